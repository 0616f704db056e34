"""Formulas as ``score_mod`` and ``mask_mod`` of flash-attn 4, whose kernels are compiled with them inside.

flash-attn 4 traces a modifier while it compiles: what Python computes at that time is fixed, and what CuTe's
tensors compute becomes code.  So a formula is evaluated once by walking it, on CuTe's values for ``b``,
``h``, ``i`` and ``j``, as :func:`fusepass.kernels.formula.evaluate` does on PyTorch's.  Numbers remain
Python's until they are combined with such a value; floats are float32, whatever they were loaded as.

Sources: the documentation of CUTLASS's Python DSL (``TensorSSA``) and the interface of flash-attn 4.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusepass.expressions.arithmetic import clamps_pass_bounds
from fusepass.kernels.formula import Formula, may_hide, may_leave

Value = Any
"""A number of Python, or a value of CuTe (``TensorSSA``)."""

#: The lowest number used: it hides as well as any lower one, and does not overflow in powers of two.
LOWEST = -1e37

#: Powers up to this one are products.
LARGEST_POWER = 16

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "le": operator.le, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt,
    "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
#: The operations of formulas that can be expressed here.
WRITABLE = frozenset(
    {*_COMPARISONS, "const", "index", "load", "cast", "add", "sub", "mul", "div", "floordiv", "mod", "neg",
     "abs", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "max", "min", "and", "or", "not", "where"}
)  # fmt: skip
_FLOATS = frozenset({"f16", "bf16", "f32"})
_CASTS = _FLOATS | {"i32", "i64", "b8"}


def unwritable(formula: Formula) -> str | None:
    """The first operation of a formula that has no counterpart here; None if all have one."""
    kind = formula[0]
    if kind not in WRITABLE:
        return str(kind)
    if kind == "cast" and formula[2] not in _CASTS:
        return f"a cast to {formula[2]}"
    if kind == "load" and any(map(may_leave, formula[2])):
        return "load by the distance between query and key"
    if kind in ("const", "index", "load"):
        return None
    if kind in ("floordiv", "mod") and not _is_count(*formula[1:]):
        return f"{kind} of a number that may be negative"
    parts = (formula[1],) if kind == "cast" else formula[1:]
    return next((unwritten for part in parts if (unwritten := unwritable(part)) is not None), None)


def _is_count(x: Formula, y: Formula) -> bool:
    """Is ``x`` an index that is never negative, and ``y`` a positive number?  Otherwise rounding differs."""
    whole = y[0] == "const" and type(y[1]) is int and y[1] > 0
    return bool(whole and x[0] == "index" and x[1] >= 0 and all(term[0] >= 0 for term in x[2]))


class Walk:
    """Evaluates formulas while a kernel is compiled.

    Args:
        at: CuTe's values for the letters ``b``, ``h``, ``i``, ``j``.
        tensors: CuTe's tensors, in the order of the formula's slots.
    """

    def __init__(self, at: Mapping[str, Value], tensors: Sequence[Any]) -> None:
        import cutlass
        from cutlass import cute

        self.cutlass, self.cute, self.at, self.tensors = cutlass, cute, at, tensors

    def value(self, formula: Formula) -> Value:
        """The value of a formula."""
        kind = formula[0]
        if kind == "const":
            return formula[1]
        if kind == "index":
            return self._index(formula[1], formula[2])
        if kind == "load":
            return self._load(self.tensors[formula[1]], formula[2])
        if kind == "cast":
            return self._cast(self.value(formula[1]), formula[2])
        given = [self.value(part) for part in formula[1:]]
        if kind in _COMPARISONS:
            return _COMPARISONS[kind](*self._alike(*given))
        result: Value = getattr(self, f"_{kind}")(*given)
        return result

    def _index(self, constant: int, terms: Any) -> Value:
        total: Value = None
        for factor, letter, stride, size in terms:
            digit = self.at[letter]
            digit = digit if stride == 1 else digit // stride
            digit = digit % size if size else digit
            digit = digit if factor == 1 else digit * factor
            total = digit if total is None else total + digit
        if total is None:
            return constant
        return total if constant == 0 else total + constant

    def _load(self, tensor: Any, indices: Any) -> Value:
        """One element per lane: CuTe has no gather, so lanes are read one after the other."""
        where = [self._index(constant, terms) for constant, terms in indices] or [0]
        lanes = next((self.cute.size(w.shape) for w in where if not isinstance(w, int)), 1)
        given = [w if isinstance(w, int) else self._scalars(w) for w in where]
        loaded = self.cute.make_rmem_tensor(lanes, tensor.element_type)
        for lane in range(lanes):
            at = tuple(g if isinstance(g, int) else g[lane] for g in given)
            loaded[lane] = tensor[at if len(at) > 1 else at[0]]
        out = loaded.load()
        return out.to(self.cutlass.Float32) if self._is_float(out) else out

    def _scalars(self, value: Value) -> Any:
        kept = self.cute.make_rmem_tensor(self.cute.size(value.shape), self.cutlass.Int32)
        kept.store(value.to(self.cutlass.Int32))
        return kept

    # -- kinds of numbers --------------------------------------------------------------------

    def _is_float(self, value: Value) -> bool:
        if isinstance(value, (bool, int, float)):
            return isinstance(value, float)
        return bool(value.dtype.is_float)

    def _is_truth(self, value: Value) -> bool:
        if isinstance(value, (bool, int, float)):
            return isinstance(value, bool)
        return value.dtype is self.cutlass.Boolean

    def _alike(self, *given: Value) -> tuple[Value, ...]:
        """Operands of one type: float32 if one is a float, else the widest integer.

        Next to a CuTe value, numbers become CuTe values too, since not every operation takes both.
        """
        values = [g for g in given if not isinstance(g, (bool, int, float))]
        if not values:
            return given
        c = self.cutlass
        if any(map(self._is_float, given)):
            dtype = c.Float32
        elif all(map(self._is_truth, given)):
            dtype = c.Boolean
        else:
            dtype = c.Int64 if any(v.dtype is c.Int64 for v in values) else c.Int32
        return tuple(self._as(g, dtype, values[0]) for g in given)

    def _as(self, given: Value, dtype: Any, like: Value) -> Value:
        if isinstance(given, (bool, int, float)):
            return self.cute.full(like.shape, given, dtype)
        return given if given.dtype is dtype else given.to(dtype)

    def truth(self, given: Value) -> Value:
        """A value as a truth value: true unless zero."""
        if self._is_truth(given):
            return given
        return given != 0 if isinstance(given, (int, float)) else operator.ne(*self._alike(given, 0))

    def _cast(self, given: Value, name: str) -> Value:
        if name == "b8":
            return self.truth(given)
        wide = name in _FLOATS
        if isinstance(given, (bool, int, float)):
            return float(given) if wide else int(given)
        c = self.cutlass
        return given.to(c.Float32 if wide else c.Int64 if name == "i64" else c.Int32)

    # -- operations --------------------------------------------------------------------------

    def _real(self, given: Value) -> Value:
        return float(given) if isinstance(given, (bool, int, float)) else given.to(self.cutlass.Float32)

    def _neg(self, x: Value) -> Value:
        return operator.sub(*self._alike(0, x))

    def _abs(self, x: Value) -> Value:
        return self._max(x, self._neg(x))

    def _div(self, x: Value, y: Value) -> Value:
        return operator.truediv(*self._alike(self._real(x), self._real(y)))

    def _floordiv(self, x: Value, y: int) -> Value:
        return x // y

    def _mod(self, x: Value, y: int) -> Value:
        return x % y

    def _exp(self, x: Value) -> Value:
        return self._of_library(x, "exp")

    def _sqrt(self, x: Value) -> Value:
        return self._of_library(x, "sqrt")

    def _tanh(self, x: Value) -> Value:
        x = self._real(x)
        return math.tanh(x) if isinstance(x, float) else self.cute.math.tanh(x, fastmath=True)

    def _of_library(self, x: Value, name: str) -> Value:
        """A function that Python and CuTe have under one name."""
        x = self._real(x)
        result: Value = getattr(math if isinstance(x, float) else self.cute.math, name)(x)
        return result

    def _log(self, x: Value) -> Value:
        return self._of_library(x, "log")

    def _log1p(self, x: Value) -> Value:
        return self._of_library(x, "log1p")

    def _expm1(self, x: Value) -> Value:
        return self._of_library(x, "expm1")

    def _erf(self, x: Value) -> Value:
        return self._of_library(x, "erf")

    def _exp2(self, x: Value) -> Value:
        return self._exp(self._mul(self._real(x), math.log(2)))

    def _rsqrt(self, x: Value) -> Value:
        return self._div(1.0, self._sqrt(x))

    def _sigmoid(self, x: Value) -> Value:
        return self._div(1.0, self._add(self._exp(self._neg(self._real(x))), 1.0))

    def _relu(self, x: Value) -> Value:
        return self._max(x, 0.0)

    def _pow(self, x: Value, y: Value) -> Value:
        """A power of a positive number, or one with a positive integer exponent."""
        if not isinstance(y, float) or not y.is_integer() or y > LARGEST_POWER:
            return self._exp(self._mul(self._log(x), y))
        power = x
        for _ in range(int(y) - 1):
            power = self._mul(power, x)
        return power if y else 1.0

    def _add(self, x: Value, y: Value) -> Value:
        return operator.add(*self._alike(x, y))

    def _sub(self, x: Value, y: Value) -> Value:
        return operator.sub(*self._alike(x, y))

    def _mul(self, x: Value, y: Value) -> Value:
        return operator.mul(*self._alike(x, y))

    def _max(self, x: Value, y: Value) -> Value:
        x, y = self._alike(x, y)
        return self._where(self._or(operator.gt(x, y), operator.ne(x, x)), x, y)

    def _min(self, x: Value, y: Value) -> Value:
        x, y = self._alike(x, y)
        return self._where(self._or(operator.lt(x, y), operator.ne(x, x)), x, y)

    def _and(self, x: Value, y: Value) -> Value:
        x, y = self._alike(self.truth(x), self.truth(y))
        return x & y

    def _or(self, x: Value, y: Value) -> Value:
        x, y = self._alike(self.truth(x), self.truth(y))
        return x | y

    def _not(self, x: Value) -> Value:
        x = self.truth(x)
        return not x if isinstance(x, bool) else operator.eq(*self._alike(x, False))

    def _where(self, condition: Value, x: Value, y: Value) -> Value:
        condition = self.truth(condition)
        if isinstance(condition, bool):
            return x if condition else y
        x, y, _ = self._alike(x, y, x if not isinstance(x, (bool, int, float)) else self._blank(condition, x))
        return self.cute.where(condition, x, y)

    def _blank(self, like: Value, number: bool | int | float) -> Value:
        c = self.cutlass
        kinds = {bool: c.Boolean, int: c.Int32, float: c.Float32}
        return self.cute.full(like.shape, number, kinds[type(number)])

    # -- scores ------------------------------------------------------------------------------

    def score(self, steps: Sequence[Any], s: Value) -> tuple[Value, list[Value]]:
        """The modified score, and the derivative of each step; None stands for 1."""
        slopes: list[Value] = []
        for step in steps:
            s, slope = self._step(step, s)
            slopes.append(slope)
        return s, slopes

    def _step(self, step: Any, s: Value) -> tuple[Value, Value]:
        """A score after one step, and the step's derivative; None stands for 1."""
        match step:
            case "scale", factor:
                return s * factor, factor
            case "softcap", cap:
                curve = self.cute.math.tanh(s / cap, fastmath=True)
                return cap * curve, 1.0 - curve * curve
            case "clamp", low, high:
                above, below = (
                    (operator.ge, operator.le) if clamps_pass_bounds() else (operator.gt, operator.lt)
                )
                inside = self._and(above(*self._alike(s, low)), below(*self._alike(s, high)))
                return self._max(self._min(s, high), low), self._where(inside, 1.0, 0.0)
            case "leaky_relu", slope:
                positive = operator.gt(*self._alike(s, 0.0))
                s = self._where(positive, s, s * slope) if slope else self._max(s, 0.0)
                return s, self._where(positive, 1.0, float(slope))
            case ("abs",):
                above, below = (compare(*self._alike(s, 0.0)) for compare in (operator.gt, operator.lt))
                return self._abs(s), self._where(above, 1.0, self._where(below, -1.0, 0.0))
            case "add", formula, factor:
                return s + self._added(formula, factor, s), None
            case "function", operations, formula:
                return self._function(operations, formula, s)
            case "times", formula:
                slope = self._as(self._real(self.value(formula)), self.cutlass.Float32, s)
                return s * slope, slope
        raise ValueError(f"flash-attn 4: unknown step {step[0]!r}")

    def _function(self, operations: Sequence[Any], formula: Formula | None, s: Value) -> tuple[Value, Value]:
        """A function of the score and its derivative, step by step; ``formula`` is the element it reads."""
        element = (
            None if formula is None else self._as(self._real(self.value(formula)), self.cutlass.Float32, s)
        )
        values: list[Value] = [s]
        slopes: list[Value] = [1.0]
        for name, *arguments in operations:
            given = [
                element if a is None else values[a] if isinstance(a, int) else a for a in arguments
            ]  # fmt: skip
            values.append(getattr(self, f"_{name}")(*given))
            slope: Value = 0.0
            for at, argument in enumerate(arguments):
                if isinstance(argument, int):
                    part = self._mul(slopes[argument], _SLOPES[name][at](self, values[-1], *given))
                    slope = self._add(slope, part)
            slopes.append(slope)
        return values[-1], self._as(slopes[-1], self.cutlass.Float32, s)

    def _side(self, x: Value, above: float, below: float, of: Value = 0.0, even: float = 0.0) -> Value:
        """``above`` where ``x`` is greater than ``of``, ``below`` where it is less, ``even`` elsewhere."""
        less = self._where(operator.lt(*self._alike(x, of)), below, even)
        return self._where(operator.gt(*self._alike(x, of)), above, less)

    def _added(self, formula: Formula, factor: float, like: Value) -> Value:
        """A bias as float32; finite numbers below ``LOWEST`` are raised to it, and hide just as much."""
        wide = self._as(self._real(self.value(formula)), self.cutlass.Float32, like)
        wide = wide if factor == 1 else wide * factor
        if not may_hide(formula, LOWEST):
            return wide
        low = self._and(operator.lt(*self._alike(wide, LOWEST)), operator.gt(*self._alike(wide, -math.inf)))
        return self._where(low, LOWEST, wide)


