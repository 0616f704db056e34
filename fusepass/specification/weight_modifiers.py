"""Weight modifiers: steps between the softmax and the product with the values; and the softmax's own sink."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusepass.specification.modifiers import Modifier, Sample, Tensors, WeightModifier, add_gradient
from fusepass.specification.samples import Draw


@dataclass(frozen=True)
class Dropout(WeightModifier):
    """Weights dropped with probability ``p`` and the rest scaled by ``1 / (1 - p)``."""

    p: float

    def __str__(self) -> str:
        return f"dropout {self.p:.6g}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return self._drawn(x)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return self._drawn(grad)

    def _drawn(self, x: Tensor) -> Tensor:
        if self.p:
            raise ValueError(
                "dropout in a reference computation: expected its drawn mask as a WeightScale operand"
            )
        return x

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0.0), ())]  # others are random


@dataclass(frozen=True)
class Keep(WeightModifier):
    """Weights set to zero where the boolean operand hides, *after* the softmax, without renormalising."""

    slot: int
    attends: bool = True
    axes: str = ""
    implied: bool = False  # the score masks hide at least these pairs
    product: bool = False  # written as a multiplication by zero, which keeps NaN
    covers: bool = False  # it hides at least what the score masks hide

    def __str__(self) -> str:
        return f"kept where [{self.axes}]"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        tensor = operands[self.slot]
        if self.product:
            return x * (tensor if self.attends else ~tensor)
        return x.masked_fill(~tensor if self.attends else tensor, 0.0)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return self.apply(grad, operands)

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        bits = draw.bits("bij")
        return [
            (cls(0, True, "bij"), (bits,)),
            (cls(0, False, "bij"), (~bits,)),
            (cls(0, True, "bij", product=True), (bits,)),
            (cls(0, False, "bij", product=True), (~bits,)),
        ]


@dataclass(frozen=True)
class WeightScale(WeightModifier):
    """Weights times a number or a tensor that does not vary over the keys."""

    factor: float = 1.0
    slot: int | None = None
    axes: str = ""

    def __str__(self) -> str:
        return f"weights * {self.factor:.6g}" if self.slot is None else f"weights * [{self.axes}]"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x * (self.factor if self.slot is None else operands[self.slot])

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        if self.slot is None:
            return grad * self.factor
        add_gradient(gradients, self.slot, grad * before)
        return (grad * operands[self.slot]).to(before.dtype)

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0.25), ()), (cls(1.0, 0, "hi"), (draw.normal("hi"),))]


@dataclass(frozen=True)
class KeyGate(WeightModifier):
    """Weights times a tensor that varies over the keys, not the queries: ``(w * t) . v = w . (t * v)``."""

    slot: int
    axes: str = ""

    def __str__(self) -> str:
        return f"weights * [{self.axes}]"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return x * operands[self.slot]

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        add_gradient(gradients, self.slot, grad * before)
        return (grad * operands[self.slot]).to(before.dtype)

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0, "bj"), (draw.normal("bj"),))]


@dataclass(frozen=True)
class ZeroEmptyRows(WeightModifier):
    """NaN weights become zero: those of rows that see no key, or all of them.

    ``every``: all NaN weights, as ``nan_to_num`` does; SDPA's own rule covers only rows that see no key.
    """

    every: bool = False

    def __str__(self) -> str:
        return "empty rows zero"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return torch.nan_to_num(x, nan=0.0) if self.every else x  # else the softmax does it

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        return grad * before.isfinite() if self.every else grad

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(), ()), (cls(True), ())]


@dataclass(frozen=True)
class Sink(Modifier):
    """One more logit in every row's softmax that belongs to no key: ``exp(s) / (sum(exp(s)) + exp(sink))``.

    The operand is a tensor ``[B | 1, H | 1, Q | 1, 1]``.  Source: Xiao et al. (arXiv 2309.17453); gpt-oss.
    """

    slot: int
    axes: str = ""
    finite: bool = False  # proved to be finite, and of ordinary size

    def __str__(self) -> str:
        return f"sink[{self.axes}]"

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        return [(cls(0, "h"), (draw.normal("h"),)), (cls(0, "bhi"), (draw.normal("bhi"),))]
