"""Where index tensors point: the position at which they hold the indices of a given element.

Index tensors ``i`` and ``j`` name the element ``[a, b]`` if ``i[n] = a`` and ``j[n] = b`` at some position
``n``.  Where the indices are affine in ``n``, these equations are solved for ``n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fusepass.expressions.index import Affine, AxisSpace


@dataclass(frozen=True)
class Equation:
    """``step * axis = value`` with a positive step."""

    axis: str
    step: int
    value: Affine


@dataclass
class Solution:
    """The only position that index tensors can have, and what must hold there.

    Attributes:
        equations: one for every axis of the position; its solution must be an integer within the axis's size.
        zeros: index expressions that must be zero.
    """

    equations: list[Equation] = field(default_factory=list)
    zeros: list[Affine] = field(default_factory=list)

    @property
    def place(self) -> dict[str, Affine]:
        """The axes of the position, as far as they are index expressions."""
        return {e.axis: e.value for e in self.equations if e.step == 1}


def solve(
    values: Sequence[Affine], targets: Sequence[Affine], unknown: frozenset[str], space: AxisSpace
) -> Solution | None:
    """The position at which ``values`` are ``targets``, or None if the equations leave several.

    Args:
        values: the indices, in the axes of the position.
        targets: the index expressions that they have to equal, in other axes.
        unknown: the axes of the position.
    """
    rest = [space.resolve(v - t) for v, t in zip(values, targets, strict=True)]
    left, solution = set(unknown), Solution()
    while left:
        at = next(((n, e) for n, r in enumerate(rest) if (e := _equation(r, rest, left)) is not None), None)
        if at is None:
            return None
        n, equation = at
        del rest[n]
        left.discard(equation.axis)
        rest = [space.resolve(_put(r, equation)) for r in rest]
        solution.equations.append(equation)
    solution.zeros = rest
    return solution


def _equation(rest: Affine, others: Sequence[Affine], unknown: set[str]) -> Equation | None:
    """``rest = 0``, solved for the only unknown axis in it; else None.

    An axis with a factor other than 1 or -1 must not be in any other equation.
    """
    mine = [(axis, c) for axis, c in rest.terms if axis in unknown]
    if len(mine) != 1:
        return None
    axis, factor = mine[0]
    if not isinstance(factor, int) or (abs(factor) != 1 and sum(axis in r.axes for r in others) > 1):
        return None
    value = rest - Affine(((axis, factor),))
    return Equation(axis, abs(factor), value * (-1 if factor > 0 else 1))


def _put(rest: Affine, equation: Equation) -> Affine:
    """An index expression with the solution of an equation in place of its axis."""
    factor = dict(rest.terms).get(equation.axis, 0)
    return rest + (equation.value - Affine(((equation.axis, 1),))) * factor if factor != 0 else rest


__all__ = ["Equation", "Solution", "solve"]
