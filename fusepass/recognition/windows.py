"""Keys and values that were unfolded: windows over the original keys.

Neighbours are copied for every query, or for every block of queries (``unfold``, shifted slices that are
stacked or concatenated, rolled blocks, an index)::

    softmax_w(q[i] . k[f(i) + w]) . v[f(i) + w] = softmax_j(q[i] . k[j]) . v[j]   with  0 <= j - f(i) < width

The map ``w -> j`` is read from the indices of the key's and the value's elements.  It is one to one because
``w`` counts ``j`` in equal steps.  At some places the copies hold something other than an original key
(padding, or the other end of a rolled tensor): the masks must hide these places.  At all other places the
masks are read as formulas of ``i`` and ``j``.

The alternative design peeled concatenations and windows with rules, layer by layer, like joined keys.  But
such a layer equals its operand only where the mask hides the rest, and a rule below the mask does not see the
mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fusepass.expressions.index import Affine, prod, simplify_size
from fusepass.expressions.inequalities import implied, impossible
from fusepass.expressions.ir import Expr, affine, expr
from fusepass.patterns import heads, masks
from fusepass.recognition.elements import Elements, Region
from fusepass.recognition.meanings import Meanings
from fusepass.recognition.operands import chain_of
from fusepass.recognition.starts import Starts
from fusepass.recognition.window_names import Dim, Names
from fusepass.rules.engine import Refuse, Scope, Term
from fusepass.rules.formulas import FALSE, TRUE, against_zero
from fusepass.rules.site import Roles, Site
from fusepass.specification.attention import (
    Attention,
    Bias,
    Dropout,
    Mask,
    Modifier,
    Scale,
    ScaleBy,
    ScoreModifier,
    WeightModifier,
    WeightScale,
    ZeroEmptyRows,
    merge_scales,
)

#: How often an axis is split, so that a stack of neighbours becomes rows and columns.
_SPLITS = 4
#: How often original keys are looked for: below all views, below all but the last one, and so on.
_VIEWS = 3


def over_original_keys(site: Site, meanings: Meanings, contracted: Sequence[Affine]) -> Site:
    """The site; if its keys are proved to be unfolded, with its specification over the original keys.

    Args:
        site: a site over the keys as they are multiplied.
        meanings: what its modifiers mean.
        contracted: the axes over which queries and keys are multiplied.
    """
    if len(site.products) > 1:
        return site  # its features are concatenated already
    try:
        outcome = _Windows(site, meanings, contracted).run()
    except Refuse:
        outcome = None
    if outcome is None:
        return site
    original, same = outcome
    return replace(site, windowed=original.spec, original=original if same else None)


class _Windows:
    def __init__(self, site: Site, meanings: Meanings, contracted: Sequence[Affine]) -> None:
        self.site, self.meanings, self.contracted = site, meanings, contracted
        self.space, self.facts = site.space, site.scope.facts
        self.formulas, self.starts = meanings.formulas, Starts(site.space)

    def run(self) -> tuple[Site, bool] | None:
        """The site over the original keys, and whether kernels can be given its operands."""
        spec = self.site.spec
        if not spec.masks_hide() or not all(map(_is_kept, (*spec.scores, *spec.weights))):
            return None
        for views in range(_VIEWS):
            sides = self._sides(views)
            if sides is None:
                return None
            (keys, values), regions = sides
            if dims := self._dims(keys, values):
                visible = self._visible(regions, keys, dims)
                clauses = None if visible is None else self._clauses(visible, dims)
                return None if clauses is None else self._over(dims, keys, values, clauses)
        return None

    # -- the map -----------------------------------------------------------------------------

    def _sides(self, views: int) -> tuple[tuple[Term, Term], list[Region]] | None:
        """The elements of the original keys and values, and all regions of the operands.

        ``views``: how many of the lowest views are not looked through, since a view may merge axes of a grid.
        """
        elements = Elements(self.site.scope, self.starts)
        for _ in range(_SPLITS):
            before = len(self.space.splits)
            by_operand = [elements.regions(chain[0]) for chain in (self.site.keys, self.site.values)]
            if not all(by_operand):
                return None
            fitted = [self._fitted([r.above(views) for r in regions]) for regions in by_operand if regions]
            sides = [one for one in fitted if one is not None]
            if len(sides) < 2:
                return None
            if len(self.space.splits) == before:
                break
        return (sides[0][0], sides[1][0]), list(dict.fromkeys([*sides[0][1], *sides[1][1]]))

    def _fitted(self, regions: Sequence[Region]) -> tuple[Term, list[Region]] | None:
        """One index for as many regions as possible, and all regions; those it does not fit lose their
        element.
        """
        real = [r for r in regions if r.element is not None]
        over = self.space.resolve(self.site.scope.keys).axes
        best: tuple[tuple[int, int], Term, list[Region]] | None = None
        for start in real[:8]:
            assert start.element is not None
            candidate = self._general(start, real)
            if candidate is None:
                continue
            fits = [self._agrees(r, candidate) for r in regions]
            counts = {a for i in candidate.index for a in self.space.resolve(i).axes if a in over}
            score = len(counts), sum(fits)
            if best is None or score > best[0]:
                marked = [r if fit else Region(r.given, None) for r, fit in zip(regions, fits, strict=True)]
                best = score, candidate, marked
        return None if best is None else best[1:]

    def _general(self, start: Region, real: Sequence[Region]) -> Term | None:
        """The index of a region, made valid for other regions: axes that have one value in it vary again."""
        assert start.element is not None
        index, pins = start.element.index, start.pins(self.space)
        for axis, value in pins.items():
            moved = self._step(start, axis, value, pins, real)
            if moved is None:
                continue
            away = Affine(((axis, 1),)) - value
            index = tuple(i + away * step for i, step in zip(index, moved, strict=True))
        return Term(start.element.expr, index)

    def _step(
        self, start: Region, axis: str, value: int, pins: dict[str, int], real: Sequence[Region]
    ) -> list[int] | None:
        """By how much each index grows with an axis; the axis is split where it counts rows and columns."""
        if axis in self.space.splits or axis not in self.space.resolve(self.site.scope.keys).axes:
            return None
        assert start.element is not None
        by_distance: dict[int, list[int]] = {}
        for other in real:
            theirs = other.pins(self.space)
            if other.element is None or other.element.expr is not start.element.expr or axis not in theirs:
                continue
            if any(theirs.get(a) != n for a, n in pins.items() if a != axis) or theirs[axis] == value:
                continue
            gaps = [
                self.space.resolve(b - a)
                for a, b in zip(start.element.index, other.element.index, strict=True)
            ]
            if all(g.is_const and isinstance(g.const, int) for g in gaps):
                by_distance[theirs[axis] - value] = [int(g.const) for g in gaps]
        near = by_distance.get(1) or ([-n for n in by_distance[-1]] if -1 in by_distance else None)
        if near is None:
            return None
        wrong = [n for n, gap in sorted(by_distance.items()) if gap != [n * step for step in near]]
        if wrong and value == 0 and wrong[0] > 1:
            self.space.split(axis, wrong[0])
        return near

    def _agrees(self, region: Region, candidate: Term) -> bool:
        """Does the candidate, at the places of a region, give the element of the region?"""
        if region.element is None or region.element.expr is not candidate.expr:
            return False
        place = {axis: Affine((), n) for axis, n in region.pins(self.space).items()}
        return all(
            self._put(a, place) == self._put(b, place)
            for a, b in zip(region.element.index, candidate.index, strict=True)
        )

    def _put(self, index: Affine, place: dict[str, Affine]) -> Affine:
        out = Affine((), index.const)
        for axis, c in self.space.resolve(index).terms:
            out = out + place.get(axis, Affine(((axis, 1),))) * c
        return out

    def _dims(self, keys: Term, values: Term) -> list[Dim]:
        """The dimensions over which windows run; empty if there are none, or if windows do not overlap."""
        over = self.space.resolve(self.site.scope.keys).axes
        pairs = [self._windowed(term, over) for term in (keys, values)]
        if len(pairs[0]) != len(pairs[1]):
            return []
        dims: list[Dim] = []
        for a, b in zip(*pairs, strict=True):
            index, size = self.space.resolve(keys.index[a]), keys.expr.shape[a]
            if index != self.space.resolve(values.index[b]) or size != values.expr.shape[b]:
                return []
            counted = Affine(tuple((x, c) for x, c in index.terms if x in over))
            width = prod(self.space.sizes[x] for x in counted.axes)
            step, backwards = _step(counted), all(isinstance(c, int) and c < 0 for _, c in counted.terms)
            unit = -step if backwards else step
            digits = self.space.digits(Affine(tuple((x, c // unit) for x, c in counted.terms)), width)
            if digits is None:
                return []
            first = index - counted
            first = first - simplify_size(step * (width - 1)) if backwards else first
            dims.append(Dim((a, b), first, digits, width, size, Affine(), step, backwards))
        moving = {x for d in dims for x in self.starts.axes(d.first)}
        used = [x for d in dims for x in (*d.digits, *self.starts.axes(d.first))]
        if {x for d in dims for x in d.digits} != set(over) or len(set(used)) < len(used):
            return []
        fixed = [keys.index[d] for d in range(keys.expr.rank) if d not in pairs[0]]
        fixed += [values.index[d] for d in range(values.expr.rank) if d not in pairs[1]]
        if any(moving & self.space.resolve(i).axes for i in fixed) or not any(map(self._overlap, dims)):
            return []
        return [replace(d, key=self.space.new_axis("j", d.size)) for d in dims]

    def _windowed(self, term: Term, over: frozenset[str]) -> list[int]:
        return [d for d, i in enumerate(term.index) if self.space.resolve(i).axes & over]

    def _overlap(self, dim: Dim) -> bool:
        """Do neighbouring windows share keys, which are therefore copied?"""
        return any(self.facts.at_most(1, c) and self.facts.at_most(c, dim.last) for _, c in dim.first.terms)

    # -- what is visible ---------------------------------------------------------------------

    def _visible(self, regions: Sequence[Region], keys: Term, dims: Sequence[Dim]) -> Expr | None:
        """One formula for what is visible where the operands hold original keys.

        None if there is no such formula, or if something other than an original key is visible.
        """
        whole = TRUE
        for mask in self.site.spec.masks:
            whole = self.formulas.make("and", (whole, self.meanings.mask_visible(mask)), torch.bool)
        others = [r.given for r in regions if r.element is None]
        if any(self._assuming(whole, given) is not FALSE for given in others):
            return None
        inside = [g for g in others if not self._beyond(g, keys, dims)]
        real = [r.given for r in regions if r.element is not None]
        parts = [(given, self._assuming(whole, given)) for given in real]
        for formula in (self._assuming(whole, *real), *(part for _, part in parts)):
            same = all(
                self._assuming(formula, given) is self._assuming(other, given) for given, other in parts
            )
            if same and all(self._assuming(formula, given) is FALSE for given in inside):
                return formula
        return None

    def _beyond(self, given: Sequence[Affine], keys: Term, dims: Sequence[Dim]) -> bool:
        """In a region that holds something other than keys, is the keys' index out of bounds everywhere?"""
        bounds = [(keys.index[d.at[0]], d.size) for d in dims]
        inside = [part for i, n in bounds for part in (i * -1, i + 1 - n)]
        return impossible([*given, *inside], self.space)

    def _assuming(self, node: Expr, *cases: Sequence[Affine]) -> Expr:
        """A formula simplified by what is known: all inequalities of one of the cases hold.

        Comparisons that have the same result in every case become true or false.
        """
        bound = against_zero(node, "le")
        if bound is not None:
            if all(implied(bound, given, self.space) for given in cases):
                return TRUE
            return FALSE if all(impossible([*given, bound], self.space) for given in cases) else node
        for op, apart in (("eq", FALSE), ("ne", TRUE)):
            same = against_zero(node, op)
            if same is not None and all(self._apart(same, given) for given in cases):
                return apart
        if not node.args or node.op == "load":
            return node
        args = tuple(self._assuming(a, *cases) for a in node.args)
        return node if args == node.args else self.formulas.make(node.op, args, node.dtype, node.attrs)

    def _apart(self, index: Affine, given: Sequence[Affine]) -> bool:
        """Is an index proved not to be zero?"""
        return any(impossible([*given, index * n], self.space) for n in (1, -1))

    def _clauses(self, visible: Expr, dims: Sequence[Dim]) -> list[Expr] | None:
        """The visibility over the original keys, as a conjunction without superfluous terms."""
        moved = self._moved(visible, dims)
        if moved is None:
            return None
        others = [c for c in masks.conjuncts(moved) if against_zero(c, "le") is None]
        bounds = [b for c in masks.conjuncts(moved) if (b := against_zero(c, "le")) is not None]
        for dim in dims:
            inside = self.space.resolve(dim.key - dim.first)
            bounds += [inside * -1, inside - dim.last]
        kept = list(dict.fromkeys(map(self.space.resolve, bounds)))
        for bound in reversed(list(kept)):
            rest = [b for b in kept if b != bound]
            if implied(bound, rest, self.space):
                kept = rest
        simpler = [self._assuming(c, kept) for c in others]
        simpler += [dim.hit(self.formulas) for dim in dims if dim.step != 1]
        return [*map(self.formulas.at_most_zero, kept), *(p for c in simpler for p in masks.conjuncts(c))]

    def _moved(self, node: Expr, dims: Sequence[Dim]) -> Expr | None:
        """A formula with the axes of the original keys in place of those of the windows, or None."""
        if (start := self.starts.of_formula(node)) is not None:
            return affine(start)
        if (bound := against_zero(node, "le")) is not None:
            moved = self._index(bound * math.lcm(*(dim.step for dim in dims)), dims)
            return None if moved is None else self.formulas.at_most_zero(moved)
        if node.op == "affine":
            index = self._index(node.attrs[0], dims)
            return None if index is None else affine(index)
        if node.op == "load":
            indices = [self._index(i, dims) for i in node.attrs]
            whole = tuple(i for i in indices if i is not None)
            return expr("load", node.args, whole, (), node.dtype) if len(whole) == len(indices) else None
        args = [self._moved(a, dims) for a in node.args]
        if any(a is None for a in args):
            return None
        known = tuple(a for a in args if a is not None)
        return self.formulas.make(node.op, known, node.dtype, node.attrs) if known else node

    def _index(self, index: Affine, dims: Sequence[Dim]) -> Affine | None:
        """An index over the original keys; None unless it contains each window's axes only as a whole."""
        index = self.space.resolve(index)
        for dim in dims:
            factors = dict(index.terms)
            factor = factors.get(dim.digits[-1], 0)
            counted = self._counted(dim)
            if any(factors.get(a, 0) != simplify_size(c * factor) for a, c in counted.terms):
                return None
            if factor % dim.step != 0:
                return None
            if factor != 0:
                inside = (dim.key - dim.first) * simplify_size(factor // dim.step)
                if dim.backwards:
                    inside = inside * -1 + simplify_size(factor * (dim.width - 1))
                index = self.space.resolve(index - counted * factor + inside)
        return index

    def _counted(self, dim: Dim) -> Affine:
        out = Affine()
        for axis in dim.digits:
            out = out * self.space.sizes[axis] + Affine(((axis, 1),))
        return out

    # -- the site ----------------------------------------------------------------------------

    def _over(
        self, dims: Sequence[Dim], keys: Term, values: Term, clauses: Sequence[Expr]
    ) -> tuple[Site, bool] | None:
        old, spec = self.site, self.site.spec
        scope = replace(old.scope, keys=_number(dims), operands=list(old.operands))
        scales, key = chain_of(scope, self._original(keys, dims, 0), spec.out_dtype)
        _, value = chain_of(scope, self._original(values, dims, 1), spec.out_dtype, scales=False)
        roles = self._roles(scope, dims, key, value)
        meanings = None if roles is None else Meanings(scope, roles, old.product.dtype)
        if roles is None or meanings is None:
            return None
        names = Names(meanings, dims, old.query[-1], self.starts)
        new_masks, kept = self._masks(meanings, names, clauses), self._renamed(meanings, dims)
        if new_masks is None or kept is None:
            return None
        seen = names.every_row_sees(clauses)
        # A row that sees no key, with finite fills, gets the mean over its window, not over all keys.
        same = seen or spec.fills_are_infinite
        scores = merge_scales([*map(Scale, scales), *(new for _, new in kept), *new_masks])
        return replace(
            old, spec=self._spec(meanings, scores, seen), roles=roles, keys=key, values=value,
            operands=scope.operands, scope=scope,
        ), same  # fmt: skip

    def _spec(self, meanings: Meanings, scores: tuple[ScoreModifier, ...], seen: bool) -> Attention:
        spec, scope, sizes = self.site.spec, meanings.scope, meanings.sizes()
        sink = spec.sink and replace(spec.sink, axes=meanings.letters(scope.operands[spec.sink.slot]))
        weights = tuple(
            replace(w, axes=meanings.letters(scope.operands[w.slot]))
            if isinstance(w, WeightScale) and w.slot is not None
            else w
            for w in spec.weights
        )
        return replace(
            spec, batch=sizes["batch"], heads=sizes["heads"], kv_heads=sizes["kv_heads"],
            queries=sizes["query"], keys=sizes["key"], scores=scores, weights=weights, sink=sink,
            rows_seen=seen or (sink is not None and sink.finite), operands=len(scope.operands),
            keys_exist=self.facts.at_most(1, sizes["key"]),
        )  # fmt: skip

    def _renamed(
        self, meanings: Meanings, dims: Sequence[Dim]
    ) -> list[tuple[ScoreModifier, ScoreModifier]] | None:
        """The modifiers other than masks, each with its form over the original keys.

        A tensor that varies over a window is read at the distance between query and key.  No view can express
        that index, so only kernels with formulas take it.
        """
        scope = meanings.scope
        renamed: list[tuple[ScoreModifier, ScoreModifier]] = []
        for mod in self.site.spec.scores:
            if isinstance(mod, (Bias, ScaleBy)):
                term = self.site.operands[mod.slot]
                moved = [self._index(i, dims) for i in term.index]
                index = tuple(i for i in moved if i is not None)
                if len(index) < len(moved):
                    return None
                now = Term(term.expr, index) if index != tuple(map(self.space.resolve, term.index)) else term
                axes = meanings.letters(Term(now.expr, tuple(map(self._named, now.index))))
                renamed.append((mod, replace(mod, slot=scope.slot(now), axes=axes)))
            elif not isinstance(mod, Mask):
                renamed.append((mod, mod))
        return renamed

    def _named(self, index: Affine) -> Affine:
        """An index over the axes that it varies over."""
        return Affine(tuple((a, 1) for a in sorted(self.starts.axes(index))))

    def _original(self, term: Term, dims: Sequence[Dim], side: int) -> Term:
        axes = {dim.at[side]: dim.key for dim in dims}
        return Term(term.expr, tuple(axes.get(d, i) for d, i in enumerate(term.index)))

    def _roles(
        self, scope: Scope, dims: Sequence[Dim], key: Sequence[Term], value: Sequence[Term]
    ) -> Roles | None:
        """The roles of the axes: the axes that windows move with are positions of queries."""
        query = self.site.query
        operand_axes = [scope.axes(chain[0]) for chain in (query, key, value)]
        in_q, in_k, in_v = (scope.finest(axes) for axes in operand_axes)
        out = heads.ordered(scope, list(self.site.out.index))
        fine = [heads.ordered(scope, [Affine(((a, 1),)) for a in group]) for group in
                (self.site.roles.query, self.site.roles.value_dim)]  # fmt: skip
        moving = {a for dim in dims for a in self.starts.axes(dim.first)} | set(fine[0])
        head_dim = heads.ordered(scope, list(self.contracted))
        if moving & (in_k | in_v) or not moving <= in_q or not set(head_dim) <= in_q & in_k:
            return None
        positions = [a for a in heads.ordered(scope, list(query[-1].index)) if a in moving]
        outer = [a for a in out if a not in fine[1] and a not in moving]
        if (in_q | in_k | in_v) - {*outer, *moving, *head_dim, *fine[1], *scope.keys.axes}:
            return None
        shared = [a for a in outer if a in in_k or a in in_v]
        kv_heads = shared[-1:] if len(shared) > 1 else []
        return Roles(
            [a for a in shared if a not in kv_heads], kv_heads, [a for a in outer if a not in shared],
            positions, heads.ordered(scope, [scope.keys]), head_dim, fine[1],
        )  # fmt: skip

    def _masks(self, meanings: Meanings, names: Names, clauses: Sequence[Expr]) -> list[Mask] | None:
        """One mask for all clauses that only positions decide, and one mask for each clause that reads a
        tensor.

        None if a clause reads a tensor in any other way than as a mask of its own.
        """
        scope = meanings.scope
        of_positions = [c for c in clauses if not _loads(c)]
        new_masks: list[Mask] = []
        if of_positions:
            written = names.written(of_positions)
            if written is None:
                return None
            new_masks.append(Mask(scope.slot(written), -math.inf, atoms=names.atoms(of_positions)))
        for clause in clauses:
            if not _loads(clause):
                continue
            load = clause.args[0] if clause.op == "not" else clause
            if load.op != "load" or load.dtype is not torch.bool or any(map(self.starts.of, load.attrs)):
                return None
            slot = scope.slot(Term(load.args[0], load.attrs))
            atoms = (masks.classify(clause, meanings.positions(), self.space),)
            new_masks.append(Mask(slot, -math.inf, attends=clause is load, atoms=atoms))
        return new_masks


def _is_kept(mod: Modifier) -> bool:
    """Does a modifier mean the same over the original keys, in other letters?"""
    if isinstance(mod, WeightModifier):
        return isinstance(mod, (Dropout, WeightScale, ZeroEmptyRows))
    return isinstance(mod, (Mask, Bias, ScaleBy)) or not mod.slots()


def _step(counted: Affine) -> int:
    """The greatest common divisor of the factors of an index; 1 if one is not known."""
    known = [c for _, c in counted.terms if isinstance(c, int)]
    return math.gcd(*known) if len(known) == len(counted.terms) else 1


def _number(dims: Sequence[Dim]) -> Affine:
    """The original key as one number, row by row."""
    whole = Affine()
    for dim in dims:
        whole = whole * dim.size + dim.key
    return whole


def _loads(node: Expr) -> bool:
    return node.op == "load" or any(map(_loads, node.args))


__all__ = ["over_original_keys"]
