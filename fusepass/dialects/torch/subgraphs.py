"""The graphs inside a graph: the bodies of higher-order operators, and the meanings of their placeholders."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap
from torch.utils import _pytree as pytree

from fusepass.dialects.torch.graph import Reader
from fusepass.dialects.torch.nodes import value_of
from fusepass.expressions.ir import Expr

#: The operator that stands for a ``torch.autograd.Function``: its forward, its backward, the operands.
_OWN_GRADIENT = "autograd_function_apply"


@dataclass(frozen=True)
class Call:
    """The call of a body by a higher-order operator, in the graph ``outer``."""

    outer: fx.GraphModule
    node: fx.Node
    body: fx.GraphModule

    @property
    def own_gradient(self) -> bool:
        """Is the body the forward of a function that defines its own gradient?"""
        return _name(self.node) == _OWN_GRADIENT and _bodies(self.outer, self.node)[0] is self.body

    def operand_meanings(self, reader: Reader) -> dict[str, Expr]:
        """The meanings of the body's placeholders in the outer graph, which ``reader`` reads.

        The result is empty unless the operator is known to pass its operands one by one: it has a single body
        (``checkpoint``, ``wrap``, ``invoke_subgraph``), or this is the forward of a function with its own
        gradient.  Operators with branches or loops pass theirs in other ways.  Operands that are written to
        have no meaning either.
        """
        if len(_bodies(self.outer, self.node)) > 1 and not self.own_gradient:
            return {}
        operands = [a for a in self.node.args if not (isinstance(a, fx.Node) and a.op == "get_attr")]
        placeholders = self.body.graph.find_nodes(op="placeholder")
        if len(operands) != len(placeholders):
            return {}
        meanings = {}
        for placeholder, node in zip(placeholders, operands, strict=True):
            meaning = reader.defined.get(node) if isinstance(node, fx.Node) else None
            if isinstance(meaning, Expr) and isinstance(node, fx.Node) and not reader.was_written(node):
                meanings[placeholder.name] = meaning
        return meanings


def graphs_of(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, Call | None]]:
    """The graph and the bodies of its higher-order operators, each with its call if there is exactly one."""
    seen: set[int] = set()
    calls: dict[int, list[Call]] = {}
    for module in gm.modules():
        if isinstance(module, fx.GraphModule) and id(module) not in seen:
            seen.add(id(module))
            for node in list(module.graph.nodes):
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    for body in _bodies(module, node):
                        calls.setdefault(id(body), []).append(Call(module, node, body))
            mine = calls.get(id(module), [])
            yield module, mine[0] if len(mine) == 1 else None


def recompute_nothing(gm: fx.GraphModule, fused: Collection[fx.GraphModule]) -> None:
    """Replace checkpoints by plain calls of their bodies if something was fused in them and no gradient
    flows.

    Such a checkpoint has no effect, but PyTorch 2.13 rejects it if it contains an operator that may draw
    random numbers, such as SDPA, although nothing will be recomputed.
    """
    for module in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        for node in module.graph.find_nodes(op="call_function", target=tag_activation_checkpoint):
            inside = (m for body in _bodies(module, node) for m in body.modules())
            if any(m in fused for m in inside) and not _may_require_grad(value_of(node)):
                node.target = wrap
                node.kwargs = tag_activation_checkpoint.divide_kwargs(node.kwargs)[1]
                module.recompile()


def _may_require_grad(value: Any) -> bool:
    """May a gradient flow to a result?  True as well if a part of the result is not known."""
    tensors = [t for t in pytree.tree_leaves(value) if not isinstance(t, (int, float, torch.SymInt))]
    return any(t is None or t.requires_grad for t in tensors)


def _bodies(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graph modules among a higher-order operator's arguments."""
    named = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    modules = [getattr(module, str(name), None) for name in named]
    return [m for m in modules if isinstance(m, fx.GraphModule)]


def _name(node: fx.Node) -> str:
    target = node.target
    return target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""


__all__ = ["Call", "graphs_of", "recompute_nothing"]
