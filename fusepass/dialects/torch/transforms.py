"""How a graph treats gradients: where they are recorded, and the transforms of ``torch.func``.

Dynamo writes ``torch.func.grad``, ``jvp`` and ``vmap`` as calls that open and close a level, around the nodes
that run in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusepass.dialects.torch.nodes import value_of
from fusepass.host.surroundings import settings

_OPEN = {
    "_vmap_increment_nesting": "vmap",
    "_grad_increment_nesting": "grad",
    "_jvp_increment_nesting": "jvp",
    "_enter_dual_level": "jvp",
}
_CLOSE = {"_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting", "_exit_dual_level"}
_BACKWARD = "_autograd_grad"

FORWARD_MODE = "it is differentiated in forward mode (torch.func.jvp), which no fused kernel supports"
BATCHED = "torch.vmap runs it, or its gradient, over a dimension that fused kernels would not see"
FOREIGN = "torch.func.grad differentiates only PyTorch's own operators"
TWICE = "it is differentiated twice (torch.func.grad of grad), which no fused kernel supports"
AGAIN = (
    "its gradient by torch.func.grad may be differentiated again, because a tensor (a parameter, say) "
    "requires gradients outside of torch.func.grad as well, and no fused kernel can be differentiated twice; "
    "detach such tensors, or call torch.func.grad under torch.no_grad()"
)


def records_gradients(gm: fx.GraphModule) -> bool:
    """May gradients be recorded anywhere in ``gm`` or in a graph that it calls?

    A function that runs under ``torch.no_grad`` may contain ``torch.enable_grad`` or ``torch.func.grad``.
    """
    return settings().grad or any(
        node.target is torch._C._set_grad_enabled and node.args[0] is not False
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


class Transforms:
    """The transforms of ``torch.func`` that the nodes of one graph run in.

    Args:
        graph: the graph.
        outer: the transforms of the calling graph, and the node that calls.
    """

    def __init__(self, graph: fx.Graph, outer: tuple[Transforms, fx.Node] | None = None) -> None:
        self._base = () if outer is None else outer[0]._levels(outer[1])
        self._batched_backward: bool = outer is not None and outer[0]._batched_backward
        self._differentiable: bool = outer is not None and outer[0]._differentiable
        self._around: dict[fx.Node, tuple[str, ...]] = {}
        levels = list(self._base)
        for node in graph.nodes:
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name in _OPEN:
                levels.append(_OPEN[name])
            elif name in _CLOSE and levels:
                levels.pop()
            elif name == _BACKWARD:
                self._batched_backward |= "vmap" in levels
                self._differentiable |= _learns_outside(value_of(node))
            if levels:
                self._around[node] = tuple(levels)

    def refuse(self, node: fx.Node) -> str | None:
        """Why no kernel can replace ``node``, or None."""
        levels = self._levels(node)
        if "jvp" in levels:
            return FORWARD_MODE
        if "vmap" in levels or ("grad" in levels and self._batched_backward) or _batched(value_of(node)):
            return BATCHED
        if "grad" in levels and (self._differentiable or _learns_outside(value_of(node))):
            return AGAIN
        return TWICE if levels.count("grad") > 1 else None

    def differentiates(self, node: fx.Node) -> bool:
        """Does ``torch.func.grad`` (or ``vjp``) run ``node``?"""
        return "grad" in self._levels(node)

    def _levels(self, node: fx.Node) -> tuple[str, ...]:
        return self._around.get(node, self._base)


def _learns_outside(value: Any) -> bool:
    """Does a tensor, or one in a nest of tensors, require gradients below the wrappers of ``torch.func``?"""
    functorch: Any = torch._C._functorch
    if isinstance(value, (tuple, list)):
        return any(map(_learns_outside, value))
    while isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _batched(value: Any) -> bool:
    """Does a tensor have a dimension that ``vmap`` hides, at any level?"""
    functorch: Any = torch._C._functorch
    while isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


__all__ = ["AGAIN", "BATCHED", "FORWARD_MODE", "FOREIGN", "TWICE", "Transforms", "records_gradients"]
