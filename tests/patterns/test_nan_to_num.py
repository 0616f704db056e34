"""Scores made finite: NaN and infinities in them become numbers, in eager and fused alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import checking

B, H, N, D = 2, 3, 9, 8
INF = math.inf
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def future(diagonal: int = 1) -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).triu(diagonal)


def before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.nan_to_num(q @ k.mT * 0.5)
    return (s + torch.zeros(N, N).masked_fill(future(), -INF)).softmax(-1) @ v


def after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT * 0.5).masked_fill(future(), -INF)
    return s.nan_to_num().softmax(-1) @ v


def after_a_mask_with_an_empty_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT * 0.5).masked_fill(future(0), -INF)
    return torch.nan_to_num(s, nan=0.5, posinf=50.0, neginf=-1e9).softmax(-1) @ v


def between_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.nan_to_num(q @ k.mT * 0.5, nan=-2.0, posinf=3.0, neginf=-3.0)
    return (s * 0.5).softmax(-1) @ v


PROGRAMS: dict[str, tuple[Program, str]] = {
    "before the mask": (before_the_mask, "scale 0.5, nan to 0, causal"),
    "after the mask": (after_the_mask, "scale 0.5, nan to 0, causal"),
    "empty row": (after_a_mask_with_an_empty_row, "scale 0.5, nan to 0.5, causal+-1"),
    "between scales": (between_scales, "scale 0.5, nan to -2, scale 0.5"),
}


def random_inputs(broken: bool) -> dict[str, Tensor]:
    inputs = dict(zip("qkv", torch.randn(3, B, H, N, D), strict=True))
    if broken:
        inputs["k"][0, 0, 3, 2] = math.nan
        inputs["k"][1, 1, 5, 2], inputs["k"][1, 2, 4, 1] = INF, -INF
    return inputs


#: Here a score of minus infinity becomes as low as a hidden one, so in eager the hidden keys count as well.
SUNK = ("empty row", True)


@pytest.mark.parametrize(("kernel", "train"), [("auto", False), ("auto", True), ("reference", True)])
@pytest.mark.parametrize(
    ("name", "broken"), [(n, b) for n in PROGRAMS for b in (False, True) if (n, b) != SUNK]
)
def test_nan_to_num(name: str, kernel: str, train: bool, broken: bool) -> None:
    program, words = PROGRAMS[name]
    inputs = random_inputs(broken)
    got = checking.call(checking.compiled(program, kernel), inputs, grads=train)
    assert got.site.fused and str(got.site.spec).endswith(f"float32; {words})"), got.site
    eager = checking.call(program, inputs, grads=train)
    exact = checking.call(program, inputs, torch.float64, grads=train)
    checking.assert_as_accurate(got.out, eager.out, exact.out)
    for name, grad in eager.grads.items():
        assert torch.equal(got.grads[name].isfinite(), grad.isfinite())
        checking.assert_as_accurate(got.grads[name], grad, exact.grads[name], name, scale=1.0)
    if broken:
        assert eager.out.isfinite().all(), "the programs hide what is not finite"
