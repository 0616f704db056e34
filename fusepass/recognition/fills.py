"""Laws about fills: what a mask does to scores in floats, through all later modifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fusepass.expressions.intervals import magnitude, range_of
from fusepass.expressions.ir import DTYPES, const, expr, pointwise
from fusepass.patterns import masks
from fusepass.recognition.rounding import Rounding, Written, roundings
from fusepass.rules.engine import Refuse, Term
from fusepass.specification.attention import (
    Bias,
    Cast,
    Finite,
    Floor,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    fill_levels,
    fills_after,
    is_hiding,
    merge_scales,
    rounds_scores,
)

#: In a dtype that holds this number, exponentials of usual scores do not overflow.
LARGE = 1e30
#: Exponentials of numbers up to this size neither vanish nor overflow next to a row's other terms.
SMALL = 64.0
#: Exponentials of numbers below this are zero, in float64 as well.
VANISHING = -1000.0


class Fills:
    """What fills do to the scores of one site.

    Args:
        rounding: tells what rounding does to its scores; it knows the softmax and what the modifiers mean.
    """

    def __init__(self, rounding: Rounding) -> None:
        self.rounding, self.meanings, self.core = rounding, rounding.meanings, rounding.core
        self.scope = rounding.meanings.scope
        self.partly: list[ScoreModifier] = []
        self.overflows: Mask | None = None

    def understood(self, written: Sequence[ScoreModifier]) -> tuple[ScoreModifier, ...]:
        """The modifiers of the scores, with scales merged, masks named, and fills as they reach the softmax.

        Args:
            written: the modifiers as they were peeled, from the product outwards.
        """
        product = self.meanings.computed
        merged = merge_scales(self.rounding.without_exact_casts(written))
        all_rounded = roundings(written, product)
        rounded = {} if any(isinstance(m, Cast) for m in merged) else all_rounded
        scores = [self._rounded(self.meanings.understood(m), m, rounded) for m in merged]
        scores = [self._overflown(m, self.core.dtype, product) for m in scores]
        pairs = zip(scores, merged, strict=True)
        self.partly = [m for m, as_merged in pairs if self.rounding.absorbs_in_part(m, as_merged, rounded)]
        self.rounding.check_rows(scores)
        self.rounding.check_narrowed(scores, all_rounded)
        casts = [DTYPES[m.dtype] for m in written if isinstance(m, Cast)]
        narrow = torch.finfo(min((self.core.dtype, product, *casts), key=lambda d: torch.finfo(d).max))
        self.rounding.check_sizes(written, scores, narrow)
        self.overflows = self.rounding.overflowing(scores, narrow)
        return self._floored(self._finite(self._filled(scores)))

    def check(self, scores: Sequence[ScoreModifier], rows_seen: bool) -> None:
        """Refuse fills that absorb only a part of what they are added to.

        Raises:
            Refuse: the original's result depends on its rounding.
        """
        if self.partly and not (rows_seen and all(isinstance(m, Mask) for m in self.partly)):
            raise Refuse(
                f"'{self.partly[0]}' absorbs scores only in part, after a shift or before a change of scale",
                self.core.scores.expr,
            )
        if rows_seen:
            return
        if self.overflows is not None:
            raise Refuse(
                f"the fill of '{self.overflows}' and the constants of a bias overflow together",
                self.core.scores.expr,
            )
        if (large := self.rounding.unabsorbed(scores)) is not None:
            raise Refuse(
                f"where a query sees no key, '{large}' holds numbers that the mask's fill does not absorb",
                self.core.scores.expr,
            )
        if (bias := self.rounding.rounded_on_a_fill(scores)) is not None:
            raise Refuse(
                f"where a query sees no key, '{bias}' is added to a fill that rounds it",
                self.core.scores.expr,
            )

    def _rounded(
        self, mod: ScoreModifier, merged: ScoreModifier, rounded: dict[int, Written]
    ) -> ScoreModifier:
        """The modifier; a mask whose fill overflows when the scores are rounded gets minus infinity instead.

        Raises:
            Refuse: the fill becomes infinity or NaN, or a number that absorbs less in a wider dtype.
        """
        if not isinstance(mod, (Mask, Bias)) or not isinstance(merged, (Mask, Bias)):
            return mod
        written = rounded.get(merged.slot)
        if written is None:
            return mod
        fill = self.rounding.fill_as_written(written.modifier)
        if not math.isfinite(fill):
            return mod
        operand = self.scope.operands[written.modifier.slot].expr
        most = torch.finfo(written.dtype).max
        if operand.is_float and operand.rank:
            most = max(most, torch.finfo(operand.dtype).max)  # the sum has the wider dtype
        for step in written.steps:
            if isinstance(step, Cast):
                most = torch.finfo(DTYPES[step.dtype]).max
            fill = fill * step.factor if isinstance(step, Scale) else step.hidden(fill)
            fill = fill if abs(fill) <= most else math.copysign(math.inf, fill)
        if fill == math.inf or math.isnan(fill) or (fill == -math.inf and isinstance(mod, Bias)):
            raise Refuse(
                f"the fill of '{mod}' overflows, and becomes {fill} when it is scaled", self.core.scores.expr
            )
        if isinstance(mod, Bias):
            return mod
        if isinstance(merged, Bias) and -math.inf < fill < torch.finfo(written.dtype).min:
            raise Refuse(
                f"a fill of {written.dtype} becomes {fill:g} in a wider dtype, where it absorbs less",
                self.core.scores.expr,
            )
        return self._infinite(mod) if fill == -math.inf else mod

    def _overflown(self, mod: ScoreModifier, *dtypes: torch.dtype) -> ScoreModifier:
        """The modifier; a mask whose fill is below the range of one of the dtypes gets minus infinity."""
        lowest = min(torch.finfo(d).min for d in dtypes)
        return self._infinite(mod) if isinstance(mod, Mask) and mod.fill < lowest else mod

    def _infinite(self, mod: Mask) -> Mask:
        """The same mask with minus infinity as its fill; it stays additive, or replaces scores, as before."""
        if not mod.additive or mod.fill == -math.inf:
            return replace(mod, fill=-math.inf)
        term = self.scope.operands[mod.slot]
        zero, low = (const(n, term.expr.dtype) for n in (0.0, -math.inf))
        added = pointwise("where", pointwise("eq", term.expr, zero), zero, low, dtype=term.expr.dtype)
        return replace(mod, slot=self.scope.slot(Term(added, term.index)), fill=-math.inf)

    def _filled(self, scores: list[ScoreModifier]) -> list[ScoreModifier]:
        """``s * c + (0 if c else fill) = where(c, s, fill)`` for a factor ``c`` of zeros and ones.

        A mask with an infinite fill stays as it is: in rows that see no key the result is NaN, and so are the
        gradients, since zero times NaN is NaN.
        """
        out: list[ScoreModifier] = []
        for mod in scores:
            before = out[-1] if out else None
            if (
                isinstance(before, ScaleBy)
                and isinstance(mod, Mask)
                and mod.additive
                and math.isfinite(mod.fill)
            ):
                term = self.scope.operands[before.slot]
                kept = masks.visibility_factor(self.meanings.formulas, self.meanings.formulas.lift(term))
                if kept is not None and set(masks.conjuncts(kept)) == set(
                    masks.conjuncts(self.meanings.mask_visible(mod))
                ):
                    bits = expr("cast", (term.expr,), (torch.bool,), term.expr.shape, torch.bool)
                    out[-1] = Mask(self.scope.slot(Term(bits, term.index)), mod.fill, False, True, mod.atoms)
                    continue
            out.append(mod)
        return out

    def _floored(self, scores: list[ScoreModifier]) -> tuple[ScoreModifier, ...]:
        """``max(where(m, s, -inf), c) = where(m, s, c)``: a floor becomes the fill of the masks before it.

        If only scales and masks come before the floor, nothing is left for it to do.
        """
        at = next((n for n, m in enumerate(scores) if isinstance(m, Floor)), None)
        if at is None:
            return tuple(scores)
        floor = scores[at]
        assert isinstance(floor, Floor)
        before, rest = scores[:at], self._floored(scores[at + 1 :])
        infinite = [n for n, m in enumerate(before) if isinstance(m, Mask) and m.fill == -math.inf]
        if any(level != -math.inf for n in infinite for level in fills_after(before, n, -math.inf)):
            return (*before, floor, *rest)
        before = [self._refilled(m, floor.bound) if isinstance(m, Mask) else m for m in before]
        kept = [] if all(isinstance(m, (Scale, Mask)) for m in before) else [floor]
        return (*before, *kept, *rest)

    def _finite(self, scores: list[ScoreModifier]) -> list[ScoreModifier]:
        """``nan_to_num(where(m, s, -inf)) = where(m, nan_to_num(s), low)``: it comes before the masks.

        Raises:
            Refuse: the result for infinite scores depends on more than a mask.
        """
        for at, mod in enumerate(scores):
            if isinstance(mod, Finite):
                first = at
                while first > 0 and isinstance(scores[first - 1], Mask):
                    first -= 1
                before = [m for m in scores[first:at] if isinstance(m, Mask)]
                if reason := self._depends(mod, scores[:first], before, scores[at + 1 :]):
                    raise Refuse(f"infinite scores become numbers, and {reason}")
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
        """What, other than a mask, makes scores infinite, or makes masked scores infinite again."""
        lowest = torch.finfo(self.meanings.computed).min
        if _changes_infinity(before):
            return "are changed before that"
        finite = [m for m in under if m.additive and math.isfinite(m.fill)]
        if finite and any(map(_is_infinite, before)):
            return "fills are added to others that are infinite"
        if _lowest_level(under, mod.low) < lowest:
            return "the sum of fills overflows"
        if len(finite) < len(under) and any(map(_is_infinite, after)):
            return "infinite numbers are added to them"
        levels = fills_after((mod, *after), 0, mod.low)
        if under and any(level is not None and level < lowest for level in levels):
            return "overflow when they are scaled or rounded"
        return None

    def _refilled(self, mod: Mask, fill: float) -> Mask:
        """A mask of ``-inf`` with another fill."""
        return self._filled_with(mod, fill) if mod.fill == -math.inf else mod

    def _filled_with(self, mod: Mask, fill: float) -> Mask:
        """A mask with another fill; if that is a change, it replaces scores, even if it was additive."""
        if mod.fill == fill:
            return mod
        if not mod.additive:
            return replace(mod, fill=fill)
        term = self.scope.operands[mod.slot]
        attends = pointwise("eq", term.expr, const(0.0, term.expr.dtype))
        return Mask(self.scope.slot(Term(attends, term.index)), fill, False, True, mod.atoms)

    def as_normalised(self, scores: tuple[ScoreModifier, ...], rows_seen: bool) -> tuple[ScoreModifier, ...]:
        """The scores of a softmax that is written out, with the effect of low fills on rows that see no key.

        Raises:
            Refuse: the effect depends on the values of the scores.
        """
        self._check_exponentials(scores)
        hiding = next(filter(is_hiding, scores), None)
        if self.core.form == "softmax" or (rows_seen and self.core.form != "bare" and hiding is None):
            return scores
        if self.core.form == "late" and hiding is None and not any(map(_is_finite_mask, scores)):
            return scores
        large = self.core.form == "bare" and (
            not all(self._is_small(m) for m in scores if isinstance(m, Bias))
            or any(isinstance(m, Scale) and abs(m.factor) > 1 for m in scores)
            or torch.finfo(self.core.scores.expr.dtype).max < LARGE
        )
        infinite = any(isinstance(m, Mask) and not math.isfinite(m.fill) for m in scores)
        if self.core.form == "gated" and not infinite and hiding is None and self.finite_sink():
            return scores
        if hiding is not None or self.core.form != "bare" or large:
            raise Refuse(
                "its softmax is written out, and the result for a query that sees no key depends on scores",
                self.core.scores.expr,
            )
        if rows_seen:
            return scores
        vanishing = [n for n, m in enumerate(scores) if isinstance(m, Mask) and _vanishes(scores, n)]
        hidden = tuple(
            self._infinite(m) if isinstance(m, Mask) and n in vanishing else m for n, m in enumerate(scores)
        )
        if any(_last_level(hidden, n) != -math.inf for n in vanishing):
            raise Refuse(
                "its softmax is written out, and for a query that sees no key the fills are changed later",
                self.core.scores.expr,
            )
        return hidden

    def _check_exponentials(self, scores: Sequence[ScoreModifier]) -> None:
        """Check that exponentials that are written out give what a softmax gives, in rows that see a key.

        Raises:
            Refuse: scores that are hidden do not vanish, or some exponentials overflow or lose digits.
        """
        if self.core.form != "softmax" and not all(
            _stays_low(scores, n) for n, m in enumerate(scores) if isinstance(m, Mask)
        ):
            raise Refuse(
                "its softmax is written out, and scores that a mask sets to a low number do not stay low",
                self.core.scores.expr,
            )
        if self.core.form == "relative" and not all(self._is_exact(m) for m in scores if isinstance(m, Bias)):
            raise Refuse(
                "its softmax is written out, as exp(x - logsumexp(x)), which differs for large biases",
                self.core.scores.expr,
            )
        if self.core.form == "shifted" and any(
            isinstance(m, Mask) or (isinstance(m, Bias) and not self._is_small(m)) for m in scores
        ):
            raise Refuse(
                "its softmax is written out, and its exponentials may overflow: the shift is not a maximum",
                self.core.scores.expr,
            )

    def _is_small(self, mod: Bias) -> bool:
        """Is a bias so small that it makes no exponential of a row vanish or overflow?"""
        bounds = range_of(self.scope.operands[mod.slot].expr, self.scope.contents, self.scope.facts)
        return bounds is not None and magnitude(bounds) * abs(mod.factor) <= SMALL

    def _is_exact(self, mod: Bias) -> bool:
        """Are the constants of a bias so small that subtracting a log-sum-exp of their size is precise?"""
        most = self.meanings.constants(mod)
        return most <= SMALL or not rounds_scores(most, self.core.scores.expr.dtype)

    def finite_sink(self) -> bool:
        """Is there a sink, learned or constant, that is a finite number of ordinary size?"""
        return self.core.sink is not None and not masks.may_hide(
            self.core.sink.expr, self.scope.contents, self.scope.facts
        )


def _stays_low(scores: Sequence[ScoreModifier], at: int) -> bool:
    """Do scores that the mask at a position fills stay low through all later modifiers?"""
    return all(level is not None and level <= SMALL for level in fill_levels(scores, at))


def _lowest_level(masks: Sequence[Mask], low: float) -> float:
    """The lowest number that several masks can make of a score: additive fills are added up.

    Infinite fills count as ``low``.
    """
    level = 0.0
    for mask in masks:
        fill = mask.fill if math.isfinite(mask.fill) else low
        level = level + fill if mask.additive and math.isfinite(mask.fill) else min(level, fill)
    return level


def _is_finite_mask(mod: ScoreModifier) -> bool:
    return isinstance(mod, Mask) and math.isfinite(mod.fill)


def _is_infinite(mod: ScoreModifier) -> bool:
    """May the modifier make scores infinite?"""
    return is_hiding(mod) or (isinstance(mod, Mask) and mod.fill == -math.inf)


def _changes_infinity(scores: Sequence[ScoreModifier]) -> bool:
    """Does anything except sums, masks and casts follow infinite scores, so that they may become others?"""
    for at, mod in enumerate(scores):
        stays = isinstance(mod, Mask) and _last_level(scores, at) == -math.inf
        changed = not all(isinstance(m, (Mask, Bias, Cast)) for m in scores[at:])
        if _is_infinite(mod) and changed and not stays:
            return True
    return False


def _vanishes(scores: Sequence[ScoreModifier], at: int) -> bool:
    """Is the exponential of scores that the mask at a position fills zero, in every dtype?"""
    level = _last_level(scores, at)
    return level is not None and level < VANISHING


def _last_level(scores: Sequence[ScoreModifier], at: int) -> float | None:
    """The value, after all later modifiers, of scores that the mask at a position fills; None if unknown."""
    *_, level = fill_levels(scores, at)
    return level


def without_empty(scores: tuple[ScoreModifier, ...]) -> tuple[ScoreModifier, ...]:
    """Drops masks that hide nothing."""
    return tuple(m for m in scores if not (isinstance(m, Mask) and not m.atoms))


__all__ = ["Fills", "without_empty"]
