"""Windows of neighbours, one at every position: ``unfold`` and ``as_strided``, as indices into the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusepass.dialects.handlers import Result, Value, are_integers, dim_of, handles, permute, reshape
from fusepass.dialects.torch.joins import padded
from fusepass.expressions.index import Size, prod
from fusepass.expressions.ir import Expr, expr, pointwise


@handles("unfold", "unfold_copy", "im2col")
def _unfold(r: Result, x: Expr, *args: Value, **kw: Value) -> Expr | None:
    """``x.unfold(dim, size, step)``; ``F.unfold(image, kernel_size, dilation, padding, stride)``."""
    if len(r.shape) == x.rank + 1:
        given = dict(zip(("dimension", "size", "step"), args, strict=False)) | kw
        numbers = [given.get(n) for n in ("dimension", "size", "step")]
        if not are_integers(numbers) or x.rank == 0:
            return None
        dim, size, step = dim_of(numbers[0], x.rank), numbers[1], numbers[2]
        return _windows(x, dim, size, step, r.shape[dim])
    names, usual = ("kernel_size", "dilation", "padding", "stride"), (0, 1, 0, 1)
    known = dict(zip(names, args, strict=False)) | kw
    pairs = [_pair(known.get(name, default)) for name, default in zip(names, usual, strict=True)]
    return _image_windows(r, x, *pairs) if x.rank == 4 and len(r.shape) == 3 else None


def _windows(x: Expr, dim: int, size: int, step: int, count: Size, dilation: int = 1) -> Expr:
    """``[..., count, ..., size]``: ``count`` windows of a dimension, whose starts are ``step`` apart.

    The elements of a window, ``dilation`` apart, are in a new last dimension.
    """
    starts, inside = (
        expr("iota", (), (0, by), (n,), torch.int64) for by, n in ((step, count), (dilation, size))
    )
    positions = pointwise("add", reshape(starts, (count, 1)), inside)
    shape = (*x.shape[:dim], count, size, *x.shape[dim + 1 :])
    gathered = expr("index", (x, positions), (dim,), shape, x.dtype)
    order = [d for d in range(len(shape)) if d != dim + 1]
    return permute(gathered, (*order, dim + 1))


def _image_windows(
    r: Result, x: Expr, kernel: Pair | None, dilation: Pair | None, padding: Pair | None, stride: Pair | None
) -> Expr | None:
    """``[N, C * kh * kw, L]``, the windows of ``[N, C, H, W]`` in row-major order."""
    if kernel is None or dilation is None or padding is None or stride is None:
        return None
    for axis in (0, 1):
        wide = padded(x, 2 + axis, padding[axis], padding[axis], 0.0, r.facts)
        if wide is None:
            return None
        spare = wide.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1
        if stride[axis] != 1 and not isinstance(spare, int):
            return None
        count = spare // stride[axis] + 1 if isinstance(spare, int) else spare + 1
        x = _windows(wide, 2 + axis, kernel[axis], stride[axis], count, dilation[axis])
    return reshape(permute(x, (0, 1, 4, 5, 2, 3)), r.shape)


def strided(r: Result, x: Expr, strides: Sequence[Size], start: Size) -> Expr | None:
    """``as_strided`` of a contiguous tensor: an index into the flattened tensor.

    Args:
        strides: one for each dimension of the result.
        start: the first element, counted from the first one of ``x``.

    Returns:
        The expression; None where an element may lie outside of ``x``, elsewhere in the same storage.
    """
    count = prod(x.shape)
    last = sum((stride * (size - 1) for stride, size in zip(strides, r.shape, strict=True)), start)
    inside = all(r.facts.at_most(0, n) for n in (start, *strides)) and r.facts.at_most(last, count - 1)
    if not inside or not r.shape:
        return None
    positions: Expr | None = None
    for dim, (size, stride) in enumerate(zip(r.shape, strides, strict=True)):
        first = start if positions is None else 0
        ramp = reshape(expr("iota", (), (first, stride), (size,), torch.int64), _alone(size, dim, r))
        positions = ramp if positions is None else pointwise("add", positions, ramp, dtype=torch.int64)
    assert positions is not None
    return expr("index", (reshape(x, (count,)), positions), (0,), r.shape, x.dtype)


def _alone(size: Size, dim: int, r: Result) -> tuple[Size, ...]:
    """The shape that broadcasts one dimension to its place among those of the result."""
    return (size, *(1,) * (len(r.shape) - dim - 1))


Pair = tuple[int, int]


def _pair(value: Value) -> Pair | None:
    """A number for both dimensions, or one for each."""
    pair: Sequence[Value] = value if isinstance(value, (tuple, list)) else (value, value)
    return (pair[0], pair[1]) if len(pair) == 2 and are_integers(pair) else None


__all__ = ["strided"]
