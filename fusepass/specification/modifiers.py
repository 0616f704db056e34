"""Modifiers: what is done to scores and weights.  Each is a class that says everything about itself.

A modifier is frozen data.  Methods without a safe default are abstract, so that a class that forgets one
cannot be instantiated: its text, its meaning, its derivative, and samples for the tests of its laws.  All
other methods default to the cautious answer: a scale cannot pass the modifier, the modifier may show again
what was hidden before it, and so on.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from fusepass.specification.samples import Draw

#: Every modifier class by its name.  Programs are written with these names (:mod:`.program`).
KINDS: dict[str, type[Modifier]] = {}
#: A modifier and the tensors of its slots, which are numbered from 0.
Sample = tuple["Modifier", tuple[Tensor, ...]]
Tensors = Sequence[Tensor]
_Kind = TypeVar("_Kind", bound="Modifier")


class Modifier(ABC):
    """One step of the computation.

    A field called ``slot``, or whose name ends in ``_slot``, is the number of an operand, or None; an operand
    is broadcastable to ``[B, H, Q, K]``.  Other fields are numbers, texts, truth values, or tuples of these.
    ``repeats``: several in a row equal a single one with another operand, so a kernel that takes one takes
    any number of them.
    """

    repeats: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = KINDS.get(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two modifiers are called {cls.__name__!r}: {known} and {cls}")
        KINDS[cls.__name__] = cls

    @abstractmethod
    def __str__(self) -> str:
        """A few words for people."""

    @classmethod
    @abstractmethod
    def samples(cls, draw: Draw) -> Sequence[Sample]:
        """Typical modifiers with their operands, one for every case of its meaning."""

    @classmethod
    def slot_fields(cls) -> Iterator[str]:
        """The names of the fields that number operands."""
        return (f.name for f in fields(cls) if f.name == "slot" or f.name.endswith("_slot"))  # type: ignore[arg-type]

    def slots(self) -> list[int]:
        """The numbers of the operands that it reads."""
        return [slot for name in self.slot_fields() if (slot := getattr(self, name)) is not None]


class Step(Modifier):
    """A modifier that maps ``[B, H, Q, K]`` to ``[B, H, Q, K]``."""

    @abstractmethod
    def apply(self, x: Tensor, operands: Tensors) -> Tensor:
        """What it computes."""

    @abstractmethod
    def backward(self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]) -> Tensor:
        """The gradient of the input ``before``, given ``grad``, that of the result.

        The gradients of the operands are added to ``gradients``, which has one tensor per slot.
        """


class ScoreModifier(Step):
    """A step between the product of queries and keys and the softmax."""

    def scaled(self, factor: float) -> ScoreModifier | None:
        """The ``M'`` with ``M(s) * factor == M'(s * factor)``; None where a scale does not pass."""
        return None

    def hidden(self, fill: float) -> float | None:
        """What this step makes of a hidden score, one that was set to ``fill``, far below all others.

        The sum of ``fill`` and a number of ordinary size counts as ``fill``.  None where it is not known.
        """
        return None

    def keeps_level(self, fill: float, dtype: torch.dtype) -> bool:
        """Does a row in which every score is ``fill``, in ``dtype``, hold a single number afterwards?"""
        return False

    @property
    def keeps_shift(self) -> bool:
        """Does a shift of a whole row before it remain a shift of the whole row after it, scaled or not?"""
        return False


class WeightModifier(Step):
    """A step between the softmax and the product with the values."""


def kinds(of: Callable[..., _Kind]) -> list[type[_Kind]]:
    """The concrete subclasses of a modifier class."""
    base = cast("type[_Kind]", of)
    return [k for k in KINDS.values() if issubclass(k, base) and not inspect.isabstract(k)]


def add_gradient(gradients: list[Tensor], slot: int, grad: Tensor) -> None:
    """Add the gradient of an operand, summed over the dimensions in which it is broadcast."""
    if gradients[slot].is_floating_point():
        gradients[slot] = gradients[slot] + grad.sum_to_size(gradients[slot].shape).to(gradients[slot].dtype)
