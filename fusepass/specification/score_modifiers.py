"""Score modifiers: steps between the product of queries and keys and the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor

from fusepass.expressions.arithmetic import clamps_pass_bounds
from fusepass.expressions.ir import DTYPES, const
from fusepass.specification.atoms import Atom, absorbs
from fusepass.specification.modifiers import Sample, ScoreModifier, Tensors, add_gradient
from fusepass.specification.samples import Draw

#: A score with this fill stays hidden whatever realistic number is added to it.
LOWEST = -1e30


@dataclass(frozen=True)
class Scale(ScoreModifier):
    """``s * factor``."""

    factor: float
    repeats = True

    def __str__(self) -> str:
        return f"scale {self.factor:.6g}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x * self.factor

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return (grad * self.factor).to(before.dtype)

    def scaled(self, factor: float) -> Scale:
        return self

    def hidden(self, fill: float) -> float | None:
        return fill * self.factor if 0 < self.factor < math.inf else None

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        return True

    @property
    def keeps_shift(self) -> bool:
        return True

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0.5), ()), (cls(-0.7), ()), (cls(3.0), ())]


@dataclass(frozen=True)
class ScaleBy(ScoreModifier):
    """``s * tensor``; ``axes`` are the letters the tensor varies over."""

    slot: int
    axes: str = ""
    repeats = True

    def __str__(self) -> str:
        return f"scale by [{self.axes}]"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x * operands[self.slot]

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        add_gradient(gradients, self.slot, grad * before)
        return (grad * operands[self.slot]).to(before.dtype)

    def scaled(self, factor: float) -> ScaleBy:
        return self

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0, axes), (draw.normal(axes),)) for axes in ("h", "bi", "bj")]


@dataclass(frozen=True)
class SoftCap(ScoreModifier):
    """``cap * tanh(s / cap)``  (Gemma 2, arXiv 2408.00118)."""

    cap: float

    def __str__(self) -> str:
        return f"softcap {self.cap:.6g}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return self.cap * torch.tanh(x / self.cap)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return grad * (1 - torch.tanh(before / self.cap) ** 2)

    def hidden(self, fill: float) -> float | None:
        return self.cap * math.tanh(fill / self.cap) if self.cap else None

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        return True

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(2.0), ()), (cls(30.0), ())]


@dataclass(frozen=True)
class Bias(ScoreModifier):
    """``s + factor * tensor``.  ``hides``: the tensor may hold fills, and so hide all keys of a row.

    ``dtype``: the short name of the dtype of the sum, given where it is wider than that of the scores and
    this matters.
    """

    slot: int
    axes: str = ""
    factor: float = 1.0
    hides: bool = False
    dtype: str = ""
    repeats = True

    def __str__(self) -> str:
        return f"bias[{self.axes}]" + ("" if self.factor == 1 else f" * {self.factor:.6g}")

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        bias, x = operands[self.slot], _widened(x, self.dtype)
        return x + (bias if self.factor == 1 else bias * self.factor)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        add_gradient(gradients, self.slot, grad * self.factor)
        return grad.to(before.dtype)

    def scaled(self, factor: float) -> Bias:
        return replace(self, factor=self.factor * factor)

    def hidden(self, fill: float) -> float | None:
        """A tensor that is not known to be of ordinary size may bring back all fills except the lowest: those
        of ``LOWEST`` and below, and half precision's lowest numbers."""
        unknown = self.hides and math.isfinite(fill) and not (fill <= LOWEST or -65504 <= fill <= -64800)
        return fill if math.isfinite(self.factor) and not unknown else None

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        if "j" not in self.axes or fill == -math.inf:
            return True
        return not self.hides and absorbs(fill, dtype)

    @property
    def keeps_shift(self) -> bool:
        return True

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [
            (cls(0, "bhij"), (draw.normal("bhij"),)),
            (cls(0, "hj", -0.5), (draw.normal("hj"),)),
            (cls(0, "bi"), (draw.normal("bi"),)),
        ]


def is_hiding(mod: ScoreModifier) -> TypeGuard[Bias]:
    """Is it a bias that may hold fills, and so hide keys?"""
    return isinstance(mod, Bias) and mod.hides


@dataclass(frozen=True)
class Mask(ScoreModifier):
    """Hide the pairs outside the conjunction of ``atoms``.

    ``additive``: the operand in ``slot`` is a floating tensor of zeros and ``fill`` that is *added*;
    otherwise it is boolean, True where ``attends``, and hidden scores are *replaced* by ``fill``.
    Whether it hides for good depends on the fill and on what follows: ask :meth:`Attention.hides`.
    ``dtype`` is that of the sum, as for a :class:`Bias`, or of the scores that hold the fill.
    """

    slot: int
    fill: float
    additive: bool = False
    attends: bool = True
    atoms: tuple[Atom, ...] = ()
    dtype: str = ""
    repeats = True

    def __str__(self) -> str:
        return " & ".join(map(str, self.atoms)) or "mask"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        tensor = operands[self.slot]
        if self.additive:
            return _widened(x, self.dtype) + tensor
        x = _widened(x, self.dtype)
        low = -math.inf if self.fill == -math.inf else max(self.fill, torch.finfo(x.dtype).min)
        return x.masked_fill(~tensor if self.attends else tensor, low)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        tensor = operands[self.slot]
        if self.additive:
            add_gradient(gradients, self.slot, grad)
            return grad.to(before.dtype)
        return grad.masked_fill(~tensor if self.attends else tensor, 0.0)

    def scaled(self, factor: float) -> ScoreModifier | None:
        if factor <= 0:
            return None  # a hidden score would change sign
        if self.additive:
            return self if factor == 1 else Bias(self.slot, "bhij", factor, dtype=self.dtype)
        return replace(self, fill=self.fill * factor)

    def hidden(self, fill: float) -> float | None:
        if self.additive:
            return fill if self.fill <= 0 else fill + self.fill
        return _lower(fill, self.fill)

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        return fill == self.fill and (fill == -math.inf or not self.additive)

    @property
    def keeps_shift(self) -> bool:
        return self.additive or self.fill == -math.inf

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        bits = draw.bits("bij")
        added = torch.zeros(bits.shape, dtype=torch.float64).masked_fill(~bits, -1e9)
        return [
            (cls(0, -math.inf), (bits,)),
            (cls(0, -math.inf, attends=False), (~bits,)),
            (cls(0, -1e9), (bits,)),
            (cls(0, -3.0), (bits,)),
            (cls(0, -1e9, additive=True), (added,)),
        ]


