"""The operation table of ONNX: one handler per operator, opsets 11 to 26.

A handler gets the meanings of a node's inputs and returns the meaning of its (first) output, or None if the
node stays opaque.  Shapes are derived here, from the named dimensions of the graph's inputs; two sizes that
cannot be proved equal never count as equal.  Nothing here knows about attention.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import sympy
import torch

from fusepass.dialects.handlers import dim_of, permute, reshape, view
from fusepass.dialects.onnx import views as onnx_views
from fusepass.dialects.onnx.call import DTYPES, HANDLERS, Call, Handler, Meaning, broadcast, fitted, handles
from fusepass.dialects.torch import creation as torch_creation
from fusepass.dialects.torch import ops as torch_ops
from fusepass.dialects.torch import products as torch_products
from fusepass.dialects.torch.creation import filled
from fusepass.expressions import arithmetic
from fusepass.expressions.index import Size, simplify_size
from fusepass.expressions.ir import Expr, Shape, cast, const, expr, leaf, pointwise, scalar_of

__all__ = ["DTYPES", "HANDLERS", "Call", "Meaning", "onnx_views"]


def _pointwise(c: Call, op: str, *args: Expr, dtype: torch.dtype | None = None) -> Expr | None:
    shape = broadcast(c, *(a.shape for a in args))
    if shape is None:
        return None
    args = tuple(fitted(c, a, shape) for a in args)
    result = pointwise(op, *args, dtype=dtype)
    result = result if result.shape == shape else expr(op, args, (), shape, result.dtype)
    return _folded(op, result) or result


_FOLDED = frozenset("neg abs sqrt log exp tanh add sub mul div pow max min".split())


def _folded(op: str, node: Expr) -> Expr | None:
    """Arithmetic on numbers, folded."""
    values = [scalar_of(a) for a in node.args]
    if op not in _FOLDED or not node.is_float or any(v is None for v in values):
        return None
    dtypes = [a.dtype for a in node.args]
    value = arithmetic.folded(op, tuple(zip(values, dtypes, strict=True)), node.dtype)
    return None if value is None else view("expand", const(value, node.dtype), node.shape)


# ---------------------------------------------------------------------------------------- pointwise


def _simple(op: str, boolean: bool = False) -> Handler:
    def handler(c: Call, *args: Expr) -> Expr | None:
        return _pointwise(c, op, *args, dtype=torch.bool if boolean else args[0].dtype)

    return handler


for _name, _op in {
    "Add": "add", "Sub": "sub", "Pow": "pow", "Neg": "neg", "Abs": "abs", "Exp": "exp",
    "Log": "log", "Tanh": "tanh", "Sqrt": "sqrt", "Sigmoid": "sigmoid", "Relu": "relu",
}.items():  # fmt: skip
    HANDLERS["", _name] = _simple(_op)
for _name, _op in {
    "Not": "not", "Or": "or", "Xor": "xor", "Equal": "eq", "Less": "lt", "LessOrEqual": "le",
    "Greater": "gt", "GreaterOrEqual": "ge",
}.items():  # fmt: skip
    HANDLERS["", _name] = _simple(_op, boolean=True)


@handles("Mul")
def _mul(c: Call, *args: Expr) -> Expr | None:
    """A product; ``x * float(m)`` of a boolean ``m`` is ``x * m``."""
    dtype = args[0].dtype
    plain = [a.args[0] if a.op == "cast" and a.args[0].dtype is torch.bool else a for a in args]
    tensors = any(a.is_float and scalar_of(a) is None for a in plain)
    return _pointwise(c, "mul", *(plain if tensors else args), dtype=dtype)


@handles("Div")
def _div(c: Call, a: Expr, b: Expr) -> Expr | None:
    if a.is_float:
        return _pointwise(c, "div", a, b, dtype=a.dtype)
    shape = broadcast(c, a.shape, b.shape)  # integer division truncates: only the shape is known
    return None if shape is None else leaf(c.node.outputs[0].name or "", shape, a.dtype)


@handles("Mod")
def _mod(c: Call, a: Expr, b: Expr) -> Expr | None:
    return None if c.attr("fmod", 0) else _pointwise(c, "mod", a, b, dtype=a.dtype)


def _unwidened(x: Expr) -> Expr:
    """The operand of a cast to a wider floating type, which preserves NaN and infinities."""
    while (
        x.op == "cast" and x.args[0].is_float and x.is_float and x.dtype.itemsize > x.args[0].dtype.itemsize
    ):
        x = x.args[0]
    return x


@handles("IsNaN")
def _isnan(c: Call, x: Expr) -> Expr | None:
    return _pointwise(c, "isnan", _unwidened(x), dtype=torch.bool)


@handles("IsInf")
def _isinf(c: Call, x: Expr) -> Expr | None:
    x = _unwidened(x)
    both = c.attr("detect_negative", 1) and c.attr("detect_positive", 1)
    weights = x.args[0] if x.op == "nan_to_num" and math.isfinite(x.attrs[0]) else x
    if weights.op == "softmax":
        return view("expand", const(False, torch.bool), x.shape)  # weights are at most one or NaN
    return _pointwise(c, "isinf", x, dtype=torch.bool) if both else None


@handles("Reciprocal")
def _reciprocal(c: Call, x: Expr) -> Expr | None:
    return _pointwise(c, "div", const(1.0, x.dtype), x, dtype=x.dtype)


def _variadic(op: str) -> Handler:
    def handler(c: Call, first: Expr, *rest: Expr) -> Expr | None:
        out: Expr | None = first
        for x in rest:
            out = None if out is None else _pointwise(c, op, out, x, dtype=first.dtype)
        return out

    return handler


HANDLERS["", "Sum"], HANDLERS["", "Max"], HANDLERS["", "Min"] = map(_variadic, ("add", "max", "min"))


@handles("Clip")
def _clip(c: Call, x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr | None:
    out: Expr | None = x
    for op, bound, name in (("max", low, "min"), ("min", high, "max")):
        if bound is None and c.attr(name) is not None:
            bound = const(c.attr(name), x.dtype)
        if bound is not None and out is not None:
            out = _pointwise(c, op, out, bound, dtype=x.dtype)
    return out


@handles("LeakyRelu")
def _leaky_relu(c: Call, x: Expr) -> Expr | None:
    low = _pointwise(c, "mul", x, const(float(c.attr("alpha", 0.01)), x.dtype), dtype=x.dtype)
    positive = _pointwise(c, "gt", x, const(0.0, x.dtype), dtype=torch.bool)
    if low is None or positive is None:
        return None
    return _pointwise(c, "where", positive, x, low, dtype=x.dtype)


@handles("And")
def _and(c: Call, a: Expr, b: Expr) -> Expr | None:
    both = _pointwise(c, "and", a, b, dtype=torch.bool)
    never = both is not None and any(scalar_of(x) is False for x in (a, b))
    return view("expand", const(False, torch.bool), both.shape) if never and both is not None else both


@handles("Where")
def _where(c: Call, condition: Expr, yes: Expr, no: Expr) -> Expr | None:
    shape = broadcast(c, condition.shape, yes.shape, no.shape)
    if scalar_of(condition) is False and no.shape == shape:
        return no
    value = scalar_of(yes)
    if condition.op == "isnan" and condition.args[0] is no and value is not None and no.shape == shape:
        return expr("nan_to_num", (no,), (float(value), -math.inf, math.inf), no.shape, no.dtype)
    return _pointwise(c, "where", condition, yes, no, dtype=yes.dtype)


@handles("Cast")
def _cast(c: Call, x: Expr) -> Expr | None:
    dtype = DTYPES.get(ir.DataType(c.attr("to")))
    return None if dtype is None else _as(x, dtype)


@handles("CastLike")
def _cast_like(c: Call, x: Expr, like: Expr) -> Expr:
    return _as(x, like.dtype)


def _as(x: Expr, dtype: torch.dtype) -> Expr:
    """A cast; a number stays a number."""
    value = scalar_of(x)
    return cast(x, dtype) if value is None else view("expand", const(value, dtype), x.shape)


@handles("Identity")
def _identity(c: Call, x: Expr) -> Expr:
    return x


@handles("Dropout")
def _dropout(c: Call, x: Expr, ratio: Expr | None = None, training: Expr | None = None) -> Expr | None:
    trains = False if training is None else scalar_of(training)
    if trains is False or trains == 0:
        return x
    chance = 0.5 if ratio is None else scalar_of(ratio)
    if trains is None or chance is None:
        return None
    return expr("dropout", (x,), (float(chance), c.node.outputs[0].name or ""), x.shape, x.dtype)


def _unread(c: Call, x: Expr, *_: Expr | None) -> Expr:
    """An element-wise or row-wise operation that stays opaque: only its shape is known."""
    name = c.node.outputs[0].name or ""
    return leaf(name, x.shape, c.output_dtype() or x.dtype)


for _name in (
    "LayerNormalization Gelu Erf Elu Softplus Softsign HardSigmoid HardSwish Mish Selu PRelu Celu "
    "Floor Ceil Round Sign Cos Sin RMSNormalization GroupNormalization InstanceNormalization "
    "BatchNormalization LpNormalization Swish SimplifiedLayerNormalization"
).split():
    HANDLERS["", _name] = _unread
for _name in (
    "Gelu FastGelu BiasGelu QuickGelu SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "SimplifiedLayerNormalization RotaryEmbedding"
).split():
    HANDLERS["com.microsoft", _name] = _unread


# ---------------------------------------------------------------------------------------- creation


@handles("ConstantOfShape")
def _constant_of_shape(c: Call, *_: Expr | None) -> Expr | None:
    shape = c.numbers(0)
    if shape is None:
        shape = c.recorded[0]
    if shape is None:
        return None
    given = c.attr("value")
    value, dtype = (0.0, torch.float32) if given is None else (given.numpy().item(), DTYPES.get(given.dtype))
    return None if dtype is None else filled(c.result(tuple(shape), dtype), value)


@handles("Range")
def _range(c: Call, *_: Expr | None) -> Expr | None:
    bounds = [c.numbers(n) for n in range(3)]
    if any(b is None or len(b) != 1 for b in bounds):
        return None
    start, limit, step = (b[0] for b in bounds if b is not None)
    length = simplify_size(sympy.expand(sympy.sympify(limit) - start))
    if isinstance(length, int) and isinstance(step, int) and step != 0:
        length = max(0, -(-length // step))
    elif step != 1 or not c.facts.at_most(0, length):
        return None
    return expr("iota", (), (start, step), (length,), torch.int64)


@handles("EyeLike")
def _eye(c: Call, x: Expr) -> Expr | None:
    dtype = DTYPES.get(ir.DataType(c.attr("dtype"))) if c.attr("dtype") else x.dtype
    if dtype is None or c.attr("k", 0):
        return None
    eye = torch_ops.HANDLERS["eye"](c.result(x.shape, dtype))
    return eye if isinstance(eye, Expr) else None


@handles("Trilu")
def _trilu(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    k = c.numbers(1) if not c.missing(1) else (0,)
    if k is None:
        return None
    return torch_creation.triangle(c.result(x.shape, x.dtype), x, k[0], "ge" if c.attr("upper", 1) else "le")


# ---------------------------------------------------------------------------------------- products


def _matmul_shape(c: Call, a: Expr, b: Expr) -> Shape | None:
    if a.rank < 1 or b.rank < 1 or not c.facts.equal(a.shape[-1], b.shape[-2 if b.rank > 1 else -1]):
        return None
    batch = broadcast(c, a.shape[:-2], b.shape[:-2])
    if batch is None:
        return None
    return (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.rank > 1 else ()))


@handles("MatMul")
def _matmul(c: Call, a: Expr, b: Expr) -> Expr | None:
    shape = _matmul_shape(c, a, b)
    if shape is None or not a.is_float:
        return None
    product = torch_ops.HANDLERS["matmul"](c.result(shape, a.dtype), a, b)
    return product if isinstance(product, Expr) else None


@handles("FusedMatMul", "TransposeMatMul", domain="com.microsoft")
def _fused_matmul(c: Call, a: Expr, b: Expr) -> Expr | None:
    if c.attr("transBatchA", 0) or c.attr("transBatchB", 0):
        return None
    a, b = (_mt(x) if c.attr(name, 0) else x for x, name in ((a, "transA"), (b, "transB")))
    out = _matmul(c, a, b)
    return out if out is None else _times(c, out, c.attr("alpha", 1.0))


def _mt(x: Expr) -> Expr:
    return permute(x, (*range(x.rank - 2), x.rank - 1, x.rank - 2)) if x.rank > 1 else x


def _times(c: Call, x: Expr, factor: float) -> Expr | None:
    return x if factor == 1 else _pointwise(c, "mul", x, const(factor, x.dtype), dtype=x.dtype)


@handles("Gemm")
def _gemm(c: Call, a: Expr, b: Expr, bias: Expr | None = None) -> Expr | None:
    a, b = (_mt(x) if c.attr(name, 0) else x for x, name in ((a, "transA"), (b, "transB")))
    out = _matmul(c, a, b)
    out = None if out is None else _times(c, out, c.attr("alpha", 1.0))
    if out is None or bias is None:
        return out
    added = _times(c, bias, c.attr("beta", 1.0))
    return None if added is None else _pointwise(c, "add", out, added, dtype=out.dtype)


@handles("Einsum")
def _einsum(c: Call, *tensors: Expr) -> Expr | None:
    labels = torch_products.einsum_labels(c.attr("equation"), [t.rank for t in tensors])
    if labels is None:
        return None
    *given, out = labels
    sizes: dict[str, Size] = {}
    for letters, tensor in zip(given, tensors, strict=True):
        for letter, size in zip(letters, tensor.shape, strict=True):
            known = sizes.get(letter, 1)
            if 1 not in (known, size) and not c.facts.equal(known, size):
                return None
            sizes[letter] = size if known == 1 else known
    if any(letter not in sizes for letter in out):
        return None
    shape = tuple(sizes[letter] for letter in out)
    product = torch_ops.HANDLERS["einsum"](c.result(shape, tensors[0].dtype), c.attr("equation"), *tensors)
    return product if isinstance(product, Expr) else None


# ---------------------------------------------------------------------------------------- reductions


def _reduce(op: str) -> Handler:
    def handler(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
        axes = c.numbers(1, "axes")
        if axes is None or not axes:
            if not c.missing(1) and axes is None:
                return None
            if c.attr("noop_with_empty_axes", 0):
                return x
            axes = tuple(range(x.rank))
        dims = tuple(sorted(dim_of(a, x.rank) for a in axes if isinstance(a, int)))
        wide = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
        reduced = expr(op, (x,), (dims,), wide, x.dtype)
        if c.attr("keepdims", 1):
            return reduced
        return reshape(reduced, tuple(n for d, n in enumerate(x.shape) if d not in dims))

    return handler


HANDLERS["", "ReduceSum"] = _reduce("sum")
HANDLERS["", "ReduceMax"] = _reduce("amax")
HANDLERS["", "ReduceLogSumExp"] = _reduce("logsumexp")


@handles("ReduceMean", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare", "ReduceL1")
def _reduced(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    """A reduction that stays opaque: only its shape is known."""
    total = _reduce("sum")(c, x)
    return _unread(c, total) if isinstance(total, Expr) else None


@handles("CumSum")
def _cumsum(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    axis = c.numbers(1)
    if axis is None or not isinstance(axis[0], int) or c.attr("exclusive", 0) or c.attr("reverse", 0):
        return None
    return expr("cumsum", (x,), (dim_of(axis[0], x.rank),), x.shape, x.dtype)


def _softmax(op: str) -> Handler:
    def handler(c: Call, x: Expr) -> Expr | None:
        axis = dim_of(c.attr("axis", -1 if c.version >= 13 else 1), x.rank)
        if c.version < 13 and axis != x.rank - 1:
            return None  # before opset 13 a softmax is over all dimensions from the axis on
        return expr(op, (x,), (axis,), x.shape, x.dtype)

    return handler


HANDLERS["", "Softmax"], HANDLERS["", "LogSoftmax"] = _softmax("softmax"), _softmax("log_softmax")