# ---------------------------------------------------------------------------------------- derivatives


def _even(other: Value) -> float:
    """The derivative of an extreme of two equal numbers, as PyTorch has it."""
    if isinstance(other, float):
        return float(clamps_pass_bounds())
    return 0.5


#: The derivatives of an operation's result ``y`` by each of its arguments ``a`` and ``b``; ``w`` is the walk.
_SLOPES: dict[str, tuple[Callable[..., Value], ...]] = {
    "neg": (lambda w, y, a: -1.0,),
    "abs": (lambda w, y, a: w._side(a, 1.0, -1.0),),
    "relu": (lambda w, y, a: w._side(a, 1.0, 0.0),),
    "exp": (lambda w, y, a: y,),
    "exp2": (lambda w, y, a: w._mul(y, math.log(2)),),
    "expm1": (lambda w, y, a: w._add(y, 1.0),),
    "log": (lambda w, y, a: w._div(1.0, a),),
    "log1p": (lambda w, y, a: w._div(1.0, w._add(a, 1.0)),),
    "sqrt": (lambda w, y, a: w._div(0.5, y),),
    "rsqrt": (lambda w, y, a: w._mul(-0.5, w._pow(y, 3.0)),),
    "tanh": (lambda w, y, a: w._sub(1.0, w._mul(y, y)),),
    "sigmoid": (lambda w, y, a: w._mul(y, w._sub(1.0, y)),),
    "erf": (lambda w, y, a: w._mul(2 / math.sqrt(math.pi), w._exp(w._neg(w._mul(a, a)))),),
    "add": (lambda w, y, a, b: 1.0, lambda w, y, a, b: 1.0),
    "sub": (lambda w, y, a, b: 1.0, lambda w, y, a, b: -1.0),
    "mul": (lambda w, y, a, b: b, lambda w, y, a, b: a),
    "div": (lambda w, y, a, b: w._div(1.0, b), lambda w, y, a, b: w._neg(w._div(y, b))),
    "pow": (lambda w, y, a, b: w._mul(b, w._pow(a, b - 1)), lambda w, y, a, b: w._mul(y, w._log(a))),
    "max": (
        lambda w, y, a, b: w._side(a, 1.0, 0.0, b, _even(b)),
        lambda w, y, a, b: w._side(b, 1.0, 0.0, a, _even(a)),
    ),
    "min": (
        lambda w, y, a, b: w._side(a, 0.0, 1.0, b, _even(b)),
        lambda w, y, a, b: w._side(b, 0.0, 1.0, a, _even(a)),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------- modifiers


def _letters(b: Value, h: Value, i: Value, j: Value) -> dict[str, Value]:
    return {"b": b, "h": h, "i": i, "j": j}


@functools.cache
def _version() -> str:
    """A version of the text of this file, on which the kernels that are cached on disk depend."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _with_identity(function: Callable[..., Any], *content: object) -> Callable[..., Any]:
    """Give a function the name and hash by which flash-attn 4 caches compiled kernels."""
    text = repr((function.__name__, _version(), content))
    function.__cute_hash__ = hashlib.sha256(text.encode()).hexdigest()  # type: ignore[attr-defined]
    return function


@functools.lru_cache(maxsize=256)
def score_mods(steps: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``score_mod`` and ``score_mod_bwd`` for the steps of a score; flash-attn 4 sets the argument names."""

    def score_mod(s, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return Walk(_letters(b, h, q_idx, kv_idx), aux_tensors or ()).score(steps, s)[0]

    def score_mod_bwd(grad, s, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        for slope in Walk(_letters(b, h, q_idx, kv_idx), aux_tensors or ()).score(steps, s)[1]:
            grad = grad if slope is None else grad * slope
        return grad

    return _with_identity(score_mod, steps), _with_identity(score_mod_bwd, steps)


@functools.lru_cache(maxsize=256)
def mask_mod(visible: Formula, first: int) -> Callable[..., Any]:
    """The ``mask_mod`` of a visibility, whose tensors begin at index ``first``."""

    def seen(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        walk = Walk(_letters(b, h, q_idx, kv_idx), (aux_tensors or ())[first:])
        visibility = walk.truth(walk.value(visible))
        return walk._blank(kv_idx, visibility) if isinstance(visibility, bool) else visibility

    return _with_identity(seen, visible, first)


__all__ = ["WRITABLE", "Walk", "mask_mod", "score_mods", "unwritable"]
