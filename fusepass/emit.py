"""Writes nodes into a graph in front of the one they replace.

A :class:`Builder` makes the tensors a kernel needs out of what the graph already has: the deepest
tensor that holds an operand without copies, re-laid by ``reshape``, ``permute`` and ``expand``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fusepass.dialects.fx_graph import Reader, size_of, value_of
from fusepass.index import Affine, AxisSpace, Size, prod
from fusepass.ir import DTYPES, Expr
from fusepass.rule import Scope, Term

Groups = Sequence[Sequence[str]]

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
    "select": aten.select.int, "flip": aten.flip.default, "pad": aten.constant_pad_nd.default,
    "exp": aten.exp.default, "tanh": aten.tanh.default, "sqrt": aten.sqrt.default,
    "rsqrt": aten.rsqrt.default, "abs": aten.abs.default, "maximum": aten.maximum.default,
    "minimum": aten.minimum.default, "scalar_tensor": aten.scalar_tensor.default, "log": aten.log.default,
    "eq_scalar": aten.eq.Scalar, "mul_scalar": aten.mul.Scalar, "sigmoid": aten.sigmoid.default,
    "pow": aten.pow.Tensor_Tensor, "ne": aten.ne.Tensor, "logical_or": aten.logical_or.default,
    "relu": aten.relu.default, "cat": aten.cat.default, "detach": aten.detach.default,
    "amax": aten.amax.default, "isfinite": aten.isfinite.default, "matmul": aten.matmul.default,
    "transpose": aten.transpose.int, "div_number": aten.div.Scalar, "contiguous": aten.contiguous.default,
}  # fmt: skip
_POINTWISE = {
    "neg": "neg", "add": "add", "sub": "sub", "mul": "mul", "div": "div", "eq": "eq", "ne": "ne",
    "le": "le", "ge": "ge", "lt": "lt", "gt": "gt", "and": "logical_and", "or": "logical_or",
    "not": "logical_not", "where": "where", "exp": "exp", "tanh": "tanh", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "abs": "abs", "max": "maximum", "min": "minimum", "log": "log", "sigmoid": "sigmoid", "pow": "pow",
    "relu": "relu",
}  # fmt: skip


class CannotEmit(Exception):
    """A tensor that cannot be made from the graph's own; the reason is for the user."""


