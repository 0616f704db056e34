"""Writes nodes into a ``torch.fx`` graph in front of the one they replace.

A :class:`Builder` makes the tensors that a kernel needs from those in the graph;
:class:`fusepass.writing.layouts.Layouts` chooses the tensors and changes their layout.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fusepass.dialects.torch.graph import Reader
from fusepass.dialects.torch.memory import written_operands
from fusepass.dialects.torch.nodes import fake_mode_of, size_of, value_of
from fusepass.expressions.index import AxisSpace, Size
from fusepass.expressions.ir import DTYPES, Expr
from fusepass.host.surroundings import graph_context
from fusepass.writing.layouts import CannotEmit, Groups, Layouts
from fusepass.writing.sharding import WithStrategies, is_sharded

aten = torch.ops.aten
_ATEN: dict[str, Any] = {
    "permute": aten.permute.default, "reshape": aten.reshape.default, "expand": aten.expand.default,
    "neg": aten.neg.default, "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "eq": aten.eq.Tensor, "le": aten.le.Tensor, "ge": aten.ge.Tensor, "lt": aten.lt.Tensor,
    "gt": aten.gt.Tensor, "logical_and": aten.logical_and.default, "logical_not": aten.logical_not.default,
    "where": aten.where.self,
    "any": aten.any.dim, "mean": aten.mean.dim, "full": aten.full.default, "arange": aten.arange.default,
    "dropout": aten.dropout.default, "to": aten._to_copy.default, "slice": aten.slice.Tensor,
    "select": aten.select.int, "flip": aten.flip.default,
    "exp": aten.exp.default, "tanh": aten.tanh.default, "sqrt": aten.sqrt.default,
    "rsqrt": aten.rsqrt.default, "abs": aten.abs.default, "maximum": aten.maximum.default,
    "minimum": aten.minimum.default, "scalar_tensor": aten.scalar_tensor.default, "log": aten.log.default,
    "eq_scalar": aten.eq.Scalar, "mul_scalar": aten.mul.Scalar, "sigmoid": aten.sigmoid.default,
    "pow": aten.pow.Tensor_Tensor, "ne": aten.ne.Tensor, "logical_or": aten.logical_or.default,
    "relu": aten.relu.default, "cat": aten.cat.default, "detach": aten.detach.default,
    "amax": aten.amax.default, "isfinite": aten.isfinite.default,
    "isnan": aten.isnan.default, "all": aten.all.dim, "matmul": aten.matmul.default,
    "clone": aten.clone.default, "sum": aten.sum.default, "sum_over": aten.sum.dim_IntList,
    "transpose": aten.transpose.int, "div_number": aten.div.Scalar, "contiguous": aten.contiguous.default,
    "index_put": aten.index_put.default, "remainder": aten.remainder.Tensor,
}  # fmt: skip
_POINTWISE = {
    "neg": "neg", "add": "add", "sub": "sub", "mul": "mul", "div": "div", "eq": "eq", "ne": "ne",
    "le": "le", "ge": "ge", "lt": "lt", "gt": "gt", "and": "logical_and", "or": "logical_or",
    "not": "logical_not", "where": "where", "exp": "exp", "tanh": "tanh", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "abs": "abs", "max": "maximum", "min": "minimum", "log": "log", "sigmoid": "sigmoid", "pow": "pow",
    "relu": "relu", "mod": "remainder",
}  # fmt: skip


class Builder(Layouts[fx.Node]):
    """Inserts nodes before ``anchor`` in the graph that ``reader`` has read.

    Args:
        reader: the reader of the graph.
        anchor: the node that computes a site's result.
        replaced: the results of sites that were replaced earlier, with the nodes that take their places.
        space: the site's axes.
        shared: what sites of the graph share (:meth:`once`).
    """

    def __init__(
        self,
        reader: Reader,
        anchor: fx.Node,
        replaced: dict[fx.Node, fx.Node],
        space: AxisSpace,
        shared: dict[Any, Any] | None = None,
    ) -> None:
        self.reader, self.anchor, self.replaced, self.space = reader, anchor, replaced, space
        self.graph = anchor.graph
        self.key = "example_value" if "example_value" in anchor.meta else "val"
        self.is_aten = isinstance(anchor.target, torch._ops.OpOverload)
        self.new_nodes: list[fx.Node] = []
        self.shared = {} if shared is None else shared
        self._sharing: list[Any] = []
        self._exprs: dict[Expr, Any] = {}
        self._sizes: dict[sympy.Expr, Any] = {}

    # -- nodes -------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, whose value is computed on fake tensors."""
        node = self.call_with(None, target, *args, **kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), value_of)
        try:
            with self.trial():
                node.meta[self.key] = target(*fake_args, **fake_kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CannotEmit(f"'{getattr(target, '__name__', target)}' fails here: {why}") from error
        return node

    def call_with(self, value: Any, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with a known fake value."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        self.new_nodes.append(node)
        for name in ("stack_trace", "nn_module_stack", "seq_nr", "source_fn_stack", "from_node"):
            if name in self.anchor.meta:
                node.meta[name] = self.anchor.meta[name]
        node.meta[self.key] = value
        return node

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, operations are tried on the fake values of nodes, under the graph's own settings."""
        value = value_of(self.anchor)
        sharded = WithStrategies() if is_sharded(value) else contextlib.nullcontext()
        mode = fake_mode_of(value) or contextlib.nullcontext()
        with graph_context(), mode, enable_python_dispatcher(), sharded:
            yield

    def op(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A named operation, as an ATen operator; in an ATen graph, as one of the operator's overloads.

        Functions of ``torch`` and its modules are not used: the user may have replaced them.
        """
        if not self.is_aten:
            return self.call(_packet(name), *args, **kwargs)
        if name == "to":
            return self.call(_ATEN["to"], args[0], dtype=args[1])
        return self.call(_ATEN[name], *args, **kwargs)

    def written_where(self, node: fx.Node, out: fx.Node) -> fx.Node:
        """``out``, copied into the tensor that ``node`` writes its result to (``out=``), if there is one."""
        targets = written_operands(node)
        if not targets:
            return out
        return self.call_with(self.value(node), aten.copy_.default, targets[0], out)

    def before(self, user: fx.Node, target: Callable[..., Any], node: fx.Node) -> fx.Node:
        """A call of ``target`` on ``node``, written in front of ``user``, one of the builder's new nodes."""
        new = self.call(target, node)
        user.prepend(new)
        self.new_nodes.remove(new)
        self.new_nodes.insert(self.new_nodes.index(user), new)
        return new

    def _reshaped(self, node: fx.Node, old: Sequence[Size], new: Sequence[Size]) -> fx.Node:
        """A reshaped node.

        If a tensor was written to through a permuted view, PyTorch's functionalization keeps the tensor's old
        strides, and then cannot merge dimensions that are not adjacent.  Such a tensor is copied first.
        """
        cuts = [set(itertools.accumulate(sizes, operator.mul)) for sizes in (old, new)]
        if not cuts[0] <= cuts[1] and self.reader.memory.of(node) & self.reader.memory.written_turned:
            node = self.op("clone", node, memory_format=torch.contiguous_format)
        return super()._reshaped(node, old, new)

    def value(self, node: Any) -> torch.Tensor:
        """The fake tensor of a node."""
        return value_of(node)  # type: ignore[no-any-return]

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A node's tensor in another dtype."""
        return node if self.value(node).dtype is dtype else self.op("to", node, dtype)

    def number(self, value: float, like: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        """A number as a tensor without dimensions, on the device of a node and, by default, in its dtype."""
        known = self.value(like)
        return self.op("scalar_tensor", value, dtype=dtype or known.dtype, device=known.device)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of ``make``, made once for all sites of the graph.

        Sites are rewritten in program order, so later ones can read what an earlier one has written.
        """
        if key not in self.shared:
            self.shared[key] = make()
            self._sharing.append(key)
        return self.shared[key]

    def discard(self) -> None:
        """Remove all nodes that this builder inserted."""
        for key in self._sharing:
            del self.shared[key]
        self._sharing.clear()
        for node in reversed(self.new_nodes):
            self.graph.erase_node(node)
        self.new_nodes.clear()
        self._exprs.clear()
        self._sizes.clear()

    # -- sizes -------------------------------------------------------------------------------

    def size(self, size: Size) -> Any:
        """An integer, or a node that computes a symbolic size."""
        if not isinstance(size, int) and isinstance(known := self.reader.facts.settled(size), int):
            size = known
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            self._sizes[size] = self._size(size)
        return self._sizes[size]

    def _size(self, size: Any) -> Any:
        node = self._size_source(size)
        if node is not None:
            return node
        if size.is_Add or size.is_Mul:
            combine = operator.add if size.is_Add else operator.mul
            return functools.reduce(
                lambda a, b: self.call(combine, a, b), [self.size(_int(a)) for a in size.args]
            )
        if size.is_Pow and size.exp.is_Integer and size.exp > 0:
            return functools.reduce(
                lambda a, b: self.call(operator.mul, a, b), [self.size(_int(size.base))] * int(size.exp)
            )
        if type(size).__name__ in ("FloorDiv", "CleanDiv"):
            return self.call(operator.floordiv, self.size(_int(size.args[0])), self.size(_int(size.args[1])))
        raise CannotEmit(f"the size {size} cannot be computed in the graph")

    def _size_source(self, size: sympy.Expr) -> Any:
        """A size node, or a dimension of a tensor, in the graph with this size."""
        end = self.reader.order[self.anchor]
        for node, position in self.reader.order.items():
            if position >= end:
                break
            value = value_of(node)
            if isinstance(value, torch.SymInt) and value.node.expr == size:
                return node
        for node, position in self.reader.order.items():
            if position >= end:
                break
            value = value_of(node)
            settled = self.reader.has_its_shape(node, end)
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and settled:
                for dim, extent in enumerate(value.shape):
                    if isinstance(extent, torch.SymInt) and extent.node.expr == size:
                        return self.call(aten.sym_size.int, node, dim)
        return None

    # -- tensors -----------------------------------------------------------------------------

    def home(self, node: Expr) -> fx.Node | None:
        """The node of the graph that holds an expression's value and can be read here."""
        held = self.reader.home(node, self.anchor)
        if held is None:
            return None
        return self.replaced.get(held, held)

    def tensor(self, node: Expr) -> Any:
        """A node (or a number) that holds an expression's value."""
        if node not in self._exprs:
            held = self.home(node)
            self._exprs[node] = held if held is not None else self._make(node)
        return self._exprs[node]

    def _make(self, node: Expr) -> Any:
        """Write nodes for an expression that no node of the graph holds."""
        if node.op == "const":
            return node.attrs[0]
        if node.op in _POINTWISE:
            return self._pointwise(node)
        if node.op == "cast":
            return self.cast(self.as_tensor(node.args[0]), node.dtype)
        if node.op in ("reshape", "expand"):
            return self.op(node.op, self.as_tensor(node.args[0]), self._target_shape(node))
        if node.op in ("permute", "flip"):
            return self.op(node.op, self.as_tensor(node.args[0]), list(node.attrs[0]))
        if node.op == "select":
            return self.op("select", self.as_tensor(node.args[0]), node.attrs[0], self.size(node.attrs[1]))
        if node.op == "slice":
            dim, start, step = node.attrs
            end = start + node.shape[dim] * step
            return self.op("slice", self.as_tensor(node.args[0]), dim, self.size(start), self.size(end), step)
        if node.op == "sum":
            return self.op("sum_over", self.as_tensor(node.args[0]), list(node.attrs[0]), True)
        if node.op == "cat":
            return self.op("cat", [self.as_tensor(a) for a in node.args], node.attrs[0])
        if node.op == "hit":
            return self._hit(node)
        if node.op == "iota":
            return self._iota(node)
        raise CannotEmit(
            f"{node.op} of shape {list(map(str, node.shape))} is written over before it is needed"
        )

    def _target_shape(self, node: Expr) -> list[Any]:
        return self.shape(node.shape) if node.op == "reshape" else [self.size(s) for s in node.shape]

    def _iota(self, node: Expr) -> Any:
        """A range of integers; without dimensions, the first of them."""
        start, step = node.attrs
        if node.rank == 0:
            return self.size(start)
        base = self.op("arange", self.size(node.shape[0]), device=self.value(self.anchor).device)
        scaled = base if step == 1 else self.op("mul", base, self.size(step))
        return scaled if start == 0 else self.op("add", scaled, self.size(start))

    def _hit(self, node: Expr) -> fx.Node:
        """A mask of zeros in which ones are written by index."""
        device = self.value(self.anchor).device
        sizes = [self.size(n) for n in node.shape]
        zeros = self.op("full", sizes, False, dtype=torch.bool, device=device)
        true = self.op("scalar_tensor", True, dtype=torch.bool, device=device)
        return self.op("index_put", zeros, [self.as_tensor(a) for a in node.args], true)

    def _pointwise(self, node: Expr) -> Any:
        args = [self.tensor(a) for a in node.args]
        numbers_only = not any(isinstance(a, fx.Node) and isinstance(value_of(a), torch.Tensor) for a in args)
        if self.is_aten or numbers_only or node.op in ("where", "max", "min", "and", "or", "not", "pow"):
            args = [self.as_tensor(a) for a in node.args]
        return self.op(_POINTWISE[node.op], *args)

    def as_tensor(self, node: Expr) -> fx.Node:
        """A node that holds a tensor; a number becomes a tensor."""
        tensor = self.tensor(node)
        value = value_of(tensor) if isinstance(tensor, fx.Node) else tensor
        if isinstance(tensor, fx.Node) and isinstance(value, torch.Tensor):
            return tensor
        return self.op("scalar_tensor", tensor, dtype=node.dtype, device=self.value(self.anchor).device)


def _int(value: sympy.Expr) -> Size:
    return int(value) if value.is_Integer else value


@functools.cache
def _packet(name: str) -> Callable[..., Any]:
    """The operator with all its overloads; a call chooses one by its arguments."""
    renamed = {"eq_scalar": "eq", "mul_scalar": "mul", "div_number": "div", "sum_over": "sum"}
    packet: Callable[..., Any] = getattr(aten, renamed.get(name, name))
    return packet


__all__ = ["DTYPES", "Builder", "CannotEmit", "Groups", "size_of"]
