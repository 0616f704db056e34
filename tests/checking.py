"""Helpers that compile a function with the pass, read its report, and compare its numbers with float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusepass.reports import collector
from fusepass.reports.report import SiteReport

# A fault of the pass must fail the test instead of leaving the graph as it was.
os.environ["FUSEPASS_STRICT"] = "1"

Function = Callable[..., Any]
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One compiled call: what the pass reports, the result, the gradients by name of input."""

    sites: list[SiteReport]
    out: Tensor
    grads: dict[str, Tensor]

    @property
    def site(self) -> SiteReport:
        """The only site."""
        assert len(self.sites) == 1, f"expected one attention site, got {self.sites}"
        return self.sites[0]


def compiled(fn: Function, kernel: str = "auto", inner: Any = "eager", **kwargs: Any) -> Function:
    """`fn` compiled with the pass; graph breaks are errors."""
    options = {"inner": inner, "kernel": kernel}
    return torch.compile(fn, backend="fusepass", options=options, **({"fullgraph": True} | kwargs))


def copies(inputs: Inputs, dtype: torch.dtype | None = None, grads: bool = False) -> dict[str, Tensor]:
    """Copies with the same strides; floating tensors are in `dtype`, and may require gradients."""
    out = {}
    for name, tensor in inputs.items():
        copy = tensor.clone(memory_format=torch.preserve_format)
        if tensor.is_floating_point():
            copy = copy.to(dtype or tensor.dtype).detach().requires_grad_(grads)
        out[name] = copy
    return out


def call(fn: Function, inputs: Inputs, dtype: torch.dtype | None = None, grads: bool = False) -> Run:
    """Call a function on copies of the inputs, in `dtype`; gradients are of a fixed weighted sum."""
    given = copies(inputs, dtype, grads)
    with collector.collect() as seen, torch.set_grad_enabled(grads):
        out = fn(**given)
        gradients: dict[str, Tensor] = {}
        if grads:
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(
                out.shape
            )
            (out * weights.to(out.dtype)).sum().backward()
            gradients = {name: t.grad for name, t in given.items() if t.grad is not None}
    return Run(seen.sites, out.detach(), gradients)


def assert_as_accurate(
    got: Tensor, eager: Tensor, exact: Tensor, what: str = "output", scale: float = 0.0
) -> None:
    """Assert NaN and infinity in the same places as eager, and elsewhere an error that is not much larger.

    Errors are those against float64. Twice eager's error is allowed, and eight roundings more, in eager's own
    dtype, of the largest true value or of `scale`.
    """
    assert got.dtype is eager.dtype and got.shape == eager.shape, f"{what}: {got.dtype} {tuple(got.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(eager)), f"{what}: {kind.__name__} at other places than eager"
    valid = torch.isfinite(eager) & torch.isfinite(exact)
    if not valid.any():
        return
    true = exact.double()[valid]
    mine, theirs = ((t.double()[valid] - true).abs().max().item() for t in (got, eager))
    floor = 8 * torch.finfo(eager.dtype).eps * max(scale, true.abs().max().item())
    allowed = 2 * theirs + floor
    assert mine <= allowed, f"{what}: error {mine:.3g}, eager {theirs:.3g}, allowed {allowed:.3g}"


def assert_same_accuracy(got: Run, eager: Run, exact: Run) -> None:
    """Compare results and gradients; a gradient that sums many elements may cancel to a small number."""
    assert_as_accurate(got.out, eager.out, exact.out)
    assert set(got.grads) == set(eager.grads), "only one side has a gradient for some input"
    scale = max((g.abs().nan_to_num(0.0, 0.0).max().item() for g in exact.grads.values()), default=0.0)
    for name, grad in eager.grads.items():
        assert_as_accurate(got.grads[name], grad, exact.grads[name], f"gradient of {name}", scale)


def assert_identical(got: Tensor, eager: Tensor) -> None:
    """Assert that an unfused site gives exactly eager's numbers."""
    assert got.dtype is eager.dtype
    assert torch.equal(got.nan_to_num(7.0), eager.nan_to_num(7.0))
    assert torch.equal(got.isnan(), eager.isnan())
