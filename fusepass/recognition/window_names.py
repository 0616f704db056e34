"""Names for windows over original keys, and the bounds of windows written as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusepass.expressions.index import Affine, Size, prod, simplify_size
from fusepass.expressions.inequalities import implied
from fusepass.expressions.ir import POINTWISE, Expr, affine, const, expr, pointwise
from fusepass.patterns import heads, masks
from fusepass.recognition.meanings import Meanings
from fusepass.recognition.starts import Starts, axes_of
from fusepass.rules.engine import Term
from fusepass.rules.formulas import TRUE, Formulas, against_zero
from fusepass.specification.attention import Atom, Band, Window, intersect


@dataclass(frozen=True)
class Dim:
    """One dimension of the original keys: the key at ``first + step * w``, for ``0 <= w < width``.

    Attributes:
        at: the dimension of the key's and of the value's tensor.
        first: the first key of a window, in the axes of the queries.
        digits: the axes that count ``w``, outermost first.
        width: how many keys a window has.
        size: how many keys there are.
        key: the new axis of the keys.
        step: the distance between neighbouring keys of a window (its dilation).
        backwards: are the keys in falling order, ``first + step * (width - 1 - w)``?
    """

    at: tuple[int, int]
    first: Affine
    digits: tuple[str, ...]
    width: Size
    size: Size
    key: Affine
    step: int = 1
    backwards: bool = False

    @property
    def last(self) -> Size:
        """How far the last key of a window is from its first."""
        return simplify_size(self.step * (self.width - 1))

    def hit(self, formulas: Formulas) -> Expr:
        """The formula: is a key a multiple of ``step`` away from the first key of the window?"""
        inside, step = affine(formulas.space.resolve(self.key - self.first)), const(self.step, torch.int64)
        rest = formulas.make("mod", (inside, step), torch.int64)
        return formulas.make("eq", (rest, const(0, torch.int64)), torch.bool)


class Names:
    """Names and writes the parts of a visibility over the original keys."""

    def __init__(self, meanings: Meanings, dims: Sequence[Dim], query: Term, starts: Starts) -> None:
        self.meanings, self.dims, self.starts = meanings, dims, starts
        self.space, self.facts = meanings.scope.space, meanings.scope.facts
        self.places = [self._place(dim, query) for dim in dims]

    def _place(self, dim: Dim, query: Term) -> Affine | None:
        """The query's position along one dimension of the keys, or None if no single index tells it."""
        first = self.starts.axes(dim.first)
        others = {a for d in self.dims for a in self.starts.axes(d.first) if d is not dim}
        indices = [i for i in map(self.space.resolve, query.index) if first and first <= i.axes]
        if len(indices) != 1 or (others & indices[0].axes and indices[0].axes - others - first):
            return None  # the index counts several dimensions together, and positions in blocks
        place = Affine()
        for axis in heads.ordered(self.meanings.scope, indices):
            if axis not in others:
                place = place * self.space.sizes[axis] + Affine(((axis, 1),))
        return place

    def atoms(self, clauses: Sequence[Expr]) -> tuple[Atom, ...]:
        """The names of clauses; both bounds of a window together are one atom."""
        named: list[Atom] = []
        sides: dict[tuple[int, Size, bool], list[Band]] = {}
        hits = [dim.hit(self.meanings.formulas) for dim in self.dims if dim.step != 1]
        for clause in clauses:
            if clause in hits:
                continue
            side = self._side(clause)
            if side is None:
                known = self.starts.written(clause)
                named.append(masks.classify(known, self.meanings.positions(), self.space))
            else:
                sides.setdefault(side[0], []).append(side[1])
        whole = [self._window(*key, bands) for key, bands in sides.items()]
        return tuple(dict.fromkeys([*(a for atoms in whole for a in atoms), *named]))

    def _window(self, axis: int, block: Size, whole: bool, bands: Sequence[Band]) -> list[Atom]:
        one = intersect(bands, self.facts)
        step, bands = self.dims[axis].step, bands if one is None else [one]
        plain = len(self.dims) == 1 == step and not whole and block == 1
        if plain and self.places[0] == self.meanings.positions().query:
            return list(bands)
        number = None if len(self.dims) == 1 else axis
        return [Window(b.left, b.right, block, number, whole, step) for b in bands]

    def _side(self, clause: Expr) -> tuple[tuple[int, Size, bool], Band] | None:
        """A clause as one bound of a window, or None.

        Returns:
            The dimension's number, the size of its blocks, and whether the window keeps its width at the
            edges; then the bound.
        """
        bound = against_zero(clause, "le")
        for axis, (dim, place) in enumerate(zip(self.dims, self.places, strict=True)):
            if bound is None or place is None:
                continue
            for sign in (1, -1):
                rest = self.starts.inside(bound - dim.key * sign)
                if rest is None or dim.key.axes & rest.axes:
                    continue
                for start, block in self._blocks(dim, place):
                    gap = self.space.resolve(rest + start * sign)
                    if not gap.is_const:
                        continue
                    reach, whole = simplify_size(gap.const * -1), bool(self.starts.of(bound))
                    if sign < 0:
                        return (axis, block, whole), Band(reach, None)
                    return (axis, block, whole), Band(None, simplify_size(reach - block + 1))
        return None

    def _blocks(self, dim: Dim, place: Affine) -> list[tuple[Affine, Size]]:
        """The query's position with a block size of 1, and the start and size of its block if it has one."""
        moving = self.starts.axes(dim.first)
        inner = Affine(tuple((a, c) for a, c in place.terms if a not in moving))
        size = prod(self.space.sizes[a] for a in inner.axes)
        blocks = [(place, simplify_size(1))]
        if inner.terms and self.space.digits(inner, size) is not None:
            blocks.append((place - inner, size))
        return blocks

    def every_row_sees(self, clauses: Sequence[Expr]) -> bool:
        """Is it proved that every query sees the key at its own position, or at the start of its window?"""
        places = [place for place in self.places if place is not None]
        if len(places) < len(self.dims):
            return False
        for shown in (places, [dim.first for dim in self.dims]):
            inside = all(
                implied(part, (), self.space)
                for dim, place in zip(self.dims, shown, strict=True)
                for part in (place * -1, place + 1 - dim.size)
            )
            where = {a: p for dim, p in zip(self.dims, shown, strict=True) for a in dim.key.axes}
            formulas = self.meanings.formulas
            if inside and all(masks.put_axes(c, where, formulas) is TRUE for c in clauses):
                return True
        return False

    def written(self, clauses: Sequence[Expr]) -> Term | None:
        """A conjunction as a boolean tensor with one dimension for each axis; None if it has no such form."""
        whole = self.starts.written(clauses[0])
        for clause in clauses[1:]:
            whole = expr("and", (whole, self.starts.written(clause)), (), (), torch.bool)
        axes = sorted(axes_of(whole, self.space))
        tensor = self._tensor(whole, axes)
        if tensor is None:
            return None
        index = tuple(
            Affine() if n == 1 else Affine(((a, 1),))
            for a, n in zip(axes[len(axes) - tensor.rank :], tensor.shape, strict=True)
        )
        return Term(tensor, index)

    def _tensor(self, node: Expr, axes: Sequence[str]) -> Expr | None:
        if node.op == "const":
            return node
        if node.op == "affine":
            return self._positions(self.space.resolve(node.attrs[0]), axes)
        if node.op not in POINTWISE or node.attrs:
            return None
        args = [self._tensor(a, axes) for a in node.args]
        known = [a for a in args if a is not None]
        return pointwise(node.op, *known, dtype=node.dtype) if len(known) == len(args) else None

    def _positions(self, index: Affine, axes: Sequence[str]) -> Expr:
        """An index expression as a tensor."""
        out: Expr | None = None
        for axis, c in index.terms:
            start = index.const if out is None else 0
            size, after = self.space.sizes[axis], len(axes) - 1 - axes.index(axis)
            ramp = expr("iota", (), (start, c), (size,), torch.int64)
            spread = expr("reshape", (ramp,), (), (size,) + (1,) * after, torch.int64) if after else ramp
            out = spread if out is None else pointwise("add", out, spread, dtype=torch.int64)
        return expr("iota", (), (index.const, 0), (), torch.int64) if out is None else out


__all__ = ["Dim", "Names"]
