"""Integer tensors of an ONNX graph with known elements: shapes, indices, and results computed from them.

``Shape``, ``Gather``, ``Concat`` and integer arithmetic are tracked element by element, so that the shape
operand of a ``Reshape`` or ``Expand`` becomes sizes.  Dimensions of the same name are the same size;
arithmetic in a dimension's name (``past + seq``) is read as PyTorch's exporter and ONNX Runtime's inference
write it.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from fusepass.expressions.index import Facts, Size, prod, simplify_size

#: A number, or the numbers of a tensor of one dimension.
Known = Size | tuple[Size, ...]


def symbol(name: str) -> sympy.Symbol:
    """A dimension's name as a size that may be zero."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@functools.cache
def parse_dim(text: str) -> Size:
    """The size that a dimension's name denotes: ``batch``, ``2*s0``, ``past + seq``, ``floor(s0/2)``."""
    try:
        size = _parsed(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return symbol(text)
    return simplify_size(size) if size.is_integer else symbol(text)


def _parsed(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name):
            return symbol(name)
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return sympy.Integer(value)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_parsed(inner)
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(op, _parsed(left), _parsed(right))
        case ast.Call(func=ast.Name(id=name), args=args) if name.lower() in _FUNCTIONS:
            return _FUNCTIONS[name.lower()](*map(_parsed, args))
    raise ValueError(f"not the name of a size: {ast.unparse(node)}")


def _binary(op: ast.operator, a: Any, b: Any) -> Any:
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return sympy.sympify(difference(a, b))
        case ast.Mult():
            return a * b
        case ast.FloorDiv():
            return sympy.floor(a / b)
        case ast.Div():
            return a / b
        case ast.Pow():
            return a**b
    raise ValueError("an operator that sizes do not have")


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "max": sympy.Max,
    "min": sympy.Min,
}


def difference(a: Size, b: Any) -> Size:
    """``a - b``, where ``a - Max(x, y)`` is ``Min(a - x, a - y)``."""
    for kind, other in ((sympy.Max, sympy.Min), (sympy.Min, sympy.Max)):
        if isinstance(b, kind):
            return simplify_size(other(*(difference(a, x) for x in b.args)))
    return simplify_size(sympy.expand(sympy.sympify(a) - b))


# ---------------------------------------------------------------------------------------- facts


class DimFacts(Facts):
    """What can be proved about named dimensions: they are not negative, and ``inhabited`` ones are not zero.

    ``inhabited`` holds sizes of a tensor's own dimensions: if one is zero the tensor has no elements, and any
    statement about its elements holds.
    """

    def __init__(self, inhabited: Sequence[Size] = ()) -> None:
        super().__init__()
        self._shift = {s: s + 1 for s in inhabited if isinstance(s, sympy.Symbol)}

    def equal(self, a: Size, b: Size) -> bool:
        """Is ``a == b`` for all sizes?"""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(a == b or sympy.expand(sympy.sympify(a) - b) == 0)

    def at_most(self, a: Size, b: Size) -> bool:
        """Is ``a <= b`` for all sizes?"""
        if isinstance(a, int) and isinstance(b, int):
            return a <= b
        if isinstance(a, sympy.Max) or isinstance(b, sympy.Min):
            return all(self.at_most(x, y) for x in _parts(a, sympy.Max) for y in _parts(b, sympy.Min))
        lows, highs = _parts(a, sympy.Min), _parts(b, sympy.Max)
        if len(lows) * len(highs) > 1 and any(self.at_most(x, y) for x in lows for y in highs):
            return True
        gap = sympy.expand((sympy.sympify(b) - a).subs(self._shift, simultaneous=True))
        return bool(gap.is_nonnegative) or _least(gap) >= 0

    def positive(self, a: Size) -> bool:
        """Is ``a >= 1`` for all sizes?"""
        return self.at_most(1, a)


def _parts(size: Any, kind: Any) -> list[Size]:
    """The arguments of a ``Max`` or ``Min``; for any other size, the size itself."""
    return [simplify_size(x) for x in size.args] if isinstance(size, kind) else [size]


def _least(gap: Any) -> float:
    """A lower bound of a sum of products of sizes; minus infinity if none can be seen."""
    total = 0.0
    for term in sympy.Add.make_args(gap):
        if term.is_number:
            total += float(term)
        elif not term.is_nonnegative:
            return -math.inf
    return total


# ---------------------------------------------------------------------------------------- propagation


def elements(value: Known) -> tuple[Size, ...]:
    """The numbers as a list, whatever the rank."""
    return value if isinstance(value, tuple) else (value,)


def _pairwise(function: Callable[[Size, Size], Size | None]) -> Callable[..., Known | None]:
    def apply(a: Known, b: Known) -> Known | None:
        x, y = elements(a), elements(b)
        length = max(len(x), len(y)) if x and y else 0
        if any(len(v) not in (1, length) for v in (x, y)):
            return None
        out = [function(x[n % len(x)], y[n % len(y)]) for n in range(length)]
        if any(v is None for v in out):
            return None
        kept = tuple(simplify_size(v) for v in out if v is not None)
        return kept if isinstance(a, tuple) or isinstance(b, tuple) else kept[0]

    return apply


def _quotient(a: Size, b: Size) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        return math.trunc(a / b) if b else None
    nonnegative = sympy.sympify(a).is_nonnegative and sympy.sympify(b).is_positive
    return simplify_size(sympy.floor(sympy.sympify(a) / b)) if nonnegative else None


def _remainder(a: Size, b: Size) -> Size | None:
    return a % b if isinstance(a, int) and isinstance(b, int) and b else None


def _equal(a: Size, b: Size) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    difference = sympy.sympify(a) - b
    if difference.is_zero:
        return 1
    return 0 if difference.is_positive or difference.is_negative else None


BINARY: dict[str, Callable[..., Known | None]] = {
    "Add": _pairwise(lambda a, b: simplify_size(a + b)),
    "Sub": _pairwise(lambda a, b: simplify_size(a - b)),
    "Mul": _pairwise(lambda a, b: simplify_size(a * b)),
    "Div": _pairwise(_quotient),
    "Mod": _pairwise(_remainder),
    "Equal": _pairwise(_equal),
    "Max": _pairwise(lambda a, b: simplify_size(sympy.Max(a, b))),
    "Min": _pairwise(lambda a, b: simplify_size(sympy.Min(a, b))),
}


def gather(data: Known, at: Known) -> Known | None:
    """``data[at]``."""
    if not isinstance(data, tuple):
        return None
    if any(not isinstance(i, int) or not -len(data) <= i < len(data) for i in elements(at)):
        return None
    picked = tuple(data[i] for i in elements(at) if isinstance(i, int))
    return picked if isinstance(at, tuple) else picked[0]


def where(condition: Known, yes: Known, no: Known) -> Known | None:
    """``where(condition, yes, no)``."""
    c, a, b = elements(condition), elements(yes), elements(no)
    length = max(len(c), len(a), len(b))
    if any(len(v) not in (1, length) for v in (c, a, b)) or any(not isinstance(v, int) for v in c):
        return None
    out = tuple((a if c[n % len(c)] else b)[n % len(a if c[n % len(c)] else b)] for n in range(length))
    return out if any(isinstance(v, tuple) for v in (condition, yes, no)) else out[0]


def total(value: Known) -> Size:
    """The product of the numbers."""
    return prod(elements(value))
