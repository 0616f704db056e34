"""Activation functions of PyTorch, written out as the operations of which they consist."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fusepass.dialects.handlers import Handler, Result, Value, handles
from fusepass.dialects.torch.pointwise import clamped
from fusepass.expressions.ir import Expr, const, opmath, pointwise


def _of_floats(handler: Handler) -> Handler:
    """The handler, only for tensors of the result's dtype: PyTorch converts integers first."""

    @functools.wraps(handler)
    def checked(r: Result, x: Any, *args: Value, **kwargs: Value) -> Value:
        same = isinstance(x, Expr) and x.is_float and x.dtype is r.dtype
        return handler(r, x, *args, **kwargs) if same else None

    return checked


def _applied(op: str, x: Expr | float, y: Expr | float, dtype: torch.dtype) -> Expr:
    """An operation on tensors of a dtype and numbers, which PyTorch keeps in its own precision."""
    args = (a if isinstance(a, Expr) else const(float(a), opmath(dtype)) for a in (x, y))
    return pointwise(op, *args, dtype=dtype)


@handles("silu", "swish")
@_of_floats
def _silu(r: Result, x: Expr, inplace: bool = False) -> Expr:
    """``x * sigmoid(x)``."""
    return pointwise("mul", x, pointwise("sigmoid", x), dtype=r.dtype)


@handles("gelu")
@_of_floats
def _gelu(r: Result, x: Expr, approximate: Value = "none") -> Expr | None:
    """The approximation ``x / 2 * (1 + tanh(u))`` is written ``x * sigmoid(2 u)``: smaller numbers."""
    if approximate == "none":
        curve = pointwise("erf", _applied("div", x, math.sqrt(2), r.dtype))
        return pointwise("mul", x, _applied("mul", _applied("add", curve, 1, r.dtype), 0.5, r.dtype))
    if approximate != "tanh":
        return None
    square = pointwise("mul", x, x)
    stretched = _applied("add", _applied("mul", square, 0.044715, r.dtype), 1, r.dtype)
    argument = pointwise("mul", _applied("mul", x, 2 * math.sqrt(2 / math.pi), r.dtype), stretched)
    return pointwise("mul", x, pointwise("sigmoid", argument))


def _exponential(x: Expr, alpha: float, divisor: float = 1.0) -> Expr:
    """``max(x, 0) + alpha * expm1(min(x, 0) / divisor)``."""
    low = _applied("min", x, 0, x.dtype)
    low = low if divisor == 1 else _applied("div", low, divisor, x.dtype)
    low = pointwise("expm1", low)
    low = low if alpha == 1 else _applied("mul", low, alpha, x.dtype)
    return pointwise("add", pointwise("relu", x), low)


@handles("elu")
@_of_floats
def _elu(r: Result, x: Expr, alpha: Value = 1.0, *others: Value, inplace: bool = False) -> Expr | None:
    """``others``, a scale and a scale of the input, are written only by PyTorch itself."""
    if not isinstance(alpha, (int, float)) or any(n not in (1, False) for n in others):
        return None
    return _exponential(x, float(alpha))


@handles("celu")
@_of_floats
def _celu(r: Result, x: Expr, alpha: Value = 1.0, inplace: bool = False) -> Expr | None:
    if not isinstance(alpha, (int, float)) or alpha == 0:
        return None
    return _exponential(x, float(alpha), float(alpha))


@handles("selu")
@_of_floats
def _selu(r: Result, x: Expr, inplace: bool = False) -> Expr:
    """A scaled ``elu`` (arXiv 1706.02515)."""
    return _applied("mul", _exponential(x, 1.6732632423543772), 1.0507009873554805, r.dtype)


@handles("softplus")
@_of_floats
def _softplus(r: Result, x: Expr, beta: Value = 1.0, threshold: Value = 20.0) -> Expr | None:
    """``log(1 + exp(beta * x)) / beta``; above the threshold it is ``x`` to rounding."""
    numbers = isinstance(beta, (int, float)) and isinstance(threshold, (int, float))
    if not numbers or beta <= 0 or threshold < 20:
        return None
    return _scaled_softplus(x, float(beta))


def _scaled_softplus(x: Expr, beta: float) -> Expr:
    """``max(x, 0) + log(1 + exp(-beta * |x|)) / beta``, which never overflows."""
    size = pointwise("abs", x)
    size = size if beta == 1 else _applied("mul", size, beta, x.dtype)
    rest = pointwise("log1p", pointwise("exp", pointwise("neg", size)))
    rest = rest if beta == 1 else _applied("div", rest, beta, x.dtype)
    return pointwise("add", pointwise("relu", x), rest)


@handles("mish")
@_of_floats
def _mish(r: Result, x: Expr, inplace: bool = False) -> Expr:
    """``x * tanh(softplus(x))`` (arXiv 1908.08681)."""
    return pointwise("mul", x, pointwise("tanh", _scaled_softplus(x, 1.0)))


@handles("log_sigmoid", "logsigmoid")
@_of_floats
def _logsigmoid(r: Result, x: Expr) -> Expr:
    """``-softplus(-x)``."""
    return pointwise("neg", _scaled_softplus(pointwise("neg", x), 1.0))


@handles("softsign")
@_of_floats
def _softsign(r: Result, x: Expr) -> Expr:
    return pointwise("div", x, _applied("add", pointwise("abs", x), 1, r.dtype))


@handles("tanhshrink")
@_of_floats
def _tanhshrink(r: Result, x: Expr) -> Expr:
    return pointwise("sub", x, pointwise("tanh", x))


@handles("hardtanh")
@_of_floats
def _hardtanh(
    r: Result, x: Expr, min_val: Value = -1.0, max_val: Value = 1.0, inplace: bool = False
) -> Expr | None:
    return clamped(r, x, min_val, max_val)


@handles("relu6")
@_of_floats
def _relu6(r: Result, x: Expr, inplace: bool = False) -> Expr | None:
    return clamped(r, x, 0.0, 6.0)


@handles("hardsigmoid")
@_of_floats
def _hardsigmoid(r: Result, x: Expr, inplace: bool = False) -> Expr | None:
    """``clamp(x + 3, 0, 6) / 6``."""
    inside = clamped(r, _applied("add", x, 3, r.dtype), 0.0, 6.0)
    return None if inside is None else _applied("div", inside, 6, r.dtype)


@handles("hardswish")
@_of_floats
def _hardswish(r: Result, x: Expr, inplace: bool = False) -> Expr | None:
    gate = _hardsigmoid(r, x)
    return None if gate is None else pointwise("mul", x, gate)
