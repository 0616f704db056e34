"""Writes ONNX nodes in front of the one they replace.

The same operator on the same inputs is written only once per graph, so that what several sites need (a mask,
a size) is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.dialects.onnx.ops import DTYPES
from fusepass.expressions.index import AxisSpace, Size, simplify_size
from fusepass.expressions.ir import Expr, Shape, scalar_of
from fusepass.writing.layouts import CannotEmit, Layouts

ONNX_DTYPES = {torch_dtype: onnx_dtype for onnx_dtype, torch_dtype in DTYPES.items()}

_SAME = {
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "tanh": "Tanh", "sqrt": "Sqrt",
    "sigmoid": "Sigmoid", "relu": "Relu", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div",
    "pow": "Pow", "max": "Max", "min": "Min", "where": "Where", "isnan": "IsNaN",
}  # fmt: skip
_BOOLEAN = {
    "not": "Not", "and": "And", "or": "Or", "xor": "Xor", "eq": "Equal", "lt": "Less", "le": "LessOrEqual",
    "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip


class Written:
    """What has been written into one graph, and the types of its values.

    Attributes:
        names: all names in the model, its inner graphs included.
        placed: for a new node, the position of the old node in front of which it was written.
        replaced: old results of sites, and the values that replace them.
        present: values that an operator writes as the present state of a cache.
        rotations: tensors that are rotary embeddings of others, with their rotations.
    """

    def __init__(self, reader: OnnxReader, opset: int, names: set[str | None]) -> None:
        self.reader, self.opset, self.names = reader, opset, names
        self.numbered: dict[Any, ir.Value] = {}
        self.placed: dict[ir.Node, int] = {}
        self.types: dict[ir.Value, tuple[Shape, torch.dtype]] = {}
        self.replaced: dict[ir.Value, ir.Value] = {}
        self.present: set[ir.Value] = set()
        self.rotations: dict[Expr, Any] = {}

    def name(self, stem: str) -> str:
        """A name that is new in the model."""
        name, count = stem, 1
        while name in self.names:
            count += 1
            name = f"{stem}_{count}"
        self.names.add(name)
        return name


class OnnxBuilder(Layouts[ir.Value]):
    """Inserts nodes before ``anchor``.

    Args:
        written: what the graph's other sites have written.
        anchor: the node whose result is to be replaced.
        space: the axes of the site.
    """

    def __init__(self, written: Written, anchor: ir.Node, space: AxisSpace) -> None:
        self.written, self.anchor, self.space = written, anchor, space
        self.reader = written.reader
        self.graph = self.reader.graph
        self.new_nodes: list[ir.Node] = []
        self.presents: list[tuple[ir.Value, ir.Value]] = []
        self._constants: list[ir.Value] = []
        self._numbers: list[Any] = []
        self._exprs: dict[Expr, ir.Value] = {}

    # -- nodes -------------------------------------------------------------------------------

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        types: Sequence[tuple[Shape, torch.dtype]],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        stem: str = "",
    ) -> list[ir.Value]:
        """A new node and its results, whose shapes and dtypes are ``types``."""
        given = dict(attributes or {})
        node = ir.node(op_type, list(inputs), given, domain=domain, num_outputs=len(types))
        node.name = self.written.name(f"fusepass/{stem or op_type}")
        node.metadata_props.update(self.anchor.metadata_props)
        for position, (value, (shape, dtype)) in enumerate(zip(node.outputs, types, strict=True)):
            value.name = self.written.name(f"fusepass/{stem or op_type}:{position}")
            value.shape = ir.Shape([n if isinstance(n, int) else str(n) for n in shape])
            value.type = ir.TensorType(ONNX_DTYPES[dtype])
            self.written.types[value] = (shape, dtype)
        self.graph.insert_before(self.anchor, node)
        self.written.placed[node] = self.reader.order[self.anchor]
        self.new_nodes.append(node)
        return list(node.outputs)

    def call(
        self, op_type: str, inputs: Sequence[ir.Value], shape: Shape, dtype: torch.dtype, **attributes: Any
    ) -> ir.Value:
        """The result of an ``ai.onnx`` operator; equal calls are written once."""
        key = (op_type, tuple(inputs), tuple(sorted((k, repr(v)) for k, v in attributes.items())))
        known = self.written.numbered.get(key)
        if known is None or not self._usable(known):
            known = self.written.numbered[key] = self.node(op_type, inputs, [(shape, dtype)], attributes)[0]
            self._numbers.append(key)
        return known

    def _usable(self, value: ir.Value) -> bool:
        """Is a value that was written before still in the graph, and computed in front of the anchor?"""
        producer = value.producer()
        if producer is None:
            return self.graph.initializers.get(value.name or "") is value
        return _is_present(value) and self.written.placed[producer] <= self.reader.order[self.anchor]

    def constant(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """A small constant as an initializer; equal ones are written once."""
        array = np.asarray(value)
        key = ("constant", dtype, array.shape, tuple(map(repr, array.flatten().tolist())))
        known = self.written.numbered.get(key)
        if known is None or not self._usable(known):
            constant = ir.Value(name=self.written.name("fusepass/constant"))
            kind = ONNX_DTYPES[dtype]
            number = torch.tensor(value, dtype=dtype).numpy()
            constant.const_value = ir.tensor(number, kind, name=constant.name)
            constant.shape, constant.type = ir.Shape(array.shape), ir.TensorType(kind)
            self.graph.register_initializer(constant)
            self.written.types[constant] = (tuple(array.shape), dtype)
            known = self.written.numbered[key] = constant
            self._numbers.append(key)
            self._constants.append(constant)
        return known

    def discard(self) -> None:
        """Remove everything that was written for this site."""
        for key in self._numbers:
            self.written.numbered.pop(key, None)
        for node in reversed(self.new_nodes):
            self.graph.remove(node, safe=True)
        for value in self._constants:
            self.graph.initializers.pop(value.name or "")
        self.new_nodes, self.presents, self._constants, self._numbers, self._exprs = [], [], [], [], {}

    def shape_of(self, value: ir.Value) -> Shape:
        """A value's shape, as integers and named sizes."""
        return self._type(value)[0]

    def dtype_of(self, value: ir.Value) -> torch.dtype:
        """A value's dtype."""
        return self._type(value)[1]

    def _type(self, value: ir.Value) -> tuple[Shape, torch.dtype]:
        known = self.written.types.get(value)
        if known is not None:
            return known
        meaning = self.reader.expr_of(value)
        assert meaning is not None
        return meaning.shape, meaning.dtype

    # -- sizes -------------------------------------------------------------------------------

    def size(self, size: Size) -> Size:
        """Sizes stand for themselves until a shape is written."""
        return size

    def shape(self, sizes: Sequence[Size]) -> list[Any]:
        """Sizes stand for themselves until a shape is written."""
        return list(sizes)

    def vector(self, sizes: Sequence[Size]) -> ir.Value:
        """A shape as a tensor of integers."""
        if all(isinstance(s, int) for s in sizes):
            return self.constant(list(sizes), torch.int64)
        parts = [self.length(s) for s in sizes]
        if len(parts) == 1:
            return parts[0]
        return self.call("Concat", parts, (len(parts),), torch.int64, axis=0)

    def length(self, size: Size) -> ir.Value:
        """One size as a tensor of one integer."""
        if isinstance(size, int):
            return self.constant([size], torch.int64)
        if isinstance(size, sympy.Symbol):
            return self._dimension(size)
        if size.is_Integer:
            return self.constant([int(size)], torch.int64)
        operator = _operator(size)
        if operator is None:
            raise CannotEmit(f"the size {size} cannot be computed in the graph")
        parts = [self.length(_as_size(a)) for a in _arguments(size)]
        total = parts[0]
        for part in parts[1:]:
            total = self.call(operator, [total, part], (1,), torch.int64)
        return total

    def _dimension(self, size: sympy.Symbol) -> ir.Value:
        value, dim = self._source(size)
        rank = len(self.shape_of(value))
        if self.written.opset >= 15:
            return self.call("Shape", [value], (1,), torch.int64, start=dim, end=dim + 1)
        whole = self.call("Shape", [value], (rank,), torch.int64)
        return self.call("Gather", [whole, self.constant([dim], torch.int64)], (1,), torch.int64, axis=0)

    def _source(self, size: sympy.Symbol) -> tuple[ir.Value, int]:
        """A value with a dimension of this size that can be read here, and the number of that dimension."""
        source = self.reader.sources.get(size)
        if source is not None and (value := self._current(source[0])) is not None:
            return value, source[1]
        for value, meaning in self.reader.meaning.items():
            current = None if meaning is None or size not in meaning.shape else self._current(value)
            if meaning is not None and current is not None:
                return current, meaning.shape.index(size)
        raise CannotEmit(f"no tensor in front of the site has the size {size}")

    # -- tensors -----------------------------------------------------------------------------

    def readable(self, value: ir.Value) -> bool:
        """Is a value of the graph computed before the anchor?"""
        producer = value.producer()
        if producer is None or producer not in self.reader.order:
            return True  # an input, a constant, or a value of the enclosing graph
        return self.reader.order[producer] < self.reader.order[self.anchor]

    def home(self, node: Expr) -> ir.Value | None:
        """The value in the graph that holds an expression and can be read here."""
        held = self.reader.home.get(node)
        return None if held is None else self._current(held)

    def _current(self, value: ir.Value) -> ir.Value | None:
        """The value that now stands for a value of the graph; None if it comes later or was removed."""
        if not self.readable(value):
            return None
        value = self.written.replaced.get(value, value)
        return value if _is_present(value) else None

    def as_tensor(self, node: Expr) -> ir.Value:
        """A value that holds an expression."""
        if node not in self._exprs:
            held = self.home(node)
            self._exprs[node] = held if held is not None else self._make(node)
        return self._exprs[node]

    def _make(self, node: Expr) -> ir.Value:
        """Write nodes for an expression that no value of the graph holds."""
        if node.op == "const":
            return self.constant(node.attrs[0], node.dtype)
        value = scalar_of(node)
        if value is not None and all(isinstance(n, int) for n in node.shape) and node.op == "expand":
            return self.expand(self.constant(value, node.dtype), node.shape)
        if node.op in _SAME or node.op in _BOOLEAN:
            name = _SAME.get(node.op) or _BOOLEAN[node.op]
            return self.call(name, [self.as_tensor(a) for a in node.args], node.shape, node.dtype)
        if node.op == "cat":
            return self.join([self.as_tensor(a) for a in node.args], node.attrs[0])
        if node.op == "cast":
            return self.cast(self.as_tensor(node.args[0]), node.dtype)
        if node.op in ("reshape", "expand"):
            return self.op(node.op, self.as_tensor(node.args[0]), list(node.shape))
        if node.op == "permute":
            return self.op("permute", self.as_tensor(node.args[0]), list(node.attrs[0]))
        if node.op == "slice" and node.attrs[1:] == (0, 1) and node.shape[node.attrs[0]] == 1:
            return self.cut(self.as_tensor(node.args[0]), node.attrs[0], 0, 1)
        if node.op == "iota" and node.rank == 1:
            return self._range(node)
        if node.op == "iota":
            return self.op("reshape", self.length(node.attrs[0]), [])
        raise CannotEmit(
            f"{node.op} of shape {list(map(str, node.shape))} cannot be recomputed before the site"
        )

    def _range(self, node: Expr) -> ir.Value:
        start, step = node.attrs
        size = node.shape[0]
        limit = start + size * step
        scalars = [self.op("reshape", self.length(_as_size(sympy.sympify(s))), []) for s in (start, limit)]
        return self.call("Range", [*scalars, self.constant(step, torch.int64)], (size,), torch.int64)

    # -- operations --------------------------------------------------------------------------

    def op(self, name: str, *args: Any, **kwargs: Any) -> ir.Value:
        """One of the operations that layouts and sums use, by its name there."""
        if name == "reshape":
            return self.reshape(args[0], args[1])
        if name == "permute":
            return self.permute(args[0], args[1])
        if name == "expand":
            return self.expand(args[0], args[1])
        if name == "slice":
            return self.cut(*args)
        if name in ("neg", "add", "sub"):
            return self.pointwise(_SAME[name], *args)
        raise CannotEmit(f"'{name}' has no counterpart in ONNX here")

    def pointwise(self, name: str, *values: ir.Value) -> ir.Value:
        """An element-wise operation, broadcast."""
        shapes = [self.shape_of(v) for v in values]
        shape = tuple(
            next((s[-d] for s in shapes if len(s) >= d and s[-d] != 1), 1)
            for d in range(max(map(len, shapes)), 0, -1)
        )
        dtype = torch.bool if name in _BOOLEAN.values() else self.dtype_of(values[-1])
        return self.call(name, list(values), shape, dtype)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """A value as another dtype."""
        if self.dtype_of(value) is dtype:
            return value
        return self.call("Cast", [value], self.shape_of(value), dtype, to=int(ONNX_DTYPES[dtype]))

    def reshape(self, value: ir.Value, sizes: Sequence[Size]) -> ir.Value:
        """Reshape. Sizes that do not change are written as 0 (copied), and one other as -1 (inferred)."""
        old, wanted = self.shape_of(value), tuple(sizes)
        if old == wanted:
            return value
        short: list[Any] = [
            s if isinstance(s, int) else 0 if d < len(old) and old[d] == s else s
            for d, s in enumerate(wanted)
        ]
        open_ = [d for d, s in enumerate(short) if not isinstance(s, int)]
        if len(open_) == 1 and 0 not in wanted:
            short[open_[0]] = -1
        elif open_:
            short = list(wanted)
        return self.call("Reshape", [value, self.vector(short)], wanted, self.dtype_of(value))

    def permute(self, value: ir.Value, dims: Sequence[int]) -> ir.Value:
        """Dimensions reordered."""
        shape = self.shape_of(value)
        wanted = tuple(shape[d] for d in dims)
        if list(dims) == list(range(len(shape))):
            return value
        return self.call("Transpose", [value], wanted, self.dtype_of(value), perm=list(dims))

    def expand(self, value: ir.Value, sizes: Sequence[Size]) -> ir.Value:
        """Broadcast to a shape."""
        if self.shape_of(value) == tuple(sizes):
            return value
        return self.call("Expand", [value, self.vector(sizes)], tuple(sizes), self.dtype_of(value))

    def join(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """The concatenation of several tensors."""
        shapes = [self.shape_of(v) for v in values]
        shape = list(shapes[0])
        shape[axis] = simplify_size(sum((s[axis] for s in shapes[1:]), shapes[0][axis]))
        return self.call("Concat", values, tuple(shape), self.dtype_of(values[0]), axis=axis)

    def reduce(self, name: str, value: ir.Value, axis: int) -> ir.Value:
        """``ReduceMax`` or ``ReduceMin`` over one axis, which is kept."""
        shape = list(self.shape_of(value))
        shape[axis] = 1
        if self.written.opset >= 18:
            axes = [self.constant([axis], torch.int64)]
            return self.call(name, [value, *axes], tuple(shape), self.dtype_of(value), keepdims=1)
        return self.call(name, [value], tuple(shape), self.dtype_of(value), keepdims=1, axes=[axis])

    def cut(self, value: ir.Value, axis: int, start: int, end: int, step: int = 1) -> ir.Value:
        """``value[..., start:end:step, ...]`` for constants within bounds."""
        shape = list(self.shape_of(value))
        shape[axis] = -(-(end - start) // step)
        bounds = [self.constant([n], torch.int64) for n in (start, end, axis, step)]
        return self.call("Slice", [value, *bounds], tuple(shape), self.dtype_of(value))


def _is_present(value: ir.Value) -> bool:
    """Is a value still in the graph: computed by a node, an input or a constant?"""
    producer = value.producer()
    return producer is None or producer.graph is not None


def _as_size(value: Any) -> Size:
    return int(value) if value.is_Integer else value


def _operator(size: Any) -> str | None:
    """The operator that combines the arguments of a size."""
    if size.is_Add:
        return "Add"
    if size.is_Mul:
        return "Mul" if all(a.is_integer for a in size.args) else None
    if isinstance(size, (sympy.Max, sympy.Min)):
        return type(size).__name__
    if size.is_Pow and size.exp.is_Integer and size.exp > 0:
        return "Mul"
    return "Div" if isinstance(size, sympy.floor) and _fraction(size) else None


def _fraction(size: Any) -> tuple[Any, Any] | None:
    top, bottom = size.args[0].as_numer_denom()
    return (top, bottom) if top.is_integer and bottom.is_Integer and top.is_nonnegative else None


def _arguments(size: Any) -> Sequence[Any]:
    if size.is_Pow:
        return [size.base] * int(size.exp)
    if isinstance(size, sympy.floor):
        return _fraction(size) or ()
    return size.args  # type: ignore[no-any-return]
