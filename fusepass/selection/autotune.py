"""`options={"kernel": "autotune"}`: measure the candidates for a site, and remember the fastest on disk.

A site's nodes are cut out of the graph, once as they were and once with each kernel, compiled by the same
inner compiler, and timed on random tensors of the site's own shapes and strides.  The result is stored
together with everything that it depends on (:func:`key_of`).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx

from fusepass.dialects.torch.nodes import value_of
from fusepass.host.config import Compiler, Options
from fusepass.host.surroundings import graph_context
from fusepass.kernels import Kernel
from fusepass.selection import clock, costs
from fusepass.selection.machine import machine
from fusepass.selection.work import UNFUSED
from fusepass.specification.attention import Attention
from fusepass.writing.validate import random_inputs, site_nodes

log = logging.getLogger("fusepass")
_lock = threading.Lock()
REPEATS = 20

Write = Callable[[Kernel], tuple[fx.Node, Callable[[], None]] | None]
"""Writes a kernel's nodes; returns the last one and a function that removes them, or None."""


def fastest(
    original: fx.Node,
    spec: Attention,
    kernels: Sequence[Kernel],
    write: Write,
    options: Options,
    training: bool,
    compiler: Compiler,
) -> str | None:
    """The name of the fastest way to compute a site, or ``"unfused"``; None where nothing could be timed.

    Args:
        original: the node that computes the site.
        kernels: the kernels to try.
        write: writes one of them into the graph; returns its node and a function that removes it, or None.
        options: the options that the result depends on: the inner compiler and its mode.
        training: are gradients wanted?
        compiler: the inner compiler that the options name.
    """
    key = key_of(spec, site_inputs(original), training, options.inner, options.mode)
    known = remembered(key)
    if known == UNFUSED or known in [k.name for k in kernels]:
        return known
    times = {UNFUSED: milliseconds(original, original, compiler, training)}
    for kernel in kernels:
        written = write(kernel)
        if written is not None:
            times[kernel.name] = milliseconds(original, written[0], compiler, training)
            written[1]()
    measured = {name: ms for name, ms in times.items() if ms is not None}
    return remember(key, measured) if measured else None


def remembered(key: str) -> str | None:
    """The kernel that was fastest in an earlier measurement, if there was one."""
    earlier = _read().get(key)
    kernel = earlier.get("kernel") if isinstance(earlier, dict) else None
    return kernel if isinstance(kernel, str) else None


def remember(key: str, milliseconds: dict[str, float]) -> str:
    """Store a measurement, and return the fastest kernel."""
    best = min(milliseconds, key=lambda name: milliseconds[name])
    with _lock:
        table = _read() | {key: {"kernel": best, "milliseconds": milliseconds}}
        place = costs.cache_folder() / "autotune.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{threading.get_ident()}.tmp")
        temporary.write_text(json.dumps(table, indent=1))
        temporary.replace(place)
    return best


def _read() -> dict[str, Any]:
    place = costs.cache_folder() / "autotune.json"
    try:
        table = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def key_of(spec: Attention, tensors: Sequence[Tensor], training: bool, inner: Any, mode: str | None) -> str:
    """What a result depends on, as text: the machine, the versions, the specification, the layouts of the
    operands, whether gradients are wanted, the inner compiler and its mode."""
    layouts = [(str(t.dtype), [_hint(n) for n in t.shape], [_hint(n) for n in t.stride()]) for t in tensors]
    device = tensors[0].device.type if tensors else "cpu"
    about = {k: v for k, v in machine(device).items() if k != "python"}
    name = inner if isinstance(inner, str) else getattr(inner, "__qualname__", "callable")
    return json.dumps([about, str(spec), layouts, training, name, *([] if mode is None else [mode])])


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def site_inputs(node: fx.Node) -> list[Tensor]:
    """The tensors that a site begins with, in program order; :func:`key_of` takes them."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    nodes = site_nodes(node, node, order)
    outside = sorted({i for n in nodes for i in n.all_input_nodes if i not in nodes}, key=lambda n: order[n])
    return [v for n in outside if isinstance(v := value_of(n), Tensor)]


def milliseconds(original: fx.Node, end: fx.Node, compiler: Compiler, training: bool) -> float | None:
    """The median time of the nodes up to ``end``, compiled separately; None if that is not possible.

    Args:
        original: the node that computes the site as it was written; it shows where the site begins.
        end: the same node, or the one that is to replace it.
        compiler: the inner compiler.
        training: are gradients wanted?
    """
    order = {n: i for i, n in enumerate(original.graph.nodes)}
    nodes = site_nodes(original, end, order)
    device = value_of(original).device
    values = random_inputs(nodes, device)
    graph, given = _standalone(end, nodes, values, order)
    for tensor in given:
        if training and tensor.is_floating_point():
            tensor.requires_grad_()
    try:
        # In a separate thread, so that the compilation around this one is not visible to it.
        with graph_context(), ThreadPoolExecutor(1) as pool:
            return pool.submit(_timed, compiler, graph, given, device, training).result()
    except Exception as error:
        log.info("fusepass: autotune skips a candidate: %s: %s", type(error).__name__, error)
        return None


def _standalone(
    end: fx.Node, nodes: set[fx.Node], values: dict[fx.Node, Any], order: dict[fx.Node, int]
) -> tuple[fx.GraphModule, list[Tensor]]:
    graph, env, given = fx.Graph(), dict[fx.Node, Any](), list[Tensor]()
    for node, value in values.items():
        if isinstance(value, Tensor):
            env[node] = graph.placeholder(node.name)
            given.append(_like(value, value_of(node)))
        else:
            env[node] = value
    for node in sorted(nodes, key=lambda n: order[n]):
        if order[node] > order[end]:
            break
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        env[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output((env[end],))
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph), given


def _like(value: Tensor, fake: Tensor) -> Tensor:
    """A random value, copied to the strides that its node has in the graph."""
    laid = torch.empty_strided(
        value.shape, [_hint(n) for n in fake.stride()], dtype=value.dtype, device=value.device
    )
    return laid.copy_(value)


def _timed(
    compiler: Compiler,
    graph: fx.GraphModule,
    given: list[Tensor],
    device: torch.device,
    training: bool,
) -> float:
    with torch.set_grad_enabled(training):
        compiled = compiler(graph, given)
        wanted = [t for t in given if t.requires_grad]
        grad: list[Tensor] = []

        def step() -> object:
            out: Tensor = compiled(*given)[0]
            if not training or not out.requires_grad:
                return out
            if not grad:
                grad.append(torch.randn_like(out))
            return torch.autograd.grad(out, wanted, grad[0], allow_unused=True)

        step()
        return clock.timed(step, device, REPEATS)


__all__ = ["key_of", "milliseconds", "remember", "remembered", "site_inputs"]
