"""Attention around an operation that is not read: what stands between its parts, for the report.

An operation without a handler becomes a leaf, and nothing is known of its elements.  Where its operands hold
scores, or its result is normalised like scores, the report names it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import fx

from fusepass.dialects.torch.graph import Reader
from fusepass.dialects.torch.nodes import is_pytorchs, operation, value_of
from fusepass.expressions.ir import POINTWISE, VIEWS, Expr
from fusepass.recognition.resemblance import are_scores, leaves_behind, softmaxes_behind

#: PyTorch's functions of several steps that normalise scores and are recorded as one call.
_NORMALISES = frozenset({"gumbel_softmax"})


class Unread:
    """The operations of a graph that are not read.

    Args:
        reader: the graph's reader.
        live: the nodes that the graph's outputs need.
    """

    def __init__(self, reader: Reader, live: set[fx.Node]) -> None:
        self.reader, self.live = reader, live

    @cached_property
    def products(self) -> dict[fx.Node, Expr]:
        """The products of two tensors of rank 3 or more, with their meanings."""
        return {
            node: meaning
            for node, meaning in self.reader.defined.items()
            if node in self.live and isinstance(meaning, Expr) and meaning.op == "dot"
            if min(a.rank for a in meaning.args) >= 3
        }

    def behind_softmax(self, softmax: Expr) -> str | None:
        """Why a softmax is not a site, if its operand comes from an operation that is not read."""
        for leaf in leaves_behind(softmax.args[0]):
            node = self._unread(leaf)
            if node is None:
                continue
            origin = _origin(node)
            name = _name(origin)
            if self._reads_scores(node, leaf):
                return f"its scores go through '{name}', which is not read"
            if _is_foreign(origin) and _tensors(origin) >= 2 and self._weighs_values(softmax):
                return f"its scores come from '{name}', which is not read"
        return None

    def between_products(self) -> Iterator[tuple[fx.Node, str]]:
        """The products of values with the result of an unread operation on scores, each with the reason."""
        applied = dict(self._applied_to_scores())
        for node, meaning in self.products.items() if applied else ():
            behind = (e for a in meaning.args for e in leaves_behind(a))
            if (leaf := next((e for e in behind if e in applied), None)) is not None:
                yield node, f"'{_name(applied[leaf])}' is applied to the scores, and it is not read"

    def _applied_to_scores(self) -> Iterator[tuple[Expr, fx.Node]]:
        """The results of unread calls that may normalise the scores that they get."""
        for leaf in self.reader.definer:
            if leaf.op == "input" and (node := self._unread(leaf)) is not None:
                origin = _origin(node)
                if isinstance(origin.target, torch._ops.HigherOrderOperator):
                    continue  # the graph that it runs has a report of its own
                may_normalise = _is_foreign(origin) or operation(origin)[0] in _NORMALISES
                if may_normalise and self._reads_scores(node, leaf):
                    yield leaf, origin

    def _unread(self, leaf: Expr) -> fx.Node | None:
        """The call that a leaf stands for; None for an input of the graph."""
        node = self.reader.definer.get(leaf)
        return None if node is None or node.op in ("placeholder", "get_attr") else node

    def _reads_scores(self, node: fx.Node, result: Expr) -> bool:
        """Does an unread call get scores, and does its result keep their last two sizes, queries and keys?"""
        todo, seen = [node], {node}
        while todo:
            for source in todo.pop().all_input_nodes:
                if source in seen:
                    continue
                seen.add(source)
                meaning = self.reader.defined.get(source)
                if isinstance(meaning, Expr) and meaning.op != "input":
                    if meaning.shape[-2:] == result.shape[-2:] and are_scores(meaning):
                        return True
                elif source.op not in ("placeholder", "get_attr"):
                    todo.append(source)
        return False

    def _weighs_values(self, softmax: Expr) -> bool:
        return any(softmax in softmaxes_behind(meaning) for meaning in self.products.values())


def _origin(node: fx.Node) -> fx.Node:
    """The call that computed a node's value, alone or as one of several results."""
    while node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _tensors(node: fx.Node) -> int:
    """How many tensors a call reads, not counting parameters."""
    values = [value_of(n) for n in node.all_input_nodes]
    return sum(isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter) for v in values)


def _is_foreign(node: fx.Node) -> bool:
    """Is it a function or operator that is not PyTorch's, or one that runs another graph?"""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace not in ("aten", "prims")
    return node.op == "call_function" and not is_pytorchs(node.target)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name)
    return operation(node)[0] or str(getattr(node.target, "__name__", node.name))


def note_on_break(gm: fx.GraphModule, reader: Reader) -> str | None:
    """A note on a graph break that separates scores from their softmax, or weights from their values."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    returned = [reader.defined.get(n) for n in gm.graph.output_node().all_input_nodes]
    what = _returned([m for m in returned if isinstance(m, Expr)])
    if what is None:
        return None
    frames = [f for f in reason.user_stack or () if f.filename]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    why = str(reason.reason).splitlines()[0] if reason.reason else "no reason given"
    return f"a graph break{where} separates {what}, so that the attention is not seen ({why})"


def _returned(meanings: list[Expr]) -> str | None:
    if any(map(are_scores, meanings)):
        return "scores from their softmax"
    if any(m.op == "softmax" for m in map(_under_pointwise, meanings)):
        return "weights from their product with the values"
    return None


def _under_pointwise(node: Expr) -> Expr:
    """The expression below views and element-wise functions of one argument."""
    while node.op in VIEWS or (node.op in POINTWISE and len(node.args) == 1):
        node = node.args[0]
    return node


__all__ = ["Unread", "note_on_break"]
