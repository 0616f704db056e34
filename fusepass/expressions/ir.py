"""``Expr``: the small typed expression language that every front end is read into.

An ``Expr`` is an immutable, hash-consed node ``op(args; attrs)`` with a shape and a dtype: equal
expressions are the same object, so "the same sub-expression" is ``is``.  The printer writes one line
per distinct node and the parser reads the text back:

    %0 = input["q"] : f32[2, 4, 8, 16]
    %1 = const[0.25] : f32[]
    %2 = mul(%0, %1) : f32[2, 4, 8, 16]
"""

from __future__ import annotations

import ast
import math
import re
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import sympy
import torch

from fusepass.expressions.arithmetic import Number, converted, is_integer, opmath, rounded_to
from fusepass.expressions.arithmetic import folded as folded_number
from fusepass.expressions.index import Affine, Size, simplify_size

__all__ = [
    "DTYPES", "DTYPE_NAMES", "LEAVES", "OPS", "OTHERS", "POINTWISE", "SCALAR", "VIEWS", "Expr", "Number",
    "Shape", "affine", "broadcast", "cast", "const", "converted", "expr", "folded", "rounded_to",
    "is_constant", "is_integer", "leaf", "number_of", "opmath", "parse", "pointwise", "scalar_of", "to_text",
    "type_text", "under_casts", "walk",
]  # fmt: skip

Shape = tuple[Size, ...]

#: Leaves: an opaque tensor, a scalar constant, ``start + step * n``.
LEAVES = frozenset({"input", "const", "iota"})
#: Element-wise operations with NumPy broadcasting.
POINTWISE = frozenset(
    "neg not abs exp exp2 expm1 log log1p tanh sqrt rsqrt sigmoid erf relu isnan isinf add sub mul div "
    "floordiv mod pow max min lt le gt ge eq ne and or xor where cast nan_to_num".split()
)
#: Operations that only rename elements.
VIEWS = frozenset({"permute", "reshape", "expand", "slice", "select", "flip", "repeat"})
#: Contractions, reductions and the rest.  ``nonzero`` lists the indices of a mask's true elements;
#: ``hit(i, j)[a, b]`` is true if ``i[n] = a`` and ``j[n] = b`` at some position ``n``.
OTHERS = frozenset("dot sum amax logsumexp softmax log_softmax dropout index cat cumsum nonzero hit".split())
#: Only in scalar formulas: an affine index, and one element of a tensor.
SCALAR = frozenset({"affine", "load"})
OPS = LEAVES | POINTWISE | VIEWS | OTHERS | SCALAR

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "b8": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Expr:
    """One node.  Build nodes with :func:`expr`; they are interned, so compare them with ``is``."""

    __slots__ = ("__weakref__", "args", "attrs", "dtype", "op", "shape")
    op: str
    args: tuple[Expr, ...]
    attrs: tuple[Any, ...]
    shape: Shape
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        """Is its dtype floating point?"""
        return self.dtype.is_floating_point

    def __repr__(self) -> str:
        return f"<{self.op} {type_text(self)}>"

    def __str__(self) -> str:
        return to_text(self)


def _attr_key(value: Hashable) -> Hashable:
    return repr(value) if isinstance(value, (bool, int, float, complex)) else value


_table: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()


def expr(
    op: str,
    args: tuple[Expr, ...] = (),
    attrs: tuple[Any, ...] = (),
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
) -> Expr:
    """The node ``op(args; attrs)``; the same object for the same content.

    Raises:
        ValueError: ``op`` is not in ``OPS``.
    """
    # The text of a number distinguishes True, 1, 1.0 and -0.0, and lets nan equal itself.
    key = (op, tuple(map(id, args)), tuple(_attr_key(a) for a in attrs), shape, dtype)
    interned = _table.get(key)
    if interned is not None:
        return interned
    if op not in OPS:
        raise ValueError(f"unknown operation {op!r}; the accepted ones are {', '.join(sorted(OPS))}")
    node = Expr.__new__(Expr)
    node.op, node.args, node.attrs, node.shape, node.dtype = op, args, attrs, shape, dtype
    _table[key] = node
    return node


