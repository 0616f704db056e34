"""Provable bounds of the elements of an expression.

The bounds are those of interval arithmetic, widened by rounding.  A bound that may exceed the range of its
dtype is infinite.  None in place of bounds means that an element may be NaN or that nothing is known.  These
assumptions are made about a graph's inputs:

* the operands of matrix products, and learned numbers, are finite and are not fills;
* lengths that are not known have an upper bound;
* in :func:`is_ordinary`, which asks for an order of magnitude, learned numbers, products, integer inputs and
  lengths are of usual size, so that a learned slope times a distance is an ordinary number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fusepass.expressions.contents import FILL, Contents
from fusepass.expressions.index import Affine, AxisSpace, Facts, prod
from fusepass.expressions.ir import VIEWS, Expr, is_integer, opmath, rounded_to

Interval = tuple[float, float]

__all__ = [
    "LEAST", "Interval", "Ranges", "absorbs_from_above", "holds_fill", "is_ordinary", "least_size",
    "range_of",
]  # fmt: skip

_BITS = frozenset("lt le gt ge eq ne and or xor not isnan isinf".split())
_TRUTH: Interval = (0.0, 1.0)
#: Operations that do not round, and those whose rounding never leaves their bounds.
_EXACT = frozenset("where max min amax cat neg abs relu".split())
_BOUNDED = frozenset("tanh sigmoid erf softmax".split())


@dataclass(frozen=True)
class Scale:
    """How large unknown things may be: learned numbers and products, integers, lengths."""

    learned: float
    integer: float | None  # None: as large as the dtype allows
    length: int


#: The largest that anything can be in practice.
WIDEST = Scale(FILL, None, 1 << 40)
#: Usual sizes: slopes times distances, and small fills times input bits, stay below a fill.
USUAL = Scale(64.0, 64.0, 1 << 20)
#: Small sizes: an expression that is large under them is large because of a constant.
LEAST = Scale(1.0, 1.0, 2)


@dataclass
class Ranges:
    """Bounds of the expressions of one graph.

    Attributes:
        contents: what is known about leaves.
        facts: what is known about sizes.
        space: the axes of index expressions, given when the questions are about formulas.
        scale: how large unknown things may be.
    """

    contents: Contents
    facts: Facts
    space: AxisSpace | None = None
    scale: Scale = WIDEST
    _known: dict[Expr, Interval | None] = field(default_factory=dict)

    def of(self, root: Expr) -> Interval | None:
        """Bounds of every element, which may be reached even if infinite.  None: unknown, or perhaps NaN."""
        todo = [root]
        while todo:
            node = todo[-1]
            missing = [a for a in _below(node) if a not in self._known]
            if missing and node not in self._known:
                todo.extend(missing)
                continue
            todo.pop()
            if node not in self._known:
                self._known[node] = self._of(node)
        return self._known[root]

    def is_finite(self, root: Expr) -> bool:
        """Is every element provably a number, neither NaN nor infinite?"""
        interval = self.of(root)
        return interval is not None and math.isfinite(interval[0]) and math.isfinite(interval[1])

    # -- one node ----------------------------------------------------------------------------

    def _of(self, node: Expr) -> Interval | None:
        if node.dtype.is_complex:
            return None
        if node in self.contents.ordinary:
            return -self.scale.learned, self.scale.learned
        if node.op in _BITS or node.dtype is torch.bool:
            return _TRUTH
        if node.op in ("const", "iota", "affine", "input"):
            return self._leaf(node)
        if node.op in VIEWS or node.op in ("index", "load"):
            return self._known[node.args[0]]
        if node.op == "dot":
            return self._product(node)
        args = [self._known[a] for a in _below(node)]
        if is_integer(node.dtype):
            return self._integer(node, args)
        if node.op == "nan_to_num":
            return _cleaned(node, args[0])
        if any(a is None for a in args):
            return None
        return self._float(node, [_as(a, arg, node.dtype) for a, arg in zip(args, _below(node), strict=True)])

    def _leaf(self, node: Expr) -> Interval | None:
        if node.op == "const":
            value = float(node.attrs[0])
            return None if math.isnan(value) else (value, value)
        if node.op == "iota":
            start, step = (self._size(n) for n in node.attrs)
            last = self._size(node.shape[0] - 1 if node.shape else 0)
            return _sum(start, _times(step, (0.0, max(last[1], 0.0))))
        if node.op == "affine":
            return self._affine(node.attrs[0])
        return self._input(node)

    def _input(self, node: Expr) -> Interval | None:
        if (value := self.contents.values.get(node)) is not None:
            return self.of(value)
        known = self.contents.extremes(node) if node.is_float or node in self.contents.consulted else None
        if known is not None:
            return None if math.isnan(known[0]) or math.isnan(known[1]) else known
        if not node.is_float:
            low, high = _limits(node.dtype)
            if self.scale.integer is not None:
                low, high = max(low, -self.scale.integer), min(high, self.scale.integer)
            return low, high
        return None

    def _affine(self, index: Affine) -> Interval | None:
        if self.space is None:
            return None
        index = self.space.resolve(index)
        total = self._size(index.const)
        for axis, c in index.terms:
            last = self._size(self.space.sizes[axis])[1] - 1
            total = _sum(total, _times(self._size(c), (0.0, max(last, 0.0))))
        return total

    def _product(self, node: Expr) -> Interval | None:
        """A matrix product, whose operands are finite by assumption unless a fill is written into them."""
        if any(map(holds_fill, node.args)):
            return None
        return -self.scale.learned, self.scale.learned

    def _integer(self, node: Expr, args: list[Interval | None]) -> Interval:
        """Integers wrap at the limits of their dtype, so they always lie within it."""
        low, high = _limits(node.dtype)
        if any(a is None for a in args) or (node.op in ("floordiv", "mod") and _holds_zero(args[1])):
            return low, high
        if node.op == "cast":
            interval = args[0]
            assert interval is not None
            interval = (math.trunc(interval[0]), math.trunc(interval[1])) if _is_finite(interval) else None
        else:
            interval = self._real(node, [a for a in args if a is not None])
            if interval is not None and _is_finite(interval):
                # A negative power of an integer is a fraction.
                interval = (math.floor(interval[0]), math.ceil(interval[1]))
        if interval is None or not _is_finite(interval) or interval[0] < low or interval[1] > high:
            return low, high
        return interval

    def _float(self, node: Expr, args: list[Interval]) -> Interval | None:
        same = all(a.dtype is node.dtype for a in _below(node))
        if node.op in _EXACT and same:
            return self._real(node, args)
        if node.op in _BOUNDED:
            bounded = self._real(node, args)
            return None if bounded is None else _flushed(bounded, node.dtype)
        if node.op == "cast":
            return _cast(args[0], node.dtype)
        interval = self._real(node, args)
        if node.op == "div" and (averaged := self._averaged(node)) is not None:
            low, high = self._known[averaged] or (-math.inf, math.inf)
            # Rounding never doubles a mean, however many elements it has.
            interval = 2 * min(low, 0.0), 2 * max(high, 0.0)
        return None if interval is None else _rounded(interval, node.dtype)

    def _averaged(self, node: Expr) -> Expr | None:
        """The operand of a mean, written as a sum divided by a symbolic number of elements; else None."""
        total, count = node.args
        while total.op in VIEWS:
            total = total.args[0]
        if total.op != "sum" or count.op != "iota" or count.rank or self._known[total.args[0]] is None:
            return None
        if torch.finfo(total.dtype).max < FILL:
            return None  # the sum may overflow
        elements = prod(total.args[0].shape[d] for d in total.attrs[0])
        return total.args[0] if self.facts.equal(elements, count.attrs[0]) else None

    def _real(self, node: Expr, args: list[Interval]) -> Interval | None:
        """The operation on real numbers."""
        if node.op in ("where", "cat"):
            return min(a[0] for a in args), max(a[1] for a in args)
        if node.op in ("sum", "cumsum", "logsumexp", "softmax", "log_softmax", "amax"):
            return self._reduced(node, args[0])
        if node.op == "dropout":
            return _dropped(args[0], float(node.attrs[0]))
        same = len(node.args) == 2 and node.args[0] is node.args[1]
        if same and node.op == "mul":
            return _power(args[0], 2.0)
        if same and node.op == "sub" and _is_finite(args[0]):
            return 0.0, 0.0
        rule = _RULES.get(node.op)
        return None if rule is None else rule(*args)

    def _reduced(self, node: Expr, x: Interval) -> Interval | None:
        dims = node.attrs[0] if isinstance(node.attrs[0], tuple) else (node.attrs[0],)
        counts = [self._size(node.args[0].shape[d]) for d in dims]
        fewest, most = (math.prod(max(c[i], 0.0) for c in counts) for i in (0, 1))
        if node.op == "amax":
            return x
        if node.op == "softmax":
            return _TRUTH if _is_finite(x) else None
        if self._counts(node, x):
            return -float(self.scale.length), float(self.scale.length)
        if node.op == "logsumexp":
            return x[0], x[1] + math.log(max(most, 1.0))
        if node.op == "log_softmax":
            return (x[0] - x[1] - math.log(max(most, 1.0)), 0.0) if _is_finite(x) else None
        if x[0] == -math.inf and x[1] == math.inf:
            return None
        ends = [_part(n, b) for n in (min(fewest, 1.0) if node.op == "cumsum" else fewest, most) for b in x]
        low, high = min(ends), max(ends)
        slack = 0.0
        if node.is_float and _is_finite((low, high)):
            slack = most * torch.finfo(opmath(node.dtype)).eps * most * max(abs(x[0]), abs(x[1]))
            slack = slack if x[0] < 0 < x[1] else 0.0
        return low * _grown(low, most, node) - slack, high * _grown(high, most, node) + slack

    def _counts(self, node: Expr, x: Interval) -> bool:
        """Is it a sum of integer inputs, where these are of usual size?  Such sums count positions."""
        usual = self.scale.integer
        return is_integer(node.dtype) and usual is not None and -usual <= x[0] and x[1] <= usual

    # -- sizes -------------------------------------------------------------------------------

    def _size(self, size: Any) -> Interval:
        """Bounds of a size, or of a sum of products of sizes."""
        if isinstance(size, int):
            return float(size), float(size)
        if size.is_Integer:
            return float(size), float(size)
        if size.is_Symbol:
            return (1.0 if size.is_positive else 0.0), float(self.scale.length)
        parts = [self._size(a) for a in size.args]
        if size.is_Add or size.is_Mul:
            out = parts[0]
            for part in parts[1:]:
                out = _sum(out, part) if size.is_Add else _times(out, part)
            return out
        if isinstance(size, (sympy.Max, sympy.Min)) or type(size).__name__ in ("Max", "Min"):
            return min(p[0] for p in parts), max(p[1] for p in parts)
        if size.is_Pow and size.exp.is_Integer and size.exp > 0:
            return _power(parts[0], float(size.exp)) or (-math.inf, math.inf)
        most = max((abs(b) for p in parts for b in p), default=math.inf)
        divided = type(size).__name__ in ("FloorDiv", "CleanDiv", "CeilDiv", "Mod", "PythonMod")
        return (-most, most) if divided else (-math.inf, math.inf)


def range_of(node: Expr, contents: Contents, facts: Facts) -> Interval | None:
    """Bounds of every element of an expression; None where it may be NaN, or anything."""
    return Ranges(contents, facts).of(node)


def magnitude(x: Interval) -> float:
    """The largest absolute value within bounds."""
    return max(map(abs, x))


def is_ordinary(node: Expr, dtype: torch.dtype, contents: Contents, facts: Facts) -> bool:
    """Is every element provably a finite number that is not a fill in ``dtype``, for inputs of usual size?

    In half precision the lowest number absorbs scores, as ``FILL`` does in other dtypes.
    """
    interval = Ranges(contents, facts, scale=USUAL).of(node)
    most = min(FILL, torch.finfo(dtype).max / 2)
    return interval is not None and interval[0] > -most and interval[1] < most


def least_size(node: Expr, contents: Contents, facts: Facts) -> float:
    """The size that its constants give a tensor, whatever the inputs are; 0 if not known."""
    interval = Ranges(contents, facts, scale=LEAST).of(node)
    return 0.0 if interval is None else magnitude(interval)


def absorbs_from_above(node: Expr, contents: Contents, facts: Facts) -> bool:
    """Are some elements so high, whatever the inputs, that they absorb the scores they are added to?"""
    interval = Ranges(contents, facts, scale=LEAST).of(node)
    return interval is not None and interval[1] >= FILL


def holds_fill(operand: Expr) -> bool:
    """Is an operand made from an infinite number, NaN or a fill?  Operands of products are not searched."""
    todo, seen = [operand], {operand}
    while todo:
        node = todo.pop()
        if node.op == "const" and node.is_float and not abs(node.attrs[0]) < FILL:
            return True
        unseen = [a for a in node.args if a not in seen and node.op != "dot"]
        seen.update(unseen)
        todo.extend(unseen)
    return False


# ---------------------------------------------------------------------------------------- dtypes


def _below(node: Expr) -> tuple[Expr, ...]:
    """The arguments from which the elements of a node are made."""
    if node.op in _BITS or node.op == "dot" or node.dtype is torch.bool:
        return ()
    if node.op == "where":
        return node.args[1:]
    return node.args[:1] if node.op == "index" else node.args


def _limits(dtype: torch.dtype) -> Interval:
    if dtype is torch.bool:
        return _TRUTH
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return float(info.min), float(info.max)


def _as(x: Interval | None, arg: Expr, dtype: torch.dtype) -> Interval:
    """The bounds of an operand in the dtype of the computation; constants keep their own precision."""
    assert x is not None
    return x if arg.op == "const" or arg.dtype is dtype else _cast(x, dtype)


def _cast(x: Interval, dtype: torch.dtype) -> Interval:
    """Bounds in another dtype: a cast rounds correctly, and keeps the order of numbers."""
    return _rounded((rounded_to(x[0], dtype), rounded_to(x[1], dtype)), dtype, slack=0.0)


def _rounded(x: Interval, dtype: torch.dtype, slack: float = 8.0) -> Interval:
    """Bounds after rounding: a little wider, infinite beyond the dtype's range, zero where it underflows."""
    info = torch.finfo(dtype)
    slack *= info.eps
    low, high = x
    low -= abs(low) * slack if math.isfinite(low) else 0.0
    high += abs(high) * slack if math.isfinite(high) else 0.0
    low, high = _flushed((low, high), dtype)
    most = float(info.max)
    return (
        -math.inf if low < -most else min(low, most),
        math.inf if high > most else max(high, -most),
    )


