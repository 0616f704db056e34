"""Fused sites by name: in graphs, in the code that TorchInductor generates, and in `torch.profiler` traces.

The nodes of a fused site are named after it. Its label is the innermost entry of their
`meta["source_fn_stack"]`, which AOTAutograd keeps and copies to the nodes of the backward pass. In the final
graph, a mark goes before the first and after the last node of a site. Under Inductor the marks become lines
of the generated program that open and close a record of the profiler (:mod:`.marks`). Under "aot_eager" and
"eager" they are calls that do the same.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fusepass.host.surroundings import will_be_stored

#: The key in the `meta` of a graph in which a site stays whose scores or weights are rounded on purpose.
ROUNDS = "fusepass_rounds"


def annotate(nodes: Iterable[fx.Node], number: int, label: str, compiled: bool) -> None:
    """Name the nodes of a fused site, and give them its label if a compiler follows.

    Exported graphs get no labels: the file format has no place for them.
    """
    for node in nodes:
        if node.op != "get_attr":
            node._rename(f"fusepass_{number}_{node.name}")
            if compiled:
                node.meta["source_fn_stack"] = [*node.meta.get("source_fn_stack", ()), (label, node.target)]


def label_of(node: fx.Node) -> str | None:
    """The label of the site that a node belongs to, in any graph; None for other nodes."""
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

    Nodes that depend on no input (positions, masks made of them) may be computed anywhere: they are left out.
    """
    nodes_of: dict[str, list[fx.Node]] = {}
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and varying.isdisjoint(node.all_input_nodes):
            continue
        varying.add(node)
        label = label_of(node)
        if label is not None and node.op in ("call_function", "call_method") and not _is_view(node):
            nodes_of.setdefault(label, []).append(node)
    return [(label, nodes[0], _with_parts(nodes[-1])) for label, nodes in nodes_of.items()]


def _is_view(node: fx.Node) -> bool:
    """Does a node compute nothing?"""
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))


def _with_parts(node: fx.Node) -> fx.Node:
    """The last of the nodes that directly follow a node and take its results apart."""
    while node.next.target is operator.getitem and label_of(node.next) is not None:
        node = node.next
    return node


# ---------------------------------------------------------------------------------------- other backends


def eager_ranges(inner: str, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """The backend "eager" or "aot_eager" with ranges for the graph's sites; other backends unchanged."""
    if inner == "eager":
        return lambda gm, inputs, **more: compiler(with_records(gm), inputs, **more)
    takes = inspect.signature(compiler).parameters
    if inner != "aot_eager" or not {"fw_compiler", "bw_compiler"} <= set(takes):
        return compiler

    def compile_with_ranges(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        from torch._dynamo.backends.debugging import boxed_nop

        if not labels_of(gm) or will_be_stored():  # PyTorch stores the result of its own backend
            return compiler(gm, inputs, **more)

        def nop(graph: fx.GraphModule, example: Sequence[Any], **rest: Any) -> Any:
            return boxed_nop(with_records(graph), list(example), **rest)

        return compiler(gm, inputs, fw_compiler=nop, bw_compiler=nop, **more)

    return compile_with_ranges


def with_records(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm`, with calls that open and close records around the nodes of its sites."""
    ranges = extents(gm.graph)
    for label, first, last in ranges:
        with gm.graph.inserting_before(first):
            record = gm.graph.call_function(open_record, (label,))
        with gm.graph.inserting_after(last):
            gm.graph.call_function(close_record, (record,))
    if ranges:
        gm.recompile()
    return gm


@fx.has_side_effect
def open_record(label: str) -> Any:
    """Begin a range of the profiler; this costs next to nothing if no profiler runs."""
    record = torch._C._profiler._RecordFunctionFast(label)
    record.__enter__()
    return record


@fx.has_side_effect
def close_record(record: Any) -> None:
    """End a range."""
    record.__exit__(None, None, None)


__all__ = [
    "ROUNDS", "annotate", "close_record", "eager_ranges", "extents", "label_of", "labels_of",
    "open_record", "with_records",
]  # fmt: skip
