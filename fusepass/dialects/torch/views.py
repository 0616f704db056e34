"""Views, selections and repetitions: the same elements under another index."""

from __future__ import annotations

import sympy
import torch

from fusepass.dialects.handlers import (
    Result,
    Value,
    are_integers,
    are_sizes,
    arg_exprs,
    dim_of,
    handles,
    ints,
    permute,
    reshape,
    view,
)
from fusepass.expressions.index import Size, simplify_size
from fusepass.expressions.ir import Expr, Shape, expr


@handles(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "view_as",
    "reshape_as",
    "view_copy",
    "ravel",
)
def _reshape(r: Result, x: Expr, *args: Value, **_: Value) -> Expr | None:
    if args and isinstance(args[0], torch.dtype):
        return None
    return reshape(x, r.shape)


@handles("permute")
def _permute(r: Result, x: Expr, *dims: Value, **kw: Value) -> Expr | None:
    order = ints(dims or tuple(kw.values()))
    return permute(x, tuple(order)) if are_integers(order) else None


@handles("transpose", "swapaxes", "swapdims")
def _transpose(r: Result, x: Expr, dim0: int, dim1: int) -> Expr:
    dims = list(range(x.rank))
    a, b = dim_of(dim0, x.rank), dim_of(dim1, x.rank)
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return permute(x, tuple(dims))


@handles("t", "T", "numpy_T")
def _t(r: Result, x: Expr) -> Expr:
    return permute(x, tuple(reversed(range(x.rank))))


@handles("mT", "mH", "adjoint")
def _mt(r: Result, x: Expr) -> Expr:
    return _transpose(r, x, -2, -1)


@handles("movedim", "moveaxis")
def _movedim(r: Result, x: Expr, source: Value, destination: Value) -> Expr | None:
    given = [d if isinstance(d, (tuple, list)) else (d,) for d in (source, destination)]
    if not all(map(are_integers, given)) or x.rank == 0:
        return x if x.rank == 0 else None
    src, dst = ([dim_of(d, x.rank) for d in dims] for dims in given)
    rest = [d for d in range(x.rank) if d not in src]
    order = [-1] * x.rank
    for s, d in zip(src, dst, strict=True):
        order[d] = s
    return permute(x, tuple(o if o >= 0 else rest.pop(0) for o in order))


