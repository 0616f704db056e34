"""Element-wise operations, comparisons, choices and casts."""

from __future__ import annotations

import torch

from fusepass.dialects.handlers import HANDLERS, Handler, Result, Value, arg_exprs, handles, in_common
from fusepass.expressions.arithmetic import COMPARISONS
from fusepass.expressions.ir import VIEWS, Expr, cast, const, converted, expr, is_integer, opmath, pointwise

_SAME = {
    "neg": "neg", "negative": "neg", "logical_not": "not", "abs": "abs", "absolute": "abs", "exp": "exp",
    "exp2": "exp2", "log": "log", "tanh": "tanh", "sqrt": "sqrt", "rsqrt": "rsqrt", "sigmoid": "sigmoid",
    "erf": "erf", "expm1": "expm1", "log1p": "log1p", "relu": "relu", "isnan": "isnan", "isinf": "isinf",
    "mul": "mul", "multiply": "mul", "floordiv": "floordiv", "floor_divide": "floordiv", "remainder": "mod",
    "mod": "mod", "pow": "pow", "maximum": "max", "minimum": "min", "lt": "lt", "less": "lt", "le": "le",
    "less_equal": "le",
    "gt": "gt", "greater": "gt", "ge": "ge", "greater_equal": "ge", "eq": "eq", "ne": "ne", "not_equal": "ne",
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor", "truediv": "div", "true_divide": "div",
}  # fmt: skip


def _pointwise_handler(op: str) -> Handler:
    def handler(r: Result, *values: Value, **_: Value) -> Expr | None:
        args = arg_exprs(r, *values)
        if args is None:
            return None
        if op in COMPARISONS:
            args = in_common(args)
        elif op in ("floordiv", "mod", "max", "min", "pow"):
            args = _as_integers(args, r.dtype)
        return pointwise(op, *args, dtype=r.dtype)

    return handler


def _as_integers(args: tuple[Expr, ...], dtype: torch.dtype) -> tuple[Expr, ...]:
    """The arguments of an integer operation, with numbers converted to its dtype if that changes them."""
    if not is_integer(dtype):
        return args
    return tuple(
        cast(a, dtype) if a.op == "const" and converted(a.attrs[0], dtype) != a.attrs[0] else a for a in args
    )


for _name, _op in _SAME.items():
    HANDLERS[_name] = _pointwise_handler(_op)


#: Bitwise operations on integers that are 0 or 1.
_BITS = {"and": "min", "or": "max"}


def _is_bit(x: Expr) -> bool:
    """Are all elements 0 or 1, because they were truth values?"""
    while x.op in VIEWS:
        x = x.args[0]
    if x.op in ("mul", "min", "max"):
        return all(map(_is_bit, x.args))
    return x.dtype is torch.bool or (x.op == "cast" and x.args[0].dtype is torch.bool)


def _bool_handler(op: str) -> Handler:
    def handler(r: Result, *values: Value) -> Expr | None:
        args = arg_exprs(r, *values)
        if args is None or (r.dtype is not torch.bool and not (op in _BITS and all(map(_is_bit, args)))):
            return None
        return pointwise(op if r.dtype is torch.bool else _BITS[op], *args, dtype=r.dtype)

    return handler


for _name in ("and", "and_", "bitwise_and", "__and__"):
    HANDLERS[_name] = _bool_handler("and")
for _name in ("or", "or_", "bitwise_or", "__or__"):
    HANDLERS[_name] = _bool_handler("or")
for _name in ("xor", "bitwise_xor"):
    HANDLERS[_name] = _bool_handler("xor")
for _name in ("invert", "bitwise_not", "inv"):
    HANDLERS[_name] = _bool_handler("not")


@handles("add", "sub", "subtract")
def _add(r: Result, a: Value, b: Value, alpha: Value = 1, *, op: str = "add") -> Expr | None:
    args = arg_exprs(r, a, b, alpha)
    if args is None:
        return None
    x, y, factor = args
    if alpha != 1:
        y = pointwise("mul", y, factor, dtype=y.dtype)
    return pointwise(op, x, y, dtype=r.dtype)


HANDLERS["sub"] = HANDLERS["subtract"] = lambda r, a, b, alpha=1: _add(r, a, b, alpha, op="sub")
HANDLERS["rsub"] = lambda r, a, b, alpha=1: _add(r, b, a, alpha, op="sub")


