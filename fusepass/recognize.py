"""From a matrix product to an attention specification: read, peel, understand.

:func:`recognise` starts at a product ``W @ V``, peels the weights down to a softmax, the scores down
to a product of queries and keys, gives every axis its role, and understands the masks.  It returns a
:class:`Site`, a :class:`Miss` with the reason, or None where nothing resembles attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusepass.contents import Contents
from fusepass.index import Affine, AxisSpace, Facts, Size, prod
from fusepass.ir import DTYPES, Expr, const, expr, opmath, pointwise, scalar_of
from fusepass.patterns import formulas, heads, masks, ranges
from fusepass.patterns.joined import JOINED, joined, taken_apart
from fusepass.patterns.layout import LAYOUT
from fusepass.patterns.products import PRODUCTS, factors, normalised_late
from fusepass.patterns.ranges import range_of
from fusepass.patterns.scores import SCORES, holds_product
from fusepass.patterns.softmax import SOFTMAX
from fusepass.patterns.weights import WEIGHTS, holds_softmax, parts
from fusepass.program import slots
from fusepass.rule import (
    STEP_LIMIT,
    Core,
    Peel,
    Product,
    Refuse,
    Rule,
    Scope,
    Term,
    always,
    applied,
)
from fusepass.spec import (
    USUAL_SCORES,
    Atom,
    Attention,
    Band,
    Bias,
    Cast,
    Finite,
    Floor,
    Keep,
    KeyGate,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    Sink,
    WeightModifier,
    WeightScale,
    ZeroEmptyRows,
    absorbs,
    fates,
    holds_less,
    merge_scales,
    negligible,
)

#: Exponentials of usual scores do not overflow in a dtype that holds this number.
LARGE = 1e30
#: Exponentials of numbers up to this size neither vanish nor overflow beside a row's other terms.
SMALL = 64.0
#: Exponentials of numbers below this are zero, in float64 as well.
VANISHING = -1000.0


@dataclass(frozen=True)
class Rules:
    """The rule lists of every stage, in order."""

    layout: tuple[Rule, ...] = LAYOUT
    products: tuple[Rule, ...] = PRODUCTS
    scores: tuple[Rule, ...] = (*SCORES, *JOINED)
    softmax: tuple[Rule, ...] = SOFTMAX
    weights: tuple[Rule, ...] = WEIGHTS


RULES = Rules()


@dataclass
class Site:
    """A recognised attention site: the specification and what its letters stand for.

    ``query``, ``keys`` and ``values`` list the tensors that may serve, from the operand of the product
    inwards through its views; every element of the operand is an element of each of them.
    """

    spec: Attention
    roles: heads.Roles
    space: AxisSpace
    query: list[Term]
    keys: list[Term]
    values: list[Term]
    operands: list[Term]
    out: Term
    product: Expr
    scope: Scope

    @property
    def trace(self) -> list[str]:
        """The rules that applied, in order."""
        return self.scope.trace


@dataclass(frozen=True)
class Miss:
    """Something like attention that stays, and why."""

    reason: str
    at: Expr
    trace: tuple[str, ...] = ()


@dataclass
class _Scores:
    """What peeling the scores found."""

    modifiers: list[ScoreModifier]
    product: Product
    node: Expr


def recognise(
    anchor: Expr,
    facts: Facts,
    rules: Rules = RULES,
    contents: Contents | None = None,
    readable: Callable[[Expr], bool] = always,
) -> Site | Miss | None:
    """Read the matrix product ``anchor`` as the last step of attention.

    Args:
        anchor: the product with the values.
        facts: what is known of symbolic sizes.
        rules: the rule lists.
        contents: what is known of the elements of leaves.
        readable: whether the graph still holds an expression's value at the anchor; a tensor may have been
            written over.
    """
    miss: Miss | None = None
    for position, operand in enumerate(factors(anchor)):
        if not holds_softmax(operand):
            continue
        known = contents or Contents()
        scope = Scope(AxisSpace(facts), views=rules.layout, contents=known, readable=readable)
        index = tuple(scope.space.fresh("x", n) for n in anchor.shape)
        out = Term(anchor, index)
        product = next((p for r in rules.products if isinstance(p := r.apply(out, scope), Product)), None)
        if product is None:
            continue
        weights, values = (product.left, product.right) if position == 0 else (product.right, product.left)
        try:
            found = _Reading(scope, rules, out, weights, values, product.axes).run()
        except Refuse as refusal:
            found = Miss(refusal.reason, refusal.at or anchor, tuple(scope.trace))
        if isinstance(found, Site):
            return found
        miss = miss or found
    return miss


def as_product(node: Expr) -> Expr | None:
    """The product with the values that a node is in other words, where it is none itself."""
    return normalised_late(node) or joined(node)


def recognise_sum(
    anchor: Expr,
    facts: Facts,
    rules: Rules = RULES,
    contents: Contents | None = None,
    readable: Callable[[Expr], bool] = always,
) -> list[tuple[int, Site]] | Miss | None:
    """Read a product as a signed sum of attentions: of one, mostly, or of the summands of its weights.

    The arguments are those of :func:`recognise`.
    """
    try:
        pieces = _pieces(anchor)
    except Refuse as refusal:
        return Miss(refusal.reason, anchor)
    found = []
    for sign, piece in pieces:
        site = recognise(piece, facts, rules, contents, readable)
        if isinstance(site, Site):
            found.append((sign, site))
        elif len(pieces) == 1:
            return site
        else:
            why = "not every one is a softmax of a product" if site is None else site.reason
            return Miss(f"the weights are a sum of several softmaxes: {why}", anchor)
    return found


def _pieces(anchor: Expr) -> list[tuple[int, Expr]]:
    """The products whose signed sum ``anchor`` is, because its weights are a sum."""
    if anchor.op == "dot":
        if len(apart := taken_apart(anchor)) > 1:
            return [(1, piece) for piece in apart]
        for position, operand in enumerate(anchor.args):
            if holds_softmax(operand) and len(summands := parts(operand)) > 1:
                pair = [[w, anchor.args[1]] if position == 0 else [anchor.args[0], w] for _, w in summands]
                return [
                    (sign, expr("dot", tuple(args), anchor.attrs, anchor.shape, anchor.dtype))
                    for (sign, _), args in zip(summands, pair, strict=True)
                ]
    return [(1, anchor)]


class _Reading:
    """One attempt, from the weights to the specification."""

    def __init__(
        self, scope: Scope, rules: Rules, out: Term, weights: Term, values: Term, summed: tuple[Affine, ...]
    ) -> None:
        self.scope, self.rules, self.out = scope, rules, out
        self.weights, self.values, self.summed = weights, values, summed
        self.formulas = formulas.Formulas(scope)
        self.steps = 0
        self.computed = out.expr.dtype  # the dtype of the product of queries and keys

    def run(self) -> Site | Miss | None:
        if len(self.summed) != 1:
            raise Refuse("the product with the values sums over several dimensions", self.out.expr)
        self.scope.keys = self.summed[0]
        peeled = self._peel_weights()
        if peeled is None:
            return None
        mods, core = peeled
        along = self.scope.space.resolve(core.scores.index[core.dim])
        single = self.summed[0].is_const and core.scores.expr.shape[core.dim] == 1
        if along != self.scope.space.resolve(self.summed[0]) or (along.is_const and not single):
            raise Refuse(
                "the softmax runs over another axis than the one summed with the values", core.scores.expr
            )
        if not holds_product(core.scores.expr):
            return None  # a softmax of something else: routing, pooling with learned scores
        if not single and not self.scope.facts.equal(
            self._extent(self.summed[0]), core.scores.expr.shape[core.dim]
        ):
            raise Refuse("the softmax runs over more keys than are summed with the values", core.scores.expr)
        rounds = holds_less(core.dtype, core.scores.expr.dtype)
        self.scope.sunk = core.sink is not None or core.form == "bare" or rounds
        found = self._peel_scores(core.scores, [])
        if isinstance(found, Miss):
            return found
        return self._finish(core, found, mods)

    def _extent(self, axis: Affine) -> Size:
        """The number of values of an axis."""
        return self.scope.space.sizes[axis.terms[0][0]]

    # -- peeling -----------------------------------------------------------------------------

    def _peel_weights(self) -> tuple[list[WeightModifier], Core] | None:
        term = self.weights
        mods: list[Any] = []
        rounded: list[torch.dtype] = []
        for _ in range(STEP_LIMIT):
            if term.expr.op == "cast":
                rounded.append(term.expr.dtype)
            found = applied((*self.rules.softmax, *self.rules.weights, *self.rules.layout), term, self.scope)
            if not found:
                return None
            layer = found[0]
            if isinstance(layer, Core):
                self._check_weights(rounded, layer.dtype)
                return list(reversed(mods)), layer
            assert isinstance(layer, Peel)
            if layer.modifier is not None:
                mods.append(layer.modifier)
            term = layer.inner
        raise Refuse(f"more than {STEP_LIMIT} layers between the softmax and the values", self.out.expr)

    def _check_weights(self, rounded: Sequence[torch.dtype], softmax: torch.dtype) -> None:
        """Weights that are rounded to less than softmax and values hold would be other ones.

        Raises:
            Refuse: they are.
        """
        kinds = [d for d in (softmax, self.values.expr.dtype) if d.is_floating_point]
        most = max(torch.finfo(d).eps for d in kinds)
        coarse = next((d for d in rounded if torch.finfo(d).eps > most), None)
        if coarse is not None:
            raise Refuse(f"the weights are rounded to {coarse}, less than the values are", self.out.expr)

    def _peel_scores(self, term: Term, mods: list[ScoreModifier]) -> _Scores | Miss:
        """Depth first through the ways to peel; the first that ends in a product of queries and keys wins."""
        self.steps += 1
        if self.steps > STEP_LIMIT:
            raise Refuse(
                f"more than {STEP_LIMIT} layers in the scores; the last were {self.scope.trace[-4:]}",
                term.expr,
            )
        self.scope.above = mods
        found = applied((*self.rules.products, *self.rules.layout, *self.rules.scores), term, self.scope)
        miss: Miss | None = None
        for layer in found:
            if isinstance(layer, Product):
                reason = self._not_query_key(layer)
                if reason is None:
                    return _Scores(list(reversed(mods)), layer, term.expr)
                miss = miss or Miss(reason, term.expr)
            elif isinstance(layer, Peel):
                deeper = [*mods, layer.modifier] if layer.modifier is not None else mods
                try:
                    below = self._peel_scores(layer.inner, deeper)  # type: ignore[arg-type]
                except Refuse as refusal:
                    below = Miss(refusal.reason, refusal.at or layer.inner.expr)
                if isinstance(below, _Scores):
                    return below
                miss = below if miss is None else miss
        return miss or Miss(f"no rule peels {term.expr.op!r} from the scores", term.expr)

    def _not_query_key(self, product: Product) -> str | None:
        """Why a product is not queries times keys."""
        sides = [self._is_key_side(product, n) for n in (0, 1)]
        if all(sides):
            return "both sides of the score product vary over the key position"
        if not any(sides):
            return "no side of the score product varies over the key position"
        return None

    def _is_key_side(self, product: Product, side: int) -> bool:
        """Does one operand run over the keys?  Of a single key: is it the one that queries do not vary?"""
        operands = (product.left, product.right)
        if not self.scope.keys.is_const:
            return self.scope.varies_over_keys(operands[side])
        free = [self.scope.axes(t) - self.scope.axes(self.values) for t in operands]
        return len(free[side]) < len(free[1 - side]) or (side == 1 and len(free[0]) == len(free[1]))

    # -- understanding -----------------------------------------------------------------------

    def _finish(self, core: Core, found: _Scores, weights: list[WeightModifier]) -> Site:
        scope, self.computed = self.scope, found.node.dtype
        left_is_key = self._is_key_side(found.product, 0)
        query, key = (
            (found.product.right, found.product.left)
            if left_is_key
            else (found.product.left, found.product.right)
        )
        low = self.out.expr.dtype
        query_scales, query_chain = self._operand(query, low)
        key_scales, key_chain = self._operand(key, low)
        _, value_chain = self._operand(self.values, low, scales=False)
        before = heads.ordered(scope, list(self.weights.index))
        value_axes = [a for a in heads.ordered(scope, list(self.out.index)) if a not in before]
        roles = heads.assign(
            scope, core.scores, core.dim, query, key, self.values, found.product.axes, value_axes
        )
        self._settle(roles)
        dtype = query_chain[-1].expr.dtype
        written = [Scale(f) for f in (*query_scales, *key_scales)] + found.modifiers
        scores = merge_scales(_without_exact_casts(written, found.node.dtype))
        rounded = {} if any(isinstance(m, Cast) for m in scores) else _roundings(written, found.node.dtype)
        understood = [self._rounded(self._understood(m, roles), m, rounded) for m in scores]
        understood = [self._overflown(m, core.dtype, found.node.dtype) for m in understood]
        partly = [
            m
            for m, as_merged in zip(understood, scores, strict=True)
            if self._absorbs_in_part(m, as_merged, rounded)
        ]
        scores = self._floored(self._finite(self._filled(understood)))
        atoms = [a for m in scores if isinstance(m, Mask) for a in m.atoms]
        sizes = {
            name: self._size(getattr(roles, name))
            for name in ("batch", "heads", "kv_heads", "query", "key", "head_dim", "value_dim")
        }
        rows_seen = self._rows_seen(scores, atoms, sizes, roles)
        if partly and not (rows_seen and all(isinstance(m, Mask) for m in partly)):
            raise Refuse(
                f"'{partly[0]}' absorbs scores in part, and they are scaled afterwards", core.scores.expr
            )
        if not rows_seen and (large := self._kept_beside(scores, dtype, core.dtype)) is not None:
            raise Refuse(
                f"where a query sees no key, '{large}' holds numbers that the mask's fill does not absorb",
                core.scores.expr,
            )
        sink = None
        if core.sink is not None:
            sink = Sink(scope.slot(core.sink), self._letters(core.sink, roles), self._finite_sink(core))
        scores = self._as_normalised(core, scores, rows_seen)
        spec = Attention(
            sizes["batch"], sizes["heads"], sizes["kv_heads"], sizes["query"], sizes["key"],
            sizes["head_dim"], sizes["value_dim"],
            dtype=dtype,
            scores=merge_scales(_without_empty(scores)),
            softmax_dtype=core.dtype,
            out_dtype=self.out.expr.dtype,
            sink=sink,
            rows_seen=rows_seen or (sink is not None and sink.finite),
            operands=len(scope.operands),
            keys_exist=scope.facts.at_most(1, sizes["key"]),
        )  # fmt: skip
        kept = tuple(w for m in weights if (w := self._weight(m, roles, spec)) is not None)
        spec = replace(spec, weights=kept)
        self._check_operands(spec, found.node)
        return Site(
            spec, roles, scope.space, query_chain, key_chain, value_chain, scope.operands, self.out,
            found.node, scope,
        )  # fmt: skip

    def _absorbs_in_part(
        self, mod: ScoreModifier, merged: ScoreModifier, rounded: dict[int, _Written]
    ) -> bool:
        """Are scores rounded by a mask or a constant that is added, and scaled by what rounds them again?

        Moved before what is added, the scale would have other scores rounded.
        """
        if not isinstance(mod, (Mask, Bias)) or not isinstance(merged, (Mask, Bias)):
            return False
        written = rounded.get(merged.slot)
        if written is None:
            return False
        scale = math.prod(abs(step.factor) for step in written.steps if isinstance(step, Scale))
        if math.frexp(scale)[0] == 0.5:
            return False
        if isinstance(mod, Bias):
            fill = -self._constants(mod) / abs(mod.factor) if mod.factor else 0.0
            inexact = -fill * torch.finfo(written.dtype).eps > 1 / 16
        else:
            fill, inexact = mod.fill, mod.additive
        return inexact and math.isfinite(fill) and not absorbs(fill, written.dtype, USUAL_SCORES * scale)

    def _kept_beside(self, scores: Sequence[ScoreModifier], *dtypes: torch.dtype) -> Bias | None:
        """A bias of constants that an additive mask after it does not absorb: hidden scores still differ.

        Args:
            scores: the modifiers.
            dtypes: of the scores, and of the softmax.
        """
        for at, mod in enumerate(scores):
            most = self._constants(mod) if isinstance(mod, Bias) and not mod.hides else 0.0
            if most <= USUAL_SCORES:
                continue
            for mask in scores[at + 1 :]:
                if isinstance(mask, Mask) and mask.additive:
                    wide = next((d for d in dtypes if mask.fill >= torch.finfo(d).min), torch.float64)
                    if not absorbs(mask.fill, DTYPES[mask.dtype] if mask.dtype else wide, most):
                        return mod  # type: ignore[return-value]
        return None

    def _constants(self, mod: Bias) -> float:
        """How large a bias is because of the constants in it, whatever its inputs are; 0 if not known."""
        known = ranges.Ranges(self.scope.contents, self.scope.facts, scale=ranges.LEAST)
        found = known.of(self.scope.operands[mod.slot].expr)
        return 0.0 if found is None else max(map(abs, found)) * abs(mod.factor)

    def _as_normalised(
        self, core: Core, scores: tuple[ScoreModifier, ...], rows_seen: bool
    ) -> tuple[ScoreModifier, ...]:
        """The scores of a softmax that is written out: what a low fill does there in rows that see no key.

        Raises:
            Refuse: it depends on numbers.
        """
        hiding = next((m for m in scores if isinstance(m, Bias) and m.hides), None)
        if core.form != "softmax" and not all(
            _stays_low(scores, n) for n, m in enumerate(scores) if isinstance(m, Mask)
        ):
            raise Refuse(
                "its softmax is written out, and scores that a mask sets to a low number do not stay low",
                core.scores.expr,
            )
        if core.form == "relative" and not all(
            self._is_exact(core, m) for m in scores if isinstance(m, Bias)
        ):
            raise Refuse(
                "its softmax is written out, as exp(x - logsumexp(x)), which is another one for large biases",
                core.scores.expr,
            )
        if core.form == "softmax" or (rows_seen and core.form != "bare" and hiding is None):
            return scores
        large = core.form == "bare" and (
            not all(self._is_small(m) for m in scores if isinstance(m, Bias))
            or any(isinstance(m, Scale) and abs(m.factor) > 1 for m in scores)
            or torch.finfo(core.scores.expr.dtype).max < LARGE
        )
        infinite = any(isinstance(m, Mask) and not math.isfinite(m.fill) for m in scores)
        if core.form == "gated" and not infinite and hiding is None and self._finite_sink(core):
            return scores
        if hiding is not None or core.form != "bare" or large:
            raise Refuse(
                "its softmax is written out, and what a query that sees no key gives depends on numbers",
                core.scores.expr,
            )
        if rows_seen:
            return scores
        return tuple(
            self._infinite(m) if isinstance(m, Mask) and _vanishes(scores, n) else m
            for n, m in enumerate(scores)
        )

    def _is_small(self, mod: Bias) -> bool:
        """Is a bias so small that no exponential of a whole row vanishes or overflows because of it?"""
        found = range_of(self.scope.operands[mod.slot].expr, self.scope.contents, self.scope.facts)
        return found is not None and max(map(abs, found)) * abs(mod.factor) <= SMALL

    def _is_exact(self, core: Core, mod: Bias) -> bool:
        """Is no constant in it so large that subtracting a log-sum-exp of its size loses parts of weights?"""
        most = max(SMALL, 1 / (16 * torch.finfo(core.scores.expr.dtype).eps))
        return self._constants(mod) <= most

    def _finite_sink(self, core: Core) -> bool:
        """Is there a sink that every row sees, since it is a learned or constant number of ordinary size?"""
        return core.sink is not None and not masks.may_hide(
            core.sink.expr, self.scope.contents, self.scope.facts
        )

    def _check_operands(self, spec: Attention, product: Expr) -> None:
        """A modifier made of the scores would compute them a second time."""
        for slot in slots(spec):
            todo, seen = [self.scope.operands[slot].expr], set()
            while todo:
                node = todo.pop()
                if node is product:
                    raise Refuse(
                        "a mask, bias or factor of the scores is computed from the scores themselves", node
                    )
                if node not in seen and node.op not in ("input", "dot"):
                    seen.add(node)
                    todo.extend(node.args)

    def _settle(self, roles: heads.Roles) -> None:
        """Splits made since an axis was listed replace it by its parts."""
        for name in ("batch", "kv_heads", "group", "query", "key", "head_dim", "value_dim"):
            axes = getattr(roles, name)
            setattr(roles, name, heads.ordered(self.scope, [Affine(((a, 1),)) for a in axes]))

    def _size(self, axes: list[str]) -> Size:
        return prod(self.scope.space.sizes[a] for a in axes)

    def _operand(self, term: Term, low: torch.dtype, scales: bool = True) -> tuple[list[float], list[Term]]:
        """Constant scales of an operand, and the tensors through its views that hold the rest of it.

        A scale that was written into the operand's own memory (``q *= scale``) stays in it.
        """
        factors: list[float] = []
        chain = [term]
        for _ in range(STEP_LIMIT):
            node = term.expr
            below = self.scope.step(term)
            factor = _factor(node) if scales else None
            if factor is not None and not self.scope.readable(node.args[factor[0]]):
                factor = None
            if below is not None:
                term = below
                chain.append(term)
            elif factor is not None:
                factors.append(factor[1])
                term = term.argument(factor[0])
                chain = [term]
            elif node.op == "cast" and node.args[0].dtype is low and node.dtype.itemsize > low.itemsize:
                term = term.argument(0)
                chain = [term]
            else:
                break
        return factors, chain

    def _understood(self, mod: ScoreModifier, roles: heads.Roles) -> ScoreModifier:
        """A modifier with its axes named, and a bias that is only ever zero or a fill turned into a mask."""
        scope = self.scope
        if isinstance(mod, ScaleBy):
            return replace(mod, axes=self._letters(scope.operands[mod.slot], roles))
        if isinstance(mod, Bias):
            return self._understood_bias(mod, roles)
        if isinstance(mod, Mask):
            formula = self.formulas.lift(scope.operands[mod.slot])
            attends = formula if mod.attends else self.formulas.make("not", (formula,), torch.bool)
            return replace(mod, atoms=self._atoms(attends, roles))
        return mod

    def _understood_bias(self, mod: Bias, roles: heads.Roles) -> Bias | Mask:
        scope = self.scope
        term = scope.operands[mod.slot]
        scaled = term
        if mod.factor != 1:
            dtype = term.expr.dtype if term.expr.is_float else torch.float32
            factor = const(mod.factor, opmath(dtype))  # neither truncated to integers nor rounded to half
            scaled = Term(pointwise("mul", term.expr, factor, dtype=dtype), term.index)
        hidden = masks.additive_mask(self.formulas, self.formulas.lift(scaled), term.expr.dtype)
        wide = mod.dtype if mod.dtype and holds_less(self.computed, DTYPES[mod.dtype]) else ""
        if hidden is None:
            if ranges.absorbs_from_above(scaled.expr, scope.contents, scope.facts):
                raise Refuse("a bias raises scores so far that others are absorbed", term.expr)
            hides = masks.may_hide(term.expr, scope.contents, scope.facts)
            coarse = self._constants(mod) * torch.finfo(self.computed).eps > 1 / 16
            kept = wide if hides or coarse else ""
            return replace(mod, axes=self._letters(term, roles), hides=hides, dtype=kept)
        atoms = self._atoms(hidden.attends, roles)
        return Mask(self.scope.slot(scaled), hidden.fill, True, True, atoms, wide)

    def _overflown(self, mod: ScoreModifier, *dtypes: torch.dtype) -> ScoreModifier:
        """A mask whose fill is below all that the scores may be: it is minus infinity."""
        lowest = min(torch.finfo(d).min for d in dtypes)
        return self._infinite(mod) if isinstance(mod, Mask) and mod.fill < lowest else mod

    def _infinite(self, mod: Mask) -> Mask:
        """A mask whose fill is minus infinity, added as it was, or in place of scores as it was."""
        if not mod.additive or mod.fill == -math.inf:
            return replace(mod, fill=-math.inf)
        term = self.scope.operands[mod.slot]
        zero, low = (const(n, term.expr.dtype) for n in (0.0, -math.inf))
        added = pointwise("where", pointwise("eq", term.expr, zero), zero, low, dtype=term.expr.dtype)
        return replace(mod, slot=self.scope.slot(Term(added, term.index)), fill=-math.inf)

    def _rounded(
        self, mod: ScoreModifier, merged: ScoreModifier, rounded: dict[int, _Written]
    ) -> ScoreModifier:
        """A mask whose fill overflows where the scores are rounded to a narrower dtype: minus infinity."""
        if not isinstance(mod, Mask) or not isinstance(merged, (Mask, Bias)) or not math.isfinite(mod.fill):
            return mod
        written = rounded.get(merged.slot)
        if written is None:
            return mod
        if isinstance(written.modifier, Mask):
            fill = written.modifier.fill
        elif isinstance(merged, Bias) and merged.factor:
            fill = mod.fill * written.modifier.factor / merged.factor
        else:
            return mod
        operand = self.scope.operands[written.modifier.slot].expr
        most = torch.finfo(written.dtype).max
        if operand.is_float and operand.rank:
            most = max(most, torch.finfo(operand.dtype).max)  # the sum is of the wider dtype
        for step in written.steps:
            if isinstance(step, Cast):
                most = torch.finfo(DTYPES[step.dtype]).max
            fill = fill * step.factor if isinstance(step, Scale) else step.hidden(fill)
            fill = fill if abs(fill) <= most else math.copysign(math.inf, fill)
        return self._infinite(mod) if fill == -math.inf else mod

    def _filled(self, scores: list[ScoreModifier]) -> list[ScoreModifier]:
        """``s * c + (0 if c else fill) = where(c, s, fill)`` for a factor ``c`` of zeros and ones."""
        out: list[ScoreModifier] = []
        for mod in scores:
            before = out[-1] if out else None
            if isinstance(before, ScaleBy) and isinstance(mod, Mask) and mod.additive:
                term = self.scope.operands[before.slot]
                kept = masks.visibility_factor(self.formulas, self.formulas.lift(term))
                if kept is not None and set(masks.conjuncts(kept)) == set(
                    masks.conjuncts(self._mask_visible(mod))
                ):
                    bits = expr("cast", (term.expr,), (torch.bool,), term.expr.shape, torch.bool)
                    out[-1] = Mask(self.scope.slot(Term(bits, term.index)), mod.fill, False, True, mod.atoms)
                    continue
            out.append(mod)
        return out

    def _floored(self, scores: list[ScoreModifier]) -> tuple[ScoreModifier, ...]:
        """``max(where(m, s, -inf), c) = where(m, s, c)``: a floor goes into the masks before it.

        Where the only other things before it are scales, nothing is left for it to do.
        """
        at = next((n for n, m in enumerate(scores) if isinstance(m, Floor)), None)
        if at is None:
            return tuple(scores)
        floor = scores[at]
        assert isinstance(floor, Floor)
        before, rest = scores[:at], self._floored(scores[at + 1 :])
        infinite = [n for n, m in enumerate(before) if isinstance(m, Mask) and m.fill == -math.inf]
        if any(level != -math.inf for n in infinite for level in fates(before, n, -math.inf)):
            return (*before, floor, *rest)
        before = [self._refilled(m, floor.bound) if isinstance(m, Mask) else m for m in before]
        kept = [] if all(isinstance(m, (Scale, Mask)) for m in before) else [floor]
        return (*before, *kept, *rest)

    def _finite(self, scores: list[ScoreModifier]) -> list[ScoreModifier]:
        """``nan_to_num(where(m, s, -inf)) = where(m, nan_to_num(s), low)``: under the masks before it.

        Raises:
            Refuse: what becomes of infinite scores depends on more than a mask.
        """
        for at, mod in enumerate(scores):
            if isinstance(mod, Finite):
                first = at
                while first > 0 and isinstance(scores[first - 1], Mask):
                    first -= 1
                before = [m for m in scores[first:at] if isinstance(m, Mask)]
                if reason := self._depends(mod, scores[:first], before, scores[at + 1 :]):
                    raise Refuse(f"infinite scores become numbers, and {reason}", self.out.expr)
                under = [self._refilled(m, mod.low) for m in before]
                scores = [*scores[:first], mod, *under, *scores[at + 1 :]]
        return scores

    def _depends(
        self,
        mod: Finite,
        before: Sequence[ScoreModifier],
        under: Sequence[Mask],
        after: Sequence[ScoreModifier],
    ) -> str | None:
        """What else than masks makes scores infinite, or masked scores that are numbers infinite again."""
        lowest = torch.finfo(self.computed).min
        finite = [m for m in under if m.additive and math.isfinite(m.fill)]
        if finite and any(map(_is_infinite, before)):
            return "fills are added to others that are infinite"
        if sum(m.fill for m in finite) < lowest:
            return "fills overflow together"
        if len(finite) < len(under) and any(map(_is_infinite, after)):
            return "infinite ones are added to them"
        levels = fates((mod, *after), 0, mod.low)
        if under and any(level is not None and -math.inf < level < lowest for level in levels):
            return "overflow when they are scaled"
        return None

    def _refilled(self, mod: Mask, fill: float) -> Mask:
        """A mask of ``-inf`` with another fill."""
        return self._filled_with(mod, fill) if mod.fill == -math.inf else mod

    def _filled_with(self, mod: Mask, fill: float) -> Mask:
        """A mask with another fill, which replaces scores."""
        if mod.fill == fill:
            return mod
        if not mod.additive:
            return replace(mod, fill=fill)
        term = self.scope.operands[mod.slot]
        attends = pointwise("eq", term.expr, const(0.0, term.expr.dtype))
        return Mask(self.scope.slot(Term(attends, term.index)), fill, False, True, mod.atoms)

    def _letters(self, term: Term, roles: heads.Roles) -> str:
        self._settle(roles)
        axes = {b for a in self.scope.axes(term) for b in self.scope.space.resolve(Affine(((a, 1),))).axes}
        table = roles.letters()
        return "".join(sorted({table.get(a, "b") for a in axes}))

    def _positions(self, roles: heads.Roles) -> masks.Positions:
        return masks.Positions(self._position(roles.query), self._position(roles.key), roles.letters())

    def _position(self, axes: list[str]) -> Affine:
        index = Affine()
        for axis in axes:
            index = index * self.scope.space.sizes[axis] + Affine(((axis, 1),))
        return index

    def _atoms(self, attends: Expr, roles: heads.Roles) -> tuple[Atom, ...]:
        self._settle(roles)
        space, at = self.scope.space, self._positions(roles)
        found = [masks.classify(part, at, space) for part in masks.conjuncts(attends)]
        bands = [a for a in found if isinstance(a, Band)]
        if len(bands) > 1:
            whole = masks.intersect(bands, self.scope.facts)
            if whole is not None:
                found = [whole, *(a for a in found if not isinstance(a, Band))]
        return tuple(dict.fromkeys(found))

    def _weight(self, mod: WeightModifier, roles: heads.Roles, spec: Attention) -> WeightModifier | None:
        if isinstance(mod, WeightScale) and mod.slot is not None:
            axes = self._letters(self.scope.operands[mod.slot], roles)
            if {"i", "j"} <= set(axes):
                raise Refuse("the weights are multiplied by a tensor that varies over queries and keys")
            return KeyGate(mod.slot, axes) if "j" in axes else replace(mod, axes=axes)
        if not isinstance(mod, Keep):
            return mod
        axes = self._letters(self.scope.operands[mod.slot], roles)
        kept = set(masks.conjuncts(self._visible(mod.slot, mod.attends)))
        if not kept:
            return None  # it hides nothing
        visible = [masks.conjuncts(self._mask_visible(m)) for m in spec.masks if spec.hides(m)]
        hidden = {c for parts in visible for c in parts}
        covers = hidden <= kept and all(visible)
        return replace(mod, axes=axes, implied=kept <= hidden, covers=covers)

    def _visible(self, slot: int, attends: bool) -> Expr:
        formula = self.formulas.lift(self.scope.operands[slot])
        return formula if attends else self.formulas.make("not", (formula,), torch.bool)

    def _mask_visible(self, mod: Mask) -> Expr:
        if not mod.additive:
            return self._visible(mod.slot, mod.attends)
        term = self.scope.operands[mod.slot]
        hidden = masks.additive_mask(self.formulas, self.formulas.lift(term), term.expr.dtype)
        return hidden.attends if hidden is not None else formulas.TRUE

    def _rows_seen(
        self,
        scores: tuple[ScoreModifier, ...],
        atoms: list[Atom],
        sizes: dict[str, Size],
        roles: heads.Roles,
    ) -> bool:
        queries, keys = sizes["query"], sizes["key"]
        if masks.every_row_sees(atoms, queries, keys, self.scope):
            return True
        parts = [c for m in scores if isinstance(m, Mask) for c in masks.conjuncts(self._mask_visible(m))]
        at = self._positions(roles)
        return masks.every_row_sees_itself(parts, at, queries, keys, self.formulas)


def _stays_low(scores: Sequence[ScoreModifier], at: int) -> bool:
    """Is what the mask at a position sets scores to no large number after all that follows?"""
    mask = scores[at]
    assert isinstance(mask, Mask)
    levels = [mask.fill, *fates(scores, at, mask.fill)]
    return all(level is not None and level <= SMALL for level in levels)


def _is_infinite(mod: ScoreModifier) -> bool:
    """May it make scores infinite?"""
    return (isinstance(mod, Bias) and mod.hides) or (isinstance(mod, Mask) and mod.fill == -math.inf)


def _vanishes(scores: Sequence[ScoreModifier], at: int) -> bool:
    """Is the exponential of what the mask at a position sets scores to zero, in every dtype?"""
    mask = scores[at]
    assert isinstance(mask, Mask)
    *_, level = (mask.fill, *fates(scores, at, mask.fill))
    return level is not None and level < VANISHING


def _factor(node: Expr) -> tuple[int, float] | None:
    """The position of the tensor and the constant, where a node is a tensor times a constant."""
    if node.op == "neg":
        return 0, -1.0
    if node.op == "mul":
        for position in (0, 1):
            value = scalar_of(node.args[1 - position])
            if value is not None and node.args[position].rank == node.rank:
                return position, float(value)
    if node.op == "div" and (value := scalar_of(node.args[1])):
        return 0, 1.0 / float(value)
    return None


def _without_exact_casts(mods: Sequence[ScoreModifier], product: torch.dtype) -> list[ScoreModifier]:
    """Casts count from the first on that holds less than the product does; from there all are kept."""
    less = (n for n, m in enumerate(mods) if isinstance(m, Cast) and holds_less(DTYPES[m.dtype], product))
    first = next(less, len(mods))
    return [m for n, m in enumerate(mods) if n >= first or not isinstance(m, Cast)]


@dataclass(frozen=True)
class _Written:
    """A mask or bias as written: the dtype of what it gives, and the scales and roundings after it."""

    modifier: Any
    dtype: torch.dtype
    steps: tuple[Any, ...]


def _roundings(mods: Sequence[ScoreModifier], product: torch.dtype) -> dict[int, _Written]:
    """For every slot of a mask or bias, how it was written, on scores that begin in the product's dtype."""
    found: dict[int, _Written] = {}
    dtype = product
    for at, mod in enumerate(mods):
        if isinstance(mod, Cast):
            dtype = DTYPES[mod.dtype]
        if isinstance(mod, (Mask, Bias)):
            dtype = DTYPES[mod.dtype] if mod.dtype else dtype
            known = itertools.takewhile(lambda m: isinstance(m, (Scale, Cast, Mask, Bias)), mods[at + 1 :])
            found[mod.slot] = _Written(mod, dtype, tuple(m for m in known if isinstance(m, (Scale, Cast))))
    return found


def _without_empty(scores: tuple[ScoreModifier, ...]) -> tuple[ScoreModifier, ...]:
    """Masks that hide nothing do nothing."""
    return tuple(m for m in scores if not (isinstance(m, Mask) and not m.atoms))


__all__ = [
    "RULES", "Miss", "Rules", "Site", "ZeroEmptyRows", "as_product", "negligible", "normalised_late",
    "recognise", "recognise_sum",
]  # fmt: skip
