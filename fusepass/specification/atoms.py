"""Visibilities by name, and fills: the vocabulary of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusepass.expressions.index import Facts, Size


@dataclass(frozen=True)
class Band:
    """``i - left <= j <= i + right``; None is unbounded.  ``Band(None, 0)`` is causal, aligned top-left."""

    left: Size | None
    right: Size | None

    def __str__(self) -> str:
        if self.left is None and self.right == 0:
            return "causal"
        if self.left is None:
            return f"causal+{self.right}"
        if self.right == 0 and self.left != 0:
            return f"window({self.left})"
        if _reaches(self.left) and _reaches(self.right) and (self.left, self.right) != (0, 0):
            return f"window({self.left}, {self.right})"
        return f"band({self.left}, {'' if self.right is None else self.right})"


def _reaches(bound: Size | None) -> bool:
    """Is there a bound, and is it not known to be negative?"""
    return bound is not None and (not isinstance(bound, int) or bound >= 0)


@dataclass(frozen=True)
class Window:
    """A band over blocks of positions, or along one axis of a grid of positions.

    All queries of one block of ``size`` positions see the same keys: from ``left`` positions before the
    block's first to ``right`` positions after its last.  None is unbounded.  ``axis`` is the number of the
    grid's axis; None where positions have only one axis.
    A window that is ``whole`` moves inwards at the edges instead of losing keys there.  ``step`` is its
    dilation: of ``step`` neighbouring keys one is visible.
    """

    left: Size | None
    right: Size | None
    size: Size = 1
    axis: int | None = None
    whole: bool = False
    step: int = 1

    def __str__(self) -> str:
        bounds = ", ".join("" if b is None else str(b) for b in (self.left, self.right))
        blocks = "" if self.size == 1 else f" of blocks of {self.size}"
        blocks += "" if self.step == 1 else f" in steps of {self.step}"
        whole = ", whole at the edges" if self.whole else ""
        return f"window({bounds}{whole}){blocks}" + ("" if self.axis is None else f" along axis {self.axis}")


@dataclass(frozen=True)
class KeyPadding:
    """Keys are hidden by a tensor that varies over ``b`` and ``j`` alone (or ``j`` alone)."""

    def __str__(self) -> str:
        return "key padding"


@dataclass(frozen=True)
class Prefix:
    """A band, usually causal, except that all queries also see certain keys, usually those below a bound."""

    def __str__(self) -> str:
        return "prefix"


@dataclass(frozen=True)
class Chunk:
    """Queries see the keys of their own block of ``size`` positions."""

    size: int

    def __str__(self) -> str:
        return f"chunk({self.size})"


@dataclass(frozen=True)
class Document:
    """Queries see the keys that carry the same label."""

    def __str__(self) -> str:
        return "document"


@dataclass(frozen=True)
class Dense:
    """Any other visibility, given as a tensor over the letters in ``axes``."""

    axes: str

    def __str__(self) -> str:
        return f"mask[{self.axes}]"


Atom = Band | Window | KeyPadding | Prefix | Chunk | Document | Dense


def intersect(bands: Sequence[Band], facts: Facts) -> Band | None:
    """The intersection of several bands; None where two bounds cannot be ordered."""
    left: Size | None = None
    right: Size | None = None
    for band in bands:
        for mine, theirs in ((left, band.left), (right, band.right)):
            if (
                mine is not None
                and theirs is not None
                and not (facts.at_most(mine, theirs) or facts.at_most(theirs, mine))
            ):
                return None
        if band.left is not None and (left is None or facts.at_most(band.left, left)):
            left = band.left
        if band.right is not None and (right is None or facts.at_most(band.right, right)):
            right = band.right
    return Band(left, right)


def negligible(fill: float, dtype: torch.dtype) -> bool:
    """Does ``exp`` of a score replaced by ``fill`` vanish beside any score of ordinary size?

    True for ``-inf``, for the most negative number of the dtype, and below ``-1e8``.  Fills such as
    ``-1e4`` are within reach of real scores and are kept as they are.  NaN hides nothing.
    """
    lowest = torch.finfo(dtype).min if dtype.is_floating_point else -1e8
    return fill == -math.inf or fill <= max(-1e8, lowest * 0.99)


def rounds_scores(size: float, dtype: torch.dtype, most: float = 1 / 16) -> bool:
    """May adding a number of this size to a score change the score by more than ``most`` through rounding?"""
    return size * torch.finfo(dtype).eps > most


def absorbs(fill: float, dtype: torch.dtype, most: float = 1e8) -> bool:
    """Does adding any number of ordinary size, up to ``most``, leave ``fill`` unchanged in ``dtype``?"""
    return -fill * torch.finfo(dtype).eps / 2 > most


__all__ = [
    "Atom", "Band", "Chunk", "Dense", "Document", "KeyPadding", "Prefix", "Window",
    "absorbs", "intersect", "negligible", "rounds_scores",
]  # fmt: skip
