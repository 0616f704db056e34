"""The operation table of PyTorch: one handler per operation, whatever its spelling.

``torch.softmax``, ``x.softmax`` and ``aten.softmax.int`` share the name ``softmax`` and one handler.
A handler gets the operands as values (an ``Expr`` for a tensor, Python numbers, sympy sizes) and the
result's shape and dtype, and returns the meaning of the node, or None where it is not looked into.
Nothing here knows attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch

from fusepass.index import Facts, Size, simplify_size
from fusepass.ir import Expr, Shape, const, expr, pointwise, scalar_of

Value = Any
Handler = Callable[..., Value]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True)
class Result:
    """What is known of a node before its meaning: result type, size facts, a name no other node has."""

    shape: Shape
    dtype: torch.dtype
    facts: Facts
    unique: str


HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[H], H]:
    """Register a handler under every name of its operation."""

    def register(handler: H) -> H:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


# ---------------------------------------------------------------------------------------- helpers


def as_expr(value: Value, like: torch.dtype = torch.float32) -> Expr | None:
    """A tensor operand or a number as an expression."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return const(value, torch.bool)
    if isinstance(value, int):
        return const(value, torch.int64)
    if isinstance(value, float):
        return const(value, like if like.is_floating_point else torch.float32)
    if isinstance(value, sympy.Expr):
        return expr("iota", (), (value, 0), (), torch.int64)  # a size as a rank-0 number: start + 0*n
    return None


def view(op: str, x: Expr, shape: Shape, *attrs: Any) -> Expr:
    """A view node; the operand itself where nothing changes."""
    if op in ("reshape", "expand") and shape == x.shape:
        return x
    return expr(op, (x,), attrs, shape, x.dtype)


def reshape(x: Expr, shape: Shape) -> Expr:
    """``x`` re-read as ``shape`` (of the same extent)."""
    while x.op == "reshape":
        x = x.args[0]
    return view("reshape", x, shape)


def permute(x: Expr, dims: tuple[int, ...]) -> Expr:
    """Dimensions reordered."""
    dims = tuple(d % x.rank for d in dims) if x.rank else ()
    if dims == tuple(range(x.rank)):
        return x
    if x.op == "permute":
        inner: tuple[int, ...] = x.attrs[0]
        return permute(x.args[0], tuple(inner[d] for d in dims))
    return view("permute", x, tuple(x.shape[d] for d in dims), dims)