@handles("div", "divide")
def _div(r: Result, a: Value, b: Value, rounding_mode: str | None = None) -> Expr | None:
    args = arg_exprs(r, a, b)
    if args is None or rounding_mode not in (None, "floor"):
        return None
    if rounding_mode:
        return pointwise("floordiv", *_as_integers(args, r.dtype), dtype=r.dtype)
    return pointwise("div", *args, dtype=r.dtype)


@handles("reciprocal")
def _reciprocal(r: Result, x: Expr) -> Expr:
    return pointwise("div", const(1.0, x.dtype), x, dtype=r.dtype)


@handles("square")
def _square(r: Result, x: Expr) -> Expr:
    return pointwise("mul", x, x, dtype=r.dtype)


@handles("where")
def _where(r: Result, c: Value, a: Value = None, b: Value = None) -> Expr | None:
    if a is None or b is None:
        return None
    args = arg_exprs(r, c, a, b)
    if args is None:
        return None
    if r.dtype is torch.bool:
        args = (args[0], *(cast(value, torch.bool) for value in args[1:]))
    condition = args[0] if args[0].dtype is torch.bool else cast(args[0], torch.bool)
    return pointwise("where", condition, args[1], args[2], dtype=r.dtype)


@handles("where_method")
def _where_method(r: Result, x: Expr, condition: Value, other: Value = None) -> Expr | None:
    """``x.where(condition, other)``."""
    return _where(r, condition, x, other)


@handles("masked_fill")
def _masked_fill(r: Result, x: Expr, mask: Expr, value: Value) -> Expr | None:
    return _where(r, mask, value, x)


@handles("leaky_relu")
def _leaky_relu(r: Result, x: Expr, negative_slope: Value = 0.01, inplace: bool = False) -> Expr | None:
    """Written out, as PyTorch's documentation defines it."""
    if not isinstance(negative_slope, (int, float)):
        return None
    low = pointwise("mul", x, const(float(negative_slope), opmath(x.dtype)), dtype=x.dtype)
    positive = pointwise("gt", x, const(0.0, x.dtype), dtype=torch.bool)
    return pointwise("where", positive, x, low, dtype=r.dtype)


@handles("clamp", "clip")
def clamped(r: Result, x: Expr, min: Value = None, max: Value = None) -> Expr | None:
    """``min(max(x, low), high)``; either bound may be missing."""
    out: Expr = x
    for op, bound in (("max", min), ("min", max)):
        if bound is not None:
            args = arg_exprs(r, out, bound)
            if args is None:
                return None
            out = pointwise(op, *(cast(a, r.dtype) if a.op == "const" else a for a in args), dtype=r.dtype)
    return out


@handles("clamp_min")
def _clamp_min(r: Result, x: Expr, min: Value) -> Expr | None:
    return clamped(r, x, min)


@handles("clamp_max")
def _clamp_max(r: Result, x: Expr, max: Value) -> Expr | None:
    return clamped(r, x, None, max)


@handles("nan_to_num")
def _nan_to_num(
    r: Result, x: Expr, nan: float | None = None, posinf: Value = None, neginf: Value = None
) -> Expr | None:
    """``nan_to_num``; its attributes are the replacements of NaN, minus infinity and infinity."""
    if not x.is_float:
        return x
    known = torch.finfo(x.dtype)
    low, high = known.min if neginf is None else neginf, known.max if posinf is None else posinf
    if not all(isinstance(n, (int, float)) for n in (nan or 0.0, low, high)):
        return None
    return expr("nan_to_num", (x,), (float(nan or 0.0), float(low), float(high)), x.shape, x.dtype)


@handles(
    "to",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "bool",
    "long",
    "int",
    "type",
    "_to_copy",
    "convert_element_type",
    "cpu",
    "cuda",
)
def _to(r: Result, x: Expr, *args: Value, **_: Value) -> Expr | None:
    return cast(x, r.dtype)


@handles(
    "contiguous",
    "clone",
    "alias",
    "lift_fresh_copy",
    "lift_fresh",
    "positive",
    "identity",
    "requires_grad_",
    "alias_copy",
)
def _same(r: Result, x: Expr, *args: Value, **_: Value) -> Expr:
    return x
