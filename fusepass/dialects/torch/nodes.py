"""The form of a ``torch.fx`` node: what it calls, with which arguments, on values of which sizes.

Functions, methods, operators, ATen overloads and Dynamo's forms of them share one name here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fusepass.dialects.handlers import Value
from fusepass.dialects.torch.ops import HANDLERS
from fusepass.expressions.index import Facts, simplify_size

#: Operations whose form with a trailing underscore changes the shape of the tensor it is called on.
_SHAPES = frozenset("transpose swapaxes swapdims t squeeze unsqueeze resize resize_as as_strided set".split())
_INPLACE_OPERATORS = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ifloordiv": "floordiv", "ipow": "pow",
    "iand": "and", "ior": "or", "ixor": "xor", "imod": "mod",
}  # fmt: skip
_BINARY = "add sub mul truediv floordiv mod pow and or xor matmul eq ne lt le gt ge rsub getitem".split()
#: Operators written as methods (`x.__eq__(y)`, as in Dynamo of torch 2.11).  They are listed because other
#: such names mean something else: `x.__bool__()` is not `x.bool()`.
_OPERATORS = {
    **{f"__{name}__": name for name in (*_BINARY, "neg", "abs", "invert", *_INPLACE_OPERATORS)},
    **{f"__r{name}__": name for name in ("add", "mul", "and", "or", "xor")},
}
#: Modules whose functions are known by their names; elsewhere (``torch.masked``, ``torch.sparse``) the same
#: names mean something else.
_MODULES = frozenset(
    "torch torch.functional torch.nn.functional torch._tensor torch._C torch._C._nn torch._C._linalg "
    "torch._C._special torch._ops.aten torch._ops.prims _operator operator math builtins".split()
)
#: Methods whose arguments are in another order than those of the function of the same name.
_METHODS = {"where": "where_method"}
_ATTRIBUTES = {"T": "t", "mT": "mT", "mH": "mH", "H": "t"}


#: Types of functions that Python code cannot create: their names and modules are genuine.
_BUILT_IN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, type,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip


def is_pytorchs(function: Any) -> bool:
    """Is a function really the one of PyTorch or Python that its name and module say?

    A user's function that replaces it may have copied both (``functools.wraps``).
    """
    if isinstance(function, types.FunctionType):
        return str(function.__globals__.get("__name__")).split(".")[0] in ("torch", "operator")
    return isinstance(function, _BUILT_IN)


def replaced_function(function: types.FunctionType, others: Iterable[str] = ()) -> str | None:
    """The name of a function that one of PyTorch's functions calls and that somebody has replaced, or None.

    Args:
        function: a Python function of PyTorch; the functions of its module that it calls are searched too.
        others: further names that are read from ``torch`` and ``torch.nn.functional``.
    """
    todo, seen = [function], {function}
    places: list[Mapping[str, Any]] = [vars(torch), vars(torch.nn.functional)]
    names = [(name, place) for name in others for place in places]
    while todo:
        at = todo.pop()
        names += [(n, place) for n in at.__code__.co_names for place in (at.__globals__, vars(torch))]
        for name, place in names:
            present = place.get(name)
            if callable(present) and not is_pytorchs(present):
                return name
            if isinstance(present, types.FunctionType) and present not in seen:
                seen.add(present)
                if present.__module__ == function.__module__:
                    todo.append(present)
        names.clear()
    return None


def value_of(node: fx.Node) -> Any:
    """The fake tensor (or number) recorded for a node, or None."""
    meta = node.meta
    value = meta.get("example_value")
    return meta.get("val") if value is None else value


def fake_mode_of(value: Any) -> Any:
    """The fake-tensor mode of a recorded value, or None; for a DTensor, that of its shard."""
    if isinstance(value, torch.Tensor):
        value = getattr(value, "_local_tensor", value)
    return getattr(value, "fake_mode", None)


def shape_of(value: Any) -> tuple[Any, ...]:
    """A tensor's shape, as integers and sympy expressions."""
    return tuple(size_of(s) for s in value.shape)


