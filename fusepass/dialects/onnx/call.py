"""What the handlers of ONNX operators get: the call, its attributes, and broadcasting of proved sizes."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx_ir as ir
import sympy
import torch

from fusepass.dialects.handlers import Result
from fusepass.dialects.onnx.sizes import DimFacts, Known, elements
from fusepass.dialects.torch.views import slice_dim
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Expr, Shape, expr, scalar_of

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16, ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}  # fmt: skip

Meaning = Expr | tuple[Expr | None, ...] | None
Handler = Callable[..., Meaning]
H = TypeVar("H", bound=Handler)

HANDLERS: dict[tuple[str, str], Handler] = {}


@dataclass(frozen=True)
class Call:
    """One node, as its handler sees it.

    Attributes:
        node: the node.
        version: the version of its operator set.
        facts: what is proved about sizes.
        inputs: the meanings of its inputs; None for an input that is left out or not known.
        known: the integers of its inputs, where these are known.
        recorded: the shapes that the model records for its outputs.
        symbols: the named dimensions that occur before the node.
        home: for an expression, the first value that holds it.
    """

    node: ir.Node
    version: int
    facts: DimFacts
    inputs: tuple[Expr | None, ...]
    known: tuple[Known | None, ...]
    recorded: tuple[Shape | None, ...]
    symbols: Container[sympy.Basic] = ()
    home: dict[Expr, ir.Value] = field(default_factory=dict)

    def names(self, size: Size) -> bool:
        """Does a size consist of dimensions that occur before this node?"""
        return isinstance(size, int) or all(s in self.symbols for s in size.free_symbols)

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def numbers(self, position: int, name: str | None = None) -> tuple[Size, ...] | None:
        """Integers given as an input (newer opsets) or as an attribute (older ones)."""
        if position < len(self.known) and (numbers := self.known[position]) is not None:
            return elements(numbers)
        given = self.inputs[position] if position < len(self.inputs) else None
        number = (
            None if given is None or given.rank > 1 or given.shape not in ((), (1,)) else scalar_of(given)
        )
        if isinstance(number, int):
            return (number,)
        value = self.attr(name) if name else None
        if value is None:
            return None
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    def missing(self, position: int) -> bool:
        """Is an optional input left out?"""
        return position >= len(self.node.inputs) or self.node.inputs[position] is None

    def result(self, shape: Shape, dtype: torch.dtype) -> Result:
        """The same information in the form that handlers of PyTorch's table take."""
        return Result(shape, dtype, self.facts, self.node.outputs[0].name or "")

    def output_dtype(self) -> torch.dtype | None:
        """The recorded dtype of the result."""
        recorded = self.node.outputs[0].dtype
        return None if recorded is None else DTYPES.get(recorded)


def handles(*names: str, domain: str = "") -> Callable[[H], H]:
    """Register a handler under the names of its operators."""

    def register(handler: H) -> H:
        for name in names:
            HANDLERS[domain, name] = handler
        return handler

    return register


# ---------------------------------------------------------------------------------------- shapes


def broadcast(c: Call, *shapes: Shape) -> Shape | None:
    """The broadcast shape, or None where two sizes that differ from 1 are not proved equal."""
    out: list[Size] = []
    for position in range(max(map(len, shapes), default=0)):
        sizes = [s[len(s) - 1 - position] for s in shapes if position < len(s)]
        joint: Size = 1
        for size in sizes:
            met = _joined(c, joint, size)
            if met is None:
                return None
            joint = met
        out.append(joint)
    return tuple(reversed(out))


def _joined(c: Call, a: Size, b: Size) -> Size | None:
    """The size of two dimensions that are broadcast together."""
    if a == 1 or c.facts.equal(a, b):
        return b
    if b == 1:
        return a
    # A table of n entries, cut to min(s, n), is broadcast with a dimension s: the model runs only if s <= n
    # or n = 1.
    for narrow, wide in ((a, b), (b, a)):
        if (
            isinstance(narrow, sympy.Min)
            and wide in narrow.args
            and all(x == wide or (x.is_Integer and x.is_positive) for x in narrow.args)
        ):
            return wide
    return None


def fitted(c: Call, x: Expr, shape: Shape) -> Expr:
    """``x`` as an operand of a broadcast to ``shape``, where ``x`` may have a dimension of size ``min(n, s)``
    and ``shape`` has ``s``.

    If ``n`` is one, that dimension has one element (or none if ``s`` is zero: then the result is empty).
    Otherwise the model runs only if ``s`` is at most ``n``, and the size of the dimension is ``s``.
    """
    met = [
        (dim, wide)
        for dim, (size, wide) in enumerate(zip(x.shape, shape[len(shape) - x.rank :], strict=True))
        if isinstance(size, sympy.Min) and size != wide and wide in size.args
    ]
    whole = list(x.shape)
    for dim, wide in met:
        if sympy.Integer(1) not in x.shape[dim].args:  # type: ignore[union-attr]
            whole[dim] = wide
    if tuple(whole) != x.shape and x.op in ("slice", "input"):
        held = c.home.get(x)
        x = expr(x.op, x.args, x.attrs, tuple(whole), x.dtype)
        if held is not None:
            c.home.setdefault(x, held)
    for dim, _ in met:
        if whole[dim] == x.shape[dim] and isinstance(x.shape[dim], sympy.Min):
            x = slice_dim(x, dim, 0, 1)
    return x
