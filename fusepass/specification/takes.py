"""What a kernel or an operator declares to take; everything else is refused, with a reason.

The declaration is checked before a kernel is asked anything else, so that a kernel cannot forget a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch

from fusepass.specification.attention import (
    USUAL_SCORES,
    Attention,
    Bias,
    Dropout,
    Keep,
    Mask,
    Modifier,
    ScaleBy,
    ScoreModifier,
    WeightModifier,
    ZeroEmptyRows,
    absorbs,
    empty_rows,
    fills_after,
    is_hiding,
    negligible,
    one_level,
    rounds_softmax,
)

#: One kind of score modifier, or a tuple of kinds in whatever order and number they are written.
Stage = type[ScoreModifier] | tuple[type[ScoreModifier], ...]


@dataclass(frozen=True)
class Takes:
    """What is computed correctly.

    Attributes:
        scores: the stages of the score, in order; a site may lack any of them.
        weights: the kinds of weight modifiers.
        sink: may the softmax have a sink?
        learned: the kinds of modifiers whose operands get gradients.
        factors: what a tensor that multiplies the scores may vary over: ``"rows"`` alone, rows or ``"keys"``,
            or ``"pairs"`` of them.
        fills: how masks are computed.  ``"hidden"``: the pairs outside them get no weight.  ``"added"``:
            additive masks are added as tensors, with any fill.  ``"written"``: all masks write their exact
            fills.
        lowest: the lowest fill that can be written; lower ones are written as this number.
        rows: which rows that see no key are computed correctly.  ``"seen"``: none, every row must see a key.
            ``"one level"``: rows in which all keys have the same fill give what
            :func:`.attention.empty_rows` says.  ``"levels"``: rows with several fills do so too.
            ``"written"``: every row is computed as the original computes it.
        hiding_biases: are biases that may hide all keys of a row added as they are?
        no_keys: is the result zero where there are no keys?
    """

    scores: tuple[Stage, ...]
    weights: tuple[type[WeightModifier], ...] = ()
    _: KW_ONLY
    sink: bool = False
    learned: tuple[type[Modifier], ...] = ()
    factors: Literal["rows", "keys", "pairs"] = "rows"
    fills: Literal["hidden", "added", "written"] = "hidden"
    lowest: float = -float("inf")
    rows: Literal["seen", "one level", "levels", "written"] = "seen"
    hiding_biases: bool = False
    no_keys: bool = False

    def refuse(self, spec: Attention, training: bool = False) -> str | None:
        """Why ``spec`` is not taken, or None."""
        checks: tuple[Callable[[Attention], str | None], ...] = (
            self._order, self._weights, self._factors, self._fills, self._rounding,
        )  # fmt: skip
        reasons = (reason for check in checks if (reason := check(spec)) is not None)
        return next(reasons, None) or self._rows(spec, training)

    def _order(self, spec: Attention) -> str | None:
        at = 0
        for position, mod in enumerate(spec.scores):
            if not any(isinstance(mod, stage) for stage in self.scores):
                return f"it has no '{mod}'"
            before = spec.scores[position - 1] if position else None
            here = next((n for n in range(at, len(self.scores)) if isinstance(mod, self.scores[n])), None)
            stage = None if here is None else self.scores[here]
            once = isinstance(stage, type) and not mod.repeats
            if stage is None or (once and isinstance(before, stage)):
                return f"'{mod}' comes after '{before}'"
            at = here or 0
        return None

    def _weights(self, spec: Attention) -> str | None:
        if spec.sink is not None and not self.sink:
            return "it has no sink"
        if spec.dropout and not any(issubclass(Dropout, kind) for kind in self.weights):
            return "it has no dropout"
        for weight in spec.weights:
            if not isinstance(weight, self.weights):
                return f"it has no '{weight}'"
            whole = self.rows == "written"
            if isinstance(weight, Keep) and not whole and not weight.implied and "j" in weight.axes:
                return "weights are hidden after the softmax without renormalising"
        return None

    def _rounding(self, spec: Attention) -> str | None:
        """Only a kernel that computes as written may round scores and weights to less than the operands'
        precision."""
        if rounds_softmax(spec.softmax_dtype, spec.dtype) and self.rows != "written":
            kind = str(spec.softmax_dtype).removeprefix("torch.")
            return f"its softmax is rounded to {kind}, which is less precise than its operands"
        return None

    def _factors(self, spec: Attention) -> str | None:
        for mod in spec.scores:
            if isinstance(mod, ScaleBy) and "j" in mod.axes and self.factors != "pairs":
                if self.factors == "rows":
                    return "the scores are multiplied by a tensor that varies over the keys"
                if "i" in mod.axes:
                    return "the scores are multiplied by a tensor that varies over queries and keys"
        return None

    def _fills(self, spec: Attention) -> str | None:
        for at, mask in enumerate(spec.scores):
            if not isinstance(mask, Mask) or spec.hides(mask):
                continue
            if self.fills == "written" and self._writes(spec, at, mask):
                continue
            if self.fills == "added" and mask.additive:
                continue
            if negligible(mask.fill, spec.score_dtype):
                return f"hidden scores come back: '{spec.scores[at + 1]}' follows '{mask}'"
            return f"hidden scores are set to {mask.fill:g}, which is within reach of real scores"
        return None

    def _writes(self, spec: Attention, at: int, mask: Mask) -> bool:
        """Can the exact fill be written?  For an additive mask this requires a fill that absorbs the scores,
        unless the kernel computes every row as written."""
        single = absorbs(mask.fill, torch.float32, USUAL_SCORES)  # kernels add in single precision
        if mask.additive and self.rows != "written" and not single:
            return False
        return not mask.fill < self.lowest or self._same_fate(spec, at, mask)

    def _same_fate(self, spec: Attention, at: int, mask: Mask) -> bool:
        """Does the lowest fill that can be written end as the same number as the fill itself?"""
        theirs, ours = (list(fills_after(spec.scores, at, fill)) for fill in (mask.fill, self.lowest))
        return bool(theirs) and theirs[-1] is not None and theirs[-1] == ours[-1]

    def _rows(self, spec: Attention, training: bool) -> str | None:
        if not spec.keys_exist and not self.no_keys:
            return f"there may be no keys: {spec.keys} may be zero (torch._check can promise otherwise)"
        if not self.no_keys and 0 in (spec.batch, spec.heads, spec.queries, spec.head_dim, spec.value_dim):
            return "there are no elements"
        if self.rows == "written":
            return None
        hiding = next(filter(is_hiding, spec.scores), None)
        if hiding is not None and not self.hiding_biases:
            return f"'{hiding}' may hide all keys of a query"
        if hiding is not None and hiding.dtype == "f64":
            return f"'{hiding}' may hide all keys of a query, and is added in float64"
        mended = self.rows == "levels" and spec.biases_empty_rows(training, self.fills == "added")
        if not spec.unseen_rows and not mended:
            return None
        if training and _zeroes_nan(spec):
            return "a query may see no key: its weights are NaN and become zero, but its gradients stay NaN"
        if self.rows == "seen":
            return "a query may see no key"
        if empty_rows(spec) == "unknown" and mended and not training and not spec.unseen_rows:
            return f"'{hiding}' may hide all keys of a query, whose scores half precision rounds away"
        if empty_rows(spec) == "unknown":
            return "a query may see no key, and the result of such a row depends on the values of its scores"
        if self.rows == "one level" and not one_level(spec):
            return "a query may see no key, and the masks have several fills"
        return None


def _zeroes_nan(spec: Attention) -> bool:
    """Are weights that may be NaN set to zero, while gradients of scores, biases or values are NaN?

    The softmax's own gradient is NaN there.  A mask that replaces scores stops it; a mask that is added does
    not.
    """
    kept = any(isinstance(w, Keep) and not w.product for w in spec.weights)
    if not kept and not any(isinstance(w, ZeroEmptyRows) and w.every for w in spec.weights):
        return False
    hidden = False
    for mod in spec.scores:
        if isinstance(mod, Bias) and (mod.hides or hidden):
            return True
        if isinstance(mod, Mask) and mod.fill == -math.inf:
            if mod.additive:
                return True
            hidden = True
    return kept and hidden and empty_rows(spec) == "nan"


__all__ = ["Stage", "Takes"]
