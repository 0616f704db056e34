"""What a replacement owes to autograd.

A fused call keeps its operands and its result for its backward pass; the original may have kept other
tensors, so memory that the graph writes to later is copied first.  Everything that the original result
depended on keeps a gradient: an operand that does not change the result (a bias of whole rows, or everything
in the scores of a single key) gets zeros, not None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from fusepass.dialects.torch.nodes import value_of
from fusepass.expressions.ir import Expr
from fusepass.writing.emit import Builder, CannotEmit
from fusepass.writing.stored import stored_op


def requires_grad(node: fx.Node) -> bool:
    """Does a gradient flow to a node's tensor?"""
    return bool(getattr(value_of(node), "requires_grad", False))


def keep_for_backward(build: Builder, products: Sequence[Expr], out: fx.Node) -> fx.Node:
    """Copy the operands that the graph writes to later, for the backward pass; likewise the result.

    An opaque operator copies the operands, because TorchInductor replaces a plain copy of an argument by the
    argument.

    Raises:
        CannotEmit: the original would not compute the right gradients either.
    """
    reader, end = build.reader, build.reader.order[build.anchor]
    if _overwrites_what_is_kept(build, products):
        raise CannotEmit("a tensor that the original keeps for its backward pass is written to afterwards")
    written = [
        n for n in tensors_read_by(build.new_nodes) if reader.written_between(reader.memory.of(n), end)
    ]
    for node in written:
        users = [m for m in build.new_nodes if node in m.all_input_nodes]
        copied = build.before(users[0], stored_op, node)
        for user in users:
            user.replace_input_with(node, copied)
    if reader.written_between(reader.memory.of(build.anchor), end):
        out = build.op("clone", out)
    return out


def _overwrites_what_is_kept(build: Builder, products: Sequence[Expr]) -> bool:
    """Is an operand of one of the original's products overwritten after autograd has kept it for the gradient
    of the other operand?

    In eager mode that is an error or, if it is written through ``.data``, a different gradient.
    """
    reader = build.reader
    for node in (*map(reader.definer.get, products), build.anchor):
        operands = [n for n in node.all_input_nodes if isinstance(value_of(n), Tensor)] if node else []
        for operand in operands:
            needed = any(requires_grad(n) for n in operands if n is not operand)
            if needed and node and reader.written_between(reader.memory.of(operand), reader.order[node]):
                return True
    return False


def tensors_read_by(new_nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The graph's own tensors that new nodes read."""
    inside = set(new_nodes)
    read = {n: None for new in new_nodes for n in new.all_input_nodes if n not in inside}
    return [n for n in read if isinstance(value_of(n), Tensor)]


def with_zero_gradients(build: Builder, out: fx.Node, new_nodes: Sequence[fx.Node]) -> fx.Node:
    """``out``, with zero gradients for all that the original depends on, but ``new_nodes`` do not.

    Source: the derivative of ``torch.where`` is zero for the branch that is not taken, whatever its value.
    """
    lost = [
        n for n in unreached(build.anchor, tensors_read_by(new_nodes), build.reader.order) if requires_grad(n)
    ]
    if not lost:
        return out
    value = build.value(out)
    total: fx.Node | None = None
    for node in lost:
        part = build.cast(build.op("sum", build.replaced.get(node, node)), value.dtype)
        total = part if total is None else build.op("add", total, part)
    never = build.op("scalar_tensor", False, dtype=torch.bool, device=value.device)
    return build.op("where", never, total, out)


def unreached(anchor: fx.Node, used: Iterable[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes nearest to ``anchor`` that its gradients reach, but that those of ``used`` do not reach."""
    through = {n for n in used if requires_grad(n)}
    first = min((order.get(n, 0) for n in through if n.op in ("call_function", "call_method")), default=0)
    leads: dict[fx.Node, bool] = dict.fromkeys(through, True)
    todo: list[tuple[fx.Node, bool]] = [(anchor, False)]
    while todo:
        node, ready = todo.pop()
        if ready:
            leads[node] = any(leads.get(n, False) for n in node.all_input_nodes)
        elif node not in leads:
            leads[node] = False
            if order.get(node, first) >= first:  # nodes that replaced an earlier site have no position
                todo.append((node, True))
                todo.extend((n, False) for n in node.all_input_nodes if requires_grad(n))
    on_the_way = [n for n, leads_there in leads.items() if n is anchor or (leads_there and n not in through)]
    edges = (n for node in on_the_way for n in node.all_input_nodes)
    lost = [n for n in dict.fromkeys(edges) if requires_grad(n) and not leads.get(n, False)]
    return [n for n in lost if not _is_behind(n, through, order)]


def _is_behind(node: fx.Node, through: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Does one of ``through`` depend on ``node``?"""
    todo, seen = list(through), set(through)
    while todo:
        at = todo.pop()
        if at is node:
            return True
        since = order.get(node, 0)
        inputs = (n for n in at.all_input_nodes if n not in seen and requires_grad(n))
        later = [n for n in inputs if order.get(n, since) >= since]
        seen.update(later)
        todo.extend(later)
    return False


__all__ = ["keep_for_backward", "requires_grad", "tensors_read_by", "unreached", "with_zero_gradients"]
