"""Softmaxes that were not fused, with the reason if it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.expressions.ir import Expr
from fusepass.recognition.resemblance import of_activations

_SOFTMAXES = ("Softmax", "LogSoftmax")
_PRODUCTS = ("MatMul", "Einsum", "FusedMatMul")
_BETWEEN = frozenset(
    "Add Sub Mul Div Where Cast Reshape Transpose Unsqueeze Squeeze Expand Slice Concat Tanh Max Min Clip "
    "Neg Identity Dropout Softplus Pow Sqrt IsNaN Pad ScatterND Trilu".split()
)

#: Operators of other domains are unknown: there may be one between two products.
_KNOWN_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")


def _reached(start: ir.Node, near: Callable[[ir.Node], list[ir.Node | None]]) -> list[ir.Node]:
    """The nodes reached from a node in one direction, up to the first products on each path, included."""
    reached: dict[ir.Node, None] = {}
    todo = [start]
    while todo and len(reached) < 100:
        for node in near(todo.pop()):
            if node is None or node in reached:
                continue
            passed = node.op_type in _BETWEEN or node.domain not in _KNOWN_DOMAINS
            if passed or node.op_type in _PRODUCTS:
                reached[node] = None
            if passed:
                todo.append(node)
    return list(reached)


def _multiplies(node: ir.Node) -> bool:
    """Is it a product of two computed values, not a projection by weights?"""
    computed = [v for v in node.inputs if v is not None and v.const_value is None]
    return node.op_type in _PRODUCTS and len(computed) >= 2


def softmaxes(graph: ir.Graph) -> int:
    """The number of softmaxes that a graph still has."""
    return sum(n.op_type in _SOFTMAXES for n in graph.all_nodes())


def left_over(
    graph: ir.Graph, reader: OnnxReader, live: set[ir.Node], settled: set[Expr]
) -> Iterator[tuple[ir.Node, str]]:
    """Softmaxes of score products whose product with values was not found.

    Args:
        graph: the graph after the pass.
        reader: knows the meanings of its nodes.
        live: the nodes that an output depends on.
        settled: softmaxes that the report already covers; those found here are added.
    """
    for node in list(graph):
        if node.op_type not in _SOFTMAXES or node not in live:
            continue
        meaning = reader.meaning.get(node.outputs[0])
        if meaning is not None and meaning in settled:
            continue
        reason = "no readable product with values uses it"
        if meaning is None or meaning.op != "softmax" or not of_activations(meaning.args[0]):
            unread = _unread_between(node, reader)
            if unread is None:
                continue
            reason = _unreadable(unread, reader)
        if meaning is not None:
            settled.add(meaning)
        yield node, reason


def _unread_between(softmax: ir.Node, reader: OnnxReader) -> ir.Node | None:
    """The first unread node between the two products of activations around a softmax."""
    behind = _reached(softmax, lambda n: [v.producer() for v in n.inputs if v is not None])
    before = _reached(softmax, lambda n: [u for v in n.outputs for u in v.consumers()])
    if not any(map(_multiplies, behind)) or not any(map(_multiplies, before)):
        return None
    for node in (softmax, *behind, *before):
        meaning = reader.meaning.get(node.outputs[0])
        if meaning is None or meaning.op == "input":
            return node
    return None


def _unreadable(node: ir.Node, reader: OnnxReader) -> str:
    """Why a node, or one that it depends on, could not be read."""
    while True:
        unread = [v for v in node.inputs if v is not None and reader.expr_of(v) is None]
        before = next((p for v in unread if (p := v.producer()) is not None and p.graph is node.graph), None)
        if before is None:
            break
        node = before
    if unread:
        return f"the shape or dtype of {unread[0].name!r}, which it depends on, is not known"
    shapes = [e.shape for v in node.inputs if (e := reader.expr_of(v)) is not None and e.is_float]
    said = f"'{node.op_type}' ({node.name}) between its two products could not be read"
    if len(shapes) < 2:
        return said
    said += f" (on {' and '.join('[' + ', '.join(map(str, s)) + ']' for s in shapes)}"
    named = any(not isinstance(n, int) for s in shapes for n in s)
    return said + ("; sizes of different names may differ)" if named else ")")