@handles("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(r: Result, x: Expr, *_: Value, **__: Value) -> Expr:
    return view("expand", x, r.shape)


@handles("repeat", "tile")
def _repeat(r: Result, x: Expr, *sizes: Value, **kw: Value) -> Expr | None:
    repeats = ints(sizes or tuple(kw.values()))
    if not are_sizes(repeats) or len(repeats) < x.rank:
        return None
    repeats = (1,) * (x.rank - len(repeats)) + tuple(repeats)
    padded = reshape(x, (1,) * (len(repeats) - x.rank) + x.shape)
    wide: list[Size] = []
    narrow: list[Size] = []
    for n, size in zip(repeats, padded.shape, strict=True):
        narrow += [1, size]
        wide += [n, size]
    return reshape(view("expand", reshape(padded, tuple(narrow)), tuple(wide)), r.shape)


@handles("repeat_interleave")
def repeat_interleave(r: Result, x: Expr, repeats: Value, dim: int | None = None, **_: Value) -> Expr | None:
    if dim is None or not are_sizes((repeats,)):
        return None
    d = dim_of(dim, x.rank)
    thin = reshape(x, (*x.shape[: d + 1], 1, *x.shape[d + 1 :]))
    return reshape(view("expand", thin, (*x.shape[: d + 1], repeats, *x.shape[d + 1 :])), r.shape)


def slice_dim(x: Expr, dim: int, start: Size, length: Size, step: Size = 1) -> Expr:
    """``x[..., start : start + length*step : step, ...]``."""
    if start == 0 and step == 1 and length == x.shape[dim]:
        return x
    shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
    return expr("slice", (x,), (dim, start, step), shape, x.dtype)


def slice_start(start: Value, size: Size) -> Size | None:
    """The first index of a slice, counted from the front; None if the sign of ``start`` is not known."""
    if start is None:
        return 0
    if isinstance(start, int):
        if start >= 0:
            return min(start, size) if isinstance(size, int) else start
        return max(0, size + start) if isinstance(size, int) else simplify_size(size + start)
    return simplify_size(start) if isinstance(start, sympy.Expr) and start.is_nonnegative else None


@handles("slice", "slice_copy")
def _slice(
    r: Result, x: Expr, dim: int = 0, start: Value = None, end: Value = None, step: Value = 1
) -> Expr | None:
    d = dim_of(dim, x.rank)
    first = slice_start(start, x.shape[d]) if are_sizes((step,)) else None
    return None if first is None else slice_dim(x, d, first, r.shape[d], step)


@handles("narrow")
def _narrow(r: Result, x: Expr, dim: int, start: Value, length: Value) -> Expr | None:
    return _slice(r, x, dim, start)


@handles("select", "select_copy")
def _select(r: Result, x: Expr, dim: int, index: Value) -> Expr | None:
    d = dim_of(dim, x.rank)
    at = slice_start(index, x.shape[d]) if not isinstance(index, Expr) else None
    return None if at is None else expr("select", (x,), (d, at), r.shape, x.dtype)


@handles("unbind")
def _unbind(r: Result, x: Expr, dim: int = 0) -> Value:
    d = dim_of(dim, x.rank)
    count = x.shape[d]
    if not isinstance(count, int):
        return None
    shape = x.shape[:d] + x.shape[d + 1 :]
    return tuple(expr("select", (x,), (d, i), shape, x.dtype) for i in range(count))


@handles(
    "split",
    "split_with_sizes",
    "tensor_split",
    "chunk",
    "unsafe_split",
    "unsafe_chunk",
    "split_with_sizes_copy",
)
def _split(r: Result, x: Expr, *_: Value, **kw: Value) -> Value:
    return None  # the reader knows the shapes of the parts: see parts_of


def parts_of(x: Expr, shapes: list[Shape], dim: int) -> tuple[Expr, ...]:
    """Consecutive slices of ``x`` along ``dim``, with the given shapes."""
    d, start, out = dim_of(dim, x.rank), 0, []
    for shape in shapes:
        out.append(slice_dim(x, d, start, shape[d]))
        start = simplify_size(start + shape[d])  # type: ignore[assignment]
    return tuple(out)


@handles("flip")
def _flip(r: Result, x: Expr, *dims: Value) -> Expr | None:
    given = ints(dims)
    return view("flip", x, x.shape, tuple(dim_of(d, x.rank) for d in given)) if are_integers(given) else None


def getitem(r: Result, x: Expr, key: Value) -> Expr | None:
    """Basic and advanced indexing ``x[key]``."""
    keys = list(key) if isinstance(key, tuple) else [key]
    used = sum(
        k.rank if isinstance(k, Expr) and k.dtype is torch.bool else 1
        for k in keys
        if k is not None and k is not Ellipsis
    )
    if Ellipsis in [k for k in keys if not isinstance(k, Expr)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.rank - used)
    else:
        keys += [slice(None)] * (x.rank - used)
    if any(isinstance(k, Expr) for k in keys):
        return _advanced(r, x, keys)
    return _basic(r, x, keys)


def _basic(r: Result, x: Expr, keys: list[Value]) -> Expr | None:
    out, dim, new_shape = x, 0, list(r.shape)
    position = 0
    for k in keys:
        if k is None:
            position += 1
        elif isinstance(k, slice):
            first = slice_start(k.start, out.shape[dim])
            step = 1 if k.step is None else k.step
            if first is None or not isinstance(step, int) or step < 1:
                return None
            out = slice_dim(out, dim, first, new_shape[position], step)
            dim, position = dim + 1, position + 1
        elif isinstance(k, (int, sympy.Expr)) and not isinstance(k, bool):
            at = slice_start(k, out.shape[dim])
            if at is None:
                return None
            out = expr("select", (out,), (dim, at), out.shape[:dim] + out.shape[dim + 1 :], out.dtype)
        else:
            return None
    if out.rank + keys.count(None) != len(r.shape):
        return None  # ``x[[0, 1]]``: a list of indices, not an index for two dimensions
    return reshape(out, r.shape)


def _advanced(r: Result, x: Expr, keys: list[Value]) -> Expr | None:
    """Indexing with adjacent integer tensors: ``mask[batch, key]``, ``table[:, bucket]``."""
    if any(k is None or isinstance(k, bool) or (isinstance(k, Expr) and k.dtype is torch.bool) for k in keys):
        return None
    if any(isinstance(k, slice) and k != slice(None) for k in keys) or len(keys) != x.rank:
        return None
    at = [i for i, k in enumerate(keys) if not isinstance(k, slice)]
    if at != list(range(at[0], at[-1] + 1)):
        return None
    indices = arg_exprs(r, *(keys[i] for i in at))
    return None if indices is None else expr("index", (x, *indices), (at[0],), r.shape, x.dtype)


@handles("index")
def _index(r: Result, x: Expr, indices: tuple[Value, ...]) -> Expr | None:
    return getitem(r, x, tuple(slice(None) if i is None else i for i in indices))


@handles("index_select")
def _index_select(r: Result, x: Expr, dim: int, index: Expr) -> Expr | None:
    if x.rank == 0:
        return None
    return expr("index", (x, index), (dim_of(dim, x.rank),), r.shape, x.dtype)


@handles("embedding")
def _embedding(r: Result, a: Expr, b: Expr, *_: Value, **__: Value) -> Expr | None:
    # F.embedding(indices, table) and aten.embedding(table, indices)
    table, index = (b, a) if not a.is_float else (a, b)
    return expr("index", (table, index), (0,), r.shape, table.dtype)
