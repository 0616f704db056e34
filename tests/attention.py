"""The simplest attention, as functions and as a module; its queries also serve as keys and values."""

import torch
from torch import Tensor

Q = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * 0.25 / 5).tanh() * 5).softmax(-1) @ v


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with heads and head size in one dimension, as the next layer reads it."""
    return ((q @ k.transpose(-1, -2) * 0.1).softmax(-1) @ v).flatten(2)


def cleared(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
    scores = q @ k.mT
    cache.zero_()
    return scores.softmax(-1) @ v


def random_heads(length: int = 8) -> list[Tensor]:
    """Queries, keys and values ``[2, 2, length, 8]``."""
    return [torch.randn(2, 2, length, 8) for _ in range(3)]


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v)