def restrictable(graph: fx.Graph, shape_env: Any) -> dict[Any, int]:
    """The sizes of the traced example, by symbol, that a graph may be restricted to.

    There are some only while Dynamo compiles: it guards the restriction, and traces the program again for
    other sizes.  There are none if the user has declared that a size stays dynamic (``mark_dynamic``).
    """
    context = torch._guards.TracingContext.try_get()
    if context is None or shape_env is None or shape_env.frozen:
        return {}
    if getattr(context.fake_mode, "shape_env", None) is not shape_env:
        return {}
    declared = (c for s in context.tensor_to_context.values() for c in getattr(s, "constraint_sizes", ()))
    if any(c is not None and not getattr(c, "warn_only", False) for c in declared):
        return {}
    values = [value_of(node) for node in graph.find_nodes(op="placeholder")]
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else [v])]
    known = (s.node for s in sizes if isinstance(s, torch.SymInt) and s.node.has_hint())
    return {node.expr: int(node.hint) for node in known if node.expr.is_Symbol}


def size_of(value: Any) -> Any:
    """A size as an integer or a sympy expression."""
    if isinstance(value, torch.SymInt):
        return simplify_size(Facts(value.node.shape_env).without_quotients(value.node.expr))
    return int(value)


def operation(node: fx.Node) -> tuple[str, bool]:
    """The operation's name, and whether it writes into its first argument.

    An operator of another library keeps its whole name, ``library::name``, if it writes to nothing and has a
    handler; otherwise its name is empty.
    """
    if (whole := _of_library(node.target)) is not None:
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        return whole if whole in HANDLERS and not writes else "", writes
    if node.op == "call_method":
        name = _METHODS.get(str(node.target), str(node.target))
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[-1]
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if node.target is getattr and len(node.args) == 2:
            return _ATTRIBUTES.get(str(node.args[1]), ""), False
        module = getattr(node.target, "__module__", None) or ""
        if (module and module not in _MODULES) or not is_pytorchs(node.target):
            return "", False
    else:
        return "", False
    name = _OPERATORS.get(name, name)
    if name in _INPLACE_OPERATORS:
        return _INPLACE_OPERATORS[name], True
    if name.endswith("_") and not name.endswith("__") and name not in HANDLERS:
        return name[:-1], True
    return name, False


def _of_library(target: Any) -> str | None:
    """The whole name of an operator of ``torch.ops`` that is not PyTorch's own; None for anything else."""
    match target:
        case torch._ops.OpOverload():
            whole: str = target._schema.name
        case torch._ops.OpOverloadPacket():
            whole = target._qualified_op_name
        case _:
            return None
    return None if whole.split("::")[0] in ("aten", "prims") else whole


@functools.cache
def _schemas(name: str) -> tuple[tuple[str, ...], ...]:
    """The positional parameters of every overload of an ATen operation."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return ()
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())
    return tuple(tuple(a.name for a in s.arguments if not a.kwarg_only) for s in schemas)


def positional(name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> tuple[Value, ...]:
    """The arguments with keywords moved to the positions that the operation's schema gives them."""
    for names in _schemas(name) if kwargs else ():
        if len(names) > len(args) and names[len(args)] in kwargs:
            for parameter in names[len(args) :]:
                if parameter not in kwargs:
                    break
                args = (*args, kwargs.pop(parameter))
            break
    return args


def first_operand(node: fx.Node) -> Any:
    """The first argument, by position or by one of its usual names."""
    if node.args:
        return node.args[0]
    return node.kwargs.get("input", node.kwargs.get("self"))


def reshapes_in_place(node: fx.Node) -> bool:
    """Does the node change the shape of its first argument (``x.unsqueeze_(0)``)?"""
    name, writes = operation(node)
    return writes and name in _SHAPES
