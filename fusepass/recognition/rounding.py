"""Laws about rounding: which numbers of scores, biases and fills the dtypes on the way lose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusepass.expressions.intervals import magnitude, range_of
from fusepass.expressions.ir import DTYPES
from fusepass.recognition.meanings import Meanings
from fusepass.rules.engine import Core, Refuse
from fusepass.specification.attention import (
    USUAL_SCORES,
    Bias,
    Cast,
    Function,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    absorbs,
    dtype_of_sum,
    fill_levels,
    is_hiding,
    is_less_precise,
    negligible,
    rounds_scores,
)


@dataclass(frozen=True)
class Written:
    """A mask or bias as written: the dtype of its sum or choice, and the scales and roundings after it.

    ``scaled_by_tensor``: the scales are not all known numbers.
    """

    modifier: Any
    dtype: torch.dtype
    steps: tuple[Any, ...]
    scaled_by_tensor: bool


def roundings(mods: Sequence[ScoreModifier], product: torch.dtype) -> dict[int, Written]:
    """How each mask or bias was written, by its slot; scores begin in the product's dtype."""
    by_slot: dict[int, Written] = {}
    dtype = product
    for at, mod in enumerate(mods):
        if isinstance(mod, Cast):
            dtype = DTYPES[mod.dtype]
        if isinstance(mod, (Mask, Bias)):
            dtype = DTYPES[mod.dtype] if mod.dtype else dtype
            known = itertools.takewhile(lambda m: isinstance(m, (Scale, Cast, Mask, Bias)), mods[at + 1 :])
            steps = tuple(m for m in known if isinstance(m, (Scale, Cast)))
            by_tensor = any(isinstance(m, ScaleBy) for m in mods[at + 1 :])
            by_slot[mod.slot] = Written(mod, dtype, steps, by_tensor)
    return by_slot


