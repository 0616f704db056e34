"""Writes by index: ``x[..., i, j] = c``, ``index_put``, ``index_fill``, ``scatter``.

Where the same value is written everywhere, neither the order nor the number of the writes matters: the result
is ``where(hit, value, x)``.
"""

from __future__ import annotations

import sympy
import torch

from fusepass.dialects.handlers import Result, Value, as_expr, dim_of, handles, permute, reshape
from fusepass.dialects.torch.creation import diagonals, within
from fusepass.dialects.torch.views import getitem, slice_start
from fusepass.expressions.index import Facts, Size, simplify_size
from fusepass.expressions.ir import Expr, Shape, cast, const, expr, pointwise, scalar_of

#: For these operations, the neutral element ``e``: ``x op e = x`` for every number ``x``.
NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_INDICES = (torch.int64, torch.int32)


def nonzero(mask: Expr, count: Size) -> Expr:
    """The indices of the true elements of ``mask`` in order, as an int64 tensor ``[count, mask.rank]``."""
    return expr("nonzero", (mask,), (), (count, mask.rank), torch.int64)


@handles("nonzero", "argwhere")
def _nonzero(r: Result, x: Expr) -> Expr | None:
    return nonzero(cast(x, torch.bool), r.shape[0]) if x.rank else None


def _triangle_indices(op: str) -> Value:
    def handler(r: Result, row: Value, col: Value, offset: Value = 0) -> Expr | None:
        if not all(isinstance(n, (int, sympy.Expr)) for n in (row, col)):
            return None
        k = as_expr(offset)
        if k is None:
            return None
        mask = diagonals((row, col), op, k, 0, 1)
        return cast(permute(nonzero(mask, r.shape[1]), (1, 0)), r.dtype)

    return handler


handles("triu_indices")(_triangle_indices("ge"))
handles("tril_indices")(_triangle_indices("le"))


def expanded(keys: Value, rank: int) -> list[Value] | None:
    """The keys of ``x[keys]``, each for one or more dimensions, with full slices for those without a key.

    New dimensions (None) are dropped: they make no difference to where a single value is written.  The result
    is None if a key is a truth value, a tuple or a list.
    """
    given = list(keys) if isinstance(keys, tuple) else [keys]
    kept = [k for k in given if k is not None]
    if any(isinstance(k, (bool, tuple, list)) for k in kept):
        return None
    used = sum(_dims_of(k) for k in kept if k is not Ellipsis)
    full = [slice(None)] * (rank - used)
    at = next((n for n, k in enumerate(kept) if k is Ellipsis), None)
    return [*kept, *full] if at is None else [*kept[:at], *full, *kept[at + 1 :]]


def _dims_of(key: Value) -> int:
    """How many dimensions a key selects from."""
    return key.rank if isinstance(key, Expr) and key.dtype is torch.bool else 1


def hits(x: Expr, keys: Value) -> Expr | None:
    """A boolean tensor, broadcastable to ``x``, that is true at the elements of ``x[keys]``."""
    given = expanded(keys, x.rank)
    if given is None or sum(map(_dims_of, given)) != x.rank:
        return None
    out, dim = const(True, torch.bool), 0
    indices: dict[int, Expr] = {}
    masks = 0
    for key in given:
        if isinstance(key, Expr) and key.dtype is not torch.bool:
            indices[dim] = key
        else:
            selected = _selected(x, dim, key)
            if selected is None:
                return None
            masks += isinstance(key, Expr)
            out = _both(out, selected)
        dim += _dims_of(key)
    if masks > 1 or (masks and indices) or any(i.dtype not in _INDICES for i in indices.values()):
        return None
    return _both(out, hit(x.shape, indices)) if indices else out


def _both(a: Expr, b: Expr) -> Expr:
    """A conjunction; a constant among the two is known to be true."""
    return b if a.op == "const" else a if b.op == "const" else pointwise("and", a, b)


def hit(shape: Shape, indices: dict[int, Expr]) -> Expr:
    """True at the elements of ``x[indices]``, where some dimensions have an index tensor each.

    The result broadcasts to ``shape``.
    """
    dims = sorted(indices)
    compact = expr("hit", tuple(indices[d] for d in dims), (), tuple(shape[d] for d in dims), torch.bool)
    return reshape(compact, tuple(n if d in indices else 1 for d, n in enumerate(shape)))


