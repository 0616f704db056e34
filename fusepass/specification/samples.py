"""Random tensors for the samples of modifiers: what the tests of their laws run on."""

from __future__ import annotations

import torch
from torch import Tensor

#: Sizes of the scores ``[B, H, Q, K]``, no two of them alike.
SIZES = {"b": 2, "h": 4, "i": 5, "j": 6}


class Draw:
    """Draws operands: float64 or boolean, of size 1 in the letters that they do not vary over."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, axes: str) -> Tensor:
        """Numbers of ordinary size and either sign."""
        return torch.randn(self._shape(axes), generator=self._generator, dtype=torch.float64)

    def bits(self, axes: str) -> Tensor:
        """Truth values, about two in three of them true; the third key is true for every query."""
        bits = torch.rand(self._shape(axes), generator=self._generator) < 0.65
        if "j" in axes:
            bits[..., 2] = True
        return bits

    def _shape(self, axes: str) -> list[int]:
        return [size if letter in axes else 1 for letter, size in SIZES.items()]


__all__ = ["SIZES", "Draw"]