def const(value: Number, dtype: torch.dtype = torch.float32) -> Expr:
    """A scalar constant: ``value`` as ``dtype`` holds it.

    A value without a meaning in the dtype (NaN as an integer) becomes a cast that is never folded.
    """
    held = converted(value, dtype)
    if held is not None:
        return expr("const", (), (held,), (), dtype)
    wide = torch.complex128 if isinstance(value, complex) else torch.float64
    return expr("cast", (expr("const", (), (value,), (), wide),), (dtype,), (), dtype)


def leaf(name: str, shape: Shape, dtype: torch.dtype) -> Expr:
    """An opaque tensor, such as an input of the graph."""
    return expr("input", (), (name,), shape, dtype)


def affine(index: Affine) -> Expr:
    """A scalar index value."""
    if index.is_const and isinstance(index.const, int):
        return const(index.const, torch.int64)
    return expr("affine", (), (index,), (), torch.int64)


def pointwise(op: str, *args: Expr, dtype: torch.dtype | None = None) -> Expr:
    """An element-wise node whose shape is broadcast from its arguments'.

    It is computed in ``dtype``, except comparisons.  Arithmetic takes constants in the precision of the
    computation; ``where`` takes them in the dtype of its result.
    """
    if dtype is None:
        boolean = op in ("lt", "le", "gt", "ge", "eq", "ne", "not", "and", "or", "xor", "isnan", "isinf")
        dtype = (
            torch.bool if boolean else max(args, key=lambda a: (a.is_float, a.rank, a.dtype.itemsize)).dtype
        )
    if op == "where":
        args = (args[0], *(cast(a, dtype) if a.op == "const" else a for a in args[1:]))
    return expr(op, args, (), broadcast(*(a.shape for a in args)), dtype)


def folded(op: str, args: tuple[Expr, ...], dtype: torch.dtype, attrs: tuple[Any, ...] = ()) -> Expr | None:
    """The constant that an operation on constants gives, as PyTorch computes it; else None."""
    if any(a.op != "const" for a in args):
        return None
    value = folded_number(op, tuple((a.attrs[0], a.dtype) for a in args), dtype, attrs)
    return None if value is None else const(value, dtype)


def broadcast(*shapes: Shape) -> Shape:
    """The broadcast shape: in each dimension the first size that is not 1.  Sizes that are not 1 are equal,
    even where they are written as different expressions."""
    out: list[Size] = []
    for position in range(max(map(len, shapes), default=0)):
        sizes = [s[len(s) - 1 - position] for s in shapes if position < len(s)]
        out.append(next((n for n in sizes if n != 1), 1))
    return tuple(reversed(out))


def walk(root: Expr) -> Iterator[Expr]:
    """Every distinct node below ``root``, arguments first."""
    done: set[Expr] = set()
    todo: list[tuple[Expr, bool]] = [(root, False)]
    while todo:
        node, ready = todo.pop()
        if ready:
            yield node
        elif node not in done:
            done.add(node)
            todo.append((node, True))
            todo.extend((a, False) for a in reversed(node.args) if a not in done)


def is_constant(root: Expr) -> bool:
    """Does an expression read no tensors?"""
    return all(node.op != "input" for node in walk(root))


def under_casts(node: Expr) -> Expr:
    """The expression below all changes of floating dtype."""
    while node.op == "cast" and node.is_float and node.args[0].is_float:
        node = node.args[0]
    return node


def cast(x: Expr, dtype: torch.dtype) -> Expr:
    """``x`` as another dtype."""
    if dtype is x.dtype:
        return x
    if x.op == "const":
        return const(x.attrs[0], dtype)
    return expr("cast", (x,), (dtype,), x.shape, dtype)


