"""The registry of operations, and the helpers that all handlers use.

A handler gets the operands as values (an ``Expr`` for a tensor, Python numbers, sympy sizes) and the result's
shape and dtype, and returns the meaning of the node, or None if the node stays opaque.  Its signature says
which forms of the call it describes: how many arguments, of which names and types (``Value`` is any).  Any
exception from it is a fault.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import sympy
import torch

from fusepass.expressions.index import Facts, Size
from fusepass.expressions.ir import Expr, Shape, cast, const, expr, is_integer, opmath
from fusepass.host.surroundings import settings

Value = Any
Handler = Callable[..., Value]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True)
class Result:
    """What is known about a node before it gets a meaning: shape, dtype, facts about sizes, a unique name."""

    shape: Shape
    dtype: torch.dtype
    facts: Facts
    unique: str


HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[H], H]:
    """Register a handler under every name of its operation.

    The table is filled when a graph is first read; a handler that was put there earlier stays.
    """

    def register(handler: H) -> H:
        for name in names:
            HANDLERS.setdefault(name, handler)
        return handler

    return register


def call_handler(
    handler: Handler, result: Any, args: Sequence[Value], kwargs: Mapping[str, Value] | None = None
) -> Value:
    """The answer of a handler to a call.

    Args:
        handler: a handler of a table.
        result: its first argument: what is known about the result.
        args: the call's arguments, as values.
        kwargs: the arguments given by name.

    Returns:
        The handler's answer, or None if it does not describe such a call: the arguments do not bind to its
        signature, or one does not have the annotated type.

    Raises:
        Exception: whatever the handler raises, which is a fault of the handler.
    """
    named = dict(kwargs or {})
    signature, accepted = _form(handler)
    try:
        bound = signature.bind(result, *args, **named)
    except TypeError:
        return None
    for name, (several, allowed) in accepted.items():
        if name in bound.arguments:
            given = bound.arguments[name]
            if not all(isinstance(v, allowed) for v in (given if several else (given,))):
                return None
    return handler(result, *args, **named)


@functools.cache
def _form(handler: Handler) -> tuple[inspect.Signature, dict[str, tuple[bool, tuple[type, ...]]]]:
    """A handler's signature; for each typed parameter, whether it takes several values, and its types."""
    signature, hints = inspect.signature(handler), get_type_hints(handler)
    accepted: dict[str, tuple[bool, tuple[type, ...]]] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        allowed = _types(hints.get(name, Any))
        if allowed is not None and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            accepted[name] = parameter.kind is inspect.Parameter.VAR_POSITIONAL, allowed
    return signature, accepted


def _types(hint: Any) -> tuple[type, ...] | None:
    """The types of a hint; None if it takes anything.  An integer counts as a float too."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_types(part) for part in get_args(hint)]
        return None if any(p is None for p in parts) else tuple(t for p in parts if p is not None for t in p)
    if hint is float:
        return float, int
    kind = get_origin(hint) or hint
    return (kind,) if isinstance(kind, type) and kind is not Any else None


def as_expr(value: Value, like: torch.dtype = torch.float64) -> Expr | None:
    """A tensor operand or a number as an expression.

    A Python float gets the dtype in which PyTorch computes with it and a tensor of dtype ``like``: float32
    for half precision, and the default dtype for integers.  Without ``like`` it is float64.
    """
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return const(value, torch.bool)
    if isinstance(value, int):
        return const(value, torch.int64)
    if isinstance(value, float):
        return const(value, opmath(like if like.is_floating_point else settings().dtype))
    if isinstance(value, sympy.Expr):
        return expr("iota", (), (value, 0), (), torch.int64)  # a size as a rank-0 number: start + 0*n
    return None


def view(op: str, x: Expr, shape: Shape, *attrs: Any) -> Expr:
    """A view node, or the operand itself if nothing changes."""
    if op in ("reshape", "expand") and shape == x.shape:
        return x
    return expr(op, (x,), attrs, shape, x.dtype)


def reshape(x: Expr, shape: Shape) -> Expr:
    """``x`` with another shape and the same number of elements."""
    while x.op == "reshape":
        x = x.args[0]
    return view("reshape", x, shape)


def permute(x: Expr, dims: tuple[int, ...]) -> Expr:
    """Dimensions reordered."""
    dims = tuple(d % x.rank for d in dims) if x.rank else ()
    if dims == tuple(range(x.rank)):
        return x
    if x.op == "permute":
        inner: tuple[int, ...] = x.attrs[0]
        return permute(x.args[0], tuple(inner[d] for d in dims))
    return view("permute", x, tuple(x.shape[d] for d in dims), dims)


def are_integers(values: Sequence[Value]) -> TypeGuard[Sequence[int]]:
    """Are all values known integers?"""
    return all(isinstance(v, int) for v in values)


def are_sizes(values: Sequence[Value]) -> TypeGuard[Sequence[Size]]:
    """Are all values integers, known or symbolic?"""
    return all(isinstance(v, (int, sympy.Expr)) for v in values)


def dim_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def ints(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """The integers of a call, whether written ``f(1, 2)`` or ``f((1, 2))``."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return tuple(values[0])
    return values


def arg_exprs(r: Result, *values: Value) -> tuple[Expr, ...] | None:
    """All operands as expressions, or None if one is not."""
    tensors = [v.dtype for v in values if isinstance(v, Expr)]
    like = next((d for d in (r.dtype, *tensors) if d.is_floating_point), r.dtype)
    out = tuple(as_expr(v, like) for v in values)
    return None if any(o is None for o in out) else out  # type: ignore[return-value]


def in_common(args: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The operands of a comparison, with numbers cast to the integer dtype in which it is computed.

    For an ``x`` of dtype uint8, ``x < 300`` is ``x < 44``.
    """
    common = common_dtype(args)
    if not is_integer(common):
        return args
    weak = [a.op == "const" or (a.rank == 0 and common.itemsize < 4) for a in args]
    return tuple(cast(a, common) if w else a for a, w in zip(args, weak, strict=True))


def common_dtype(args: tuple[Expr, ...]) -> torch.dtype:
    """The promoted dtype; operands without dimensions do not promote tensors of the same kind.

    The kinds are boolean, integer, floating and complex.
    """
    strong = [a.dtype for a in args if a.rank]
    weak = [a.dtype for a in args if not a.rank]
    promoted = [functools.reduce(torch.promote_types, dtypes) for dtypes in (strong, weak) if dtypes]
    return max(promoted, key=_kind, default=torch.float32)


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else int(dtype is not torch.bool)
