"""Systems of linear inequalities over iteration axes: can all of them hold at once?

Variables are eliminated one after another (Fourier and Motzkin).  A contradiction over the rationals is
also one over the integers, so an answer "impossible" is a proof; any other answer proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusepass.expressions.index import Affine, AxisSpace, Facts, Size, simplify_size

#: More inequalities than this are not combined: the question stays open.
MOST = 120


@dataclass(frozen=True)
class _Row:
    """``sum(factor * axis) + const <= 0``; factors are integers."""

    factors: tuple[tuple[str, int], ...]
    const: Size

    def of(self, axis: str) -> int:
        return dict(self.factors).get(axis, 0)


def impossible(parts: Iterable[Affine], space: AxisSpace) -> bool:
    """Is it proved that no values of the axes make all of ``parts`` at most zero?

    Inequalities with factors of unknown size are left out, which can only weaken the system.
    """
    resolved = [space.resolve(part) for part in parts]
    rows = {row for part in resolved if (row := _row(part)) is not None}
    for axis in {a for part in resolved for a in part.axes}:
        rows |= {_Row(((axis, -1),), 0), _Row(((axis, 1),), simplify_size(1 - space.sizes[axis]))}
    return _contradict(rows, space.facts)


def implied(part: Affine, by: Sequence[Affine], space: AxisSpace) -> bool:
    """Is ``part <= 0`` proved wherever all of ``by`` are at most zero?"""
    return impossible([*by, part * -1 + 1], space)


def _row(part: Affine) -> _Row | None:
    factors = [(axis, c) for axis, c in part.terms if isinstance(c, int)]
    return _Row(tuple(sorted(factors)), part.const) if len(factors) == len(part.terms) else None


def _contradict(rows: set[_Row], facts: Facts) -> bool:
    while len(rows) <= MOST:
        if any(not row.factors and facts.at_most(1, row.const) for row in rows):
            return True
        axes = {axis for row in rows for axis, _ in row.factors}
        if not axes:
            return False
        rows = _without(min(sorted(axes), key=lambda a: _pairs(rows, a)), rows)
    return False


def _pairs(rows: set[_Row], axis: str) -> int:
    """How many new inequalities replace those with an axis when it is eliminated."""
    factors = [row.of(axis) for row in rows]
    return sum(f > 0 for f in factors) * sum(f < 0 for f in factors)


def _without(axis: str, rows: set[_Row]) -> set[_Row]:
    """The inequalities that follow from ``rows`` and do not mention an axis."""
    above = [row for row in rows if row.of(axis) > 0]
    below = [row for row in rows if row.of(axis) < 0]
    kept = {row for row in rows if row.of(axis) == 0}
    return kept | {_sum(a, -b.of(axis), b, a.of(axis)) for a in above for b in below}


def _sum(a: _Row, times: int, b: _Row, others: int) -> _Row:
    factors = {axis: f * times for axis, f in a.factors}
    for axis, f in b.factors:
        factors[axis] = factors.get(axis, 0) + f * others
    left = tuple(sorted((axis, f) for axis, f in factors.items() if f))
    return _Row(left, simplify_size(a.const * times + b.const * others))


__all__ = ["implied", "impossible"]
