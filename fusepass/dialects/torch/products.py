"""Matrix products of all names, as contractions of two operands."""

from __future__ import annotations

import torch

from fusepass.dialects.handlers import HANDLERS, Result, Value, handles, permute, reshape
from fusepass.expressions.ir import Expr, cast, const, expr, opmath, pointwise


def dot(a: Expr, b: Expr, la: str, lb: str, lo: str, r: Result, dtype: torch.dtype | None = None) -> Expr:
    """``einsum("la,lb->lo", a, b)``; operands are cast to the result's dtype, as autocast does."""
    dtype = dtype or r.dtype
    return expr("dot", (cast(a, dtype), cast(b, dtype)), (la, lb, lo), r.shape, dtype)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def batch_labels(rank: int) -> str:
    return "abcdefgh"[:rank]


@handles("matmul", "bmm", "mm", "dot", "mv", "__matmul__")
def _matmul(r: Result, a: Expr, b: Expr, *_: Value) -> Expr | None:
    if a.rank == 0 or b.rank == 0 or a.dtype.is_complex:
        return None
    batch = batch_labels(max(a.rank, b.rank, 2) - 2)
    la = "k" if a.rank == 1 else batch[len(batch) - (a.rank - 2) :] + "mk"
    lb = "k" if b.rank == 1 else batch[len(batch) - (b.rank - 2) :] + "kn"
    lo = batch + ("m" if a.rank > 1 else "") + ("n" if b.rank > 1 else "")
    return dot(a, b, la, lb, lo, r)


@handles("inner")
def _inner(r: Result, a: Expr, b: Expr) -> Expr | None:
    """Contract the last dimensions, whatever the ranks."""
    return None if a.rank == 0 or b.rank == 0 else _contracted(r, a, b, (a.rank - 1,), (b.rank - 1,))


@handles("tensordot")
def _tensordot(r: Result, a: Expr, b: Expr, dims: Value = 2) -> Expr | None:
    if isinstance(dims, int):
        dims = tuple(range(a.rank - dims, a.rank)), tuple(range(dims))
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        return None
    first, second = (d if isinstance(d, (tuple, list)) else (d,) for d in dims)
    if len(first) != len(second) or not all(isinstance(d, int) for d in (*first, *second)):
        return None
    return _contracted(r, a, b, tuple(d % a.rank for d in first), tuple(d % b.rank for d in second))


def _contracted(r: Result, a: Expr, b: Expr, first: tuple[int, ...], second: tuple[int, ...]) -> Expr | None:
    """Contract pairs of dimensions; the others of ``a`` come first, then those of ``b``."""
    if a.rank + b.rank > len(_LETTERS) or a.dtype.is_complex:
        return None
    if any(a.shape[i] != b.shape[j] for i, j in zip(first, second, strict=True)):
        return None
    la = _LETTERS[: a.rank]
    free = iter(_LETTERS[a.rank :])
    lb = "".join(la[first[second.index(d)]] if d in second else next(free) for d in range(b.rank))
    lo = "".join(c for d, c in enumerate(la) if d not in first)
    lo += "".join(c for d, c in enumerate(lb) if d not in second)
    return dot(a, b, la, lb, lo, r)


@handles("linear")
def _linear(r: Result, x: Expr, w: Expr, bias: Expr | None = None) -> Expr | None:
    if w.rank != 2 or x.rank == 0:
        return None
    batch = batch_labels(x.rank - 1)
    if len(batch) != x.rank - 1:
        return None
    out = dot(x, w, batch + "k", "nk", batch + "n", r)
    return out if bias is None else pointwise("add", out, bias, dtype=r.dtype)


@handles("baddbmm", "addmm", "addbmm")
def _baddbmm(r: Result, base: Expr, a: Expr, b: Expr, *, beta: Value = 1, alpha: Value = 1) -> Expr | None:
    out = _matmul(r, a, b)
    if out is None or not all(isinstance(v, (int, float)) for v in (alpha, beta)):
        return None
    if alpha != 1:
        out = pointwise("mul", out, const(alpha, opmath(r.dtype)), dtype=r.dtype)
    if beta == 0:
        return out
    if beta != 1:
        base = pointwise("mul", base, const(beta, opmath(r.dtype)), dtype=r.dtype)
    return pointwise("add", out, base, dtype=r.dtype)


HANDLERS["addbmm"] = lambda r, *_, **__: None


