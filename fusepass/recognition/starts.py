"""Windows that keep their width at the edges, so that the first key is not a linear function of the query."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusepass.expressions.index import Affine, AxisSpace, Size, simplify_size
from fusepass.expressions.ir import Expr, affine, expr


@dataclass(frozen=True)
class Start:
    """Where a window starts, such as ``clamp(i - 3, 0, 25)``.

    Attributes:
        formula: the number of the first key, in the axes of the queries.
        inside: that number where the window touches no edge; None if it has no single linear form there.
    """

    formula: Expr
    inside: Affine | None


@dataclass
class Starts:
    """The starts of windows as axes of their own: proofs need only the range of a start, not its formula.

    Each axis counts from 0 all starts that leave a window within the keys.  No tensor has such an axis, so
    the formula takes the place of the axis wherever something is named or written.
    """

    space: AxisSpace
    by_axis: dict[str, Start] = field(default_factory=dict)
    known: dict[tuple[Expr, Size, Size], Affine] = field(default_factory=dict)

    def add(self, formula: Expr, inside: Affine | None, low: Size, count: Size) -> Affine:
        """``low`` plus an axis, for a formula that is proved to lie from ``low`` to ``low + count - 1``."""
        key = (formula, low, count)
        if key not in self.known:
            axis = self.space.new_axis("f", count)
            for name in axis.axes:
                from_zero = _plus(formula, simplify_size(low * -1))
                self.by_axis[name] = Start(from_zero, None if inside is None else inside - low)
            self.known[key] = axis + low
        return self.known[key]

    def of(self, index: Affine) -> list[str]:
        """The axes of an index that stand for starts."""
        return [a for a in index.axes if a in self.by_axis]

    def of_formula(self, node: Expr) -> Affine | None:
        """The axis, with its offset, that stands for a formula."""
        return next((index for (formula, _, _), index in self.known.items() if formula is node), None)

    def axes(self, index: Affine) -> frozenset[str]:
        """The axes that an index varies over, with those of the formulas in place of starts."""
        starts = self.of(index)
        varied = (axes_of(self.by_axis[axis].formula, self.space) for axis in starts)
        return self.space.resolve(index).axes.difference(starts).union(*varied)

    def inside(self, index: Affine) -> Affine | None:
        """An index as it is where no window touches an edge; None if a start has no single form there."""
        for axis in self.of(index):
            inside, factor = self.by_axis[axis].inside, dict(index.terms)[axis]
            if inside is None:
                return None
            index = index - Affine(((axis, 1),)) * factor + inside * factor
        return self.space.resolve(index)

    def written(self, node: Expr) -> Expr:
        """A formula with the formulas of starts in place of their axes."""
        if node.op == "affine":
            return self._sum(node.attrs[0])
        if not node.args or node.op == "load":
            return node
        return expr(node.op, tuple(map(self.written, node.args)), node.attrs, node.shape, node.dtype)

    def _sum(self, index: Affine) -> Expr:
        starts = self.of(index)
        rest = Affine(tuple((a, c) for a, c in index.terms if a not in starts), index.const)
        out = affine(rest)
        for axis in starts:
            factor = affine(Affine((), dict(index.terms)[axis]))
            term = expr("mul", (self.by_axis[axis].formula, factor), (), (), torch.int64)
            out = expr("add", (out, term), (), (), torch.int64)
        return out


def axes_of(node: Expr, space: AxisSpace) -> frozenset[str]:
    """The axes that a formula of positions varies over."""
    if node.op == "affine":
        return space.resolve(node.attrs[0]).axes
    return frozenset().union(*(axes_of(a, space) for a in node.args))


def _plus(formula: Expr, number: Size) -> Expr:
    return formula if number == 0 else expr("add", (formula, affine(Affine((), number))), (), (), torch.int64)


__all__ = ["Start", "Starts", "axes_of"]
