"""Sums, maxima and running sums."""

from __future__ import annotations

import functools

import torch

from fusepass.dialects.handlers import (
    HANDLERS,
    Handler,
    Result,
    Value,
    are_integers,
    dim_of,
    handles,
    reshape,
)
from fusepass.dialects.torch.views import slice_dim
from fusepass.expressions.index import prod, simplify_size
from fusepass.expressions.ir import Expr, cast, const, expr, opmath, pointwise

#: ``all`` and ``any`` of at most this many truth values are written out.
_FEW = 8


def _dims(dim: Value, rank: int) -> tuple[int, ...] | None:
    """The dimensions that are reduced, in order; None if they are not known."""
    if dim is None:
        return tuple(range(rank))
    given = dim if isinstance(dim, (tuple, list)) else (dim,)
    return tuple(sorted(dim_of(d, rank) for d in given)) if are_integers(given) else None


def _reduce(op: str) -> Handler:
    def handler(r: Result, x: Expr, dim: Value = None, keepdim: bool = False, **kw: Value) -> Expr | None:
        dims = _dims(kw.get("axis", dim), x.rank)
        if dims is None:
            return None
        wide = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
        reduced = expr(op, (cast(x, r.dtype) if op == "sum" else x,), (dims,), wide, r.dtype)
        return reshape(reduced, r.shape)

    return handler


def _truth(op: str) -> Handler:
    """``all`` or ``any`` of a few truth values, written out."""

    def handler(r: Result, x: Expr, dim: Value = None, keepdim: bool = False) -> Expr | None:
        if not isinstance(dim, int) or not x.rank or r.dtype is not torch.bool:
            return None
        d = dim_of(dim, x.rank)
        count = x.shape[d]
        if not isinstance(count, int) or not 0 < count <= _FEW:
            return None
        shape = (*x.shape[:d], *x.shape[d + 1 :])
        parts = [cast(expr("select", (x,), (d, n), shape, x.dtype), torch.bool) for n in range(count)]
        return reshape(functools.reduce(lambda a, b: pointwise(op, a, b), parts), r.shape)

    return handler


HANDLERS["all"], HANDLERS["any"] = _truth("and"), _truth("or")
HANDLERS["sum"] = _total = _reduce("sum")
HANDLERS["amax"] = _reduce("amax")
HANDLERS["logsumexp"] = _reduce("logsumexp")


@handles("cumsum")
def _cumsum(r: Result, x: Expr, dim: int) -> Expr:
    return expr("cumsum", (x,), (dim_of(dim, x.rank),), r.shape, r.dtype)


@handles("diff")
def _diff(
    r: Result, x: Expr, n: int = 1, dim: int = -1, prepend: Value = None, append: Value = None
) -> Expr | None:
    d = dim_of(dim, x.rank)
    parts = [p for p in (prepend, x, append) if isinstance(p, Expr)]
    if n != 1 or x.dtype is torch.bool:  # for booleans it is the exclusive or
        return None
    length = simplify_size(r.shape[d] + 1)
    whole = (
        x
        if len(parts) == 1
        else expr("cat", tuple(parts), (d,), (*x.shape[:d], length, *x.shape[d + 1 :]), x.dtype)
    )
    return pointwise(
        "sub", slice_dim(whole, d, 1, r.shape[d]), slice_dim(whole, d, 0, r.shape[d]), dtype=r.dtype
    )


@handles("mean")
def _mean(r: Result, x: Expr, dim: Value = None, keepdim: bool = False, **kw: Value) -> Expr | None:
    dims = _dims(kw.get("axis", dim), x.rank)
    if dims is None or not x.rank:
        return None
    count, total = prod(x.shape[d] for d in dims), _total(r, x, dims, keepdim)
    if not isinstance(total, Expr) or not r.facts.at_most(1, count):
        return None
    if isinstance(count, int):
        return pointwise("div", total, const(float(count), opmath(r.dtype)), dtype=r.dtype)
    return pointwise("div", total, expr("iota", (), (count, 0), (), torch.int64), dtype=r.dtype)


def _extreme(op: str) -> Handler:
    def handler(r: Result, x: Expr, other: Value = None) -> Expr | None:
        if other is None and op == "max":
            return reshape(expr("amax", (x,), (tuple(range(x.rank)),), (1,) * x.rank, r.dtype), r.shape)
        if not isinstance(other, Expr):
            return None  # max(dim) returns two results: the reader handles it
        return pointwise(op, x, other, dtype=r.dtype)

    return handler


HANDLERS["max"], HANDLERS["min"] = _extreme("max"), _extreme("min")
