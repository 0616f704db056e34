"""Translation validation: a site's original and its replacement are both run when the graph is compiled.

Both are computed from the same random values for the tensors that the site reads, the original also in
float64.  The replacement's error may be twice that of the original in its own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fusepass.dialects.torch.memory import written_operands
from fusepass.dialects.torch.nodes import value_of
from fusepass.host.surroundings import graph_context


def site_error(original: fx.Node, replacement: fx.Node) -> float:
    """The replacement's error, as a multiple of what is allowed: above 1 it is wrong.

    Args:
        original: the node that computes the site as the user wrote it.
        replacement: the node that is to take its place, in the same graph.

    Returns:
        ``error(replacement) / (2 * error(original) + slack)``, where an error is the largest difference
        from the original in float64, and the slack is 16 units in the last place of the largest result.
        Infinity if the two differ in their shapes, or in where they are finite.
        0.0 if they cannot be compared, because the site draws random numbers (dropout) or the original
        has no finite results.
    """
    order = {n: i for i, n in enumerate(original.graph.nodes)}
    nodes = site_nodes(original, replacement, order)
    if any(is_random(n) for n in nodes):
        return 0.0
    device = value_of(original).device
    values = random_inputs(nodes, device)
    plain = dict(values)
    exact = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in values.items()
    }
    with graph_context(), torch.no_grad():
        ours = _run(replacement, plain, nodes, order)
        theirs = _run(original, plain, nodes, order)
        truth = _run(original, exact, nodes, order, double=True)
    return _ratio(ours, theirs, truth)


def _ratio(ours: Tensor, theirs: Tensor, truth: Tensor) -> float:
    finite = torch.isfinite(theirs)
    if ours.shape != theirs.shape or not torch.equal(torch.isfinite(ours), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    error = (ours.double() - truth)[finite].abs().max().item()
    allowed = 2 * (theirs.double() - truth)[finite].abs().max().item()
    allowed += 16 * torch.finfo(theirs.dtype).eps * truth[finite].abs().max().item()
    return error / max(allowed, 1e-300)


def site_nodes(original: fx.Node, replacement: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes of a site: from both ends back to large operations, inputs and parameters."""
    nodes: set[fx.Node] = set()
    todo = [original, replacement]
    while todo:
        node = todo.pop()
        if node in nodes or node.op in ("placeholder", "get_attr"):
            continue
        if node not in (original, replacement) and _is_boundary(node):
            continue
        nodes.add(node)
        todo.extend(node.all_input_nodes)
        todo.extend(u for u in node.users if node in written_operands(u) and order[u] < order[original])
    return nodes


def _is_boundary(node: fx.Node) -> bool:
    """Is a node a projection or normalisation, at which a site begins?"""
    name = getattr(node.target, "__name__", str(node.target))
    return node.op == "call_module" or any(
        word in name for word in ("linear", "layer_norm", "embedding", "conv", "group_norm", "rms_norm")
    )


def is_random(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return (
        "dropout" in name
        and not (len(node.args) > 2 and node.args[2] is False)
        and node.kwargs.get("training", True) is not False
    )


def random_inputs(nodes: Iterable[fx.Node], device: torch.device) -> dict[fx.Node, Any]:
    """Random values for the tensors that the nodes read from outside."""
    inside = set(nodes)
    generator = torch.Generator(device="cpu").manual_seed(0)
    outside = sorted({i for n in inside for i in n.all_input_nodes if i not in inside}, key=lambda n: n.name)
    return {n: _random(value_of(n), generator, device) for n in outside}


def _random(value: Any, generator: torch.Generator, device: torch.device) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    shape = [int(s) if isinstance(s, int) else s.node.hint for s in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype).to(device)
    drawn = torch.rand(shape, generator=generator) < 0.7
    return drawn.to(value.dtype).to(device)


def _run(
    end: fx.Node,
    values: dict[fx.Node, Any],
    nodes: set[fx.Node],
    order: dict[fx.Node, int],
    double: bool = False,
) -> Tensor:
    """Interpret the nodes that ``end`` needs, in program order."""
    env = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    for node in sorted(nodes, key=lambda n: order[n]):
        if order[node] > order[end]:
            break
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        if double:
            args, kwargs = fx.node.map_aggregate((args, kwargs), _wide)
        if node.op == "call_method":
            env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    out = env[end]
    assert isinstance(out, Tensor)
    return out


def _wide(value: Any) -> Any:
    return (
        torch.float64
        if value in (torch.float32, torch.float16, torch.bfloat16) and isinstance(value, torch.dtype)
        else value
    )