@handles("einsum")
def _einsum(r: Result, equation: Value, *operands: Value, **_: Value) -> Expr | None:
    tensors = list(operands[0]) if operands and isinstance(operands[0], (tuple, list)) else list(operands)
    if not isinstance(equation, str) or len(tensors) not in (1, 2):
        return None
    if not all(isinstance(t, Expr) for t in tensors):
        return None
    labels = einsum_labels(equation, [t.rank for t in tensors])
    if labels is None:
        return None
    *given, lo = labels
    if any(len(set(s)) != len(s) for s in labels) or not set(lo) <= set("".join(given)):
        return None
    if len(tensors) == 1:
        return _summed(r, tensors[0], given[0], lo)
    la, lb = given
    if any(c not in lo and (c in la) != (c in lb) for c in la + lb):
        return None  # summed in only one operand
    return dot(tensors[0], tensors[1], la, lb, lo, r)


def _summed(r: Result, x: Expr, labels: str, out: str) -> Expr:
    """``einsum("labels->out", x)``: a sum over the other labels, and a permutation."""
    dims = tuple(d for d, c in enumerate(labels) if c not in out)
    kept = [c for c in labels if c in out]
    if dims:
        wide = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
        total = expr("sum", (cast(x, r.dtype),), (dims,), wide, r.dtype)
        x = reshape(total, tuple(n for d, n in enumerate(x.shape) if d not in dims))
    return permute(x, tuple(kept.index(c) for c in out))


def einsum_labels(equation: str, ranks: list[int]) -> list[str] | None:
    """The labels of the operands and of the result, with ``...`` and the implicit output written out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" if c not in equation]
    dots = [
        rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)
    ]
    wide = "".join(spare[: max(dots)])
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        out = ("..." if "." in left else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    full = [t.replace("...", wide[len(wide) - n :] if n else "") for t, n in zip(terms, dots, strict=True)]
    return [*full, out.replace("...", wide)]


#: If either side has more points than this, PyTorch computes Euclidean distances by products.
_FEW_POINTS = 25


@handles("cdist", "_cdist_forward")
def _cdist(r: Result, x: Expr, y: Expr, p: Value = 2.0, compute_mode: Value = None) -> Expr | None:
    """Euclidean distances ``[..., P, R]`` of ``[..., P, D]`` and ``[..., R, D]``, by products or differences.

    With few points, differences are squared and summed, which is more exact (see ``torch.cdist``).
    """
    if p != 2 or x.dtype is not r.dtype or y.dtype is not r.dtype:
        return None
    many = any(r.facts.at_most(_FEW_POINTS + 1, n) for n in r.shape[-2:])
    if compute_mode in (1, "use_mm_for_euclid_dist"):
        many = True
    elif compute_mode not in (None, 0, "use_mm_for_euclid_dist_if_necessary"):
        many = False
    return _distances(r, x, y) if many else _differences(r, x, y)


@handles("_euclidean_dist")
def _distances(r: Result, x: Expr, y: Expr) -> Expr | None:
    """``sqrt(max(|x|^2 + |y|^2 - 2 x.y, 0))``."""
    batch = batch_labels(len(r.shape) - 2)
    la, lb = (batch[len(batch) - (t.rank - 2) :] + c + "k" for t, c in ((x, "m"), (y, "n")))
    product = dot(x, y, la, lb, batch + "mn", r)
    rows, columns = _squares(x), _squares(y)
    rows = reshape(rows, (*x.shape[:-1], 1))
    columns = reshape(columns, (*y.shape[:-2], 1, y.shape[-2]))
    squared = pointwise("add", rows, columns, dtype=r.dtype)
    twice = pointwise("mul", product, const(2.0, r.dtype), dtype=r.dtype)
    squared = pointwise("sub", squared, twice, dtype=r.dtype)
    return pointwise("sqrt", pointwise("max", squared, const(0.0, r.dtype), dtype=r.dtype), dtype=r.dtype)


def _squares(x: Expr) -> Expr:
    """The sum of the squares over the last dimension, which is kept."""
    square = pointwise("mul", x, x, dtype=x.dtype)
    return expr("sum", (square,), ((x.rank - 1,),), (*x.shape[:-1], 1), x.dtype)


def _differences(r: Result, x: Expr, y: Expr) -> Expr | None:
    """``sqrt(sum((x - y)^2))``."""
    left = reshape(x, (*x.shape[:-1], 1, x.shape[-1]))
    right = reshape(y, (*y.shape[:-2], 1, *y.shape[-2:]))
    difference = pointwise("sub", left, right, dtype=r.dtype)
    square = pointwise("mul", difference, difference, dtype=r.dtype)
    total = expr("sum", (square,), ((square.rank - 1,),), (*square.shape[:-1], 1), r.dtype)
    return pointwise("sqrt", reshape(total, r.shape), dtype=r.dtype)