def _flushed(x: Interval, dtype: torch.dtype) -> Interval:
    """Bounds widened for numbers too small for the dtype: they may round to zero, or away from zero."""
    (low, high), least = x, float(torch.finfo(dtype).smallest_normal)
    return (
        0.0 if 0 < low < 2 * least else -2 * least if -least < low < 0 else low,
        0.0 if -2 * least < high < 0 else 2 * least if 0 < high < least else high,
    )


def _cleaned(node: Expr, x: Interval | None) -> Interval:
    """``nan_to_num``: finite numbers stay the same, the rest become what the attributes say."""
    nan, low, high = (rounded_to(v, node.dtype) for v in node.attrs)
    least, most = _limits(node.dtype) if x is None else x
    if math.isnan(nan):
        return -math.inf, math.inf
    ends = [nan] if x is None else []
    ends.append(low if least == -math.inf or x is None else least)
    ends.append(high if most == math.inf or x is None else most)
    limits = _limits(node.dtype)
    ends += [limits[0]] if least in (-math.inf, limits[0]) else []
    ends += [limits[1]] if most in (math.inf, limits[1]) else []
    return min(ends), max(ends)


def _grown(bound: float, count: float, node: Expr) -> float:
    """The factor by which rounding may increase a sum of ``count`` numbers."""
    return 1.0 + (count * torch.finfo(opmath(node.dtype)).eps if node.is_float and bound else 0.0)


