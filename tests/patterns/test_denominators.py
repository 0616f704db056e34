"""Softmaxes that are written out: which denominators are the row sum of the exponentials."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import checking

B, H, N, D = 2, 3, 11, 8
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(D)


def shifted(q: Tensor, k: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-1, keepdim=True)).exp()


def total(e: Tensor) -> Tensor:
    return e.sum(-1, keepdim=True)


def lower() -> Tensor:
    return torch.tril(torch.ones(N, N))


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k)
    return (e / total(e).clamp(min=1e-9)) @ v


def clamped_by_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k)
    return (e / torch.maximum(total(e), torch.tensor(1.0))) @ v


def summed_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return torch.einsum("bhij,bhjd->bhid", e, v) / torch.einsum("bhij->bhi", e)[..., None]


def times_a_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k) * lower()
    return (e / total(e)) @ v


def times_one_less_a_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (1.0 - torch.triu(torch.ones(N, N), diagonal=1)) * scores(q, k).exp()
    return (e / total(e)) @ v


FUSED: dict[str, tuple[Program, str]] = {
    "clamped": (clamped, "scale 0.353553"),
    "clamped by a maximum": (clamped_by_maximum, "scale 0.353553"),
    "summed by einsum": (summed_by_einsum, "scale 0.353553"),
    "times a triangle": (times_a_triangle, "scale 0.353553, causal"),
    "times one less a triangle": (times_one_less_a_triangle, "scale 0.353553, causal"),
}


def random_inputs() -> dict[str, Tensor]:
    return dict(zip("qkv", torch.randn(3, B, H, N, D), strict=True))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_row_sum(name: str, train: bool) -> None:
    program, words = FUSED[name]
    inputs = random_inputs()
    got = checking.call(checking.compiled(program), inputs, grads=train)
    assert got.site.fused and str(got.site.spec).endswith(f"{words})"), got.site
    eager = checking.call(program, inputs, grads=train)
    exact = checking.call(program, inputs, torch.float64, grads=train)
    checking.assert_same_accuracy(got, eager, exact)


def with_epsilon(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k)
    return (e / (total(e) + 1e-6)) @ v


def clamped_unshifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / total(e).clamp(min=1e-9)) @ v


def clamped_above_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k)
    return (e / total(e).clamp(min=1.5)) @ v


def clamped_and_shifted_by_another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum over the queries: a row's sum may be small."""
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return (e / total(e).clamp(min=0.9)) @ v


def clamped_and_shifted_by_a_rounded_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k) * 50
    e = (s - s.amax(-1, keepdim=True).bfloat16().float()).exp()
    return (e / total(e).clamp(min=0.9)) @ v


def clamped_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum may be among the hidden keys: the rest may sum to less than the bound."""
    e = shifted(q, k) * lower()
    return (e / total(e).clamp(min=0.5)) @ v


def times_halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = shifted(q, k) * (0.5 + 0.5 * lower())
    return (e / total(e)) @ v


UNPROVED = "not provably their row sum"
STAYS: dict[str, tuple[Program, str | None]] = {
    "with an epsilon": (with_epsilon, "not needed, because the sum is at least 1"),
    "clamped, not shifted": (clamped_unshifted, UNPROVED),
    "clamped above one": (clamped_above_one, UNPROVED),
    "clamped, shifted by another maximum": (clamped_and_shifted_by_another_maximum, UNPROVED),
    "clamped, shifted by a rounded maximum": (clamped_and_shifted_by_a_rounded_maximum, UNPROVED),
    "clamped and masked": (clamped_masked, UNPROVED),
    "times halves": (times_halves, None),
}


@pytest.mark.parametrize("name", STAYS)
def test_another_denominator_stays(name: str) -> None:
    program, words = STAYS[name]
    inputs = random_inputs()
    got = checking.call(checking.compiled(program), inputs)
    assert not any(site.fused for site in got.sites)
    if words is not None:
        assert words in str(got.site.reason)
    checking.assert_identical(got.out, checking.call(program, inputs).out)


@pytest.mark.parametrize("dims", [(-1,), (-2, -1)])
def test_a_maximum_of_more_than_the_row_lets_hidden_rows_vanish(dims: tuple[int, ...]) -> None:
    """If another row has the maximum, all exponentials of a row of low fills are zero: 0/0, not a mean."""
    hidden = torch.zeros(B, 1, N, N, dtype=torch.bool)
    hidden[0, :, 3] = True

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores(q, k).masked_fill(hidden, -1e9)
        e = (s - s.amax(dims, keepdim=True)).exp()
        return (e / total(e)) @ v

    inputs = random_inputs()
    got, want = checking.call(checking.compiled(program, "reference", "eager"), inputs), program(**inputs)
    assert got.site.fused is (dims == (-1,))
    torch.testing.assert_close(got.out, want, equal_nan=True)
    assert bool(want.isnan().any()) is (dims != (-1,))
