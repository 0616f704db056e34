"""Constant tensors of an ONNX model as expressions: uniform, affine in the index, or a band.

Exporters fold whatever does not depend on an input, so a causal mask often arrives as a table of numbers.  A
table gets a closed form only if every element agrees with it; all others stay leaves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusepass.dialects.handlers import Result as _Result
from fusepass.dialects.handlers import reshape, view
from fusepass.dialects.torch.creation import filled
from fusepass.expressions.index import Facts
from fusepass.expressions.ir import Expr, cast, const, expr, pointwise

Array = npt.NDArray[Any]

#: Tables with more elements are weights: they are not examined.
_LARGEST = 1 << 26


def closed_form(array: Array, dtype: torch.dtype) -> Expr | None:
    """The expression with exactly these elements, or None.

    Args:
        array: the constant, of any shape.
        dtype: its dtype.
    """
    if array.size == 0 or array.size > _LARGEST:
        return None
    first = array.flat[0]
    if bool((array == first).all()):
        return filled(_result(array.shape, dtype), first.item())
    if dtype in (torch.int64, torch.int32):
        form = _affine(array, dtype)
        if form is not None:
            return form
    return _band(array, dtype) if array.ndim >= 2 else None


def _result(shape: tuple[int, ...], dtype: torch.dtype) -> _Result:
    return _Result(shape, dtype, Facts(), "")


def _affine(array: Array, dtype: torch.dtype) -> Expr | None:
    """``c + sum of c_d * i_d``."""
    start = int(array.flat[0])
    steps = [_step(array, d) - start if n > 1 else 0 for d, n in enumerate(array.shape)]
    table = np.full(array.shape, start, dtype=np.int64)
    for dim, (step, n) in enumerate(zip(steps, array.shape, strict=True)):
        table = table + (np.arange(n) * step).reshape([-1 if d == dim else 1 for d in range(array.ndim)])
    if not np.array_equal(table, array):
        return None
    total: Expr | None = None
    for dim, (step, n) in enumerate(zip(steps, array.shape, strict=True)):
        if step == 0:
            continue
        base = expr("iota", (), (start if total is None else 0, step), (n,), torch.int64)
        term = reshape(base, (n,) + (1,) * (array.ndim - dim - 1))
        total = term if total is None else pointwise("add", total, term, dtype=torch.int64)
    assert total is not None
    return view("expand", cast(total, dtype), tuple(array.shape))


def _step(array: Array, dim: int) -> int:
    return int(array[tuple(1 if d == dim else 0 for d in range(array.ndim))])


def _band(array: Array, dtype: torch.dtype) -> Expr | None:
    """One value where ``low <= j - i <= high`` and another elsewhere, the same for all leading dimensions."""
    plane = array[(0,) * (array.ndim - 2)]
    values = np.unique(plane[[0, -1]])
    if len(values) > 2 or not bool((array == plane).all()):
        return None
    values = np.unique(plane)
    if len(values) != 2:
        return None
    rows, columns = plane.shape
    gap = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    for inner, outer in (values, values[::-1]):
        where = plane == inner
        low, high = int(gap[where].min()), int(gap[where].max())
        if np.array_equal(where, (gap >= low) & (gap <= high)):
            inside = _inside(rows, columns, low, high)
            band = pointwise(
                "where", inside, const(inner.item(), dtype), const(outer.item(), dtype), dtype=dtype
            )
            return view("expand", band, tuple(array.shape))
    return None


def _inside(rows: int, columns: int, low: int, high: int) -> Expr:
    row = reshape(expr("iota", (), (0, 1), (rows,), torch.int64), (rows, 1))
    gap = pointwise("sub", expr("iota", (), (0, 1), (columns,), torch.int64), row, dtype=torch.int64)
    out = const(True, torch.bool)
    if high < columns - 1:
        out = pointwise("le", gap, const(high, torch.int64))
    if low > -(rows - 1):
        above = pointwise("ge", gap, const(low, torch.int64))
        out = above if out.op == "const" else pointwise("and", out, above)
    return out
