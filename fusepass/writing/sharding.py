"""DTensors in a graph: operators must be able to work on shards, and results must keep their placement.

A *strategy* tells DTensor how to compute an operator on shards.  For an operator without one PyTorch tries
every placement of every operand on the operator's decomposition, which takes minutes for attention: such an
operator is refused immediately.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fusepass.writing.layouts import CannotEmit

_MODULE = "torch.distributed.tensor"
#: The tables of strategies, in whichever form a release of PyTorch has them.
_TABLES = ("op_to_rules", "op_strategy_funcs", "op_single_dim_strategy_funcs")


def is_sharded(value: Any) -> bool:
    """Is a value a DTensor?  Nothing is imported to find out."""
    return _MODULE in sys.modules and isinstance(value, sys.modules[_MODULE].DTensor)


class WithStrategies(TorchDispatchMode):
    """Inside, an operator on DTensors raises `CannotEmit` if it or its backward has no sharding strategy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(is_sharded, pytree.tree_leaves((args, kwargs)))):
            for operator in (func, _backward_of(func)):
                if operator is not None and not has_strategy(operator):
                    raise CannotEmit(f"DTensor has no sharding strategy for '{operator}'")
        return func(*args, **kwargs)


def has_strategy(operator: Any) -> bool:
    """Does DTensor have a sharding strategy for an operator?"""
    dispatcher = getattr(sys.modules[_MODULE].DTensor, "_op_dispatcher", None)
    known = getattr(dispatcher, "sharding_propagator", None)
    return any(operator in getattr(known, table, ()) for table in _TABLES)


def _backward_of(operator: Any) -> Any:
    """The operator ``..._backward`` that computes the gradients of an operator, or None."""
    namespace, name = operator._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_backward", None)
    return None if packet is None else getattr(packet, "default", None)


def check_placements(before: torch.Tensor, after: torch.Tensor) -> None:
    """Check that a replacement is on the same devices as the original, in the same shards.

    Raises:
        CannotEmit: it is not.
    """
    if is_sharded(before) is not is_sharded(after):
        raise CannotEmit("a DTensor is replaced by a plain tensor, or the other way round")
    if is_sharded(before):
        x: Any = before
        y: Any = after
        if x.device_mesh != y.device_mesh or tuple(x.placements) != tuple(y.placements):
            raise CannotEmit(
                f"the result would be placed as {tuple(y.placements)}, and is read as {tuple(x.placements)}: "
                "shard queries, keys and values in the same way, by batch or by heads"
            )


__all__ = ["WithStrategies", "check_placements", "has_strategy", "is_sharded"]
