"""What drawn programs need to run: numbers and calls. It is printed with each failing program."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

inf, nan = float("inf"), float("nan")


def r(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers. Where float64 is the default dtype, the same numbers in float64."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    exact = torch.get_default_dtype() == torch.float64
    return numbers.double() if exact else numbers


def whole(*shape: int, seed: int, below: int = 2, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers from 0 on."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def memory(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def backward(results: tuple[Any, ...]) -> None:
    """Gradients of a fixed weighted sum of the results."""
    total = None
    for t in results:
        if isinstance(t, Tensor) and t.requires_grad:
            weights = torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)
            total = (t * weights).sum() if total is None else total + (t * weights).sum()
    if total is not None:
        total.backward()


def call(f: Callable[..., Any], args: dict[str, Tensor], mode: str) -> dict[str, Any]:
    """Everything that a caller can see of one call."""
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": contextlib.nullcontext}
    learned = {name: t if t._base is None else t._base for name, t in args.items() if t.requires_grad}
    if isinstance(f, torch.nn.Module):
        learned |= dict(f.named_parameters())
    before = {name: memory(t) for name, t in args.items()}
    held = [t.untyped_storage() for t in args.values()]  # so that nothing else gets this memory
    with modes[mode]():
        results = f(**args)
    if learned:
        backward(results)
    seen: dict[str, Any] = {}
    for number, t in enumerate(results):
        seen[f"result {number}"] = t.detach().clone() if isinstance(t, Tensor) else t
        if isinstance(t, Tensor) and memory(t):
            seen[f"memory of result {number}"] = [n for n, place in before.items() if place == memory(t)]
            seen[f"learning of result {number}"] = t.requires_grad
    for name, t in learned.items():
        seen[f"gradient of {name}"] = None if t.grad is None else t.grad.clone()
    for name, t in args.items():
        seen[f"{name} afterwards"] = t.detach().clone()
    if isinstance(f, torch.nn.Module):
        for name, t in f.named_buffers():
            seen[f"{name} afterwards"] = t.detach().clone()
    del held
    return seen


def run(
    f: Callable[..., Any],
    inputs: Callable[[int], dict[str, Tensor]],
    edit: Callable[[Any], None],
    calls: int,
    mode: str,
) -> dict[str, Any]:
    """Everything that a caller can see of all calls; a module is edited before each one after the first."""
    seen: dict[str, Any] = {}
    for turn in range(calls):
        if turn:
            edit(f)
        seen |= {f"call {turn}, {name}": value for name, value in call(f, inputs(turn), mode).items()}
    return seen


def compiled(f: Callable[..., Any], backend: str, dynamic: bool | None, **options: str) -> Callable[..., Any]:
    """`f` through `torch.compile`; a module is compiled in place."""
    given: dict[str, Any] = {"backend": backend, "dynamic": dynamic, "options": options or None}
    if isinstance(f, torch.nn.Module):
        f.compile(**given)
        return f
    return torch.compile(f, **given)
