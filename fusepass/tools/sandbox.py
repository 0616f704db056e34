"""Runs the user's model without leaving traces in its state, random numbers or compiled code."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch.utils import _pytree as pytree

Call = Callable[..., Any]


def unwrapped(model: Call) -> Call:
    """The original model, if the argument is a result of `torch.compile`."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        if (original := getattr(model, name, None)) is not None:
            return unwrapped(original)
    return model


def compiled_apart(model: Call, backend: Call, dynamic: bool | None) -> Call:
    """`torch.compile(model)`, with its cached code separate from what the user has compiled.

    Dynamo keeps compiled code with the function's code object, so the model is called from a function with a
    new code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    apart = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    extra: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        extra["isolate_recompiles"] = True
    compiled: Call = torch.compile(apart, backend=backend, dynamic=dynamic, **extra)
    return compiled


@contextmanager
def restored(model: Call) -> Iterator[None]:
    """Afterwards, random number generators, buffers, gradients and the train/eval mode are as before."""
    module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
    modes = {name: part.training for name, part in module.named_modules()}
    buffers = {name: (part, part.detach().clone()) for name, part in module.named_buffers()}
    grads = {name: part.grad for name, part in module.named_parameters()}
    for part in module.parameters():
        part.grad = None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            _restore(module, modes, buffers, grads)


def _restore(
    module: torch.nn.Module,
    modes: Mapping[str, bool],
    buffers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    grads: Mapping[str, torch.Tensor | None],
) -> None:
    for name, part in module.named_modules():
        part.training = modes.get(name, part.training)
    with torch.no_grad():
        for buffer, saved in buffers.values():
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)
    for name, parameter in module.named_parameters():
        parameter.grad = grads.get(name)


def copied(tree: Any, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """Copies of a call's arguments, since the model may write to them.

    If given, floating tensors become `dtype`, and all tensors move to `device`.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        floating = leaf.is_floating_point()
        tensor = leaf.detach().to(device=device or leaf.device, dtype=dtype if floating else None, copy=True)
        return tensor.requires_grad_(leaf.requires_grad)

    return pytree.tree_map(one, tree)


def named_tensors(tree: Any) -> dict[str, torch.Tensor]:
    """The floating tensors in nested outputs, by their path, such as "logits" or "states.0"."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    tensors = {}
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            tensors[".".join(map(_step, path)) or "output"] = leaf
    return tensors


def _step(key: object) -> str:
    """One step of a path: a key, a position, or the name of a field."""
    names = (getattr(key, name, None) for name in ("key", "idx", "name"))
    return str(next((name for name in names if name is not None), key))
