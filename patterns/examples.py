"""Small expressions for the law tests of the rules."""

from __future__ import annotations

import torch

from fusepass.expressions.ir import Expr, const, expr, leaf, pointwise

__all__ = ["binary", "bits", "cast", "expr", "leaf", "number", "reduced", "scores", "softmax"]

B, H, Q, K, D = 2, 3, 5, 6, 4


def scores(name: str = "s") -> Expr:
    """Scores ``[B, H, Q, K]``: the product of queries and keys."""
    q, k = leaf(f"{name}_q", (B, H, Q, D), torch.float64), leaf(f"{name}_k", (B, H, K, D), torch.float64)
    return expr("dot", (q, k), ("abmk", "abnk", "abmn"), (B, H, Q, K), torch.float64)


def cast(x: Expr, dtype: torch.dtype = torch.float32) -> Expr:
    """``x`` in another dtype."""
    return expr("cast", (x,), (dtype,), x.shape, dtype)


def number(value: float) -> Expr:
    """A float64 constant."""
    return const(value, torch.float64)


def bits(name: str = "m") -> Expr:
    """A boolean tensor ``[B, 1, Q, K]``."""
    return leaf(name, (B, 1, Q, K), torch.bool)


def binary(op: str, x: Expr, y: Expr) -> Expr:
    """A float64 pointwise node (boolean where ``op`` compares)."""
    return pointwise(op, x, y)


def reduced(op: str, x: Expr) -> Expr:
    """A reduction of the last dimension, kept as size 1."""
    return expr(op, (x,), ((x.rank - 1,),), (*x.shape[:-1], 1), x.dtype)


def softmax(x: Expr) -> Expr:
    """Softmax over the last dimension."""
    return expr("softmax", (x,), (x.rank - 1,), x.shape, x.dtype)
