"""Functions of one score, as operations in their order, each with its derivative."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusepass.expressions.arithmetic import clamps_pass_bounds, folded, opmath
from fusepass.specification.modifiers import Sample, ScoreModifier, Tensors, add_gradient
from fusepass.specification.samples import Draw

#: How much of an operation a text shows.
_SHOWN = 60


class Operation(NamedTuple):
    """A continuous operation on numbers.

    Attributes:
        compute: the result, given the arguments; at least one of them is a tensor.
        pull: the gradients of the arguments, given that of the result, the result and the arguments; as
            PyTorch's own where an operation has a corner.
    """

    compute: Callable[..., Tensor]
    pull: Callable[..., tuple[Any, ...]]


def _extreme(bound: str, compare: Callable[..., Tensor], both: Callable[..., Tensor]) -> Operation:
    """The maximum or the minimum of two arguments; ``compare`` tells whether the first one is not taken."""

    def compute(a: Any, b: Any) -> Tensor:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return both(a, b)
        x, number = (a, b) if isinstance(a, Tensor) else (b, a)
        return x.clamp(**{bound: number})

    def pull(g: Tensor, _: Tensor, a: Any, b: Any) -> tuple[Any, ...]:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            halved = torch.where(a == b, g / 2, g)
            return halved.masked_fill(compare(a, b), 0.0), halved.masked_fill(compare(b, a), 0.0)
        x, number = (a, b) if isinstance(a, Tensor) else (b, a)
        taken = compare(number, x) | (x == number) if clamps_pass_bounds() else compare(number, x)
        inside = torch.where(taken, g, torch.zeros_like(g))
        return inside, inside

    return Operation(compute, pull)


def _pull_power(g: Tensor, y: Tensor, a: Any, b: Any) -> tuple[Any, ...]:
    if isinstance(a, Tensor):
        return (g * (b * a.pow(b - 1)) if b else torch.zeros_like(g)), None
    return None, g * (y * math.log(a))


#: By the names of :mod:`fusepass.expressions.ir`.
OPERATIONS: dict[str, Operation] = {
    "neg": Operation(operator.neg, lambda g, y, x: (-g,)),
    "abs": Operation(torch.abs, lambda g, y, x: (g * x.sign(),)),
    "exp": Operation(torch.exp, lambda g, y, x: (g * y,)),
    "exp2": Operation(torch.exp2, lambda g, y, x: (g * y * math.log(2),)),
    "expm1": Operation(torch.expm1, lambda g, y, x: (g * (y + 1),)),
    "log": Operation(torch.log, lambda g, y, x: (g / x,)),
    "log1p": Operation(torch.log1p, lambda g, y, x: (g / (x + 1),)),
    "tanh": Operation(torch.tanh, lambda g, y, x: (g * (1 - y * y),)),
    "sqrt": Operation(torch.sqrt, lambda g, y, x: (g / (2 * y),)),
    "rsqrt": Operation(torch.rsqrt, lambda g, y, x: (-0.5 * g * y**3,)),
    "sigmoid": Operation(torch.sigmoid, lambda g, y, x: (g * (1 - y) * y,)),
    "erf": Operation(torch.erf, lambda g, y, x: (g * (2 / math.sqrt(math.pi)) * (-x * x).exp(),)),
    "relu": Operation(torch.relu, lambda g, y, x: (torch.where(x <= 0, torch.zeros_like(g), g),)),
    "add": Operation(operator.add, lambda g, y, a, b: (g, g)),
    "sub": Operation(operator.sub, lambda g, y, a, b: (g, -g)),
    "mul": Operation(operator.mul, lambda g, y, a, b: (g * b, g * a)),
    "div": Operation(operator.truediv, lambda g, y, a, b: (g / b, -g * (y / b))),
    "pow": Operation(torch.pow, _pull_power),
    "max": _extreme("min", operator.lt, torch.maximum),
    "min": _extreme("max", operator.gt, torch.minimum),
}


@dataclass(frozen=True)
class Function(ScoreModifier):
    """A continuous function of each score, and of an element of one tensor if there is a ``slot``.

    ``steps``: each is the name of an operation and its arguments: numbers (floats), None for the tensor's
    element, or the place of an earlier value: 0 for the score, n for the result of the n-th step.  The last
    result is the function's.  ``axes`` are the letters that the tensor varies over.
    """

    steps: tuple[tuple[Any, ...], ...]
    slot: int | None = None
    axes: str = ""

    def __str__(self) -> str:
        words = ["s"]
        for name, *arguments in self.steps:
            given = (
                f"[{self.axes}]" if a is None else words[a] if isinstance(a, int) else f"{a:.4g}"
                for a in arguments
            )  # fmt: skip
            text = f"{name}({', '.join(given)})"
            words.append(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
        return f"function {words[-1]}"

    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        return self._values(x, operands)[-1].to(x.dtype)

    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        values = self._values(before, operands)
        pulled = [torch.zeros_like(v) for v in values]
        pulled[-1] = grad.to(values[-1].dtype)
        for at in reversed(range(len(self.steps))):
            name, *arguments = self.steps[at]
            given = [self._given(a, values, operands) for a in arguments]
            parts = OPERATIONS[name].pull(pulled[at + 1], values[at + 1], *given)
            for argument, part in zip(arguments, parts, strict=True):
                if isinstance(argument, int):
                    pulled[argument] = pulled[argument] + part
                elif argument is None and self.slot is not None:
                    add_gradient(gradients, self.slot, part)
        return pulled[0].to(before.dtype)

    def _values(self, x: Tensor, operands: Tensors) -> list[Tensor]:
        """The score and the results of all steps, in the dtype that PyTorch computes in."""
        values = [x.to(opmath(x.dtype))]
        for name, *arguments in self.steps:
            given = (self._given(a, values, operands) for a in arguments)
            values.append(OPERATIONS[name].compute(*given))
        return values

    def _given(self, argument: Any, values: list[Tensor], operands: Tensors) -> Any:
        if argument is None and self.slot is not None:
            return operands[self.slot]
        return values[argument] if isinstance(argument, int) else argument

    def hidden(self, fill: float) -> float | None:
        return None if self.slot is not None else _level(self.steps, fill)

    @classmethod
    def samples(cls, draw: Draw) -> list[Sample]:
        gelu = (("div", 0, math.sqrt(2)), ("erf", 1), ("add", 2, 1.0), ("mul", 0, 3), ("mul", 4, 0.5))
        vanishing = (("abs", 0), ("neg", 1), ("exp", 2), ("log1p", 3), ("expm1", 2), ("add", 4, 5))
        mean = (("abs", 0), ("add", 1, 1.0), ("log", 2))
        lengths = (("mul", 0, 0), ("add", 1, 1.0), ("sqrt", 2), ("rsqrt", 2))
        return [
            (cls((("sigmoid", 0), ("mul", 0, 1))), ()),
            (cls(gelu), ()),
            (cls((("min", 0, 0.0), ("exp", 1), ("sub", 2, 1.0), ("max", 0, 3))), ()),
            (cls((*vanishing, ("relu", 0), ("add", 6, 7))), ()),
            (cls(mean), ()),
            (cls((*lengths, ("div", 0, 3), ("mul", 5, 4))), ()),
            (cls((("tanh", 0), ("exp2", 1), ("pow", 2, 3.0), ("pow", 2.0, 1), ("min", 3, 4))), ()),
            (cls((("add", 0, None), ("sigmoid", 1), ("mul", 0, 2)), 0, "hj"), (draw.normal("hj"),)),
            (cls((("max", 0, None),), 0, "ij"), (draw.normal("ij"),)),
        ]  # fmt: skip


@functools.lru_cache(maxsize=512)
def _level(steps: tuple[tuple[Any, ...], ...], fill: float) -> float | None:
    """A function's value at a fill; None if that is no number, or is infinite in single precision alone."""
    single, double = (_value_at(steps, fill, dtype) for dtype in (torch.float32, torch.float64))
    if math.isnan(single) or math.isfinite(single) != math.isfinite(double):
        return None
    return double


def _value_at(steps: tuple[tuple[Any, ...], ...], at: float, dtype: torch.dtype) -> float:
    """A function's value in a dtype; NaN where there is none."""
    values = [at]
    for name, *arguments in steps:
        given = tuple((values[a] if isinstance(a, int) else a, dtype) for a in arguments)
        result = folded(name, given, dtype)
        values.append(math.nan if result is None else float(result.real))
    return values[-1]


__all__ = ["OPERATIONS", "Function", "Operation"]
