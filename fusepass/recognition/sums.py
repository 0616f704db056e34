"""Laws of sums in the scores.

* Several products over the same pairs are one: ``a.c + b.d = [a, b].[c, d]``, where ``[a, b]`` are the
  features of both (absorbed latent attention, DeepSeek-AI, arXiv 2405.04434).
* A term that does not vary over the keys cancels in the softmax: a squared distance
  ``|q|^2 + |k|^2 - 2 q.k`` becomes a product with a key bias.

In floats: a product is accumulated in float32 or wider, so the sum of two products is rounded once if they
are one, and three times otherwise.  A term that cancels must be of ordinary size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from fusepass.expressions.index import Size
from fusepass.expressions.intervals import holds_fill
from fusepass.expressions.ir import DTYPES, Expr, const, is_constant, opmath, pointwise
from fusepass.patterns.scores import cancels
from fusepass.patterns.sums import product_below, square_below, summands, without
from fusepass.recognition.concatenation import Part, joined_product
from fusepass.rules.engine import STEP_LIMIT, Product, Scope, Term
from fusepass.rules.site import Roles
from fusepass.specification.attention import (
    USUAL_SCORES,
    Bias,
    Cast,
    Mask,
    Scale,
    ScoreModifier,
)


@dataclass(frozen=True)
class Summed:
    """Scores: a product, and the modifiers from the product outwards.

    Attributes:
        modifiers: what is done to the product, in order of computation.
        product: the product of queries and keys.
        node: the product as an expression.
        products: the original products that it is made of.
        copied: how many elements of queries and keys are copied to concatenate features.
        spared: how many elements the products have that would otherwise be stored as biases.
    """

    modifiers: list[ScoreModifier]
    product: Product
    node: Expr
    products: tuple[Expr, ...]
    copied: Size = 0
    spared: Size = 0


class Sums:
    """The sums in the scores of one site.

    Args:
        scope: the site's axes and tensors.
        roles: what each axis is, as far as the first product tells.
        low: the dtype of the result.
    """

    def __init__(self, scope: Scope, roles: Roles, low: torch.dtype) -> None:
        self.scope, self.roles, self.low = scope, roles, low

    def without_rows(self, scores: Summed) -> Summed:
        """The scores without terms that do not vary over the keys, where these cancel in the softmax.

        A constant stays, because it belongs to the term that it is added to, as in ``(1 - mask) * fill``.
        """
        self._know_squares(scores)
        mods: list[ScoreModifier] = []
        for at, mod in enumerate(scores.modifiers):
            later = scores.modifiers[at + 1 :]
            cancels = not self.scope.sunk and all(m.keeps_shift for m in later)
            kept = self._without_rows(mod) if isinstance(mod, Bias) and cancels else mod
            if kept is not mod:
                self.scope.note_shift(later)
            mods += [] if kept is None else [kept]
        return replace(scores, modifiers=mods)

    def _without_rows(self, mod: Bias) -> Bias | None:
        term = self.scope.operands[mod.slot]
        rows: dict[Expr, bool] = {}
        for factor, leaf in summands(term.expr, self.scope):
            row = not is_constant(leaf) and not self.scope.varies_over_keys(term.of(leaf))
            rows[leaf] = row and self._cancels(factor, leaf, mod) and rows.get(leaf, True)
        return self._rest(mod, {leaf for leaf, dropped in rows.items() if dropped})

    def _cancels(self, factor: float, leaf: Expr, mod: Bias) -> bool:
        """Does a multiple of a row's tensor cancel, as it is added to the scores?"""
        dtype = DTYPES[mod.dtype] if mod.dtype else leaf.dtype
        added = pointwise("mul", leaf, const(factor * mod.factor, opmath(leaf.dtype)), dtype=leaf.dtype)
        return cancels(added, dtype, self.scope)

    def _rest(self, mod: Bias, dropped: set[Expr]) -> Bias | None:
        """A bias without some of its summands."""
        term = self.scope.operands[mod.slot]
        rest = without(term.expr, dropped, self.scope) if dropped else term.expr
        if rest is term.expr:
            return mod
        return None if rest is None else replace(mod, slot=self.scope.slot(term.of(rest)))

    def _know_squares(self, scores: Summed) -> None:
        """Note that sums of squares of the operands of products are of ordinary size, as the products are."""
        leaves = [
            term.of(leaf)
            for mod in scores.modifiers
            if isinstance(mod, Bias)
            for term in [self.scope.operands[mod.slot]]
            for _, leaf in summands(term.expr, self.scope)
        ]
        squares = [square_below(leaf, self.scope) for leaf in leaves]
        if not any(squares):
            return
        others = (product_below(t, self.scope) for t in leaves)
        products = [scores.product, *(p[0] for p in others if p is not None)]
        pairs = [(p.left, p.right) for p in products if p.left != p.right]
        operands = {e for pair in pairs for t in pair for e in self._through(t)}
        for leaf, square in zip(leaves, squares, strict=True):
            if square is not None and operands.intersection(self._through(square[0])):
                self.scope.contents.ordinary.add(leaf.expr)

    def _through(self, term: Term) -> list[Expr]:
        """An operand, and what is below its views, casts and constant factors."""
        terms = [term.expr]
        for _ in range(STEP_LIMIT):
            below = self.scope.step(term)
            alone = summands(term.expr, self.scope) if below is None else []
            if below is None and len(alone) == 1 and alone[0][1] is not term.expr:
                below = term.of(alone[0][1])
            if below is None:
                break
            term = below
            terms.append(term.expr)
        return terms

    # -- products ----------------------------------------------------------------------------

    def joined(self, scores: Summed) -> Summed | None:
        """One product in place of all products that are added with only scales, biases, masks and widening
        casts in between.

        None where there is only one, or where their operands cannot be concatenated.
        """
        if self.scope.keys.is_const:
            return None
        parts, dtypes = [self._part(scores.product, scores.node, 1.0)], {self.low, scores.node.dtype}
        mods: list[ScoreModifier] = []
        scale, lowest = 1.0, -math.inf
        for at, mod in enumerate(scores.modifiers):
            if isinstance(mod, Scale):
                scale *= mod.factor
            if isinstance(mod, Cast):
                dtypes.add(DTYPES[mod.dtype])
            if isinstance(mod, Mask):
                lowest = max(lowest, mod.fill)
            largest = _most_absorbed(lowest, dtypes)
            if largest == 0 or not _lets_pass(mod) or scale == 0 or not math.isfinite(scale):
                mods += scores.modifiers[at:]
                break
            kept: ScoreModifier | None = mod
            if isinstance(mod, Bias):
                kept = self._taken(mod, scale, largest, parts)
            mods += [] if kept is None else [kept]
        joint = joined_product(self.scope, parts, self.low) if len(parts) > 1 else None
        if joint is None:
            return None
        outside: list[ScoreModifier] = [] if joint.scale == 1.0 else [Scale(joint.scale)]
        products = tuple(dict.fromkeys(p.node for p in parts))
        return Summed([*outside, *mods], joint.product, joint.node, products, joint.copied, joint.spared)

    def _taken(self, mod: Bias, scale: float, largest: float, parts: list[Part]) -> Bias | None:
        """What is left of a bias without the products that it holds, which are added to the parts.

        Args:
            mod: the bias.
            scale: the factor of the first product where the bias is added.
            largest: the largest factor of a product that is absorbed by the masks before the bias.
            parts: the products so far.
        """
        term, taken = self.scope.operands[mod.slot], set()
        for factor, leaf in summands(term.expr, self.scope):
            below = product_below(term.of(leaf), self.scope)
            relative = factor * mod.factor / scale
            usual = 0 < abs(factor * mod.factor) <= largest and math.isfinite(relative)
            if below is not None and usual and self._fits(below[0]):
                parts.append(self._part(*below, relative))
                taken.add(leaf)
        return self._rest(mod, taken)

    def _fits(self, product: Product) -> bool:
        """Does one operand vary over the keys and not the queries, and the other over the queries alone?

        A single query has no axis, and then only one operand must vary over the keys.  A product with fills
        in an operand is a mask, not a product of features.
        """
        if holds_fill(product.left.expr) or holds_fill(product.right.expr):
            return False
        sides = [self.scope.axes(t) for t in (product.left, product.right)]
        keys = self.scope.space.resolve(self.scope.keys).axes
        queries = self.scope.finest(frozenset(self.roles.query))
        over_keys, over_queries = ([bool(side & axes) for side in sides] for axes in (keys, queries))
        return sum(over_keys) == 1 and (not queries or over_queries == [not over for over in over_keys])

    def _part(self, product: Product, node: Expr, factor: float) -> Part:
        left, right = product.left, product.right
        if self.scope.varies_over_keys(left):
            left, right = right, left
        return Part(left, right, product.axes, node, factor)


def _lets_pass(mod: ScoreModifier) -> bool:
    """Is ``M(x) + p = M(x + p)`` up to a scale, for a product ``p`` that the fill of a mask ``M`` absorbs?"""
    return isinstance(mod, (Scale, Bias, Mask)) or (isinstance(mod, Cast) and not mod.narrow)


def _most_absorbed(fill: float, dtypes: Collection[torch.dtype]) -> float:
    """The largest factor with which a product of usual size leaves a fill as it is; 0 if it is at most 1."""
    usual = (-fill * torch.finfo(dtype).eps / 2 / USUAL_SCORES for dtype in dtypes)
    return largest if (largest := min(usual)) > 1 else 0.0


def whole(modifiers: Sequence[ScoreModifier], product: Product, node: Expr) -> Summed:
    """The scores as they were peeled."""
    return Summed(list(modifiers), product, node, (node,))


__all__ = ["Summed", "Sums", "whole"]
