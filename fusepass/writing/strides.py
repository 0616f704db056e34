"""Memory layout seen from outside.

A kernel's result may have other strides than the product it replaces.  Most readers do not depend on strides;
a ``view``, a graph output or a call of ``stride()`` does.  The readers are run on fake tensors to find out,
and the layout of the result is changed only if one depends on it.
"""

from __future__ import annotations

import heapq
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import Max

from fusepass.dialects.torch.memory import writes
from fusepass.dialects.torch.nodes import operation, size_of, value_of
from fusepass.expressions.index import Facts, simplify_size
from fusepass.writing.emit import Builder, CannotEmit
from fusepass.writing.sharding import check_placements

#: Operations that read the layout itself.
_ASKING = frozenset(
    "stride is_contiguous storage_offset data_ptr as_strided untyped_storage sym_stride sym_storage_offset "
    "set dim_order is_non_overlapping_and_dense".split()
)
#: If more readers than this would have to be run, one of them is assumed to depend on strides.
_LIMIT = 200
_LARGE = 1 << 20  # stands for a size that depends on data


def laid_out_as(build: Builder, node: fx.Node, out: fx.Node) -> fx.Node:
    """``out``, with the layout of ``node`` if a reader of ``node`` depends on it.

    Raises:
        CannotEmit: such a reader exists, and no permutation of dimensions gives the layout.
    """
    before, facts = value_of(node), build.reader.facts
    check_placements(before, build.value(out))
    if same_strides(before, build.value(out), facts) or not _observed(build, node, build.value(out)):
        return out
    order = sorted(range(before.dim()), key=lambda d: (-_hint(before.stride(d)), d))
    inverse = [order.index(d) for d in range(before.dim())]
    if order == sorted(order):
        out = build.op("contiguous", out)
    else:
        out = build.op("permute", build.op("contiguous", build.op("permute", out, order)), inverse)
    if not same_strides(before, build.value(out), facts) and _observed(build, node, build.value(out)):
        raise CannotEmit("a reader of the result depends on a memory layout that cannot be restored")
    return out


def same_strides(a: torch.Tensor, b: torch.Tensor, facts: Facts) -> bool:
    """Are the strides provably equal in all dimensions of more than one element, unless a size is zero?"""
    sizes = {size_of(size) for size in (*a.shape, *b.shape)}
    return all(
        statically_known_true(size == 1) or _equal(m, n, sizes, facts)
        for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _equal(m: Any, n: Any, sizes: set[Any], facts: Facts) -> bool:
    """Are two strides provably equal if none of the tensor's sizes is zero?"""
    if statically_known_true(m == n):
        return True
    strides = []
    for stride in map(sympy.sympify, map(size_of, (m, n))):
        positive = {e: size for e in stride.atoms(Max) for size in sizes if e == Max(1, size)}
        strides.append(stride.xreplace(positive))
    return facts.equal(*map(simplify_size, strides))


def _hint(stride: Any) -> int:
    """A stride as a number, for sorting dimensions."""
    if isinstance(stride, int):
        return stride
    if stride.node.hint is not None:
        return int(stride.node.hint)
    return int(stride.node.expr.subs(dict.fromkeys(stride.node.expr.free_symbols, _LARGE)))


def _observed(build: Builder, node: fx.Node, value: torch.Tensor) -> bool:
    """Would a reader of ``node`` notice if ``node`` had the strides of ``value``?"""
    order = build.reader.order
    changed: dict[fx.Node, Any] = {node: value}
    todo = [(order.get(u, -1), u) for u in node.users]
    heapq.heapify(todo)
    seen: set[fx.Node] = set()
    while todo:
        _, user = heapq.heappop(todo)
        if user in seen:
            continue
        seen.add(user)
        if len(seen) > _LIMIT or _must_keep(user):
            return True
        try:
            new = _run(build, user, changed)
        except Exception:
            return True
        if _aliases_otherwise(build, user, new, changed):
            return True
        if not _same(value_of(user), new, build.reader.facts):
            changed[user] = new
            for reader in user.users:
                heapq.heappush(todo, (order.get(reader, -1), reader))
    return False


def _aliases_otherwise(build: Builder, user: fx.Node, new: Any, changed: dict[fx.Node, Any]) -> bool:
    """Would a view become a copy, or a copy a view, in a way that can be observed?

    It can be observed if one of the two is written to.  It can also be observed under ``no_grad``: there, a
    view of a tensor that requires a gradient requires one too, but a copy does not.
    """
    reader, memory = build.reader, build.reader.memory
    if not isinstance(new, torch.Tensor):
        return False
    for source in user.all_input_nodes:
        if isinstance(given := changed.get(source), torch.Tensor):
            before = not memory.of(source).isdisjoint(memory.of(user))
            now = given.untyped_storage()._cdata == new.untyped_storage()._cdata
            seen = user in reader.without_gradients
            if before != now and (seen or reader.was_written(source) or reader.was_written(user)):
                return True
    return False


def _must_keep(user: fx.Node) -> bool:
    """Does a reader depend on strides, or is it unknown whether it does?"""
    if user.op not in ("call_function", "call_method"):
        return True
    if isinstance(user.target, torch._ops.HigherOrderOperator):
        return True
    return operation(user)[0] in _ASKING or writes(user)


def _run(build: Builder, user: fx.Node, changed: dict[fx.Node, Any]) -> Any:
    """The value that the reader has with the new layout."""

    def value(n: fx.Node) -> Any:
        known = changed.get(n, value_of(n))
        if known is None:
            raise CannotEmit(f"'{n.name}' has no known value")
        return known

    args, kwargs = fx.map_arg((user.args, user.kwargs), value)
    with build.trial(), torch.no_grad():
        if user.op == "call_method":
            return getattr(args[0], str(user.target))(*args[1:], **kwargs)
        return user.target(*args, **kwargs)  # type: ignore[operator]


def _same(old: Any, new: Any, facts: Facts) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return old.shape == new.shape and same_strides(old, new, facts)
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(_same(a, b, facts) for a, b in zip(old, new, strict=True))
    return not isinstance(new, torch.Tensor)


__all__ = ["laid_out_as", "same_strides"]