@dataclass(frozen=True)
class Cast(ScoreModifier):
    """``s`` in another dtype.  Casts before the first one that is less precise than the product of queries
    and keys are left out of a specification."""

    dtype: str  #: its short name, as in texts of expressions
    narrow: bool  #: does it round?

    def __str__(self) -> str:
        return f"in {self.dtype}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x.to(DTYPES[self.dtype])

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return grad.to(before.dtype)

    def hidden(self, fill: float) -> float | None:
        return float(const(fill, DTYPES[self.dtype]).attrs[0])

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        return True

    @property
    def keeps_shift(self) -> bool:
        return not self.narrow

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls("f64", False), ())]


@dataclass(frozen=True)
class Floor(ScoreModifier):
    """``max(s, bound)`` with a negligible bound: what was hidden by ``-inf`` is hidden by ``bound``."""

    bound: float

    def __str__(self) -> str:
        return f"floor {self.bound:.4g}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x.clamp(min=max(self.bound, torch.finfo(x.dtype).min))

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return torch.where(before >= self.bound, grad, torch.zeros_like(grad))

    def hidden(self, fill: float) -> float | None:
        return _lower(fill, self.bound)

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        return True

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(-1e30), ()), (cls(-0.25), ())]


@dataclass(frozen=True)
class Finite(ScoreModifier):
    """``nan_to_num(s)``: NaN becomes ``nan``, minus infinity ``low`` and infinity ``high``."""

    nan: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"nan to {self.nan:.6g}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return finite(x, self.nan, self.low, self.high)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return grad * before.isfinite()  # as in PyTorch: NaN stays NaN

    def hidden(self, fill: float) -> float | None:
        return self.low if fill == -math.inf else fill

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        return True

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0.5, -2.0, 2.0), ()), (cls(0.0, -1e30, 1e30), ())]


@dataclass(frozen=True)
class Clamp(ScoreModifier):
    """``min(max(s, low), high)``; either bound may be infinite."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"clamp {self.low:.4g} to {self.high:.4g}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        most = torch.finfo(x.dtype).max
        low, high = (n if math.isinf(n) else min(max(n, -most), most) for n in (self.low, self.high))
        x = x if low == -math.inf else x.clamp(min=low)
        return x if high == math.inf else x.clamp(max=high)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        closed = clamps_pass_bounds()
        above = before >= self.low if closed or self.low == -math.inf else before > self.low
        below = before <= self.high if closed or self.high == math.inf else before < self.high
        inside = above & below
        return torch.where(inside, grad, torch.zeros_like(grad))

    def hidden(self, fill: float) -> float | None:
        return min(max(fill, self.low), self.high)

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(-0.25, 0.5), ()), (cls(-math.inf, 0.25), ()), (cls(-0.5, math.inf), ())]


@dataclass(frozen=True)
class LeakyReLU(ScoreModifier):
    """``s`` where it is positive, ``slope * s`` elsewhere; a slope of zero is the plain rectifier."""

    slope: float

    def __str__(self) -> str:
        return f"leaky relu {self.slope:.4g}" if self.slope else "relu"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return torch.where(x > 0, x, x * self.slope) if self.slope else x.relu()

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        low = grad * self.slope if self.slope else torch.zeros_like(grad)
        return torch.where(before <= 0, low, grad)  # a NaN passes

    def hidden(self, fill: float) -> float | None:
        return fill if fill > 0 else fill * self.slope if self.slope else 0.0

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0.0), ()), (cls(0.2), ()), (cls(-0.5), ())]


@dataclass(frozen=True)
class Absolute(ScoreModifier):
    """``abs(s)``."""

    def __str__(self) -> str:
        return "abs"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x.abs()

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return grad * before.sign()

    def hidden(self, fill: float) -> float | None:
        return abs(fill)

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(), ())]


def finite(s: Tensor, nan: float, low: float, high: float) -> Tensor:
    """``nan_to_num(s, nan, high, low)``, with the numbers clamped to the range of the dtype of ``s``."""
    most = torch.finfo(s.dtype).max
    s = torch.where(s == math.inf, min(high, most) if high < math.inf else high, s)
    s = torch.where(s == -math.inf, max(low, -most) if low > -math.inf else low, s)
    return torch.where(s != s, nan, s)


def _widened(s: Tensor, dtype: str) -> Tensor:
    """Scores in the dtype of a sum, if that is wider than theirs."""
    return s.to(DTYPES[dtype]) if dtype and s.dtype.itemsize < DTYPES[dtype].itemsize else s


def _lower(fill: float, other: float) -> float:
    """The higher of two fills; ``other`` where either is NaN."""
    return fill if other <= fill else other
