"""Who shares memory in a ``torch.fx`` graph, and which nodes write to it.

Sharing is *observed*, not derived: the fake tensors that a graph's nodes carry share storages like the real
tensors.  So a view, ``.data``, ``detach``, the result of an in-place operation, and an argument that is a
slice of another one share a storage.  The schemas of PyTorch's operators say which operands a node writes to;
a function without a schema is run on the recorded values and watched.

A *storage* here is a hashable key.  A storage counts as one piece of memory, whatever the offsets.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from fusepass.dialects.torch.nodes import first_operand, operation, value_of

Storage = Any
Storages = frozenset[Storage]

_NONE: Storages = frozenset()
#: The only storage of a graph in which tensors change storages (``x.set_(y)``): there, storages cannot be
#: told apart.
_ANY = "any"
#: Operations that move a tensor to another storage.
_REBINDING = frozenset({"set", "swap_tensors", "_set_data"})
#: Functions that update running statistics in operands that no schema marks as written.
_STATISTICS = frozenset({"batch_norm", "instance_norm"})
#: Higher-order operators without a body that write to nothing.
_FUNCTIONAL = frozenset(
    "auto_functionalized auto_functionalized_v2 triton_kernel_wrapper_functional out_dtype "
    "flex_attention_backward run_and_save_rng_state run_with_rng_state".split()
)
#: Nodes that must stay although nothing reads their result: checks, modes, profiling.
_EFFECTS = frozenset(
    "_assert _assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size manual_seed "
    "_set_grad_enabled _enter_autocast _exit_autocast _record_function_enter _record_function_enter_new "
    "_record_function_exit call_torchbind print".split()
)


class Memory:
    """The storages of one graph's nodes.

    Args:
        graph: the graph; its nodes carry fake values.
        owner: the module with the attributes that ``get_attr`` and ``call_module`` nodes name.
    """

    def __init__(self, graph: fx.Graph, owner: torch.nn.Module | None = None) -> None:
        self._graph, self._owner = graph, owner
        self._of: dict[fx.Node, Storages] = {}
        self._alive: list[Any] = []  # the address of a freed storage could be reused
        self._written: dict[fx.Node, Storages] = {}
        calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
        #: Do tensors move to other storages, so that recorded values cannot be trusted?
        self.rebinds = any(operation(n)[1] and operation(n)[0] in _REBINDING for n in calls)
        outside = graph.find_nodes(op="placeholder") + graph.find_nodes(op="get_attr")
        self.external: Storages = _NONE.union(*(self.of(n) for n in outside))

    def of(self, node: fx.Node) -> Storages:
        """The storages that hold a node's tensors."""
        storages = self._of.get(node)
        if storages is None:
            storages = self._of[node] = self._find_storages(node)
        return storages

    def written(self, node: fx.Node) -> Storages:
        """The storages that a node writes to."""
        storages = self._written.get(node)
        if storages is None:
            storages = self._written[node] = _NONE.union(*(self.of(n) for n in self._targets(node)))
        return storages

    @functools.cached_property
    def all_written(self) -> Storages:
        """The storages that any node writes to."""
        return _NONE.union(*(self.written(n) for n in self._graph.nodes))

    @functools.cached_property
    def written_turned(self) -> Storages:
        """The storages that any node writes to through a view with permuted dimensions."""
        nodes = (target for node in self._graph.nodes for target in self._targets(node))
        return _NONE.union(*(self.of(n) for n in nodes if _is_permuted(value_of(n))))

    def read(self, node: fx.Node) -> Storages:
        """The storages of a node's tensor operands."""
        return _NONE.union(*(self.of(n) for n in node.all_input_nodes))

    def stand_in(self, new: fx.Node, old: fx.Node) -> None:
        """Record that ``new`` replaces ``old``: it is on the storages of both from then on."""
        self._of[new] = self.of(new) | self.of(old)

    def same_elements(self, a: fx.Node, b: fx.Node) -> bool:
        """Are two nodes provably the same elements of one storage, in the same order?"""
        x, y = value_of(a), value_of(b)
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or len(self.of(a)) != 1:
            return False
        if self.rebinds or self.of(a) != self.of(b) or x.dtype is not y.dtype or x.dim() != y.dim():
            return False
        a_sizes, b_sizes = ((*t.shape, *t.stride(), t.storage_offset()) for t in (x, y))
        return all(_known_equal(m, n) for m, n in zip(a_sizes, b_sizes, strict=True))

    def _find_storages(self, node: fx.Node) -> Storages:
        if self.rebinds:
            return frozenset({_ANY})
        value = value_of(node)
        storages = set(self._keys(value))
        if node.op == "get_attr":
            storages.add(("attribute", str(node.target)))
            held = _attribute(self._owner, str(node.target))
            storages.update(self._keys(held) if isinstance(held, Tensor) else ())
        elif value is None and node.op not in ("placeholder", "output"):
            storages.update(*(self.of(n) for n in node.all_input_nodes))  # it may be a view of any of them
        elif isinstance(node.target, torch._ops.OpOverload):
            storages.update(*(self.of(n) for n in _aliased(node)))
        elif operation(node)[0].endswith("dropout"):
            of_operand = (self.of(n) for n in _nodes_in(first_operand(node)))
            storages.update(*of_operand)  # in eval mode, the result is the operand
        return frozenset(storages)

    def _keys(self, value: Any) -> Iterator[Storage]:
        if isinstance(value, (tuple, list)):
            for part in value:
                yield from self._keys(part)
        elif isinstance(value, dict):
            yield from self._keys(list(value.values()))
        elif isinstance(value, Tensor):
            for plain in _unwrapped(value):
                kept, key = _storage(plain)
                self._alive.append(kept)
                yield key

    def _targets(self, node: fx.Node) -> Iterable[fx.Node]:
        if node.op == "call_module":
            return _module_targets(node, self._owner)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return _higher_order_targets(node, self._owner)
        return written_operands(node)


