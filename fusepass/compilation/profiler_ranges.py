"""Fused sites by name: in graphs, in the code that TorchInductor generates, and in `torch.profiler` traces.

The nodes of a fused site are named after it, and its label is the last function that they say to come from
(`meta["source_fn_stack"]`), which AOTAutograd keeps and copies to the nodes of the backward pass. When the
final graph is made, a mark goes before the first and after the last of a site's nodes. Under Inductor the
marks become lines of the generated program, which open and close a record of the profiler
(:mod:`.marks`). Under "aot_eager" and "eager" they are calls that open and close the same record.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from fusepass.host.faults import strict
from fusepass.host.surroundings import will_be_stored

log = logging.getLogger("fusepass")

#: The mark, in its `meta`, of a graph in which a site stays whose scores or weights are rounded on purpose.
ROUNDS = "fusepass_rounds"

#: The setting of Inductor that runs a pass over its last graph.
_PASS = "post_grad_custom_post_pass"


def annotate(nodes: Iterable[fx.Node], number: int, label: str, compiled: bool) -> None:
    """Name the nodes of a fused site, and give them its label where a compiler follows.

    Exported graphs are written to files, in a form that has no place for labels.
    """
    for node in nodes:
        if node.op != "get_attr":
            node._rename(f"fusepass_{number}_{node.name}")
            if compiled:
                node.meta["source_fn_stack"] = [*node.meta.get("source_fn_stack", ()), (label, node.target)]


def label_of(node: fx.Node) -> str | None:
    """The label of the site that a node computes, in whatever graph it is; None for other nodes."""
    for key, suffix in (("source_fn_stack", ""), ("fwd_source_fn_stack", ", backward")):
        for entry in reversed(node.meta.get(key) or ()):
            if isinstance(entry, tuple) and str(entry[0]).startswith("fusepass "):
                return f"{entry[0]}{suffix}"
    return None


def labels_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """The labels of a graph and the graphs in it, in order."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return tuple(dict.fromkeys(label for graph in graphs for n in graph.nodes if (label := label_of(n))))


def extents(graph: fx.Graph) -> list[tuple[str, fx.Node, fx.Node]]:
    """Every label with the first and the last node that computes something for it.

    What depends on no input (positions, masks made of them) may be computed anywhere, and is left out.
    """
    found: dict[str, list[fx.Node]] = {}
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and varying.isdisjoint(node.all_input_nodes):
            continue
        varying.add(node)
        label = label_of(node)
        if label is not None and node.op in ("call_function", "call_method") and not _is_view(node):
            found.setdefault(label, []).append(node)
    return [(label, nodes[0], _with_parts(nodes[-1])) for label, nodes in found.items()]


def _is_view(node: fx.Node) -> bool:
    """Does a node compute nothing?"""
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))


def _with_parts(node: fx.Node) -> fx.Node:
    """The last of the results that are taken out of a node right after it."""
    while node.next.target is operator.getitem and label_of(node.next) is not None:
        node = node.next
    return node


# ---------------------------------------------------------------------------------------- Inductor


def marked(inductor: Any, gm: fx.GraphModule) -> Any:
    """Inductor as `torch.compile` calls it, which writes a range for every labelled site of `gm`."""
    labels = labels_of(gm)
    if not labels or not _lowered():
        return inductor
    from torch._inductor import config

    from fusepass.compilation.marks import Marking

    given = inductor.config.get(_PASS) or getattr(config, _PASS)
    before = tuple(given) if isinstance(given, (list, tuple)) else (given,) * (given is not None)
    made = copy.copy(inductor)
    made.config = {**inductor.config, _PASS: Marking(labels, before)}
    return made


def write_marks(graph: fx.Graph) -> None:
    """Put a mark before and after the nodes of every site."""
    for label, first, last in extents(graph):
        device = _device(first) if isinstance(first.target, HigherOrderOperator) else ""
        with graph.inserting_before(first):
            graph.call_function(_enter(), (label, device)).meta["val"] = None
        with graph.inserting_after(last):
            graph.call_function(_leave(), (label, device)).meta["val"] = None


def _device(node: fx.Node) -> str:
    """The device of a node's result, with its number."""
    value = node.meta.get("val")
    parts: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
    return next((str(part.device) for part in parts if isinstance(part, torch.Tensor)), "cpu")


@functools.cache
def _library() -> Any:
    """Two operators that do nothing but stand in a graph."""
    library = torch.library.Library("fusepass", "FRAGMENT")
    for name in ("range_enter", "range_leave"):
        library.define(f"{name}(str label, str template_on) -> ()")
        library.impl(name, lambda label, template_on: None, "CompositeExplicitAutograd")
        fx.node.has_side_effect(getattr(torch.ops.fusepass, name).default)
    return library


def _enter() -> Any:
    _library()
    return torch.ops.fusepass.range_enter.default


def _leave() -> Any:
    _library()
    return torch.ops.fusepass.range_leave.default


@functools.cache
def _lowered() -> bool:
    """Teach Inductor the marks; False where this Inductor is another than the one they were written for."""
    try:
        from fusepass.compilation.marks import register

        register(_enter(), _leave())
    except (AttributeError, ImportError, TypeError) as error:
        if strict():
            raise
        log.info("fusepass: no ranges in the code of this Inductor: %s", error)
        return False
    return True


# ---------------------------------------------------------------------------------------- other backends


def eager_ranges(inner: str, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """The backend "eager" or "aot_eager" with the ranges of the graph it is given; others as they are."""
    if inner == "eager":
        return lambda gm, inputs, **more: compiler(with_records(gm), inputs, **more)
    takes = inspect.signature(compiler).parameters
    if inner != "aot_eager" or not {"fw_compiler", "bw_compiler"} <= set(takes):
        return compiler

    def compile_with_ranges(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        from torch._dynamo.backends.debugging import boxed_nop

        if not labels_of(gm) or will_be_stored():  # PyTorch stores what its own backend makes
            return compiler(gm, inputs, **more)

        def nop(graph: fx.GraphModule, example: Sequence[Any], **rest: Any) -> Any:
            return boxed_nop(with_records(graph), list(example), **rest)

        return compiler(gm, inputs, fw_compiler=nop, bw_compiler=nop, **more)

    return compile_with_ranges


def with_records(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm`, which opens and closes records around the nodes of its sites."""
    found = extents(gm.graph)
    for label, first, last in found:
        with gm.graph.inserting_before(first):
            record = gm.graph.call_function(open_record, (label,))
        with gm.graph.inserting_after(last):
            gm.graph.call_function(close_record, (record,))
    if found:
        gm.recompile()
    return gm


@fx.has_side_effect
def open_record(label: str) -> Any:
    """A range of the profiler that begins now; next to nothing where no profiler runs."""
    record = torch._C._profiler._RecordFunctionFast(label)
    record.__enter__()
    return record


@fx.has_side_effect
def close_record(record: Any) -> None:
    """The end of a range."""
    record.__exit__(None, None, None)


__all__ = [
    "ROUNDS", "annotate", "close_record", "eager_ranges", "extents", "label_of", "labels_of", "marked",
    "open_record", "with_records", "write_marks",
]  # fmt: skip
