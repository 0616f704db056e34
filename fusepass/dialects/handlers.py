"""The registry of operations, and what every handler is made of.

A handler gets the operands as values (an ``Expr`` for a tensor, Python numbers, sympy sizes) and the result's
shape and dtype, and returns the meaning of the node, or None where it is not looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch

from fusepass.index import Facts
from fusepass.ir import Expr, Shape, const, expr

Value = Any
Handler = Callable[..., Value]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True)
class Result:
    """What is known of a node before its meaning: result type, size facts, a name no other node has."""

    shape: Shape
    dtype: torch.dtype
    facts: Facts
    unique: str


HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[H], H]:
    """Register a handler under every name of its operation."""

    def register(handler: H) -> H:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def as_expr(value: Value, like: torch.dtype = torch.float32) -> Expr | None:
    """A tensor operand or a number as an expression."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return const(value, torch.bool)
    if isinstance(value, int):
        return const(value, torch.int64)
    if isinstance(value, float):
        return const(value, like if like.is_floating_point else torch.float32)
    if isinstance(value, sympy.Expr):
        return expr("iota", (), (value, 0), (), torch.int64)  # a size as a rank-0 number: start + 0*n
    return None


def view(op: str, x: Expr, shape: Shape, *attrs: Any) -> Expr:
    """A view node; the operand itself where nothing changes."""
    if op in ("reshape", "expand") and shape == x.shape:
        return x
    return expr(op, (x,), attrs, shape, x.dtype)


def reshape(x: Expr, shape: Shape) -> Expr:
    """``x`` re-read as ``shape`` (of the same extent)."""
    while x.op == "reshape":
        x = x.args[0]
    return view("reshape", x, shape)


def permute(x: Expr, dims: tuple[int, ...]) -> Expr:
    """Dimensions reordered."""
    dims = tuple(d % x.rank for d in dims) if x.rank else ()
    if dims == tuple(range(x.rank)):
        return x
    if x.op == "permute":
        inner: tuple[int, ...] = x.attrs[0]
        return permute(x.args[0], tuple(inner[d] for d in dims))
    return view("permute", x, tuple(x.shape[d] for d in dims), dims)


def dim_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def ints(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """``f(1, 2)`` and ``f((1, 2))`` alike."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return tuple(values[0])
    return values


def arg_exprs(r: Result, *values: Value) -> tuple[Expr, ...] | None:
    """Every operand as an expression, or None where one is not."""
    like = next((v.dtype for v in values if isinstance(v, Expr) and v.is_float), torch.float32)
    out = tuple(as_expr(v, like) for v in values)
    return None if any(o is None for o in out) else out  # type: ignore[return-value]