def _known_equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is b or (
        isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr
    )


def _is_permuted(value: Any) -> bool:
    """May a stride of a tensor be larger than that of the dimension before it?  Size 1 does not count."""
    if not isinstance(value, Tensor):
        return True
    both = zip(value.shape, value.stride(), strict=True)
    strides = [stride for size, stride in both if not statically_known_true(size == 1)]
    return not all(statically_known_true(a >= b) for a, b in itertools.pairwise(strides))


def _unwrapped(value: Tensor) -> Iterator[Tensor]:
    """The tensors below the wrappers of ``torch.func`` and below tensor subclasses."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    if torch._is_functional_tensor(value):
        yield from _unwrapped(torch._from_functional_tensor(value))
    elif is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        for part in (getattr(value, name) for name in names):
            if isinstance(part, Tensor):  # others describe how parts are combined (a DTensor's mesh)
                yield from _unwrapped(part)
    else:
        yield value


def _storage(value: Tensor) -> tuple[Any, Storage]:
    """A storage (or the object to keep alive in its place) and its key."""
    try:
        storage = value.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return value, ("tensor", id(value))  # sparse and other layouts have no storage
    return storage, storage._cdata


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _aliased(node: fx.Node) -> Iterator[fx.Node]:
    """The operands whose views an operator may return, according to its schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    of_results = {s for r in schema.returns if r.alias_info is not None for s in r.alias_info.before_set}
    for argument, given in _bound(schema, node):
        if argument.alias_info is not None and argument.alias_info.before_set & of_results:
            yield from _nodes_in(given)