# ---------------------------------------------------------------------------------------- arithmetic


def _is_finite(x: Interval) -> bool:
    return math.isfinite(x[0]) and math.isfinite(x[1])


def _holds_zero(x: Interval | None) -> bool:
    return x is None or x[0] <= 0 <= x[1]


def _part(a: float, b: float) -> float:
    """A product of bounds, in which zero times infinity is zero."""
    return 0.0 if a == 0 or b == 0 else a * b


def _times(a: Interval, b: Interval) -> Interval:
    ends = [_part(x, y) for x in a for y in b]
    return min(ends), max(ends)


def _sum(a: Interval, b: Interval) -> Interval:
    return a[0] + b[0], a[1] + b[1]


def _add(a: Interval, b: Interval) -> Interval | None:
    infinite = any({x, y} == {-math.inf, math.inf} for x in a for y in b)
    return None if infinite else _sum(a, b)


def _neg(x: Interval) -> Interval:
    return -x[1], -x[0]


def _sub(a: Interval, b: Interval) -> Interval | None:
    return _add(a, _neg(b))


def _mul(a: Interval, b: Interval) -> Interval | None:
    """Zero times infinity is NaN."""
    for x, y in ((a, b), (b, a)):
        if _holds_zero(x) and not _is_finite(y):
            return None
    return _times(a, b)