def dim_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def ints(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """``f(1, 2)`` and ``f((1, 2))`` alike."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return tuple(values[0])
    return values


def arg_exprs(r: Result, *values: Value) -> tuple[Expr, ...] | None:
    """Every operand as an expression, or None where one is not."""
    like = next((v.dtype for v in values if isinstance(v, Expr) and v.is_float), torch.float32)
    out = tuple(as_expr(v, like) for v in values)
    return None if any(o is None for o in out) else out  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------- pointwise

_SAME = {
    "neg": "neg", "negative": "neg", "logical_not": "not", "abs": "abs", "absolute": "abs", "exp": "exp",
    "exp2": "exp2", "log": "log", "tanh": "tanh", "sqrt": "sqrt", "rsqrt": "rsqrt", "sigmoid": "sigmoid",
    "relu": "relu", "isnan": "isnan", "isinf": "isinf",
    "mul": "mul", "multiply": "mul", "floordiv": "floordiv", "floor_divide": "floordiv", "remainder": "mod",
    "mod": "mod", "pow": "pow", "maximum": "max", "minimum": "min", "lt": "lt", "less": "lt", "le": "le",
    "less_equal": "le",
    "gt": "gt", "greater": "gt", "ge": "ge", "greater_equal": "ge", "eq": "eq", "ne": "ne", "not_equal": "ne",
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor", "truediv": "div", "true_divide": "div",
}  # fmt: skip


def _pointwise_handler(op: str) -> Handler:
    def handler(r: Result, *values: Value, **_: Value) -> Expr | None:
        args = arg_exprs(r, *values)
        return None if args is None else pointwise(op, *args, dtype=r.dtype)

    return handler


for _name, _op in _SAME.items():
    HANDLERS[_name] = _pointwise_handler(_op)


def _bool_handler(op: str) -> Handler:
    def handler(r: Result, *values: Value) -> Expr | None:
        args = arg_exprs(r, *values)
        return None if args is None or r.dtype is not torch.bool else pointwise(op, *args, dtype=r.dtype)

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
    return pointwise("floordiv" if rounding_mode else "div", *args, dtype=r.dtype)


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
    condition = args[0] if args[0].dtype is torch.bool else cast(args[0], torch.bool)
    return pointwise("where", condition, args[1], args[2], dtype=r.dtype)


@handles("masked_fill")
def _masked_fill(r: Result, x: Expr, mask: Expr, value: Value) -> Expr | None:
    return _where(r, mask, value, x)


@handles("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(r: Result, x: Expr, min: Value = None, max: Value = None) -> Expr | None:
    out: Expr = x
    for op, bound in (("max", min), ("min", max)):
        if bound is not None:
            args = arg_exprs(r, out, bound)
            if args is None:
                return None
            out = pointwise(op, *args, dtype=r.dtype)
    return out


HANDLERS["clamp_min"] = lambda r, x, min: _clamp(r, x, min)
HANDLERS["clamp_max"] = lambda r, x, max: _clamp(r, x, None, max)


@handles("nan_to_num")
def _nan_to_num(
    r: Result, x: Expr, nan: float | None = None, posinf: Value = None, neginf: Value = None
) -> Expr | None:
    return expr("nan_to_num", (x,), (float(nan or 0.0),), x.shape, x.dtype)


def cast(x: Expr, dtype: torch.dtype) -> Expr:
    """``x`` as another dtype."""
    if dtype is x.dtype:
        return x
    if x.op == "const":
        return const(x.attrs[0], dtype)
    return expr("cast", (x,), (dtype,), x.shape, dtype)


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


# ---------------------------------------------------------------------------------------- views


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
def _permute(r: Result, x: Expr, *dims: Value, **kw: Value) -> Expr:
    return permute(x, ints(dims or (kw["dims"],)))


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
def _movedim(r: Result, x: Expr, source: Value, destination: Value) -> Expr:
    src = [dim_of(d, x.rank) for d in (source if isinstance(source, (tuple, list)) else (source,))]
    dst = [
        dim_of(d, x.rank) for d in (destination if isinstance(destination, (tuple, list)) else (destination,))
    ]
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
    repeats = (1,) * (x.rank - len(repeats)) + tuple(repeats)
    padded = reshape(x, (1,) * (len(repeats) - x.rank) + x.shape)
    wide: list[Size] = []
    narrow: list[Size] = []
    for n, size in zip(repeats, padded.shape, strict=True):
        narrow += [1, size]
        wide += [n, size]
    return reshape(view("expand", reshape(padded, tuple(narrow)), tuple(wide)), r.shape)


@handles("repeat_interleave")
def _repeat_interleave(r: Result, x: Expr, repeats: Value, dim: int | None = None, **_: Value) -> Expr | None:
    if dim is None or isinstance(repeats, Expr):
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
    """The first element of a slice, counted from the front; None where its sign is not known."""
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
    first = slice_start(start, x.shape[d])
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
    return None  # the reader knows the parts' shapes: see parts_of


def parts_of(x: Expr, shapes: list[Shape], dim: int) -> tuple[Expr, ...]:
    """Consecutive slices of ``x`` along ``dim`` of the given shapes."""
    d, start, out = dim_of(dim, x.rank), 0, []
    for shape in shapes:
        out.append(slice_dim(x, d, start, shape[d]))
        start = simplify_size(start + shape[d])  # type: ignore[assignment]
    return tuple(out)


@handles("flip")
def _flip(r: Result, x: Expr, *dims: Value) -> Expr:
    return view("flip", x, x.shape, tuple(dim_of(d, x.rank) for d in ints(dims)))


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
    return reshape(out, r.shape)


def _advanced(r: Result, x: Expr, keys: list[Value]) -> Expr | None:
    """Integer-tensor indexing whose tensors are adjacent: ``mask[batch, key]``, ``table[:, bucket]``."""
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
def _index(r: Result, x: Expr, indices: Value) -> Expr | None:
    return getitem(r, x, tuple(slice(None) if i is None else i for i in indices))


@handles("index_select")
def _index_select(r: Result, x: Expr, dim: int, index: Expr) -> Expr:
    return expr("index", (x, index), (dim_of(dim, x.rank),), r.shape, x.dtype)


@handles("embedding")
def _embedding(r: Result, a: Expr, b: Expr, *_: Value, **__: Value) -> Expr | None:
    # F.embedding(indices, table) and aten.embedding(table, indices)
    table, index = (b, a) if not a.is_float else (a, b)
    return expr("index", (table, index), (0,), r.shape, table.dtype)


# ---------------------------------------------------------------------------------------- creation


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
    """A constant of the result's shape."""
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
    rows, columns = r.shape
    row = reshape(expr("iota", (), (0, 1), (rows,), torch.int64), (rows, 1))
    same = pointwise("eq", row, expr("iota", (), (0, 1), (columns,), torch.int64))
    return cast(same, r.dtype)


@handles("tril", "triu")
def _tril(r: Result, x: Expr, diagonal: Value = 0) -> Expr | None:
    return triangle(r, x, diagonal, "le")


HANDLERS["triu"] = lambda r, x, diagonal=0: triangle(r, x, diagonal, "ge")


def triangle(r: Result, x: Expr, diagonal: Value, op: str) -> Expr | None:
    """``where(column - row <= diagonal, x, 0)``."""
    k = as_expr(diagonal)
    if k is None:
        return None
    rows, columns = x.shape[-2:]
    row = reshape(expr("iota", (), (0, 1), (rows,), torch.int64), (rows, 1))
    column = expr("iota", (), (0, 1), (columns,), torch.int64)
    inside = pointwise(op, pointwise("sub", column, row), k)
    return pointwise("where", inside, x, const(0, x.dtype), dtype=x.dtype)


# ---------------------------------------------------------------------------------------- products


def dot(a: Expr, b: Expr, la: str, lb: str, lo: str, r: Result, dtype: torch.dtype | None = None) -> Expr:
    """``einsum("la,lb->lo", a, b)``; operands are cast where the result is narrower (autocast)."""
    dtype = dtype or r.dtype
    return expr("dot", (cast(a, dtype), cast(b, dtype)), (la, lb, lo), r.shape, dtype)


def _batch_labels(rank: int) -> str:
    return "abcdefgh"[:rank]


@handles("matmul", "bmm", "mm", "dot", "mv", "inner", "__matmul__")
def _matmul(r: Result, a: Expr, b: Expr, *_: Value) -> Expr | None:
    if a.rank == 0 or b.rank == 0 or a.dtype.is_complex:
        return None
    batch = _batch_labels(max(a.rank, b.rank) - 2)
    la = "k" if a.rank == 1 else batch[len(batch) - (a.rank - 2) :] + "mk"
    lb = "k" if b.rank == 1 else batch[len(batch) - (b.rank - 2) :] + "kn"
    lo = batch + ("m" if a.rank > 1 else "") + ("n" if b.rank > 1 else "")
    return dot(a, b, la, lb, lo, r)


@handles("linear")
def _linear(r: Result, x: Expr, w: Expr, bias: Value = None) -> Expr | None:
    if w.rank != 2 or x.rank == 0:
        return None
    batch = _batch_labels(x.rank - 1)
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
        out = pointwise("mul", out, const(alpha, r.dtype), dtype=r.dtype)
    if beta == 0:
        return out
    if beta != 1:
        base = pointwise("mul", base, const(beta, r.dtype), dtype=r.dtype)
    return pointwise("add", out, base, dtype=r.dtype)


HANDLERS["addbmm"] = lambda r, *_, **__: None


@handles("einsum")
def _einsum(r: Result, equation: Value, *operands: Value, **_: Value) -> Expr | None:
    tensors = list(operands[0]) if operands and isinstance(operands[0], (tuple, list)) else list(operands)
    if not isinstance(equation, str) or len(tensors) not in (1, 2):
        return None
    labels = _einsum_labels(equation, [t.rank for t in tensors])
    if labels is None:
        return None
    *given, lo = labels
    if any(len(set(s)) != len(s) for s in labels) or not set(lo) <= set("".join(given)):
        return None
    if len(tensors) == 1:
        return _summed(r, tensors[0], given[0], lo)
    la, lb = given
    if any(c not in lo and (c in la) != (c in lb) for c in la + lb):
        return None  # summed in one operand alone
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


def _einsum_labels(equation: str, ranks: list[int]) -> list[str] | None:
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


# ---------------------------------------------------------------------------------------- reductions


def _dims(dim: Value, rank: int) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(rank))
    return tuple(sorted(dim_of(d, rank) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))


