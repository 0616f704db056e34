"""Which elements of which tensor an operand consists of, seen through copies: regions of its index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusepass.expressions.index import Affine, AxisSpace, Size, prod, simplify_size
from fusepass.expressions.inequalities import implied, impossible
from fusepass.expressions.ir import Expr, number_of
from fusepass.recognition.starts import Starts
from fusepass.rules.engine import Scope, Term
from fusepass.rules.formulas import Formulas, against_zero, index_of

#: More regions than this are not told apart; F.unfold of 7 by 7 neighbours stacked one by one has 49.
MOST = 256


@dataclass(frozen=True)
class Region:
    """Where all of ``given`` are at most zero, the operand is ``element``; None stands for padding.

    ``views`` are the same element, seen through fewer views.
    """

    given: tuple[Affine, ...]
    element: Term | None
    views: tuple[Term, ...] = ()

    def above(self, count: int) -> Region:
        """The region with its element as it is ``count`` views closer to the operand."""
        if self.element is None:
            return self
        return Region(self.given, [*self.views, self.element][-1 - min(count, len(self.views))])

    def pins(self, space: AxisSpace) -> dict[str, int]:
        """The axes that have a single value in the region."""
        ends: dict[tuple[tuple[str, Size], ...], int] = {}
        for part in map(space.resolve, self.given):
            if isinstance(part.const, int):
                ends[part.terms] = max(part.const, ends.get(part.terms, part.const))
        pinned: dict[str, int] = {}
        for terms, const in ends.items():
            if ends.get((Affine(terms) * -1).terms) == -const:  # e + c <= 0 and -e - c <= 0
                pinned |= _digits(Affine(terms), -const, space)
        return pinned


def _digits(index: Affine, value: int, space: AxisSpace) -> dict[str, int]:
    """The values of the axes of a mixed-radix number, such as ``3*row + column``; empty for other indices."""
    names = space.digits(index, prod(space.sizes[a] for a in index.axes)) or ()
    digits: dict[str, int] = {}
    for axis in reversed(names):
        size = space.sizes[axis]
        if axis == names[0]:
            digits[axis] = value
        elif isinstance(size, int):
            value, digits[axis] = divmod(value, size)
        else:
            return {}
    return digits


class Elements:
    """Looks through views, concatenations and indices with known positions."""

    def __init__(self, scope: Scope, starts: Starts) -> None:
        self.scope, self.space, self.formulas = scope, scope.space, Formulas(scope)
        self.starts = starts

    def regions(self, term: Term) -> list[Region] | None:
        """The regions of an operand's element; None if there are too many."""
        regions: list[Region] = []
        todo = [Region((), term)]
        while todo:
            at = todo.pop()
            if len(regions) + len(todo) > MOST:
                return None
            below = self._below(at)
            if below is None:
                regions.append(Region((*at.given, *self._pinned(at)), at.element, at.views))
            else:
                todo += [r for r in reversed(below) if not impossible(r.given, self.space)]
        return regions

    def _pinned(self, region: Region) -> Iterator[Affine]:
        """Inequalities that pin the digits of mixed-radix numbers which have a single value."""
        for axis, value in region.pins(self.space).items():
            away = Affine(((axis, 1),)) - value
            yield from (away, away * -1)

    def _below(self, region: Region) -> list[Region] | None:
        """The regions of one layer below; None where nothing is seen through."""
        term = region.element
        if term is None:
            return None
        if number_of(term.expr) is not None:
            return [Region(region.given, None)]
        if term.expr.op == "cat":
            return [Region((*region.given, *more), part) for more, part in self._parts(term)]
        if term.expr.op == "index":
            return self._gathered(region, term)
        below = self.scope.step(term)
        return None if below is None else [Region(region.given, below, (*region.views, term))]

    def _parts(self, term: Term) -> Iterator[tuple[tuple[Affine, ...], Term]]:
        dim, start = int(term.expr.attrs[0]), simplify_size(0)
        at = term.index[dim]
        for part in term.expr.args:
            end = simplify_size(start + part.shape[dim])
            inside = Affine() if part.shape[dim] == 1 else at - start
            index = tuple(inside if d == dim else i for d, i in enumerate(term.index))
            yield (at * -1 + start, at + 1 - end), Term(part, index)
            start = end

    def _gathered(self, region: Region, term: Term) -> list[Region] | None:
        """``x[..., p, ...]`` for positions ``p`` that are within bounds in each of their cases."""
        x, *indices = term.expr.args
        dim, wide = int(term.expr.attrs[0]), max(i.rank for i in term.expr.args[1:])
        middle = term.index[dim : dim + wide]
        cases: list[tuple[tuple[Affine, ...], tuple[Affine, ...]]] = [(region.given, ())]
        for n, node in enumerate(indices):
            formula = self.formulas.lift(Term(node, middle[wide - node.rank :]).of(node))
            more = self._window(formula, x.shape[dim + n]) or self._cases(formula, x.shape[dim + n])
            if more is None or len(cases) * len(more) > MOST:
                return None
            cases = [((*given, *new), (*at, i)) for given, at in cases for new, i in more]
            cases = [(given, at) for given, at in cases if not impossible(given, self.space)]
            if not all(self._within(at[n], x.shape[dim + n], given) for given, at in cases):
                return None
        before, after = term.index[:dim], term.index[dim + wide :]
        return [Region(given, Term(x, (*before, *at, *after))) for given, at in cases]

    def _within(self, index: Affine, size: Size, given: tuple[Affine, ...]) -> bool:
        """Is an index proved to be within bounds, counted from the front?"""
        return all(implied(part, given, self.space) for part in (index * -1, index + 1 - size))

    def _window(self, position: Expr, size: Size) -> list[tuple[tuple[Affine, ...], Affine]] | None:
        """The single case of a position in a window that keeps its width at the edges: start + place."""
        if position.op != "add":
            return None
        start, place = sorted(position.args, key=lambda a: index_of(a) is not None)
        at, cases = index_of(place), self._cases(start, size)
        reach = None if at is None else self.space.bounds(at)
        if at is None or reach is None or cases is None:
            return None
        low, high = simplify_size(reach[0] * -1), simplify_size(size - 1 - reach[1])
        whole = all(
            implied(part, given, self.space) for given, i in cases for part in (i * -1 + low, i - high)
        )
        moving = {self.space.resolve(i) for _, i in cases if i.axes}
        if not whole or any(i.axes & self.space.resolve(at).axes for i in moving):
            return None
        inside = moving.pop() if len(moving) == 1 else None
        return [((), self.starts.add(start, inside, low, simplify_size(high - low + 1)) + at)]

    def _cases(self, position: Expr, size: Size) -> list[tuple[tuple[Affine, ...], Affine]] | None:
        """The cases of a position: its index, and the inequalities under which it is this index.

        A clamped or chosen position has several cases.
        """
        if (known := index_of(position)) is not None:
            return [((), known)]
        if position.op == "where":
            combined = []
            for chosen, wanted in zip(position.args[1:], (True, False), strict=True):
                cases, where = self._cases(chosen, size), _where(position.args[0], wanted)
                if cases is None or where is None:
                    return None
                combined += [((*given, *more), index) for given in where for more, index in cases]
            return combined
        if position.op not in ("min", "max"):
            return None
        first, second = (self._cases(a, size) for a in position.args)
        if first is None or second is None:
            return None
        sign = 1 if position.op == "min" else -1
        combined = []
        for given, a in first:
            for other, b in second:
                gap = (a - b) * sign  # at most zero where the first one is taken
                combined += [((*given, *other, gap), a), ((*given, *other, gap * -1 + 1), b)]
        return combined


def _where(condition: Expr, wanted: bool) -> list[tuple[Affine, ...]] | None:
    """Disjoint systems of inequalities, one of which holds where a condition is ``wanted``.

    None if they are not known.
    """
    if (bound := against_zero(condition, "le")) is not None:
        return [(bound if wanted else bound * -1 + 1,)]
    if condition.op == "not":
        return _where(condition.args[0], not wanted)
    if condition.op not in ("and", "or"):
        return None
    a, b = condition.args
    first, second = _where(a, wanted), _where(b, wanted)
    other = _where(a, not wanted)
    if first is None or second is None or other is None:
        return None
    both = [(*x, *y) for x in first for y in second]
    if (condition.op == "and") is wanted:
        return both
    return first + [(*x, *y) for x in other for y in second]


__all__ = ["Elements", "Region"]
