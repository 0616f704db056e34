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

from fusepass.expressions.contents import Contents
from fusepass.expressions.index import Affine, AxisSpace, Facts, Size, prod
from fusepass.expressions.ir import DTYPE_NAMES, Expr, expr
from fusepass.patterns import heads
from fusepass.patterns.distances import DISTANCES, squares_differences
from fusepass.patterns.joined import JOINED, joined, split_softmaxes
from fusepass.patterns.layout import LAYOUT
from fusepass.patterns.products import PRODUCTS, factors, normalised_late
from fusepass.patterns.scores import SCORES
from fusepass.patterns.softmax import SOFTMAX
from fusepass.patterns.terms import holds_product
from fusepass.patterns.weights import WEIGHTS, holds_softmax, parts
from fusepass.recognition.fills import Fills, without_empty
from fusepass.recognition.meanings import Meanings, told_by_masks
from fusepass.recognition.operands import chain_of, check_operands
from fusepass.recognition.rounding import Rounding
from fusepass.recognition.sums import Summed, Sums, whole
from fusepass.recognition.windows import over_original_keys
from fusepass.rules.engine import (
    STEP_LIMIT,
    Core,
    Peel,
    Product,
    Refuse,
    Rule,
    Scope,
    Term,
    always,
    apply_first,
)
from fusepass.rules.site import Roles, Site
from fusepass.specification.attention import (
    Attention,
    Bias,
    Cast,
    Scale,
    ScoreModifier,
    Sink,
    WeightModifier,
    is_less_precise,
    merge_scales,
)


@dataclass(frozen=True)
class Rules:
    """The rule lists of every stage, in order."""

    layout: tuple[Rule, ...] = LAYOUT
    products: tuple[Rule, ...] = PRODUCTS
    scores: tuple[Rule, ...] = (*DISTANCES, *SCORES, *JOINED)
    softmax: tuple[Rule, ...] = SOFTMAX
    weights: tuple[Rule, ...] = WEIGHTS


RULES = Rules()

#: Keys in more dimensions than this, each summed on its own, are left alone.
MOST_SUMMED = 3

_DIFFERENCES = "the scores are squared differences, which are more exact than a product of queries and keys"


@dataclass(frozen=True)
class Miss:
    """Something that resembles attention and stays, with the reason."""

    reason: str
    at: Expr
    trace: tuple[str, ...] = ()


@dataclass
class _Scores:
    """The result of peeling the scores."""

    modifiers: list[ScoreModifier]
    product: Product
    node: Expr


