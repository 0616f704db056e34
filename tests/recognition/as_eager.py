"""Programs of one attention, compared with eager: results and gradients, NaN included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusepass.reports import collector
from tests import checking  # noqa: F401  (faults of the pass are raised)

INF, NAN = math.inf, math.nan


LOW = torch.finfo(torch.float32).min


B, H, N, D = 2, 2, 4, 8


ROWS = torch.tensor([False, True, True, True])[:, None]


KEYS = torch.tensor([True, False, True, True])


CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()


KERNELS = ["auto", "reference", "sdpa", "flex"]


Scores = Callable[[Tensor], Tensor]


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(B, H, N, D, generator=generator).to(dtype) for name in "qkv"}


def agrees(
    program: Callable[..., Tensor],
    kernel: str,
    inner: str = "aot_eager",
    close: float | None = None,
    **changed: Tensor,
) -> collector.Collector:
    given = inputs() | changed
    expected = program(**given)
    torch._dynamo.reset()
    call: Any = torch.compile(program, backend="fusepass", options={"inner": inner, "kernel": kernel})
    with collector.collect() as seen:
        got = call(**given)
    rtol, atol = (1e-4, 1e-5) if close is None else (close, close)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    assert len(seen.sites) <= 1 and not seen.notes
    return seen


def gradients(
    program: Callable[..., Tensor],
    kernel: str | None,
    learned: dict[str, Tensor],
    constant: dict[str, Tensor],
) -> list[Tensor | None]:
    """The gradients of ``learned``, from the sum of a program's result; eager's if ``kernel`` is None."""
    torch._dynamo.reset()
    given = {n: t.detach().clone().requires_grad_() for n, t in learned.items()}
    options: Any = {"inner": "aot_eager", "kernel": kernel}
    call: Any = program if kernel is None else torch.compile(program, backend="fusepass", options=options)
    call(**given, **constant).sum().backward()
    return [t.grad for t in given.values()]


def gradients_agree(program: Callable[..., Tensor], kernel: str, **constant: Tensor) -> None:
    learned = inputs()
    ours, eager = (gradients(program, how, learned, constant) for how in (kernel, None))
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def attention_with(program: Scores) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: program(q @ k.mT) @ v
