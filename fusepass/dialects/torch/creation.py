"""Tensors made from numbers: ranges, constants, triangles, fills."""

from __future__ import annotations

import sympy
import torch

from fusepass.dialects.handlers import HANDLERS, Handler, Result, Value, as_expr, handles, reshape, view
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Expr, Shape, cast, const, expr, pointwise, scalar_of


@handles("arange")
def _arange(r: Result, *args: Value, **kw: Value) -> Expr | None:
    start, step = 0, 1
    if len(args) >= 2:
        start = args[0]
    if len(args) >= 3:
        step = args[2]
    start, step = kw.get("start", start), kw.get("step", step)
    if not all(isinstance(v, (int, sympy.Expr)) for v in (start, step)):
        return None
    base = expr("iota", (), (start, step), r.shape, torch.int64)
    return cast(base, r.dtype)


def _full_handler(value: float) -> Handler:
    return lambda r, *_, **__: filled(r, value)


def filled(r: Result, value: float | int | bool) -> Expr:
    """A constant with the result's shape."""
    return view("expand", const(value, r.dtype), r.shape)


for _name in ("zeros", "zeros_like", "new_zeros"):
    HANDLERS[_name] = _full_handler(0)
for _name in ("ones", "ones_like", "new_ones"):
    HANDLERS[_name] = _full_handler(1)


@handles("full", "full_like", "new_full")
def _full(r: Result, first: Value, *args: Value, fill_value: Value = None, **_: Value) -> Expr | None:
    value = fill_value if fill_value is not None else (args[-1] if args else None)
    if isinstance(value, Expr):
        return view("expand", cast(value, r.dtype), r.shape) if value.rank == 0 else None
    return filled(r, value) if isinstance(value, (int, float)) else None


HANDLERS["full_like"] = lambda r, first, *args, **kw: _full(r, first, *args[:1], **kw)
HANDLERS["full"] = lambda r, first, *args, **kw: _full(r, first, *args[:1], **kw)
HANDLERS["new_full"] = lambda r, x, first, *args, **kw: _full(r, first, *args[:1], **kw)


@handles("scalar_tensor", "tensor", "as_tensor", "new_tensor")
def _tensor(r: Result, *args: Value, **_: Value) -> Expr | None:
    if not args:
        return None
    value = args[-1] if len(args) < 3 else args[0]
    return filled(r, value) if isinstance(value, (int, float)) and not r.shape else None


def within(x: Expr, dim: int, start: Size, stop: Size) -> Expr:
    """``start <= n < stop`` for the index ``n`` of one dimension, broadcastable to ``x``."""
    size = x.shape[dim]
    n = reshape(expr("iota", (), (0, 1), (size,), torch.int64), (size,) + (1,) * (x.rank - dim - 1))
    low, high = as_expr(start), as_expr(stop)
    assert low is not None and high is not None
    return pointwise("and", pointwise("ge", n, low), pointwise("lt", n, high))


@handles("copy")
def _copy(r: Result, x: Expr, source: Value, *_: Value) -> Expr | None:
    return view("expand", cast(source, x.dtype), x.shape) if isinstance(source, Expr) else None


@handles("fill", "fill_scalar")
def _fill(r: Result, x: Expr, value: Value) -> Expr | None:
    if isinstance(value, Expr):
        value = scalar_of(value)
    return filled(r, value) if isinstance(value, (int, float)) else None


@handles("zero")
def _zero(r: Result, x: Expr) -> Expr:
    return filled(r, 0)


@handles("eye")
def _eye(r: Result, *_: Value, **__: Value) -> Expr | None:
    if len(r.shape) != 2:
        return None
    rows, columns = r.shape
    row = reshape(expr("iota", (), (0, 1), (rows,), torch.int64), (rows, 1))
    same = pointwise("eq", row, expr("iota", (), (0, 1), (columns,), torch.int64))
    return cast(same, r.dtype)


@handles("tril")
def _tril(r: Result, x: Expr, diagonal: Value = 0) -> Expr | None:
    return triangle(r, x, diagonal, "le")


@handles("triu")
def _triu(r: Result, x: Expr, diagonal: Value = 0) -> Expr | None:
    return triangle(r, x, diagonal, "ge")


def triangle(r: Result, x: Expr, diagonal: Value, op: str) -> Expr | None:
    """``where(column - row <= diagonal, x, 0)``, in which ``op`` ("le", "ge") is the comparison."""
    k = as_expr(diagonal)
    if k is None:
        return None
    inside = diagonals(x.shape, op, k, x.rank - 2, x.rank - 1)
    return pointwise("where", inside, x, const(0, x.dtype), dtype=x.dtype)


def diagonals(shape: Shape, op: str, k: Expr, row: int, column: int) -> Expr:
    """``column - row <= k`` for the indices of two dimensions of a shape, broadcastable to it.

    The comparison is ``op``: "le", "ge" or "eq".
    """
    first, rank = min(row, column), len(shape)

    def along(dim: int) -> Expr:
        n = shape[dim]
        wide = tuple(n if d == dim else 1 for d in range(first, rank))
        return reshape(expr("iota", (), (0, 1), (n,), torch.int64), wide)

    return pointwise(op, pointwise("sub", along(column), along(row)), k)


@handles("fill_diagonal")
def _fill_diagonal(r: Result, x: Expr, fill_value: Value, wrap: bool = False) -> Expr | None:
    value = as_expr(fill_value, x.dtype)
    if value is None or value.rank or x.rank != 2 or wrap:
        return None
    return pointwise("where", diagonals(x.shape, "eq", const(0, torch.int64), 0, 1), value, x, dtype=x.dtype)


def diagonal_filled(x: Expr, value: Expr, offset: Value = 0, dim1: int = 0, dim2: int = 1) -> Expr | None:
    """``x`` after a constant is written to ``x.diagonal(offset, dim1, dim2)``; None if it is not constant."""
    known, k = scalar_of(value), as_expr(offset)
    if known is None or k is None:
        return None
    inside = diagonals(x.shape, "eq", k, dim1 % x.rank, dim2 % x.rank)
    return pointwise("where", inside, const(known, x.dtype), x, dtype=x.dtype)
