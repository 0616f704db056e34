"""Reads an ONNX graph into expressions.

Nothing in an ONNX graph is overwritten, so every value has one meaning.  Constants get a closed form if they
have one; integers that describe shapes are tracked element by element; the result of an operator that the
table does not describe becomes a leaf with the shape that the model records for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import onnx_ir as ir
import sympy
import torch

from fusepass.dialects.handlers import as_expr, call_handler, reshape, view
from fusepass.dialects.onnx import sizes as onnx_sizes
from fusepass.dialects.onnx.constants import closed_form
from fusepass.dialects.onnx.ops import DTYPES, HANDLERS, Call, Meaning
from fusepass.dialects.onnx.sizes import BINARY, DimFacts, Known
from fusepass.dialects.torch.views import slice_dim
from fusepass.expressions.contents import Contents
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Expr, Shape, leaf
from fusepass.host.faults import Faults

T = TypeVar("T")

#: Integer tensors with more elements are not shapes.
_MOST = 64
#: Constants with more elements are weights.
_TABLE = 1 << 22


class _Tables(Mapping[Expr, torch.Tensor]):
    """Constants as tensors, made on demand."""

    def __init__(self) -> None:
        self._values: dict[Expr, ir.Value] = {}

    def add(self, meaning: Expr, value: ir.Value) -> None:
        """Add a leaf and the constant that it stands for."""
        self._values[meaning] = value

    def update(self, other: _Tables) -> None:
        """Add the constants of an enclosing graph."""
        self._values.update(other._values)

    def __getitem__(self, meaning: Expr) -> torch.Tensor:
        tensor = ir.convenience.get_const_tensor(self._values[meaning])
        assert tensor is not None
        array = tensor.numpy()
        wide = array.astype("float32") if meaning.dtype is torch.bfloat16 else array
        return torch.tensor(wide).to(meaning.dtype)

    def __iter__(self) -> Iterator[Expr]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class OnnxReader:
    """The meanings of a graph's values.

    Args:
        graph: the graph, in topological order.
        opsets: the version of every operator set.
        shapes: the results of shape inference, by the name of the value.
        parent: the reader of the enclosing graph.
        holder: the node of the enclosing graph that contains this one.

    Attributes:
        meaning: the expression of every value that has one.
        known: the numbers of small integer tensors.
        home: for an expression, the first value that holds it.
        sources: for the name of a dimension, a value and which of its dimensions has this size.
        order: the position of every node.
        contents: the elements of constants that have no closed form of their own.
        faults: the operators that failed when they were read.
    """

    def __init__(
        self,
        graph: ir.Graph,
        opsets: Mapping[str, int],
        shapes: Mapping[str, Sequence[Any]] | None = None,
        parent: OnnxReader | None = None,
        holder: ir.Node | None = None,
    ) -> None:
        self.graph, self.opsets, self.shapes = graph, opsets, shapes or {}
        self.meaning: dict[ir.Value, Expr | None] = {}
        self.known: dict[ir.Value, Known] = {}
        self.home: dict[Expr, ir.Value] = {}
        self.sources: dict[sympy.Symbol, tuple[ir.Value, int]] = {}
        self.order: dict[ir.Node, int] = {}
        self._tables = _Tables()
        self.contents = Contents(self._tables, fixed=True)
        self._smallest: dict[ir.Value, float] = {}
        self.faults = Faults()
        if parent is not None:
            self._inherit(parent, holder)
        self.facts = DimFacts()
        for value in graph.inputs:
            self._bind(value, self._opaque(value))
        for position, node in enumerate(graph):
            self.order[node] = position
            self._read(node)

    def _inherit(self, parent: OnnxReader, holder: ir.Node | None) -> None:
        """Take over what the enclosing graph knows, as far as it is computed before this graph runs."""
        last = parent.order.get(holder, -1) if holder is not None else -1

        def early(value: ir.Value) -> bool:
            producer = value.producer()
            if producer is None or producer not in parent.order:
                return producer is None or producer.graph is not None
            return producer.graph is not None and parent.order[producer] < last

        self.meaning, self.known = dict(parent.meaning), dict(parent.known)
        self.home = {e: v for e, v in parent.home.items() if early(v)}
        self.sources = {s: source for s, source in parent.sources.items() if early(source[0])}
        self._tables.update(parent._tables)

    # -- public ------------------------------------------------------------------------------

    def expr_of(self, value: ir.Value | None) -> Expr | None:
        """The meaning of a value; constants are examined on demand."""
        if value is None:
            return None
        if value not in self.meaning:
            self._bind(value, self._constant(value))
        return self.meaning[value]

    def facts_of(self, node: Expr) -> DimFacts:
        """Facts for an expression that has elements, so that no size of it or of its arguments is zero."""
        return DimFacts([n for e in (node, *node.args) for n in e.shape])

    def smallest(self, value: ir.Value) -> float:
        """The smallest element of a constant; NaN counts as minus infinity."""
        if value not in self._smallest:
            table = value.const_value.numpy() if value.const_value is not None else None
            low = float(table.min()) if table is not None and table.size else -math.inf
            self._smallest[value] = low if low == low else -math.inf
        return self._smallest[value]

    # -- reading -----------------------------------------------------------------------------

    def _bind(self, value: ir.Value, meaning: Expr | None) -> None:
        self.meaning[value] = meaning
        if meaning is None:
            return
        self.home.setdefault(meaning, value)
        for dim, size in enumerate(meaning.shape):
            if isinstance(size, sympy.Symbol):
                self.sources.setdefault(size, (value, dim))

    def recorded(self, value: ir.Value) -> Shape | None:
        """The shape of a value, from the model or from shape inference; unknown sizes get names."""
        dims: Any = value.shape if value.shape is not None else self.shapes.get(value.name or "")
        if dims is None:
            return None
        inferred = self.shapes.get(value.name or "", ())
        out: list[Size] = []
        for position, dim in enumerate(dims):
            name = dim if isinstance(dim, (int, str)) else dim.value
            if name is None and len(inferred) == len(tuple(dims)):
                name = inferred[position]
            out.append(
                name
                if isinstance(name, int)
                else onnx_sizes.parse_dim(name or f"{value.name}_{position}".replace(".", "_"))
            )
        return tuple(out)

    def _opaque(self, value: ir.Value) -> Expr | None:
        shape, dtype = self.recorded(value), None if value.dtype is None else DTYPES.get(value.dtype)
        if shape is None or dtype is None or value.name is None:
            return None
        return leaf(value.name, shape, dtype)

    def _constant(self, value: ir.Value) -> Expr | None:
        """The meaning of an initializer; a leaf if it is also a graph input, which may get another value."""
        tensor = ir.convenience.get_const_tensor(value)
        dtype = None if tensor is None else DTYPES.get(tensor.dtype)
        if tensor is None or dtype is None or value.is_graph_input():
            return self._opaque(value)
        shape = tuple(int(n) for n in tensor.shape)
        small = dtype in (torch.int64, torch.int32) and len(shape) <= 1 and tensor.size <= _MOST
        if small:
            numbers = tensor.numpy().tolist()
            self.known[value] = tuple(numbers) if shape else numbers
        table = tensor.numpy()
        wide = table.astype("float32") if dtype is torch.bfloat16 else table
        return closed_form(wide, dtype) or self._table(value, wide, dtype)

    def _table(self, value: ir.Value, table: Any, dtype: torch.dtype) -> Expr:
        """A constant without a closed form, as a slice that is expanded along the dimensions in which it
        repeats.
        """
        shape = tuple(int(n) for n in table.shape)
        whole = leaf(value.name or f"constant{id(value)}", shape, dtype)
        self._tables.add(whole, value)
        if table.ndim < 3 or table.size > _TABLE:
            return whole
        same = [d for d, n in enumerate(shape) if n > 1 and bool((table == table.take([0], d)).all())]
        if not same:
            return whole
        self.home[whole] = value
        thin = whole
        for dim in same:
            thin = slice_dim(thin, dim, 0, 1)
        return view("expand", thin, shape)

    def _read(self, node: ir.Node) -> None:
        inputs = tuple(self.expr_of(v) for v in node.inputs)
        known = tuple(None if v is None else self.known.get(v) for v in node.inputs)
        if node.op_type == "Constant" and node.domain == "":
            self._bind(node.outputs[0], self._constant(node.outputs[0]))
            return
        call = Call(
            node,
            self.opsets.get(node.domain, 1),
            self.facts,
            inputs,
            known,
            tuple(self.recorded(v) for v in node.outputs),
            self.sources,
            self.home,
        )
        self._read_safely(call, self._record_numbers)
        meanings = self._read_safely(call, self._meaning)
        parts = meanings if isinstance(meanings, tuple) else (meanings,)
        for position, value in enumerate(node.outputs):
            part = parts[position] if position < len(parts) else None
            if part is None and value in self.known:
                part = _numbers(self.known[value])
            self._bind(value, part if part is not None else self._opaque(value))

    def _read_safely(self, call: Call, read: Callable[[Call], T]) -> T | None:
        """The answer of ``read`` for a node; a fault costs only that node."""
        try:
            return read(call)
        except Exception as fault:
            self.faults.note(call.node.op_type, fault)
            return None

    def _meaning(self, call: Call) -> Meaning:
        handler = HANDLERS.get((call.node.domain, call.node.op_type))
        if handler is None:
            return None
        given = zip(call.inputs, call.node.inputs, strict=True)
        if any(meaning is None and value is not None for meaning, value in given):
            return None
        result: Meaning = call_handler(handler, call, call.inputs)
        return result

    # -- integers ----------------------------------------------------------------------------

    def _record_numbers(self, call: Call) -> None:
        numbers = self._numbers(call)
        if numbers is not None and len(onnx_sizes.elements(numbers)) <= _MOST:
            self.known[call.node.outputs[0]] = numbers

    def _numbers(self, call: Call) -> Known | None:
        """The numbers of an integer result."""
        node, known = call.node, call.known
        if node.domain != "":
            return None
        if node.op_type == "Shape":
            x = call.inputs[0]
            return None if x is None else x.shape[call.attr("start", 0) : call.attr("end", None)]
        if node.op_type == "Size" and call.inputs[0] is not None:
            return onnx_sizes.total(call.inputs[0].shape)
        if not known or known[0] is None or not _integral(call):
            return None
        if node.op_type in BINARY and len(known) == 2 and known[1] is not None:
            return BINARY[node.op_type](known[0], known[1])
        function = _KNOWN.get(node.op_type)
        return None if function is None else function(call)


def _integral(call: Call) -> bool:
    """Does the result hold integers (or a comparison of integers)?"""
    if call.node.op_type == "Cast":
        wanted = DTYPES.get(ir.DataType(call.attr("to")))
        return wanted in (torch.int64, torch.int32, torch.bool)
    return True


def _numbers(known: Known) -> Expr | None:
    """A known number, or the only one of a vector, as an expression; None for several numbers."""
    if not isinstance(known, tuple):
        return as_expr(known)
    single = as_expr(known[0]) if len(known) == 1 else None
    return None if single is None else reshape(single, (1,))


def _same(call: Call) -> Known | None:
    return call.known[0]


def _as_vector(call: Call) -> Known | None:
    known = call.known[0]
    return known if known is None or isinstance(known, tuple) else (known,)


def _as_number(call: Call) -> Known | None:
    known = call.known[0]
    return known[0] if isinstance(known, tuple) and len(known) == 1 else None


def _reshaped(call: Call) -> Known | None:
    wanted, known = call.known[1], call.known[0]
    if known is None or not isinstance(wanted, tuple) or len(wanted) > 1:
        return None
    return onnx_sizes.elements(known) if wanted else _as_number(call)


def _gathered(call: Call) -> Known | None:
    at = call.known[1]
    return None if at is None or call.known[0] is None else onnx_sizes.gather(call.known[0], at)


def _sliced(call: Call) -> Known | None:
    known, bounds = call.known[0], [call.numbers(n, name) for n, name in ((1, "starts"), (2, "ends"))]
    step = call.numbers(4) or (1,)
    if not isinstance(known, tuple) or any(b is None or not isinstance(b[0], int) for b in (*bounds, step)):
        return None
    start, end = (b[0] for b in bounds if b is not None)
    stride = step[0]
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(stride, int) and stride > 0):
        return None
    return known[start:end:stride]


def _joined(call: Call) -> Known | None:
    if any(k is None for k in call.known):
        return None
    return tuple(n for k in call.known if k is not None for n in onnx_sizes.elements(k))


def _chosen(call: Call) -> Known | None:
    c, a, b = call.known
    return None if c is None or a is None or b is None else onnx_sizes.where(c, a, b)


def _filled(call: Call) -> Known | None:
    shape, given = call.known[0], call.attr("value")
    if not isinstance(shape, tuple) or len(shape) != 1 or not isinstance(shape[0], int) or given is None:
        return None
    value = given.numpy().item()
    return (value,) * shape[0] if isinstance(value, int) and shape[0] <= _MOST else None


def _negated(call: Call) -> Known | None:
    known = call.known[0]
    return tuple(-n for n in known) if isinstance(known, tuple) else None if known is None else -known


def _multiplied(call: Call) -> Known | None:
    known = call.known[0]
    if known is None:
        return None
    whole = onnx_sizes.total(known)
    return (whole,) if call.attr("keepdims", 1) else whole


def _expanded(call: Call) -> Known | None:
    known, wanted = call.known
    if known is None or not isinstance(wanted, tuple) or len(wanted) != 1 or not isinstance(wanted[0], int):
        return None
    numbers = onnx_sizes.elements(known)
    return numbers * wanted[0] if len(numbers) == 1 and wanted[0] <= _MOST else numbers


_KNOWN = {
    "Cast": _same, "Identity": _same, "Unsqueeze": _as_vector, "Squeeze": _as_number, "Reshape": _reshaped,
    "Gather": _gathered, "Slice": _sliced, "Concat": _joined, "Where": _chosen, "ConstantOfShape": _filled,
    "Neg": _negated, "ReduceProd": _multiplied, "Expand": _expanded,
}  # fmt: skip
