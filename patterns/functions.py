"""Continuous functions of one score, whatever operations they are written with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusepass.expressions.contents import FILL
from fusepass.expressions.intervals import USUAL, Interval, Ranges, magnitude
from fusepass.expressions.ir import Expr, pointwise
from fusepass.patterns import examples as eg
from fusepass.patterns.terms import holds_product, number
from fusepass.rules.engine import Peel, Scope, Term, rule
from fusepass.specification.functions import OPERATIONS, Function

#: A function of more operations is left alone.
LONGEST = 60
#: One of these alone, with the scores at this place, is a scale, a shift or a bias.
_OTHERS = {("add", 0), ("add", 1), ("sub", 0), ("sub", 1), ("mul", 0), ("mul", 1), ("div", 0)}
#: What their first argument must be for the result to be a number.
_POSITIVE = frozenset("sqrt rsqrt log".split())


def _gated() -> Expr:
    x = eg.scores()
    return pointwise("mul", x, pointwise("sigmoid", x))


@rule("f(x) for a continuous f: x * sigmoid(x), log(1 + exp(-|x|)), max(x, t) with a tensor t", _gated)
def function(term: Term, scope: Scope) -> Peel | None:
    """A function of the nearest tensor below that all of its operations lead to, or of a farther one.

    It is the first one for which the function is tame.
    """
    for read in _readings(term.expr, scope):
        if read.is_plain():
            return None
        if read.is_tame(scope):
            slot = None if read.tensor is None else scope.slot(term.of(read.tensor))
            return Peel(term.of(read.scores), Function(read.steps(scope), slot))
    return None


@dataclass(frozen=True)
class _Reading:
    """A node as a function of one tensor of scores.

    Attributes:
        node: the result.
        scores: the tensor.
        tensor: the only other tensor that is read, if any.
        operations: what is between, in the order of computation; the last one is the node.
    """

    node: Expr
    scores: Expr
    tensor: Expr | None
    operations: tuple[Expr, ...]

    def is_plain(self) -> bool:
        """Is it a scale, a shift or a bias, which have rules of their own?"""
        sides = [n for n, a in enumerate(self.node.args) if a is self.scores]
        return len(self.operations) == len(sides) == 1 and (self.node.op, sides[0]) in _OTHERS

    def is_tame(self, scope: Scope) -> bool:
        """Is the result of ordinary size for scores of usual size, with nothing infinite or lost on the way?

        Then rounding changes it no more than in the original.
        """
        contents = replace(scope.contents, ordinary=scope.contents.ordinary | {self.scores})
        ranges = Ranges(contents, scope.facts, scale=USUAL)
        finite = all(_is_below(ranges.of(node), torch.finfo(node.dtype).max / 2) for node in self.operations)
        return (
            finite
            and _is_below(ranges.of(self.node), FILL)
            and all(self._has_result(node, ranges, scope) for node in self.operations)
            and not any(_may_cancel(node, ranges) for node in self.operations)
        )

    def _has_result(self, node: Expr, ranges: Ranges, scope: Scope) -> bool:
        """Is the operation, with its slope, defined for the whole range of its arguments?"""
        first = ranges.of(node.args[0])
        positive = first is not None and first[0] > 0
        if node.op == "pow":
            exponent = number(node.args[1], scope)
            if exponent is None:
                return number(node.args[0], scope) is not None and positive
            return positive or (exponent >= 1 and exponent.is_integer())
        return positive or node.op not in _POSITIVE

    def steps(self, scope: Scope) -> tuple[tuple[Any, ...], ...]:
        """The operations as :class:`Function` has them."""
        values: dict[Expr, int | None] = {self.scores: 0}
        if self.tensor is not None:
            values[self.tensor] = None
        steps: list[tuple[Any, ...]] = []
        for node in self.operations:
            if node.op == "cast":
                values[node] = values[node.args[0]]
                continue
            given = (values[a] if a in values else number(a, scope) for a in node.args)
            steps.append((node.op, *given))
            values[node] = len(steps)
        return tuple(steps)


def _is_below(interval: Interval | None, most: float) -> bool:
    return interval is not None and magnitude(interval) < most


def _may_cancel(node: Expr, ranges: Ranges) -> bool:
    """May a sum of numbers that are not of ordinary size be small, so that only rounding is left?"""
    if node.op not in ("add", "sub"):
        return False
    known = [ranges.of(a) for a in node.args]
    if all(_is_below(interval, FILL) for interval in known):
        return False
    signs = {_sign(interval) for interval in known}
    return 0 in signs or (len(signs) == 1) == (node.op == "sub")


def _sign(interval: Interval | None) -> int:
    """1 if all numbers are at least zero, -1 if all are at most zero, else 0."""
    return 0 if interval is None else 1 if interval[0] >= 0 else -1 if interval[1] <= 0 else 0


def _readings(node: Expr, scope: Scope) -> Iterator[_Reading]:
    """A node as a function of each tensor that all of its operations lead to and that leads to the product,
    the nearest first."""
    if not _is_operation(node, node):
        return
    scores, tensors = _split(node.args, scope)
    operations = [node]
    while scores and len(operations) < LONGEST:
        top = _topmost(scores)
        if len(scores) == 1 and _fits(top, node) and top.dtype is node.dtype and len(tensors) < 2:
            yield _Reading(node, top, next(iter(tensors), None), tuple(reversed(operations)))
        if not _is_operation(top, node):
            return
        operations.append(top)
        more, others = _split(top.args, scope)
        scores = [s for s in scores if s is not top] + [s for s in more if s not in scores]
        tensors |= others


def _split(args: Iterable[Expr], scope: Scope) -> tuple[list[Expr], dict[Expr, None]]:
    """The arguments that lead to a product, and the other tensors."""
    tensors = dict.fromkeys(a for a in args if number(a, scope) is None)
    scores = [a for a in tensors if holds_product(a)]
    return scores, {a: None for a in tensors if a not in scores}


def _topmost(nodes: Sequence[Expr]) -> Expr:
    """The first of the nodes that no other one is made from."""
    below: set[Expr] = set()
    todo = [a for node in nodes for a in node.args]
    while todo:
        at = todo.pop()
        if at not in below:
            below.add(at)
            todo.extend(at.args if at.op in OPERATIONS or at.op == "cast" else ())
    return next(node for node in nodes if node not in below)


def _is_operation(node: Expr, root: Expr) -> bool:
    """Is it an operation of a function whose result is ``root``?"""
    known = node.op in OPERATIONS or (node.op == "cast" and node is not root and node.args[0].is_float)
    return known and _fits(node, root)


def _fits(node: Expr, root: Expr) -> bool:
    return node.is_float and node.shape == root.shape


__all__ = ["function"]
