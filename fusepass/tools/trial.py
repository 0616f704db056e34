"""One call, run in several ways on the same inputs: its results, and their distance from the exact ones."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fusepass.tools.sandbox import Call, copied, named_tensors, restored

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Results:
    """Floating tensors by name: the outputs and, if requested, the gradients."""

    outputs: Tensors
    gradients: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A call `model(*args, **kwargs)` that can be repeated."""

    model: Call
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grads: bool

    @cached_property
    def device(self) -> torch.device:
        """The device of the first tensor; arguments come before parameters."""
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The least precise floating dtype among arguments and parameters; it decides what error passes."""
        dtypes = {tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.get_default_dtype())

    def _tensors(self) -> list[torch.Tensor]:
        leaves = torch.utils._pytree.tree_leaves((self.args, dict(self.kwargs)))
        own = [*self.model.parameters()] if isinstance(self.model, torch.nn.Module) else []
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + own

    def run(self, call: Call | None = None, seed: int = 0) -> Results:
        """The results of `call` (None: the model), on copies of the arguments, with fixed random numbers."""
        with restored(self.model):
            return self._prepared(call or self.model, self.model, None, seed)()

    def exact(self, dtype: torch.dtype) -> Results:
        """The results of a copy of the model in a more precise dtype."""
        model = copy.deepcopy(self.model)
        if isinstance(model, torch.nn.Module):
            model.to(dtype)
        with restored(self.model), torch.autocast(self.device.type, enabled=False):
            return self._prepared(model, model, dtype, 0)()

    def prepare(self, call: Call) -> Callable[[], Results]:
        """The same call, ready to be measured."""
        return self._prepared(call, self.model, None, 0)

    def _prepared(
        self, call: Call, owner: Call, dtype: torch.dtype | None, seed: int
    ) -> Callable[[], Results]:
        args, kwargs = copied((self.args, dict(self.kwargs)), dtype)
        given = named_tensors(dict(enumerate(args)) | kwargs)
        leaves = {f"argument {name}": leaf for name, leaf in given.items()}
        if isinstance(owner, torch.nn.Module):
            leaves.update(owner.named_parameters())
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

        def thunk() -> Results:
            torch.manual_seed(seed)
            if not self.grads:
                return Results(_detached(named_tensors(call(*args, **kwargs))))
            with torch.enable_grad():
                outputs = named_tensors(call(*args, **kwargs))
                return Results(_detached(outputs), _gradients(outputs, leaves))

        return thunk


def _detached(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _gradients(outputs: Tensors, leaves: Tensors) -> Tensors:
    """The gradients of all outputs at once, each weighted by fixed random numbers."""
    generator = torch.Generator().manual_seed(0)
    roots = [tensor for tensor in outputs.values() if tensor.requires_grad]
    if not roots or not leaves:
        return {}
    weights = [torch.randn(root.shape, generator=generator).to(root) for root in roots]
    gradients = torch.autograd.grad(roots, list(leaves.values()), weights, allow_unused=True)
    return {name: grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}


def distance(got: torch.Tensor, want: torch.Tensor, like: torch.Tensor, scale: float = 0.0) -> float:
    """The largest error of `got`, in units of the largest value of `want` (at least `scale`).

    Infinite if the shapes differ, or if `got` has its infinities and NaNs in other places than `like`.
    """
    if got.shape != want.shape or not _same_kinds(got, like):
        return float("inf")
    valid = torch.isfinite(got) & torch.isfinite(want)
    if not valid.any():
        return 0.0
    largest = max(want[want.isfinite()].abs().max().item(), scale, torch.finfo(torch.float32).tiny)
    return (got[valid].double() - want[valid].double()).abs().max().item() / largest


def _same_kinds(got: torch.Tensor, like: torch.Tensor) -> bool:
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    return got.shape == like.shape and all(torch.equal(kind(got), kind(like)) for kind in kinds)