def _div(a: Interval, b: Interval) -> Interval | None:
    if _holds_zero(b):
        return None if _holds_zero(a) or not (_is_finite(a) and _is_finite(b)) else (-math.inf, math.inf)
    if not (_is_finite(a) or _is_finite(b)):
        return None
    ends = [x / y for x in a for y in b]
    return min(ends), max(ends)


def _floordiv(a: Interval, b: Interval) -> Interval | None:
    quotient = _div(a, b)
    if quotient is None or not _is_finite(quotient):
        return None
    slack = 1.0 + 1e-6 * max(abs(quotient[0]), abs(quotient[1]))
    return math.floor(quotient[0] - slack), math.ceil(quotient[1] + slack)


def _mod(a: Interval, b: Interval) -> Interval | None:
    """The remainder has the sign of the divisor."""
    if _holds_zero(b) or not (_is_finite(a) and _is_finite(b)):
        return None
    return min(0.0, b[0]), max(0.0, b[1])


def _abs(x: Interval) -> Interval:
    ends = (abs(x[0]), abs(x[1]))
    return (0.0 if _holds_zero(x) else min(ends)), max(ends)


def _monotone(function: Callable[[float], float]) -> Callable[[Interval], Interval]:
    return lambda x: (function(x[0]), function(x[1]))