def _reduce(op: str) -> Handler:
    def handler(r: Result, x: Expr, dim: Value = None, keepdim: bool = False, **kw: Value) -> Expr | None:
        dims = _dims(kw.get("axis", dim), x.rank)
        wide = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
        reduced = expr(op, (cast(x, r.dtype) if op == "sum" else x,), (dims,), wide, r.dtype)
        return reshape(reduced, r.shape)

    return handler


HANDLERS["sum"] = _reduce("sum")
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
    if n != 1:
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


@handles("max", "min")
def _max(r: Result, x: Expr, *args: Value, **kw: Value) -> Value:
    if args and isinstance(args[0], Expr):
        return pointwise("max", x, args[0], dtype=r.dtype)
    return None  # max(dim) returns two results: see the reader


HANDLERS["min"] = lambda r, x, *args, **kw: (
    pointwise("min", x, args[0], dtype=r.dtype) if args and isinstance(args[0], Expr) else None
)


@handles("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax")
def _softmax(
    r: Result, x: Expr, dim: Value = None, *rest: Value, op: str = "softmax", **_: Value
) -> Expr | None:
    if dim is None or x.rank == 0:
        return None
    x = cast(x, r.dtype)
    return expr(op, (x,), (dim_of(dim, x.rank),), x.shape, r.dtype)