class Builder:
    """Inserts nodes before ``anchor`` in the graph that ``reader`` has read."""

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
        self.made: list[fx.Node] = []
        self.shared = {} if shared is None else shared
        self._sharing: list[Any] = []
        self._exprs: dict[Expr, Any] = {}
        self._sizes: dict[sympy.Expr, Any] = {}

    # -- nodes -------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node; its value is computed on fake tensors."""
        node = self.call_with(None, target, *args, **kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), value_of)
        try:
            with self.mode(), enable_python_dispatcher():
                node.meta[self.key] = target(*fake_args, **fake_kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CannotEmit(f"'{getattr(target, '__name__', target)}' fails here: {why}") from error
        return node

    def call_with(self, value: Any, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node of a known fake value."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        self.made.append(node)
        for name in ("stack_trace", "nn_module_stack", "seq_nr", "source_fn_stack", "from_node"):
            if name in self.anchor.meta:
                node.meta[name] = self.anchor.meta[name]
        node.meta[self.key] = value
        return node

    def mode(self) -> Any:
        """The fake-tensor mode of the graph."""
        value = value_of(self.anchor)
        return getattr(value, "fake_mode", None) or torch.no_grad()

    def op(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A named operation in the graph's own dialect."""
        if self.is_aten:
            if name == "to":
                return self.call(_ATEN["to"], args[0], dtype=args[1])
            return self.call(_ATEN[name], *args, **kwargs)
        return self.call(_torch_function(name), *args, **kwargs)

    def value(self, node: Any) -> torch.Tensor:
        """The fake tensor of a node."""
        return value_of(node)  # type: ignore[no-any-return]

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A node as another dtype."""
        return node if self.value(node).dtype is dtype else self.op("to", node, dtype)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` writes, or wrote for an earlier site: sites are rewritten in program order."""
        if key not in self.shared:
            self.shared[key] = make()
            self._sharing.append(key)
        return self.shared[key]

    def discard(self) -> None:
        """Take back everything inserted."""
        for key in self._sharing:
            del self.shared[key]
        self._sharing.clear()
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()
        self._exprs.clear()
        self._sizes.clear()

    # -- sizes -------------------------------------------------------------------------------

    def size(self, size: Size) -> Any:
        """An integer, or a node that computes a symbolic size."""
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
        """A size node or a dimension of a tensor in the graph that has this size."""
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
            if node.op == "placeholder" and isinstance(value, torch.Tensor):
                for dim, extent in enumerate(value.shape):
                    if isinstance(extent, torch.SymInt) and extent.node.expr == size:
                        return (
                            self.call(aten.sym_size.int, node, dim)
                            if self.is_aten
                            else self.call(torch.Tensor.size, node, dim)
                        )
        return None

    def shape(self, sizes: Sequence[Size]) -> list[Any]:
        """A shape as arguments; a single symbolic size becomes -1."""
        if sum(not isinstance(s, int) for s in sizes) == 1:
            return [s if isinstance(s, int) else -1 for s in sizes]
        return [self.size(s) for s in sizes]

    # -- tensors -----------------------------------------------------------------------------

    def home(self, node: Expr) -> fx.Node | None:
        """The graph's node that holds an expression's value and may be read here."""
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
        """Compute an expression that no node of the graph holds."""
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
        if node.op == "cat":
            return self.op("cat", [self.as_tensor(a) for a in node.args], node.attrs[0])
        if node.op == "iota" and node.rank == 1:
            return self._iota(node)
        if node.op == "iota":
            return self.size(node.attrs[0])
        raise CannotEmit(
            f"{node.op} of shape {list(map(str, node.shape))} is written over before it is needed"
        )

    def _target_shape(self, node: Expr) -> list[Any]:
        return self.shape(node.shape) if node.op == "reshape" else [self.size(s) for s in node.shape]

    def _iota(self, node: Expr) -> fx.Node:
        start, step = node.attrs
        base = self.op("arange", self.size(node.shape[0]), device=self.value(self.anchor).device)
        scaled = base if step == 1 else self.op("mul", base, self.size(step))
        return scaled if start == 0 else self.op("add", scaled, self.size(start))

    def _pointwise(self, node: Expr) -> Any:
        args = [self.tensor(a) for a in node.args]
        numbers_only = not any(isinstance(a, fx.Node) for a in args)
        if self.is_aten or numbers_only or node.op in ("where", "max", "min", "and", "or", "not", "pow"):
            args = [self.as_tensor(a) for a in node.args]
        return self.op(_POINTWISE[node.op], *args)

    def as_tensor(self, node: Expr) -> fx.Node:
        """A node that holds a tensor: numbers are wrapped."""
        made = self.tensor(node)
        value = value_of(made) if isinstance(made, fx.Node) else made
        if isinstance(made, fx.Node) and isinstance(value, torch.Tensor):
            return made
        return self.op("scalar_tensor", made, dtype=node.dtype, device=self.value(self.anchor).device)

    # -- layout ------------------------------------------------------------------------------

    def sizes(self, axes: Sequence[str]) -> Size:
        """The joint extent of some axes."""
        return prod(self.space.sizes[a] for a in axes)

    def digits(self, term: Term) -> list[tuple[str, ...]] | None:
        """The axes of each dimension, where every element of the tensor is named exactly once."""
        found = [self.space.digits(i, n) for i, n in zip(term.index, term.expr.shape, strict=True)]
        if any(f is None for f in found):
            return None
        flat = [a for f in found for a in f or ()]
        return found if len(set(flat)) == len(flat) else None  # type: ignore[return-value]

    def finest(self, groups: Groups) -> list[list[str]]:
        """Groups in today's finest axes: reading an operand may have split some since they were listed."""
        return [[b for a in g for b in self._parts(a)] for g in groups]

    def _parts(self, axis: str) -> list[str]:
        if axis not in self.space.splits:
            return [axis]
        terms = self.space.splits[axis].terms
        inner = next(a for a, c in terms if c == 1)
        return [b for a in (*(a for a, _ in terms if a != inner), inner) for b in self._parts(a)]

    def choose(self, chain: Sequence[Term], groups: Groups) -> Term:
        """Of the tensors that may serve, the one without copies that is nearest to the wanted layout."""
        groups = self.finest(groups)
        wanted = [a for g in groups for a in g]
        best: tuple[tuple[int, int, int], Term] | None = None
        for depth, term in enumerate(chain):
            found = self.digits(term)
            if found is None or self.home(term.expr) is None:
                continue
            flat = [a for f in found for a in f]
            cost = (len(flat), self._work(found, groups, wanted), depth)
            if best is None or cost < best[0]:
                best = (cost, term)
        return best[1] if best is not None else chain[0]

    def reach(self, term: Term, scope: Scope) -> Term:
        """The first tensor below ``term``'s views that can be re-laid: its index names every element once."""
        at: Term | None = term
        while at is not None:
            if self.digits(at) is not None:
                return at
            at = scope.step(at)
        return term

    def _work(self, found: list[tuple[str, ...]], groups: Groups, wanted: list[str]) -> int:
        flat = [a for f in found for a in f]
        present = [tuple(a for a in g if a in flat) for g in groups]
        work = 0 if flat == [a for a in wanted if a in flat] else 1
        return work + (
            0 if [f for f in found if f] == [p for p in present if p] and len(found) == len(groups) else 1
        )

    def layout(self, term: Term, groups: Groups, full: bool) -> fx.Node:
        """``term``'s tensor with one dimension a group; absent groups have size 1 unless ``full``."""
        node, shape, found = self._read(term)
        return self.relayout(node, [a for f in found for a in f], shape, self.finest(groups), full, found)

    def _read(self, term: Term) -> tuple[fx.Node, list[Size], list[tuple[str, ...]]]:
        """A tensor with every element named exactly once, its shape, and the axes of its dimensions."""
        found = self.digits(term)
        if found is not None:
            return self.as_tensor(term.expr), list(term.expr.shape), found
        cuts = [self._cut(i, n) for i, n in zip(term.index, term.expr.shape, strict=True)]
        axes = [a for cut in cuts if cut is not None for a in cut[3]]
        if None in cuts or len(set(axes)) < len(axes):
            raise CannotEmit("an operand is a part or a repetition of its tensor that no view can express")
        node, shape = self.as_tensor(term.expr), []
        for dim, cut in enumerate(cuts):
            assert cut is not None
            start, step, length, _ = cut
            if (start, step, length) != (0, 1, term.expr.shape[dim]):
                node = self.op("slice", node, dim, start, start + step * (length - 1) + 1, step)
            shape.append(length)
        return node, shape, [cut[3] for cut in cuts if cut is not None]

    def _cut(self, index: Affine, size: Size) -> tuple[int, int, Any, tuple[str, ...]] | None:
        """``index`` as start, step, length and axes of a slice of a dimension."""
        whole = self.space.digits(index, size)
        if whole is not None:
            return 0, 1, size, tuple(whole)
        index = self.space.resolve(index)
        numbers = [index.const, *(c for _, c in index.terms), *(self.space.sizes[a] for a, _ in index.terms)]
        if not all(isinstance(n, int) for n in numbers) or any(c <= 0 for _, c in index.terms):
            return None
        step = math.gcd(*(int(c) for _, c in index.terms)) if index.terms else 1
        inner = Affine(tuple((a, c // step) for a, c in index.terms))
        length = 1 + sum(int(c) * (int(self.space.sizes[a]) - 1) for a, c in inner.terms)
        axes = self.space.digits(inner, length)
        return None if axes is None else (int(index.const), step, length, tuple(axes))

    def relayout(
        self,
        node: fx.Node,
        flat: list[str],
        shape: list[Size],
        groups: Groups,
        full: bool,
        dims: Sequence[Sequence[str]],
    ) -> fx.Node:
        """Re-lay a tensor whose elements run over the axes ``flat`` into the given groups."""
        extra = [a for a in flat if a not in {x for g in groups for x in g}]
        if extra:
            raise CannotEmit("an operand varies over an axis that the kernel does not have")
        order = [a for g in groups for a in g if a in flat]
        if [list(d) for d in dims] != [[a] for a in flat]:
            node = self._reshaped(node, shape, [self.space.sizes[a] for a in flat])
            shape = [self.space.sizes[a] for a in flat]
        if order != flat:
            node = self.op("permute", node, [flat.index(a) for a in order])
        thin: list[Size] = []
        wide: list[Size] = []
        final: list[Size] = []
        for group in groups:
            partly = full or any(a in flat for a in group)
            thin += [self.space.sizes[a] if a in flat else 1 for a in group]
            wide += [self.space.sizes[a] if a in flat or partly else 1 for a in group]
            final.append(self.sizes(group) if partly else 1)
        now = [self.space.sizes[a] for a in order]
        if thin != wide:
            node = self._reshaped(node, now, thin)
            node = self.op("expand", node, [self.size(s) for s in wide])
            now = wide
        return self._reshaped(node, now, final)

    def _reshaped(self, node: fx.Node, old: Sequence[Size], new: Sequence[Size]) -> fx.Node:
        return node if list(old) == list(new) else self.op("reshape", node, self.shape(new))

    def restore(self, node: fx.Node, groups: Groups, out: Term) -> fx.Node:
        """Lay a kernel's result (one dimension a group) out as the tensor it replaces."""
        dims, groups = self.digits(out), self.finest(groups)
        flat = [a for g in groups for a in g]
        if dims is None:
            raise CannotEmit("the result's layout is no permutation of the kernel's")
        wanted = [a for d in dims for a in d]
        node = self._reshaped(node, [self.sizes(g) for g in groups], [self.space.sizes[a] for a in flat])
        if wanted != flat:
            node = self.op("permute", node, [flat.index(a) for a in wanted])
        return self._reshaped(node, [self.space.sizes[a] for a in wanted], list(out.expr.shape))


def _int(value: sympy.Expr) -> Size:
    return int(value) if value.is_Integer else value


@functools.cache
def _torch_function(name: str) -> Callable[..., Any]:
    special: dict[str, Callable[..., Any]] = {
        "expand": torch.Tensor.expand, "to": torch.Tensor.to, "contiguous": torch.Tensor.contiguous,
        "dropout": torch.nn.functional.dropout,
        "pad": torch.nn.functional.pad, "slice": aten.slice.Tensor, "eq_scalar": torch.eq,
        "mul_scalar": torch.mul, "div_number": torch.div,
    }  # fmt: skip
    return special.get(name) or getattr(torch, name)


__all__ = ["DTYPES", "Builder", "CannotEmit", "Groups", "size_of"]