def number_of(node: Expr, known: Callable[[Expr], Number | None] | None = None) -> Number | None:
    """The number that all elements of a node are equal to, in its dtype, seen through views and casts; else
    None.

    Args:
        node: the expression.
        known: for a leaf, the number that all its elements are equal to, or None.
    """
    dtypes = []
    while node.op in VIEWS or node.op == "cast":
        if node.op == "cast":
            dtypes.append(node.dtype)
        node = node.args[0]
    value: Number | None = None
    if node.op == "const":
        value = node.attrs[0]
    elif node.op == "input" and known is not None:
        value = known(node)
    for dtype in reversed(dtypes):
        value = None if value is None else converted(value, dtype)
    return value


def scalar_of(node: Expr) -> float | int | bool | None:
    """The real number behind a constant, seen through broadcasting views and casts; else None."""
    value = number_of(node)
    return None if isinstance(value, complex) else value


# ---------------------------------------------------------------------------------------- text


def type_text(node: Expr) -> str:
    """``f32[2, s0]``."""
    return f"{DTYPE_NAMES.get(node.dtype, str(node.dtype))}[{', '.join(map(str, node.shape))}]"


def _attr_text(value: Hashable) -> str:
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, float) and not math.isfinite(value):
        return "'nan'" if math.isnan(value) else "1e999" if value > 0 else "-1e999"
    if isinstance(value, tuple):
        inner = ", ".join(map(_attr_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, (sympy.Expr, Affine)):
        return repr(str(value))
    return repr(value)


def to_text(root: Expr) -> str:
    """One line per distinct node, arguments first; :func:`parse` reads it back."""
    names: dict[Expr, str] = {}
    lines = []
    for node in walk(root):
        names[node] = f"%{len(names)}"
        attrs = f"[{', '.join(map(_attr_text, node.attrs))}]" if node.attrs else ""
        args = f"({', '.join(names[a] for a in node.args)})" if node.args else ""
        lines.append(f"{names[node]} = {node.op}{attrs}{args} : {type_text(node)}")
    return "\n".join(lines)


_LINE = re.compile(r"^(%\w+) = (\w+)(?:\[(.*?)\])?(?:\(((?:%\w+(?:, )?)*)\))? : (\w+)\[(.*)\]$")


def parse(text: str) -> Expr:
    """The expression printed as ``text``; the last line is the root.

    Raises:
        ValueError: a line is not of the printed form, or uses a name that no earlier line defines.
    """
    known: dict[str, Expr] = {}
    last: Expr | None = None
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"line {number}: expected '%n = op[attrs](args) : dtype[shape]', got {line!r}")
        name, op, attrs, args, dtype, shape = match.groups()
        unknown = [a for a in (args or "").split(", ") if a and a not in known]
        if unknown or dtype not in DTYPES:
            raise ValueError(f"line {number}: undefined {', '.join(unknown) or dtype!r} in {line!r}")
        operands = tuple(known[a] for a in (args or "").split(", ") if a)
        sizes = tuple(_parse_size(s) for s in shape.split(", ") if s)
        last = known[name] = expr(op, operands, _parse_attrs(op, attrs or ""), sizes, DTYPES[dtype])
    if last is None:
        raise ValueError("no expression: the text is empty")
    return last


def _parse_size(text: str) -> Size:
    """An integer or an expression of sizes; as in PyTorch, ``s0`` is positive and ``u0`` may be zero."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    names = set(re.findall(r"\b[a-z]+\d+\b", text))
    known = {n: sympy.Symbol(n, integer=True, **({"positive": True} if n[0] == "s" else {})) for n in names}
    size: Any = sympy.sympify(text, locals=known)  # type: ignore[call-overload]
    return simplify_size(size)


def _parse_attrs(op: str, text: str) -> tuple[Any, ...]:
    if not text:
        return ()
    if op == "cast":
        return (DTYPES[text],)
    value = ast.literal_eval(f"({text},)")
    if op in ("iota", "slice", "select"):
        return tuple(_parse_size(str(v)) for v in value)
    return tuple(math.nan if v == "nan" and op == "const" else v for v in value)