def _steps(layer: Peel, dtype: torch.dtype) -> list[ScoreModifier]:
    """What a layer does to scores, from the softmax inwards; if it promotes them, a cast comes before it."""
    mod, inner = layer.modifier, layer.inner.expr
    steps: list[ScoreModifier] = [mod] if isinstance(mod, ScoreModifier) else []
    promoted = inner.dtype != dtype and inner.is_float and dtype.is_floating_point
    if promoted and not isinstance(mod, Cast):
        steps.append(Cast(DTYPE_NAMES[dtype], is_less_precise(dtype, inner.dtype)))
    return steps


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
        readable: tells whether the graph still holds an expression's value at the anchor: a tensor may have
            been overwritten.
    """
    miss: Miss | None = None
    for position, operand in enumerate(factors(anchor)):
        if not holds_softmax(operand):
            continue
        known = contents or Contents()

        def scope(known: Contents = known) -> Scope:
            return Scope(AxisSpace(facts), views=rules.layout, contents=known, readable=readable)

        reading = _read(anchor, position, scope, rules)
        if isinstance(reading, Site):
            return reading
        miss = miss or reading
    return miss


def _read(anchor: Expr, position: int, scope: Callable[[], Scope], rules: Rules) -> Site | Miss | None:
    """Read a product whose operand at a position holds the weights.

    Where products are added in the scores, it is read twice: with one product of concatenated features, and
    with all products but one as biases.
    """
    together, joins = _read_once(anchor, position, scope(), rules, True)
    if not joins:
        return together
    apart, _ = _read_once(anchor, position, scope(), rules, False)
    if not isinstance(together, Site):
        return apart
    return replace(together, apart=apart) if isinstance(apart, Site) else together


def _read_once(
    anchor: Expr, position: int, scope: Scope, rules: Rules, joins: bool
) -> tuple[Site | Miss | None, bool]:
    """What was read, and whether products were joined."""
    index = tuple(scope.space.new_axis("x", n) for n in anchor.shape)
    out = Term(anchor, index)
    product = next((p for r in rules.products if isinstance(p := r.apply(out, scope), Product)), None)
    if product is None:
        return None, False
    weights, values = (product.left, product.right) if position == 0 else (product.right, product.left)
    reading = _Reading(scope, rules, out, weights, values, product.axes, joins)
    try:
        return reading.run(), reading.joined
    except Refuse as refusal:
        return Miss(refusal.reason, refusal.at or anchor, tuple(scope.trace)), reading.joined


def as_product(node: Expr) -> Expr | None:
    """The product with the values that equals a node which is not itself such a product, or None."""
    return normalised_late(node) or joined(node)


def recognise_sum(
    anchor: Expr,
    facts: Facts,
    rules: Rules = RULES,
    contents: Contents | None = None,
    readable: Callable[[Expr], bool] = always,
) -> list[tuple[int, Site]] | Miss | None:
    """Read a product as a signed sum of attentions: usually one, otherwise one per summand of its weights.

    The arguments are those of :func:`recognise`.  Each site comes with its sign, 1 or -1.
    """
    try:
        pieces = _pieces(anchor)
    except Refuse as refusal:
        return Miss(refusal.reason, anchor)
    sites = []
    for sign, piece in pieces:
        site = recognise(piece, facts, rules, contents, readable)
        if isinstance(site, Site):
            sites.append((sign, site))
        elif len(pieces) == 1:
            return site
        else:
            why = "not all of them are softmaxes of a product" if site is None else site.reason
            return Miss(f"the weights are a sum of several softmaxes: {why}", anchor)
    return sites


def _pieces(anchor: Expr) -> list[tuple[int, Expr]]:
    """The products whose signed sum ``anchor`` is, because its weights are a sum."""
    if anchor.op == "dot":
        if len(apart := split_softmaxes(anchor)) > 1:
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
        self, scope: Scope, rules: Rules, out: Term, weights: Term, values: Term, summed: tuple[Affine, ...],
        joins: bool,
    ) -> None:  # fmt: skip
        self.scope, self.rules, self.out = scope, rules, out
        self.weights, self.values, self.summed, self.joins = weights, values, summed, joins
        self.joined = False
        self.steps = 0

    def run(self) -> Site | Miss | None:
        if not 0 < len(self.summed) <= MOST_SUMMED:
            raise Refuse(
                f"the product with the values sums over {len(self.summed)} dimensions", self.out.expr
            )
        self.scope.keys = self._number(self.summed)
        peeled = self._peel_weights()
        if peeled is None:
            return None
        mods, core = peeled
        along = self.scope.space.resolve(core.scores.index[core.dim])
        single = self.scope.keys.is_const and core.scores.expr.shape[core.dim] == 1
        orders = map(self._number, itertools.permutations(self.summed))
        keys = next((n for n in orders if self.scope.space.resolve(n) == along), None)
        if keys is None or (along.is_const and not single):
            raise Refuse(
                "the softmax runs over another axis than the one summed with the values", core.scores.expr
            )
        self.scope.keys = keys
        if not holds_product(core.scores.expr):
            if squares_differences(core.scores.expr):
                raise Refuse(_DIFFERENCES, core.scores.expr)
            return None  # a softmax of something else: routing, pooling with learned scores
        extent = prod(map(self._extent, self.summed))
        if not single and not self.scope.facts.equal(extent, core.scores.expr.shape[core.dim]):
            raise Refuse("the softmax runs over more keys than are summed with the values", core.scores.expr)
        rounds = is_less_precise(core.dtype, core.scores.expr.dtype)
        self.scope.sunk = core.sink is not None or core.form == "bare" or rounds
        scores = self._peel_scores(core.scores, [])
        if isinstance(scores, Miss):
            differences = squares_differences(core.scores.expr)
            return replace(scores, reason=_DIFFERENCES) if differences else scores
        return self._finish(core, self._summed(core, scores), mods)

    def _number(self, axes: Sequence[Affine]) -> Affine:
        """The position that some axes, outermost first, count together."""
        number = Affine()
        for axis in axes:
            number = number * self._extent(axis) + axis
        return number

    def _extent(self, axis: Affine) -> Size:
        """The length of an axis."""
        return 1 if axis.is_const else self.scope.space.sizes[axis.terms[0][0]]

    # -- peeling -----------------------------------------------------------------------------

    def _peel_weights(self) -> tuple[list[WeightModifier], Core] | None:
        term = self.weights
        mods: list[Any] = []
        rounded: list[torch.dtype] = []
        for _ in range(STEP_LIMIT):
            if term.expr.op == "cast":
                rounded.append(term.expr.dtype)
            layers = apply_first(
                (*self.rules.softmax, *self.rules.weights, *self.rules.layout), term, self.scope
            )
            if not layers:
                return None
            layer = layers[0]
            if isinstance(layer, Core):
                self._check_weights(rounded, layer.dtype)
                return list(reversed(mods)), layer
            assert isinstance(layer, Peel)
            if layer.modifier is not None:
                mods.append(layer.modifier)
            term = layer.inner
        raise Refuse(f"more than {STEP_LIMIT} layers between the softmax and the values", self.out.expr)

    def _check_weights(self, rounded: Sequence[torch.dtype], softmax: torch.dtype) -> None:
        """Check that the weights are as precise as the softmax, or as the values if these are less precise.

        Raises:
            Refuse: they are rounded further, and a kernel would not round them.
        """
        kinds = [d for d in (softmax, self.values.expr.dtype) if d.is_floating_point]
        most = max(torch.finfo(d).eps for d in kinds)
        coarse = next((d for d in rounded if torch.finfo(d).eps > most), None)
        if coarse is not None:
            reason = f"the weights are rounded to {coarse}, which is less precise than the values"
            raise Refuse(reason, self.out.expr)

    def _peel_scores(self, term: Term, mods: list[ScoreModifier]) -> _Scores | Miss:
        """Search the ways to peel depth first; the first that ends in a product of queries and keys wins."""
        self.steps += 1
        if self.steps > STEP_LIMIT:
            raise Refuse(
                f"more than {STEP_LIMIT} layers in the scores; the last were {self.scope.trace[-4:]}",
                term.expr,
            )
        self.scope.above = mods
        layers = apply_first((*self.rules.products, *self.rules.layout, *self.rules.scores), term, self.scope)
        miss: Miss | None = None
        for layer in layers:
            if isinstance(layer, Product):
                reason = self._not_query_key(layer)
                if reason is None:
                    return _Scores(list(reversed(mods)), layer, term.expr)
                miss = miss or Miss(reason, term.expr)
            elif isinstance(layer, Peel):
                deeper = [*mods, *_steps(layer, term.expr.dtype)]
                try:
                    below = self._peel_scores(layer.inner, deeper)
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
            return "neither side of the score product varies over the key position"
        return None

    def _is_key_side(self, product: Product, side: int) -> bool:
        """Is an operand the keys: does it vary over the key position?

        A single key has no axis.  Then the operand with fewer axes that the values lack is the key, or the
        right one if both have equally many.
        """
        operands = (product.left, product.right)
        if not self.scope.keys.is_const:
            return self.scope.varies_over_keys(operands[side])
        free = [self.scope.axes(t) - self.scope.axes(self.values) for t in operands]
        return len(free[side]) < len(free[1 - side]) or (side == 1 and len(free[0]) == len(free[1]))

    # -- understanding -----------------------------------------------------------------------

    def _summed(self, core: Core, peeled: _Scores) -> Summed:
        """The scores without terms that cancel; a sum of products is one product if they can be joined."""
        scores = whole(peeled.modifiers, peeled.product, peeled.node)
        if not any(isinstance(m, Bias) for m in peeled.modifiers):
            return scores
        query, key = self._query_and_key(peeled.product)
        sums = Sums(self.scope, self._roles(core, peeled.product, query, key), self.out.expr.dtype)
        scores = sums.without_rows(scores)
        one = sums.joined(scores) if self.joins else None
        self.joined = one is not None
        return one or scores

    def _finish(self, core: Core, summed: Summed, weights: list[WeightModifier]) -> Site:
        scope, low = self.scope, self.out.expr.dtype
        query, key = self._query_and_key(summed.product)
        query_scales, query_chain = chain_of(scope, query, low)
        key_scales, key_chain = chain_of(scope, key, low)
        _, value_chain = chain_of(scope, self.values, low, scales=False)
        roles = self._roles(core, summed.product, query, key)
        roles = told_by_masks(scope, roles, core.scores, summed.modifiers)
        dtype = query_chain[-1].expr.dtype
        meanings = Meanings(scope, roles, summed.node.dtype)
        fills = Fills(Rounding(meanings, core, dtype))
        written = [Scale(f) for f in (*query_scales, *key_scales)] + summed.modifiers
        scores = fills.understood(written)
        sizes = meanings.sizes()
        rows_seen = meanings.rows_seen(scores)
        fills.check(scores, rows_seen)
        sink = None
        if core.sink is not None:
            sink = Sink(scope.slot(core.sink), meanings.letters(core.sink), fills.finite_sink())
        scores = fills.as_normalised(scores, rows_seen)
        spec = Attention(
            sizes["batch"], sizes["heads"], sizes["kv_heads"], sizes["query"], sizes["key"],
            sizes["head_dim"], sizes["value_dim"],
            dtype=dtype,
            scores=merge_scales(without_empty(scores)),
            softmax_dtype=core.dtype,
            out_dtype=self.out.expr.dtype,
            sink=sink,
            rows_seen=rows_seen or (sink is not None and sink.finite),
            operands=len(scope.operands),
            keys_exist=scope.facts.at_most(1, sizes["key"]),
        )  # fmt: skip
        if not spec.rows_seen and spec.fills_stay_finite:
            # Next to infinite fills a key with a finite fill still counts as seen, however low the fill is.
            infinite = [m for m in spec.hiding_alone if m.fill == -math.inf]
            spec = replace(
                spec, rows_seen=len(infinite) == len(spec.hiding_alone) and meanings.rows_seen(infinite)
            )
        kept = tuple(w for m in weights if (w := meanings.weight(m, spec)) is not None)
        spec = replace(spec, weights=kept)
        check_operands(scope, spec, summed.products)
        site = Site(
            spec, roles, scope.space, query_chain, key_chain, value_chain, scope.operands, self.out,
            summed.node, scope, summed.products, summed.copied, summed.spared,
        )  # fmt: skip
        return over_original_keys(site, meanings, summed.product.axes)

    def _query_and_key(self, product: Product) -> tuple[Term, Term]:
        """The operands of the product of queries and keys, in this order."""
        left_is_key = self._is_key_side(product, 0)
        return (product.right, product.left) if left_is_key else (product.left, product.right)

    def _roles(self, core: Core, product: Product, query: Term, key: Term) -> Roles:
        """The role of every axis."""
        scope = self.scope
        before = heads.ordered(scope, list(self.weights.index))
        value_axes = [a for a in heads.ordered(scope, list(self.out.index)) if a not in before]
        return heads.assign(scope, core.scores, core.dim, query, key, self.values, product.axes, value_axes)


__all__ = [
    "RULES", "Miss", "Rules", "as_product", "factors", "recognise", "recognise_sum",
]  # fmt: skip
