"""Lower bounds of an expression's values, from the constants in it."""

from __future__ import annotations

import math

from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.expressions.ir import VIEWS, Expr

_PICKS = VIEWS | {"index", "cast", "cat", "amax"}


def lower_bound(node: Expr, reader: OnnxReader, depth: int = 40) -> float:
    """A lower bound of all elements; minus infinity if none is known."""
    if depth == 0:
        return -math.inf
    if node.op == "const":
        return float(node.attrs[0])
    if node.op == "input":
        return _smallest(node, reader)
    if node.op in ("index", "where"):
        chosen = node.args[:1] if node.op == "index" else node.args[1:]
        return min(lower_bound(a, reader, depth - 1) for a in chosen)
    if node.op in _PICKS:
        return min(lower_bound(a, reader, depth - 1) for a in node.args)
    if node.op == "add":
        return sum(lower_bound(a, reader, depth - 1) for a in node.args)
    if node.op == "max":
        return max(lower_bound(a, reader, depth - 1) for a in node.args)
    if node.op in ("sigmoid", "relu", "exp", "abs", "softmax"):
        return 0.0
    return -1.0 if node.op == "tanh" else -math.inf


def _smallest(node: Expr, reader: OnnxReader) -> float:
    """The smallest element of a constant tensor."""
    held = reader.home.get(node)
    if held is None or held.const_value is None or held.is_graph_input():
        return -math.inf
    return reader.smallest(held)