def _bound(schema: Any, node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The arguments of a schema that a node passes, with their values."""
    for position, argument in enumerate(schema.arguments):
        if argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]
        elif position < len(node.args) and not argument.kwarg_only:
            yield argument, node.args[position]


def _nodes_in(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(value, lambda n: nodes.append(n) or n)  # type: ignore[func-returns-value]
    return nodes


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The operands that are tensors, or whose value is not known."""
    return [n for n in node.all_input_nodes if not isinstance(value_of(n), (int, float, bool, torch.SymInt))]


# ---------------------------------------------------------------------------------------- what is written


def writes(node: fx.Node) -> bool:
    """Does a node write into the memory of an operand?"""
    return bool(written_operands(node))


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that a call of a function or method writes to.

    PyTorch's functions write to the operands that their schema marks, to the first operand if their name ends
    in an underscore or ``inplace=True`` is passed, and to ``out=``.  Functions from elsewhere are watched.
    """
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        return _marked(node, [node.target._schema])
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        packet = node.target
        return _marked(node, [getattr(packet, name)._schema for name in packet.overloads()])
    operands = _nodes_in(node.kwargs["out"]) if node.kwargs.get("out") is not None else []
    name, in_place = operation(node)
    if node.target is operator.setitem or name == "__setitem__":
        return operands + _nodes_in(node.args[:1])
    if in_place:
        known = _schemas_in_place(name)
        operands += _marked(node, known) if known else []
        return list(dict.fromkeys(operands)) or _nodes_in(first_operand(node)) or _tensors(node)
    if node.op == "call_function":
        operands += _by_convention(node, name)
    return operands


def _marked(node: fx.Node, schemas: Iterable[Any]) -> list[fx.Node]:
    """The operands that any of the matching schemas marks as written."""
    marked: dict[fx.Node, None] = {}
    for schema in schemas:
        if schema.is_mutable:
            for argument, given in _bound(schema, node):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    marked.update(dict.fromkeys(_nodes_in(given)))
    return list(marked)


@functools.cache
def _schemas_in_place(name: str) -> tuple[Any, ...]:
    packet = getattr(torch.ops.aten, f"{name}_", None)
    return () if packet is None else tuple(getattr(packet, o)._schema for o in packet.overloads())


def _by_convention(node: fx.Node, name: str) -> list[fx.Node]:
    """The operands that a function writes to although its name does not say so."""
    function: Any = node.target
    module = str(getattr(function, "__module__", None) or "torch")
    if module.split(".")[0] not in ("torch", "math", "_operator", "operator", "builtins"):
        return _observed(node)
    if _option(node, "inplace"):
        return _nodes_in(first_operand(node)) or _tensors(node)
    if any(word in getattr(function, "__name__", "") for word in _STATISTICS) or _option(node, "max_norm"):
        return _tensors(node)[1:]
    return []


def _option(node: fx.Node, name: str) -> bool:
    """Is an option of a function passed, by keyword or position, and not false?"""
    if name in node.kwargs:
        return node.kwargs[name] not in (None, False)
    at = _parameters(node.target).get(name)
    return at is not None and at < len(node.args) and node.args[at] not in (None, False)


@functools.cache
def _parameters(function: Any) -> dict[str, int]:
    """The positions of a Python function's parameters; none for built-in ones, which have schemas."""
    try:
        return {name: n for n, name in enumerate(inspect.signature(function).parameters)}
    except (TypeError, ValueError):
        return {}


class _Watch(TorchDispatchMode):
    """Records the storages that operators write to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[Storage] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = kwargs.get(argument.name, args[position] if position < len(args) else None)
                for tensor in given if isinstance(given, (list, tuple)) else [given]:
                    if isinstance(tensor, Tensor):
                        self.written.add(_storage(tensor)[1])
        return func(*args, **kwargs)


def _observed(node: fx.Node) -> list[fx.Node]:
    """The operands that a function writes to when it runs on the recorded values; all if it cannot be run."""
    operands = _tensors(node)
    if not operands:
        return []
    values = [v for n in operands for v in (value_of(n),) if isinstance(v, Tensor)]
    mode = next((m for v in values if (m := getattr(v, "fake_mode", None)) is not None), None)
    if mode is None or len(values) < len(operands):
        return operands
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _alias(value_of(n)))
    try:
        with mode, torch.no_grad(), _Watch() as watch:
            node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:
        return operands
    return [n for n, v in zip(operands, values, strict=True) if _storage(v)[1] in watch.written]


def _alias(value: Any) -> Any:
    """A new tensor on the same memory: changes of its metadata do not reach the recorded value."""
    return value.detach() if isinstance(value, Tensor) else value


def _module_targets(node: fx.Node, owner: torch.nn.Module | None) -> list[fx.Node]:
    """The operands that a module writes to: none for PyTorch's modules, unless they work in place, and all
    for unknown ones.
    """
    module = _attribute(owner, str(node.target))
    if not isinstance(module, torch.nn.Module) or not type(module).__module__.startswith("torch.nn."):
        return _tensors(node)
    return _tensors(node) if getattr(module, "inplace", False) else []


def _higher_order_targets(node: fx.Node, owner: torch.nn.Module | None) -> list[fx.Node]:
    """The operands that a higher-order operator writes to: all of them if a body writes to an input."""
    bodies = [_attribute(owner, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    graphs = [b for b in bodies if isinstance(b, fx.GraphModule)]
    if graphs:
        return _tensors(node) if any(map(_writes_outside, graphs)) else []
    return [] if _higher_order_name(node) in _FUNCTIONAL else _tensors(node)


def _higher_order_name(node: fx.Node) -> str:
    return str(getattr(node.target, "_name", ""))


def _writes_outside(body: fx.GraphModule) -> bool:
    memory = Memory(body.graph, body)
    return any(memory.written(n) & memory.external for n in body.graph.nodes)


def has_effect(node: fx.Node) -> bool:
    """Must a node stay although nothing reads it and it writes to no tensor?"""
    if node.op not in ("call_function", "call_method") or is_type_check(node):
        return False
    if node.target in fx.node._side_effectful_functions and node.target is not operator.setitem:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1] in _EFFECTS or _returns_nothing(node)
    name = getattr(node.target, "__name__", str(node.target))
    return name in _EFFECTS or name.endswith(("_increment_nesting", "_decrement_nesting", "_dual_level"))


def _returns_nothing(node: fx.Node) -> bool:
    """Does an operator have no results, so that it is called for its effect?"""
    schema = node.target._schema  # type: ignore[union-attr]
    return not schema.returns and not schema.is_mutable


def is_type_check(node: fx.Node) -> bool:
    """Is a node an assertion on the type of a value, which is pointless once the value is not computed?"""
    return operation(node)[0] == "_assert_tensor_metadata"


# ---------------------------------------------------------------------------------------- liveness


def live_nodes(graph: fx.Graph, memory: Memory, without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that the output, an effect, or a visible write depends on.

    A write is visible if it is to an argument or attribute, or to a storage that a later live node reads.  It
    is also visible if it goes through ``.data`` or ``detach`` to a tensor with gradients: autograd does not
    notice such a write, and the backward pass reads what was written.
    ``without``: nodes that have been replaced; their writes do not count either.
    """
    live: set[fx.Node] = set()
    seen = set(memory.external)
    for node in reversed(graph.nodes):
        if node in without:
            continue
        needed = node.op in ("output", "placeholder") or any(u in live for u in node.users)
        visible = has_effect(node) or not memory.written(node).isdisjoint(seen)
        if needed or visible or _is_unseen_by_autograd(node):
            live.add(node)
            seen |= memory.read(node)
    return live


def _is_unseen_by_autograd(node: fx.Node) -> bool:
    """Does a node write through ``.data`` or ``detach`` to a tensor that gradients flow to?"""
    for operand in written_operands(node):
        while isinstance(base := first_operand(operand), fx.Node):
            if _leaves_autograd(operand) and getattr(value_of(base), "requires_grad", False):
                return True
            operand = base
    return False


def _leaves_autograd(node: fx.Node) -> bool:
    """Is a node the ``.data`` or the ``detach()`` of a tensor?"""
    data = node.target is getattr and node.args[1:] == ("data",)
    return data or operation(node)[0] == "detach" or getattr(node.target, "__name__", "") == "_get_data_attr"


__all__ = [
    "Memory", "Storages", "has_effect", "is_type_check", "live_nodes", "written_operands", "writes",
]  # fmt: skip
