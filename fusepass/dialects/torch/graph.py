"""Reads a captured ``torch.fx`` graph into expressions: Dynamo's, ``symbolic_trace``'s, ``torch.export``'s.

The reader goes through the nodes in program order and gives each its meaning at that point.  A write makes a
new version of a storage (:mod:`.memory` says which one): the tensor that is written to gets a new meaning,
the others on that storage lose theirs, and a node whose memory was overwritten can no longer stand for its
old value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusepass.dialects.handlers import Result, Value, as_expr, call_handler, permute, reshape, view
from fusepass.dialects.torch import joins, windows
from fusepass.dialects.torch.creation import diagonal_filled
from fusepass.dialects.torch.memory import Memory, Storages
from fusepass.dialects.torch.nodes import (
    first_operand,
    operation,
    positional,
    reshapes_in_place,
    restrictable,
    shape_of,
    size_of,
    value_of,
)
from fusepass.dialects.torch.ops import HANDLERS
from fusepass.dialects.torch.views import getitem, parts_of
from fusepass.dialects.torch.writes import assigned
from fusepass.expressions.contents import Contents
from fusepass.expressions.index import Facts, simplify_size
from fusepass.expressions.ir import POINTWISE, VIEWS, Expr, Shape, cast, const, expr, is_constant, leaf
from fusepass.host.faults import Faults
from fusepass.host.surroundings import settings

#: Opaque operations whose results are finite and of ordinary size if their operands are.
_FINITE = frozenset(
    "conv1d conv2d conv3d layer_norm group_norm batch_norm instance_norm rms_norm native_layer_norm gelu "
    "silu normalize interpolate".split()
)

#: How many nested views are followed to find the tensor that a new view belongs to.
_NESTED = 8


@dataclass(frozen=True)
class Known:
    """What is known about a graph's placeholders, by their names.

    Attributes:
        constants: values that never change.
        static: tensors whose elements may be relied on under a guard.
        meanings: expressions in terms of the graph that calls this one.
        contents: what is known about the leaves in those meanings.
        own_gradient: whether the graph is the forward of a function that defines its own gradient, so that
            nothing in the graph computes gradients.
        gradients: whether gradients may be recorded in the graph.
    """

    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    static: Mapping[str, torch.Tensor] = field(default_factory=dict)
    meanings: Mapping[str, Expr] = field(default_factory=dict)
    contents: Contents | None = None
    own_gradient: bool = False
    gradients: bool = field(default_factory=lambda: settings().grad)


class Reader:
    """The meanings of a graph's nodes.

    Attributes:
        meaning: the present expression (or tuple of expressions) of every node that has one.
        defined: the expression it had when it was computed, whatever was written into it later.
        holders: for an expression, the nodes that hold its value, each with the position from which on it
            does.
        before: for a leaf that stands for a tensor after a write of unknown effect, the tensor's meaning
            before the write.
        facts: what is known about symbolic sizes.
        contents: what is known about the elements of leaves.
        faults: nodes that could not be read; each became a leaf.
        turned: the storages that are written to through views whose last dimension is strided.
    """

    def __init__(
        self,
        graph: fx.Graph,
        owner: torch.nn.Module | None = None,
        known: Known | None = None,
    ) -> None:
        self.graph = graph
        self.known = known or Known()
        self._prefix = f"{id(graph):x}." if self.known.meanings else ""  # leaf names are unique to a graph
        self._tensors: dict[Expr, torch.Tensor] = {}
        self.contents = self.known.contents or Contents(self._tensors)
        self.owner = owner
        self.meaning: dict[fx.Node, Value] = {}
        self.defined: dict[fx.Node, Value] = {}
        self.definer: dict[Expr, fx.Node] = {}
        self.holders: dict[Expr, list[tuple[fx.Node, int]]] = {}
        self.order: dict[fx.Node, int] = {}
        self.memory = Memory(graph, owner)
        self._members: dict[Any, list[fx.Node]] = {}
        self._writes: dict[Any, list[int]] = {}
        self.before: dict[Expr, Expr] = {}
        self._held: dict[tuple[Expr, joins.Window], Expr] = {}  # what parts are known to hold
        self._views: dict[fx.Node, tuple[fx.Node, tuple[Expr, ...]]] = {}  # whose view, by which steps
        self._no_grad = False
        self.without_gradients: set[fx.Node] = set()  # nodes in ``no_grad`` regions of the graph
        self._reshaped = self._last_reshaping()
        shape_env = self._shape_env()
        self.facts = Facts(shape_env, restrictable(self.graph, shape_env))
        self.faults = Faults()
        self.turned: set[Any] = set()
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            try:
                self._read(node, position)
            except Exception as error:
                self.faults.note(operation(node)[0] or str(node.target), error)
                self._forget(self.memory.written(node), position)
                self.meaning.pop(node, None)
                self._bind(node, self._opaque(node))

    # -- public ------------------------------------------------------------------------------

    def usable(self, node: fx.Node, since: int, until: fx.Node) -> bool:
        """Does ``node``, read at position ``since``, hold the same value just before ``until``?"""
        end = self.order[until]
        begun = max(self.order[node], since) < end
        return begun and not self.written_between(self.memory.of(node), since, end)

    def written_between(self, storages: Storages, since: int, end: float = math.inf) -> bool:
        """Is one of the storages written to after position ``since`` and before ``end``?"""
        return any(since < w < end for s in storages for w in self._writes.get(s, ()))

    def storages_written(self, since: int, end: float) -> set[Any]:
        """The storages that are written to after position ``since`` and before ``end``."""
        return {s for s, writes in self._writes.items() if any(since < w < end for w in writes)}

    def home(self, meaning: Expr, until: fx.Node) -> fx.Node | None:
        """A node that holds an expression's value just before ``until``."""
        return next((n for n, since in self.holders.get(meaning, ()) if self.usable(n, since, until)), None)

    def readable(self, meaning: Expr, until: fx.Node) -> bool:
        """Can an expression's value be made just before ``until``, by views and element-wise operations?"""
        todo, seen = [meaning], {meaning}
        while todo:
            node = todo.pop()
            if node.op in ("const", "iota") or self.home(node, until) is not None:
                continue
            if node.op not in VIEWS and node.op not in POINTWISE and node.op not in ("cat", "hit"):
                return False
            unseen = [a for a in node.args if a not in seen]
            seen.update(unseen)
            todo.extend(unseen)
        return True

    def _hold(self, meaning: Value, node: fx.Node, since: int) -> None:
        if isinstance(meaning, Expr):
            self.holders.setdefault(meaning, []).append((node, since))

    def was_written(self, node: fx.Node) -> bool:
        """Does anything write into the memory of ``node``?"""
        return any(s in self._writes for s in self.memory.of(node))

    def later_readers(self, writer: fx.Node) -> list[fx.Node]:
        """The nodes after ``writer`` that get a tensor on memory that it writes to."""
        readers = {u: None for n in self._on(self.memory.written(writer)) for u in n.users}
        return [u for u in readers if self.order.get(u, -1) > self.order[writer]]

    def _shape_env(self) -> Any:
        for node in self.graph.nodes:
            value = value_of(node)
            if isinstance(value, (torch.SymInt, torch.SymFloat)):
                return value.node.shape_env
            if isinstance(value, torch.Tensor):
                for size in value.shape:
                    if isinstance(size, torch.SymInt):
                        return size.node.shape_env
        return None

    def _last_reshaping(self) -> dict[int, int]:
        """The position of the last operation that changes the shape of a recorded value in place."""
        positions: dict[int, int] = {}
        for position, node in enumerate(self.graph.nodes):
            if node.op in ("call_function", "call_method") and reshapes_in_place(node):
                target = first_operand(node)
                if isinstance(target, fx.Node) and isinstance(value_of(target), torch.Tensor):
                    positions[id(value_of(target))] = position
        return positions

    def has_its_shape(self, node: fx.Node, position: int) -> bool:
        """Is the recorded shape the one at ``position``?  An in-place reshape also changes the recorded
        values of earlier nodes.
        """
        return position >= self._reshaped.get(id(value_of(node)), 0)

    # -- reading -----------------------------------------------------------------------------

    def _read(self, node: fx.Node, position: int) -> None:
        for storage in self.memory.of(node):
            self._members.setdefault(storage, []).append(node)
        if self._no_grad:
            self.without_gradients.add(node)
        if node.op in ("placeholder", "get_attr"):
            self._bind(node, self._opaque(node))
            return
        if node.op not in ("call_function", "call_method", "call_module"):
            return
        if node.target is torch._C._set_grad_enabled:
            self._no_grad = node.args[0] is False
        name, _ = operation(node)
        if node.target is operator.setitem or name == "__setitem__":
            self._set_item(node, position)
            return
        if written := self.memory.written(node):
            self._write_in_place(node, name, written, position)
            return
        if not self.has_its_shape(node, position):
            return  # the recorded value has the shape of a later node
        self._bind(node, self._meaning(node, name))

    def _bind(self, node: fx.Node, meaning: Value) -> None:
        if meaning is None or not self.has_its_shape(node, self.order[node]):
            return
        self.meaning[node] = meaning
        self.defined.setdefault(node, meaning)
        if isinstance(meaning, Expr):
            self.definer.setdefault(meaning, node)
            self._hold(meaning, node, self.order[node])
            self._note_view(meaning, node)

    def _note_view(self, meaning: Expr, node: fx.Node) -> None:
        """Note by which steps a new node is a view of its operand, or of a tensor that the operand views."""
        steps = [meaning]
        while steps[-1].op in VIEWS:
            steps.append(steps[-1].args[0])
        holder = first_operand(node)
        for _ in range(_NESTED):
            if not isinstance(holder, fx.Node) or self.memory.of(holder) != self.memory.of(node):
                return
            base = self.meaning.get(holder)
            if base in steps:
                self._views[node] = (holder, tuple(steps[: steps.index(base) + 1]))
                return
            holder = first_operand(holder)

    def _opaque(self, node: fx.Node) -> Value:
        """A leaf for a tensor, a size for a SymInt, the number itself for a number."""
        value = value_of(node)
        constant = self.known.constants.get(node.name)
        if constant is not None and constant.dim() == 0 and node.op == "placeholder":
            return const(constant.item(), constant.dtype)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            return self._leaf(node, value)
        if isinstance(value, torch.SymInt):
            return size_of(value)
        if isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return value
        if isinstance(value, torch.Size):
            return tuple(size_of(s) for s in value)
        if isinstance(value, torch.SymFloat):
            expression = value.node.expr
            return (
                float(expression) if expression.is_number else self._unique_leaf(node.name, (), torch.float64)
            )
        return None

    def _unique_leaf(self, name: str, shape: Shape, dtype: torch.dtype) -> Expr:
        """A leaf with a name that is unique over all graphs whose expressions are combined."""
        return leaf(self._prefix + name, shape, dtype)

    def _leaf(self, node: fx.Node, value: torch.Tensor) -> Expr:
        meant = self.known.meanings.get(node.name) if node.op == "placeholder" else None
        if meant is not None and meant.shape == shape_of(value) and meant.dtype is value.dtype:
            return meant
        named = self._unique_leaf(node.name, shape_of(value), value.dtype)
        if self._is_static(node):
            self._tensors[named] = self.known.static[node.name]
        elif isinstance(value, torch.nn.Parameter) or operation(node)[0] in _FINITE:
            self.contents.ordinary.add(named)
        return named

    def _is_static(self, node: fx.Node) -> bool:
        """May the elements of a node's tensor be relied on?  Not if the graph writes to them, even later."""
        if node.op != "placeholder" or node.name not in self.known.static:
            return False
        return not (self.memory.rebinds or self.memory.of(node) & self.memory.all_written)

    def _meaning(self, node: fx.Node, name: str) -> Value:
        value = value_of(node)
        if isinstance(
            value,
            (torch.SymInt, torch.SymFloat, int, float, bool, str, torch.dtype, torch.device, torch.Size),
        ):
            return self._opaque(node)
        if self.memory.rebinds:
            return self._opaque(node)  # recorded shapes are wrong too
        out = self._try(node, name, value)
        if self._stops_gradients(node, value) and isinstance(out, Expr) and not is_constant(out):
            opaque = self._opaque(node)
            self.contents.values[opaque] = out
            return opaque
        if out is None and isinstance(value, torch.Tensor):
            opaque, source = self._opaque(node), self.meaning.get(first_operand(node))
            if name == "detach" and isinstance(opaque, Expr) and isinstance(source, Expr):
                self.contents.values[opaque] = source
            return opaque
        return out

    def _stops_gradients(self, node: fx.Node, value: Any) -> bool:
        """Was the node computed without gradients (``detach``, ``no_grad``) from a node that has them?"""
        if (
            self.known.own_gradient
            or not self.known.gradients
            or not isinstance(value, torch.Tensor)
            or not value.is_floating_point()
        ):
            return False
        sources = (value_of(n) for n in node.all_input_nodes)
        had = any(isinstance(s, torch.Tensor) and s.requires_grad for s in sources)
        return had and (self._no_grad or not value.requires_grad)

    def _try(self, node: fx.Node, name: str, value: Any) -> Value:
        if node.op == "call_module":
            return self._module(node, value)
        if node.target is operator.getitem or name == "getitem":
            return self._get_item(node, value)
        if isinstance(value, (tuple, list)):
            return self._many(node, name, value)
        if name == "as_strided":
            return self._strided(node, value)
        handler = HANDLERS.get(name)
        if handler is None or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        return self._call(handler, node, value)

    def _strided(self, node: fx.Node, value: torch.Tensor) -> Value:
        """``as_strided`` of a contiguous tensor; strides and offsets are those of the recorded values."""
        source = first_operand(node)
        x, known = self.meaning.get(source), value_of(source)
        if not isinstance(x, Expr) or not statically_known_true(known.is_contiguous()):
            return None
        start = size_of(value.storage_offset()) - size_of(known.storage_offset())
        return windows.strided(
            self._result(node, value), x, [size_of(s) for s in value.stride()], simplify_size(start)
        )

    def _result(self, node: fx.Node, value: torch.Tensor) -> Result:
        return Result(shape_of(value), value.dtype, self.facts, self._prefix + node.name)

    def _call(self, handler: Any, node: fx.Node, value: torch.Tensor) -> Value:
        args, kwargs = self._values(node)
        for alias in ("input", "self"):
            if alias in kwargs:
                args = (kwargs.pop(alias), *args)
        args = positional(operation(node)[0], args, kwargs)
        if node.target is getattr:
            args = args[:1]
        if any(isinstance(a, fx.Node) for a in args):
            return None
        for name in (
            "dtype",
            "device",
            "layout",
            "pin_memory",
            "memory_format",
            "requires_grad",
            "non_blocking",
            "inplace",
            "implicit",
            "out",
            "generator",
            "_stacklevel",
        ):
            kwargs.pop(name, None)
        return call_handler(handler, self._result(node, value), args, kwargs)

    def _values(self, node: fx.Node) -> tuple[tuple[Value, ...], dict[str, Value]]:
        def convert(a: Any) -> Value:
            if isinstance(a, fx.Node):
                return self.meaning.get(a, a)
            if isinstance(a, (tuple, list)):
                return tuple(convert(x) for x in a)
            if isinstance(a, slice):
                return slice(convert(a.start), convert(a.stop), convert(a.step))
            return a

        return tuple(convert(a) for a in node.args), {k: convert(v) for k, v in node.kwargs.items()}

    def _module(self, node: fx.Node, value: Any) -> Value:
        module = self.owner.get_submodule(str(node.target)) if self.owner is not None else None
        if not isinstance(value, torch.Tensor) or not node.args:
            return None
        x = self.meaning.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if not isinstance(x, Expr):
            return None
        r = self._result(node, value)
        if type(module) is torch.nn.Softmax:
            return HANDLERS["softmax"](r, x, module.dim)
        if type(module) is torch.nn.Dropout:
            return HANDLERS["dropout"](r, x, module.p, module.training)
        if type(module) is torch.nn.Identity:
            return x
        if type(module) in (torch.nn.Flatten, torch.nn.Unflatten):
            return HANDLERS["reshape"](r, x)
        return None

    def _get_item(self, node: fx.Node, value: Any) -> Value:
        args, _ = self._values(node)
        base, key = args[0], args[1]
        if isinstance(base, (tuple, list)) and isinstance(key, int):
            return base[key] if -len(base) <= key < len(base) else None
        if not isinstance(base, Expr) or not isinstance(value, torch.Tensor):
            return None
        return getitem(self._result(node, value), base, key)

    def _many(self, node: fx.Node, name: str, value: Any) -> Value:
        """The meanings of an operation with several results."""
        args, kwargs = self._values(node)
        x = args[0] if args else None
        if name == "broadcast_tensors":
            given = x if isinstance(x, tuple) else args
            pairs = zip(given, value, strict=True)
            return tuple(view("expand", a, shape_of(v)) if isinstance(a, Expr) else None for a, v in pairs)
        if not value or not isinstance(x, Expr):
            return None
        if not all(isinstance(v, torch.Tensor) for v in value if v is not None):
            return None
        if name in (
            "split",
            "split_with_sizes",
            "chunk",
            "tensor_split",
            "unsafe_split",
            "unsafe_chunk",
            "split_with_sizes_copy",
        ):
            dim: Any = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            return parts_of(x, [shape_of(v) for v in value], dim)
        if name in ("nonzero", "where"):  # ``nonzero(x, as_tuple=True)``, ``where(x)``
            listed = HANDLERS["nonzero"](self._result(node, value[0]), x)
            return tuple(
                expr("select", (listed,), (1, d), listed.shape[:1], listed.dtype) for d in range(x.rank)
            )
        if name == "unbind":
            return HANDLERS["unbind"](self._result(node, value[0]), x, *args[1:], **kwargs)
        if name == "native_dropout":
            return self._call(HANDLERS["native_dropout"], node, value[0])
        if (name == "max" and len(value) == 2 and len(args) >= 2) or (name == "max" and "dim" in kwargs):
            r = self._result(node, value[0])
            return (HANDLERS["amax"](r, x, kwargs.get("dim", args[1] if len(args) > 1 else None)), None)
        return None

    # -- mutation ----------------------------------------------------------------------------

    def _write_in_place(self, node: fx.Node, name: str, written: Storages, position: int) -> None:
        """``x.op_(...)``: from here on ``x`` means ``op(x, ...)``."""
        target = node.kwargs.get("out", first_operand(node))
        if not isinstance(target, fx.Node) or name == "" or self.memory.of(target) != written:
            self._forget(written, position)
            self._bind(node, self._opaque(node))
            return
        value = value_of(target)
        out: Value = None
        if name == "copy":
            out = self._copied(node, target)
        elif isinstance(value, torch.Tensor) and name in HANDLERS:
            out = self._call(HANDLERS[name], node, value)
            if "out" in node.kwargs and (not isinstance(out, Expr) or out.dtype is not value.dtype):
                out = None
        self._rewrite(target, node, out, position)

    def _wholes(self, target: fx.Node, out: Expr) -> list[tuple[fx.Node, Expr]]:
        """The tensors that ``target`` is a part of, with their meanings once the part holds ``out``."""
        if operation(target)[0] == "diagonal":
            return self._diagonal_filled(target, out)
        wholes: list[tuple[fx.Node, Expr]] = []
        part, held = target, out
        while (step := self._views.get(part)) is not None:
            holder, view_of = step
            base = self.meaning.get(holder)
            if not isinstance(base, Expr) or base.shape != view_of[-1].shape:
                break
            whole = self._seen_through(view_of, base, held)
            if whole is None:
                break
            if self._learns_alike(holder, target):
                wholes.append((holder, whole))
            part, held = holder, whole
        return wholes

    def _seen_through(self, view_of: tuple[Expr, ...], base: Expr, out: Expr) -> Expr | None:
        """What ``base`` means once a view of it holds ``out``.

        Args:
            view_of: the steps of the view, from the part to the whole, as they were when the view was made.
            base: the present meaning of the whole.
        """
        now = [base]  # what the steps mean at present
        for step in reversed(view_of[:-1]):
            now.insert(0, expr(step.op, (now[0],), step.attrs, step.shape, step.dtype))
        while len(now) > 1:
            if now[0].op == "reshape":
                out = reshape(out, now[1].shape)
            elif now[0].op == "permute":
                order: tuple[int, ...] = now[0].attrs[0]
                out = permute(out, tuple(map(order.index, range(len(order)))))
            else:
                while len(now) > 2 and now[1].op in ("select", "slice"):
                    del now[1]
                window = joins.window_of_view(now[0], now[1])
                whole = None if window is None else self._with_part(now[1], window, out)
                if whole is None:
                    return None
                out = whole
            del now[0]
        return out

    def _with_part(self, x: Expr, window: joins.Window, out: Expr) -> Expr | None:
        """``x`` once a part of it holds ``out``."""
        whole = joins.written(x, window, out, self.facts, self._held.get((x, window)))
        if whole is not None:
            self._held[whole, window] = out
        return whole

    def _diagonal_filled(self, target: fx.Node, out: Expr) -> list[tuple[fx.Node, Expr]]:
        """The tensor that ``target`` is a diagonal of, with its meaning once the diagonal holds ``out``."""
        args, kwargs = self._values(target)
        if not args or not isinstance(args[0], Expr) or not kwargs.keys() <= {"offset", "dim1", "dim2"}:
            return []
        whole = diagonal_filled(args[0], out, *args[1:], **kwargs)
        return [] if whole is None else [(first_operand(target), whole)]

    def _copied(self, node: fx.Node, target: fx.Node) -> Value:
        source = self._values(node)[0][1] if len(node.args) > 1 else None
        value = value_of(target)
        if not isinstance(source, Expr) or not isinstance(value, torch.Tensor):
            return None
        source = cast(source, value.dtype)
        return source if source.shape == shape_of(value) else view("expand", source, shape_of(value))

    def _rewrite(self, target: fx.Node, node: fx.Node, out: Value, position: int) -> None:
        """``target``'s memory now holds ``out``: forget the meanings of all others that share it."""
        value = value_of(target)
        if (
            isinstance(value, torch.Tensor)
            and value.dim()
            and not statically_known_true(value.stride(-1) == 1)
        ):
            self.turned |= self.memory.of(target)
        before, storages = self.meaning.get(target), self.memory.of(target)
        lost = self._stops_gradients(node, value_of(target))
        if lost or not (isinstance(out, Expr) and isinstance(before, Expr) and out.shape == before.shape):
            self._forget(storages, position)
            if isinstance(value_of(node), torch.Tensor):
                self._bind(node, self.meaning.get(target))
            return
        out = cast(out, before.dtype)
        held = [(n, out) for n in self._on(storages) if self._is_same(n, target)]
        held += self._wholes(target, out)
        self._forget(storages, position)
        for holder, meaning in held:
            self.meaning[holder] = meaning
            self._hold(meaning, holder, position)
        if isinstance(value_of(node), torch.Tensor):
            self._bind(node, out)

    def _is_same(self, node: fx.Node, target: fx.Node) -> bool:
        """Is it another name for ``target``, in its elements and its gradients?"""
        return node is target or (
            node in self.meaning
            and self.memory.same_elements(node, target)
            and self._learns_alike(node, target)
        )

    def _learns_alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Do gradients flow to both or neither?  Autograd does not see a write through ``.data``."""
        x, y = (bool(getattr(value_of(n), "requires_grad", False)) for n in (a, b))
        return x == y or not self.known.gradients or self.known.own_gradient

    def _on(self, storages: Storages) -> list[fx.Node]:
        """The nodes so far that share one of the given storages, in program order."""
        nodes = {n: None for s in storages for n in self._members.get(s, ())}
        return sorted(nodes, key=self.order.__getitem__)

    def _forget(self, storages: Storages, position: int) -> None:
        for storage in storages:
            self._writes.setdefault(storage, []).append(position)
        for member in self._on(storages):
            value = value_of(member)
            if not self.has_its_shape(member, position):
                self.meaning.pop(member, None)
            elif isinstance(value, torch.Tensor):
                unknown = self._unique_leaf(f"{member.name}@{position}", shape_of(value), value.dtype)
                if isinstance(before := self.meaning.get(member), Expr):
                    self.before[unknown] = before
                self.meaning[member] = unknown
                self._hold(unknown, member, position)

    def _set_item(self, node: fx.Node, position: int) -> None:
        """``x[key] = value``, for a key of boolean masks, slices or integers."""
        target = node.args[0]
        if not isinstance(target, fx.Node):
            return
        args, _ = self._values(node)
        x, key, new = args[0], args[1], args[2]
        if isinstance(node.args[1], list):
            key = (key,)  # a list of indices is a single index, for one dimension
        out = None
        if isinstance(x, Expr):
            window = joins.window_of_key(x, key)
            value = as_expr(new, x.dtype)
            if window is not None and value is not None:
                own = self._held.get((x, window))  # ``x[key] += y`` puts back what x holds
                out = x if own is value else joins.written(x, window, value, self.facts, own)
            elif value is not None:
                out = assigned(x, key, value, self.facts)
        self._rewrite(target, node, out, position)
