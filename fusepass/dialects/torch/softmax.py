"""Softmax, dropout, and PyTorch's own attention call."""

from __future__ import annotations

import math

import torch

from fusepass.dialects.handlers import HANDLERS, Result, Value, dim_of, handles
from fusepass.dialects.torch.creation import filled, triangle
from fusepass.dialects.torch.products import batch_labels, dot
from fusepass.dialects.torch.views import repeat_interleave
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Expr, cast, const, expr, opmath, pointwise

#: The attributes of ``nan_to_num`` that leave infinities alone.
NAN_TO_ZERO = (0.0, -math.inf, math.inf)


@handles("softmax", "_softmax", "special_softmax")
def _softmax(
    r: Result, x: Expr, dim: Value = None, *rest: Value, op: str = "softmax", **_: Value
) -> Expr | None:
    if not isinstance(dim, int) or x.rank == 0:
        return None
    x = cast(x, r.dtype)
    return expr(op, (x,), (dim_of(dim, x.rank),), x.shape, r.dtype)


@handles("softmin")
def _softmin(r: Result, x: Expr, dim: Value = None, *_: Value, **__: Value) -> Expr | None:
    return _softmax(r, pointwise("neg", cast(x, r.dtype), dtype=r.dtype), dim)


@handles("log_softmax", "_log_softmax")
def _log_softmax(r: Result, x: Expr, dim: Value = None, *_: Value, **__: Value) -> Expr | None:
    return _softmax(r, x, dim, op="log_softmax")


@handles("_safe_softmax")
def _safe_softmax(r: Result, x: Expr, dim: int, *_: Value, **__: Value) -> Expr | None:
    out = _softmax(r, x, dim)
    return None if out is None else expr("nan_to_num", (out,), NAN_TO_ZERO, out.shape, out.dtype)


@handles("dropout", "feature_dropout", "alpha_dropout")
def _dropout(
    r: Result, x: Expr, p: Value = 0.5, training: Value = True, *_: Value, **kw: Value
) -> Expr | None:
    training = kw.get("train", training)
    if training is False or p == 0:
        return x
    return (
        expr("dropout", (x,), (p, r.unique), x.shape, x.dtype)
        if training is True and isinstance(p, float)
        else None
    )


HANDLERS["feature_dropout"] = HANDLERS["alpha_dropout"] = lambda r, *_, **__: None


@handles("native_dropout")
def _native_dropout(r: Result, x: Expr, p: float, train: Value) -> Value:
    out = _dropout(r, x, p, train is not False)
    return None if out is None else (out, None)


@handles("scaled_dot_product_attention")
def sdpa(
    r: Result,
    q: Expr,
    k: Expr,
    v: Expr,
    attn_mask: Value = None,
    dropout_p: Value = 0.0,
    is_causal: Value = False,
    *,
    scale: Value = None,
    enable_gqa: bool = False,
) -> Expr | None:
    """``scaled_dot_product_attention`` written out, as PyTorch's documentation defines it.

    In half precision its kernels add the mask in float32, so the sum of scores and mask is not rounded.
    """
    factor = scale if scale is not None else _default_scale(q.shape[-1])
    if not isinstance(factor, (int, float)) or not isinstance(dropout_p, (int, float)) or q.rank < 3:
        return None
    if enable_gqa:
        wide_k, wide_v = (_grouped(r, t, q.shape[-3]) for t in (k, v))
        if wide_k is None or wide_v is None:
            return None
        k, v = wide_k, wide_v
    batch = batch_labels(q.rank - 2)
    kv_batch, v_batch = (batch[len(batch) - (t.rank - 2) :] for t in (k, v))
    weights = Result((*r.shape[:-2], q.shape[-2], k.shape[-2]), r.dtype, r.facts, r.unique)
    scores = dot(q, k, batch + "mk", kv_batch + "nk", batch + "mn", weights)
    scores = pointwise("mul", scores, const(factor, opmath(r.dtype)), dtype=r.dtype)
    hidden = const(-math.inf, r.dtype)
    if is_causal:
        ones = filled(Result(weights.shape, torch.bool, r.facts, r.unique), True)
        scores = pointwise("where", triangle(r, ones, 0, "le"), scores, hidden, dtype=r.dtype)  # type: ignore[arg-type]
    if isinstance(attn_mask, Expr) and attn_mask.dtype is torch.bool:
        scores = pointwise("where", attn_mask, scores, hidden, dtype=r.dtype)
    elif isinstance(attn_mask, Expr):
        wide = opmath(r.dtype)
        scores = pointwise("add", cast(scores, wide), cast(attn_mask, wide), dtype=wide)
    elif attn_mask is not None:
        return None
    p = cast(expr("softmax", (scores,), (len(weights.shape) - 1,), weights.shape, scores.dtype), r.dtype)
    if is_causal or attn_mask is not None:
        p = expr("nan_to_num", (p,), NAN_TO_ZERO, weights.shape, r.dtype)
    if dropout_p > 0:
        p = expr("dropout", (p,), (float(dropout_p), r.unique), weights.shape, r.dtype)
    return dot(p, v, batch + "mn", v_batch + "nd", batch + "md", r)


def _grouped(r: Result, x: Expr, heads: Size) -> Expr | None:
    """Key/value heads repeated, one for each query head; None if it is not known how often."""
    count = r.facts.quotient(heads, x.shape[-3])
    if count is None:
        return None
    wide = Result((*x.shape[:-3], heads, *x.shape[-2:]), x.dtype, r.facts, r.unique)
    return repeat_interleave(wide, x, count, x.rank - 3)


def _default_scale(size: Size) -> Value:
    return 1.0 / math.sqrt(size) if isinstance(size, int) else None