@handles("softmin")
def _softmin(r: Result, x: Expr, dim: Value = None, *_: Value, **__: Value) -> Expr | None:
    return _softmax(r, pointwise("neg", cast(x, r.dtype), dtype=r.dtype), dim)


HANDLERS["log_softmax"] = lambda r, x, dim=None, *rest, **kw: _softmax(r, x, dim, op="log_softmax")
HANDLERS["_log_softmax"] = HANDLERS["log_softmax"]


@handles("_safe_softmax")
def _safe_softmax(r: Result, x: Expr, dim: int, *_: Value, **__: Value) -> Expr | None:
    out = _softmax(r, x, dim)
    return None if out is None else expr("nan_to_num", (out,), (0.0,), out.shape, out.dtype)


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
    """``scaled_dot_product_attention`` written out, as PyTorch's documentation defines it."""
    factor = scale if scale is not None else _default_scale(q.shape[-1])
    if not isinstance(factor, (int, float)) or not isinstance(dropout_p, (int, float)) or q.rank < 3:
        return None
    if enable_gqa:
        k, v = (_grouped(r, t, q.shape[-3]) for t in (k, v))
    batch = _batch_labels(q.rank - 2)
    kv_batch, v_batch = (batch[len(batch) - (t.rank - 2) :] for t in (k, v))
    weights = Result((*r.shape[:-2], q.shape[-2], k.shape[-2]), r.dtype, r.facts, r.unique)
    scores = dot(q, k, batch + "mk", kv_batch + "nk", batch + "mn", weights)
    scores = pointwise("mul", scores, const(factor, r.dtype), dtype=r.dtype)
    hidden = const(-math.inf, r.dtype)
    if is_causal:
        ones = filled(Result(weights.shape, torch.bool, r.facts, r.unique), True)
        scores = pointwise("where", triangle(r, ones, 0, "le"), scores, hidden, dtype=r.dtype)  # type: ignore[arg-type]
    if isinstance(attn_mask, Expr) and attn_mask.dtype is torch.bool:
        scores = pointwise("where", attn_mask, scores, hidden, dtype=r.dtype)
    elif isinstance(attn_mask, Expr):
        scores = pointwise("add", scores, attn_mask, dtype=r.dtype)
    elif attn_mask is not None:
        return None
    p = expr("softmax", (scores,), (len(weights.shape) - 1,), weights.shape, r.dtype)
    if is_causal or attn_mask is not None:
        p = expr("nan_to_num", (p,), (0.0,), weights.shape, r.dtype)
    if dropout_p > 0:
        p = expr("dropout", (p,), (float(dropout_p), r.unique), weights.shape, r.dtype)
    return dot(p, v, batch + "mn", v_batch + "nd", batch + "md", r)


def _grouped(r: Result, x: Expr, heads: Size) -> Expr:
    """Key/value heads repeated so that there is one a query head."""
    count = r.facts.quotient(heads, x.shape[-3])
    if count is None:
        raise ValueError("query heads are no multiple of key/value heads")
    wide = Result((*x.shape[:-3], heads, *x.shape[-2:]), x.dtype, r.facts, r.unique)
    return _repeat_interleave(wide, x, count, x.rank - 3) or x


def _default_scale(size: Size) -> Value:
    return 1.0 / math.sqrt(size) if isinstance(size, int) else None