def _selected(x: Expr, dim: int, key: Value) -> Expr | None:
    """Where ``key``, a slice, an integer or a mask, selects from the dimensions that begin at ``dim``."""
    if isinstance(key, Expr):
        end = dim + key.rank
        wide = (*[1] * dim, *x.shape[dim:end], *[1] * (x.rank - end))
        return reshape(key, wide) if key.rank else None
    size = x.shape[dim]
    if not isinstance(key, slice):
        at = slice_start(key, size) if isinstance(key, (int, sympy.Expr)) else None
        return None if at is None else within(x, dim, at, simplify_size(at + 1))
    start = slice_start(key.start, size)
    stop = size if key.stop is None else slice_start(key.stop, size)
    step = 1 if key.step is None else key.step
    if start is None or stop is None or not isinstance(step, int) or step < 1:
        return None
    if (start, stop, step) == (0, size, 1):
        return const(True, torch.bool)
    inside = within(x, dim, start, stop)
    return inside if step == 1 else pointwise("and", inside, _every(x, dim, start, step))


def _every(x: Expr, dim: int, start: Size, step: int) -> Expr:
    """``(n - start) % step == 0`` for the index ``n`` of one dimension, broadcastable to ``x``."""
    size = x.shape[dim]
    n = reshape(expr("iota", (), (-start, 1), (size,), torch.int64), (size, *[1] * (x.rank - dim - 1)))
    return pointwise("eq", pointwise("mod", n, const(step, torch.int64)), const(0, torch.int64))


def assigned(x: Expr, keys: Value, value: Expr, facts: Facts) -> Expr | None:
    """``x`` after ``x[keys] = value``, if one number is written, or combined with what is there (``+=``).

    None for any other value.
    """
    mask = hits(x, keys)
    if mask is None:
        return None
    single = _single(value, x.dtype)
    if single is not None:
        return pointwise("where", mask, single, x, dtype=x.dtype)
    if value.op in NEUTRAL and value.dtype is x.dtype:
        old = getitem(Result(value.shape, x.dtype, facts, ""), x, keys)
        number = scalar_of(value.args[1])
        if old is not None and value.args[0] is old and number is not None:
            kind = value.args[1].dtype
            change = pointwise("where", mask, const(number, kind), const(NEUTRAL[value.op], kind), dtype=kind)
            return pointwise(value.op, x, change, dtype=x.dtype)
    return None


def _single(value: Expr, dtype: torch.dtype) -> Expr | None:
    """The one number that a tensor holds everywhere, as an expression without dimensions, or None."""
    known = scalar_of(value)
    if known is not None:
        return cast(const(known, value.dtype), dtype)
    return cast(reshape(value, ()), dtype) if all(n == 1 for n in value.shape) else None


@handles("index_put")
def _index_put(
    r: Result, x: Expr, indices: tuple[Value, ...], values: Expr, accumulate: bool = False
) -> Expr | None:
    if accumulate:
        return None
    return assigned(x, tuple(slice(None) if i is None else i for i in indices), values, r.facts)


@handles("index_fill")
def _index_fill(r: Result, x: Expr, dim: int, index: Expr, value: Value) -> Expr | None:
    filler = as_expr(value, x.dtype)
    if filler is None or filler.rank or not x.rank or index.dtype not in _INDICES:
        return None
    at = hit(x.shape, {dim_of(dim, x.rank): index})
    return pointwise("where", at, cast(filler, x.dtype), x, dtype=x.dtype)


@handles("scatter")
def _scatter(
    r: Result, x: Expr, dim: int, index: Expr, src: Value = None, value: Value = None
) -> Expr | None:
    """``scatter`` of one number: in the other dimensions, an index writes at its own position."""
    filler = as_expr(src if value is None else value, x.dtype)
    single = None if filler is None else _single(filler, x.dtype)
    if single is None or not x.rank or index.rank != x.rank or index.dtype not in _INDICES:
        return None
    along, thin = dim_of(dim, x.rank), index.args[0] if index.op == "expand" else index
    shape = (1,) * (x.rank - thin.rank) + thin.shape
    alike = {d for d in range(x.rank) if shape[d] == 1 and r.facts.equal(index.shape[d], x.shape[d])}
    at = {d: _count(index.shape, d) for d in range(x.rank) if d not in alike}
    return pointwise("where", hit(x.shape, at | {along: thin}), single, x, dtype=x.dtype)


def _count(shape: Shape, dim: int) -> Expr:
    """The position along one dimension, broadcastable to ``shape``."""
    n = shape[dim]
    return reshape(expr("iota", (), (0, 1), (n,), torch.int64), (n, *[1] * (len(shape) - dim - 1)))


__all__ = ["NEUTRAL", "assigned", "expanded", "hit", "hits", "nonzero"]
