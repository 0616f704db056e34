"""An additive mask as a visibility and a fill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fusepass.expressions.ir import Expr, rounded_to, scalar_of
from fusepass.rules.formulas import FALSE, TRUE, Formulas
from fusepass.specification.attention import negligible


@dataclass(frozen=True)
class Hidden:
    """An additive mask: zero where ``attends``, ``fill`` elsewhere."""

    attends: Expr
    fill: float


def additive_mask(formulas: Formulas, formula: Expr, dtype: torch.dtype) -> Hidden | None:
    """The mask that a bias is, if it is always zero or a negligible fill; else None."""
    if formula.op == "cast" and formula.is_float and formula.args[0].is_float:
        inner = additive_mask(formulas, formula.args[0], dtype)
        return None if inner is None else Hidden(inner.attends, rounded_to(inner.fill, formula.dtype))
    if formula.op == "const":
        value = float(formula.attrs[0])
        if value != 0 and not negligible(value, dtype):
            return None
        return Hidden(TRUE, 0.0) if value == 0 else Hidden(FALSE, value)
    if formula.op == "add":
        a, b = (additive_mask(formulas, x, dtype) for x in formula.args)
        if a is None or b is None:
            return None
        both = rounded_to(a.fill + b.fill, formula.dtype)
        least = both if both == -math.inf else min(a.fill, b.fill)
        return Hidden(formulas.make("and", (a.attends, b.attends), torch.bool), least)
    if formula.op == "where":
        condition, yes, no = formula.args
        for wanted, kept, filler in (
            (condition, yes, no),
            (formulas.make("not", (condition,), torch.bool), no, yes),
        ):
            fill = scalar_of(filler)
            inner = additive_mask(formulas, kept, dtype)
            if fill is not None and inner is not None and negligible(float(fill), dtype):
                return Hidden(
                    formulas.make("and", (wanted, inner.attends), torch.bool), min(float(fill), inner.fill)
                )
        return _either_mask(formulas, condition, yes, no, dtype)
    return None


def _either_mask(formulas: Formulas, c: Expr, yes: Expr, no: Expr, dtype: torch.dtype) -> Hidden | None:
    """``where(c, x, y)`` of two masks that hide with the same fill, or of which one hides nothing."""
    a, b = additive_mask(formulas, yes, dtype), additive_mask(formulas, no, dtype)
    if a is None or b is None or (a.fill != b.fill and TRUE not in (a.attends, b.attends)):
        return None
    sides = (
        formulas.make("and", (c, a.attends), torch.bool),
        formulas.make("and", (formulas.make("not", (c,), torch.bool), b.attends), torch.bool),
    )
    return Hidden(formulas.make("or", sides, torch.bool), min(a.fill, b.fill))


__all__ = ["Hidden", "additive_mask"]