def _bounded(function: Callable[..., float]) -> Callable[..., float]:
    """The function, infinite where Python's overflows."""

    def bounded(*x: float) -> float:
        try:
            return function(*x)
        except OverflowError:
            return math.inf

    return bounded


_power_of = _bounded(math.pow)


def _log(x: Interval) -> Interval | None:
    return None if x[0] < 0 else (_ln(x[0]), _ln(x[1]))


def _ln(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def _log1p(x: Interval) -> Interval | None:
    return None if x[0] < -1 else (_ln1p(x[0]), _ln1p(x[1]))


def _ln1p(x: float) -> float:
    return -math.inf if x == -1 else math.log1p(x)


def _sqrt(x: Interval) -> Interval | None:
    return None if x[0] < 0 else (math.sqrt(x[0]), math.sqrt(x[1]))


def _rsqrt(x: Interval) -> Interval | None:
    """The inverse root of minus zero is minus infinity."""
    if x[0] <= 0:
        return None if x[0] < 0 else (-math.inf, math.inf)
    return 1 / math.sqrt(x[1]), 1 / math.sqrt(x[0])


def _pow(a: Interval, b: Interval) -> Interval | None:
    if b[0] == b[1] and float(b[0]).is_integer() and math.isfinite(b[0]):
        power = _power(a, abs(b[0]))
        return power if power is None or b[0] >= 0 else _div((1.0, 1.0), power)
    if a[0] < 0 or not (_is_finite(a) and _is_finite(b)) or (a[0] == 0 and b[0] <= 0):
        return None
    ends = [_power_of(x, y) for x in a for y in b] + [1.0] * (b[0] <= 0 <= b[1])
    return min(ends), max(ends)


def _power(x: Interval, exponent: float) -> Interval | None:
    """A power with a non-negative integer exponent."""
    if exponent == 0:
        return 1.0, 1.0
    if exponent % 2:
        ends = (math.copysign(_power_of(abs(b), exponent), b) for b in x)
        low, high = ends
        return low, high
    low, high = _abs(x)
    return _power_of(low, exponent), _power_of(high, exponent)


def _dropped(x: Interval, p: float) -> Interval | None:
    """Dropout: zero, or the number scaled up."""
    if not _is_finite(x):
        return None
    if p >= 1:
        return 0.0, 0.0
    return min(0.0, x[0] / (1 - p)), max(0.0, x[1] / (1 - p))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _clipped(rule: Callable[[Interval], Interval], low: float, high: float) -> Callable[[Interval], Interval]:
    """A function whose values stay within ``low`` and ``high``, rounding included."""

    def clipped(x: Interval) -> Interval:
        y = rule(x)
        return max(low, y[0] - 1e-2 * abs(y[0])), min(high, y[1] + 1e-2 * abs(y[1]))

    return clipped


_RULES: dict[str, Callable[..., Interval | None]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "floordiv": _floordiv, "mod": _mod, "neg": _neg,
    "abs": _abs, "log": _log, "sqrt": _sqrt, "rsqrt": _rsqrt, "pow": _pow,
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "relu": lambda x: (max(0.0, x[0]), max(0.0, x[1])),
    "exp": _monotone(_bounded(math.exp)), "exp2": _monotone(_bounded(math.exp2)),
    "expm1": _monotone(_bounded(math.expm1)), "log1p": _log1p,
    "tanh": _clipped(_monotone(math.tanh), -1.0, 1.0), "sigmoid": _clipped(_monotone(_logistic), 0.0, 1.0),
    "erf": _clipped(_monotone(math.erf), -1.0, 1.0),
}  # fmt: skip