@dataclass(frozen=True)
class Rounding:
    """What rounding does to the scores of one site.

    Attributes:
        meanings: tells what the modifiers mean.
        core: the softmax.
        dtype: the dtype of the scores, which is that of queries and keys.
    """

    meanings: Meanings
    core: Core
    dtype: torch.dtype

    def fill_as_written(self, mod: Mask | Bias) -> float:
        """The fill of a mask, or of a bias that is one, before any scale; -inf for other biases."""
        mask = self.meanings.understood(mod)
        return mask.fill if isinstance(mask, Mask) else -math.inf

    def without_exact_casts(self, written: Sequence[ScoreModifier]) -> list[ScoreModifier]:
        """Drops the casts before the first one that is less precise than the product; the rest are kept.

        All casts are kept where a wide fill, or a bias that may hide, is narrowed, and where scores are
        narrowed after anything except sums, scales and masks: only for these is it known what rounding does
        to fills (:func:`roundings`).
        """
        others = [not isinstance(m, (Scale, ScaleBy, Bias, Mask, Cast)) for m in written]
        changed = any(isinstance(m, Cast) and m.narrow and any(others[:n]) for n, m in enumerate(written))
        if changed or self._narrows_fills(written):
            return list(written)
        product = self.meanings.computed
        less = (
            n
            for n, m in enumerate(written)
            if isinstance(m, Cast) and is_less_precise(DTYPES[m.dtype], product)
        )
        first = next(less, len(written))
        return [m for n, m in enumerate(written) if n >= first or not isinstance(m, Cast)]

    def _narrows_fills(self, written: Sequence[ScoreModifier]) -> bool:
        """Is a fill, or a bias that may hide, wider than the product's dtype, and narrowed later?"""
        return any(
            self._is_wide(mod) and any(isinstance(m, Cast) and m.narrow for m in written[at + 1 :])
            for at, mod in enumerate(written)
        )

    def _is_wide(self, mod: ScoreModifier) -> bool:
        product = self.meanings.computed
        if isinstance(mod, Mask):
            return -math.inf < mod.fill < torch.finfo(product).min
        wide = isinstance(mod, Bias) and is_less_precise(product, DTYPES[mod.dtype])
        return wide and is_hiding(self.meanings.understood(mod))

    def check_rows(self, scores: Sequence[ScoreModifier]) -> None:
        """Check that no constant that is added to whole rows leaves their scores hardly a digit.

        Raises:
            Refuse: the original's weights are made by rounding, and those of a wider sum would not be.
        """
        for mod in scores:
            if isinstance(mod, Bias) and "j" not in mod.axes and not mod.hides:
                size, dtype = self.meanings.constants(mod), DTYPES[mod.dtype] if mod.dtype else self.dtype
                if rounds_scores(size, dtype, 1.0):
                    raise Refuse(
                        f"{size:g} is added to whole rows, where scores lose their digits in {dtype}"
                    )

    def check_narrowed(self, scores: Sequence[ScoreModifier], rounded: dict[int, Written]) -> None:
        """Check that no bias hides keys only because its sum is rounded to a less precise dtype than its own.

        Raises:
            Refuse: the original absorbs the scores of a row that the bias hides, and a wider sum would not.
        """
        for mod in scores:
            if not isinstance(mod, Bias) or (written := rounded.get(mod.slot)) is None:
                continue
            operand = self.meanings.scope.operands[mod.slot].expr
            low = -self.meanings.constants(mod)
            casts = (DTYPES[step.dtype] for step in written.steps if isinstance(step, Cast))
            before = low / abs(mod.factor) if mod.factor else low
            for dtype in (written.dtype, *casts, self.core.dtype):
                hides = negligible(low, dtype) and not negligible(low, operand.dtype)
                known = dtype is torch.float16 and not mod.hides  # kernels mend rows of a bias that ``hides``
                if hides or (known and absorbs(before, dtype, USUAL_SCORES)):
                    raise Refuse(
                        f"a bias of {low:g} in {operand.dtype} is rounded to {dtype}, where it hides scores",
                        operand,
                    )

    def check_sizes(
        self, written: Sequence[ScoreModifier], scores: Sequence[ScoreModifier], narrow: torch.finfo
    ) -> None:
        """Check that usual scores stay finite, and so do fills that are changed later.

        Args:
            written: the modifiers as they were peeled.
            scores: the same, merged and understood.
            narrow: the range of the narrowest dtype on the way.

        Raises:
            Refuse: the original overflows, and a wider sum or product would not.
        """
        scale, level = 1.0, 0.0
        for mod in written:
            scale *= self._factor(mod)
            if scale * USUAL_SCORES > narrow.max:
                raise Refuse(f"scores that are multiplied by {scale:g} overflow in {narrow.dtype}")
        for at, mod in enumerate(scores):
            if isinstance(mod, Function) and any(map(is_hiding, scores[:at])):
                raise Refuse(f"'{mod}' is applied to scores that a bias may hide")
            alone = (mod, *(m for m in scores[at + 1 :] if not isinstance(m, Mask)))
            levels = fill_levels(alone, 0) if isinstance(mod, Mask) else ()
            high = next((n for n in levels if n is not None and not n <= narrow.max), None)
            if high is not None:
                raise Refuse(f"some scores are set to {high:g}, which overflows in {narrow.dtype}")
        for mod in written:
            fill = self.fill_as_written(mod) if isinstance(mod, (Mask, Bias)) else math.nan
            if isinstance(mod, Bias) and fill == -math.inf:
                fill = -self.meanings.constants(mod)  # the bias is not a mask
            if math.isfinite(fill):
                added = isinstance(mod, Bias) or (isinstance(mod, Mask) and mod.additive)
                level = level + fill if added else min(level, fill)
            elif level < narrow.min and not isinstance(mod, (Mask, Bias, Cast)):
                raise Refuse(f"the sum of fills overflows in {narrow.dtype}, and '{mod}' is applied to it")
        self._check_constants(written, narrow)

    def _check_constants(self, written: Sequence[ScoreModifier], narrow: torch.finfo) -> None:
        """Check that the constants of biases that are no masks stay finite through all scales."""
        largest = 0.0
        for mod in written:
            if isinstance(mod, Bias) and isinstance(self.meanings.understood(mod), Bias):
                constants = self.meanings.constants(mod)
                largest = max(largest, constants if constants < math.inf else 0.0)
            largest *= self._factor(mod)
            if largest > narrow.max and not isinstance(mod, Bias):
                raise Refuse(f"constants of a bias become {largest:g}, which overflows in {narrow.dtype}")

    def _factor(self, mod: ScoreModifier) -> float:
        """By how much a modifier makes scores larger, as far as that is known."""
        if isinstance(mod, Scale):
            return abs(mod.factor)
        if not isinstance(mod, ScaleBy):
            return 1.0
        scope = self.meanings.scope
        bounds = range_of(scope.operands[mod.slot].expr, scope.contents, scope.facts)
        return 1.0 if bounds is None or not magnitude(bounds) < math.inf else magnitude(bounds)

    def overflowing(self, scores: Sequence[ScoreModifier], narrow: torch.finfo) -> Mask | None:
        """A mask whose fill is finite in the narrowest dtype, but not when constants of biases are added."""
        most = narrow.max * (1 + narrow.eps / 4)  # what is larger is rounded to infinity
        for at, mod in enumerate(scores):
            if not isinstance(mod, Mask) or not -most < mod.fill:
                continue
            reached = scores if mod.additive else scores[at + 1 :]
            constants = sum(self.meanings.constants(m) for m in reached if isinstance(m, Bias))
            if constants and mod.fill - constants <= -most:
                return mod
        return None

    def absorbs_in_part(self, mod: ScoreModifier, merged: ScoreModifier, rounded: dict[int, Written]) -> bool:
        """Does adding a mask or a constant round the scores, and would a fused kernel round other numbers?

        It would if a shift before the addition was dropped, or if a scale was moved before the addition.
        """
        if not isinstance(mod, (Mask, Bias)) or not isinstance(merged, (Mask, Bias)):
            return False
        if isinstance(mod, Mask) and not mod.atoms:
            return False  # it hides nothing
        written = rounded.get(merged.slot)
        if written is None:
            return False
        scale = math.prod(abs(step.factor) for step in written.steps if isinstance(step, Scale))
        shifted = merged.slot in self.meanings.scope.shifted
        if math.frexp(scale)[0] == 0.5 and not written.scaled_by_tensor and not shifted:
            return False
        if isinstance(mod, Bias):
            fill = -self.meanings.constants(mod) / abs(mod.factor) if mod.factor else 0.0
            inexact = rounds_scores(-fill, written.dtype)
        else:
            fill, inexact = mod.fill, mod.additive
        return inexact and math.isfinite(fill) and not absorbs(fill, written.dtype, USUAL_SCORES * scale)

    def unabsorbed(self, scores: Sequence[ScoreModifier]) -> Bias | None:
        """A bias of constants that an additive mask does not absorb, so that hidden scores still differ."""
        added = [m for m in scores if isinstance(m, Mask) and m.additive]
        for mod in scores:
            if (
                not isinstance(mod, Bias)
                or mod.hides
                or (most := self.meanings.constants(mod)) <= USUAL_SCORES
            ):
                continue
            if not all(absorbs(m.fill, dtype_of_sum(m, self.dtype, self.core.dtype), most) for m in added):
                return mod
        return None

    def rounded_on_a_fill(self, scores: Sequence[ScoreModifier]) -> Bias | None:
        """A bias of unknown numbers that is added to a fill of moderate size (``-1e4``) and rounded there."""
        for at, mask in enumerate(scores):
            if not isinstance(mask, Mask) or not mask.atoms or not math.isfinite(mask.fill):
                continue
            for mod, level in zip(scores[at + 1 :], fill_levels(scores, at), strict=False):
                dtype = DTYPES[mod.dtype] if isinstance(mod, Bias) and mod.dtype else self.dtype
                if level is None or negligible(level, dtype):
                    break
                if is_hiding(mod) and rounds_scores(abs(level), dtype):
                    return mod
        return None


__all__ = ["Rounding", "Written", "roundings"]
