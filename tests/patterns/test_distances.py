"""Squared distances as scores: several spellings of the product form are fused; squared differences stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusepass
from fusepass.reports import collector
from tests import checking

B, H, S, D = 2, 3, 40, 8
INF = float("inf")
Program = Callable[..., Tensor]


def squared(q: Tensor, k: Tensor) -> Tensor:
    return q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1)[..., None, :] - 2 * q @ k.mT


def of_cdist(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(torch.cdist(q, k) ** 2)).softmax(-1) @ v


def of_cdist_times_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = torch.cdist(q, k)
    return (d * d / -2).softmax(-1) @ v


def few_points_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t[:, :, :9] for t in (q, k, v))
    return (-torch.cdist(q, k, compute_mode="use_mm_for_euclid_dist").square()).softmax(-1) @ v


def keys_of_all_batches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(torch.cdist(q, k[0]) ** 2)).softmax(-1) @ v


def under_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    return (torch.cdist(q, k) ** 2 * -0.1).masked_fill(hidden, -INF).softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-squared(q, k) / 4).softmax(-1) @ v


def clamped_at_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (squared(q, k).clamp(min=0) / -4).softmax(-1) @ v


def rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.relu(squared(q, k)) * -0.25).softmax(-1) @ v


def root_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (squared(q, k).clamp(min=0).sqrt().pow(2) / -4).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = torch.einsum("bhid,bhid->bhi", q, q)[..., None] + (k * k).sum(-1)[:, :, None]
    return (-torch.relu(own - 2 * torch.einsum("bhid,bhjd->bhij", q, k))).softmax(-1) @ v


READ = (
    of_cdist, of_cdist_times_itself, few_points_by_products, keys_of_all_batches, under_a_mask, written_out,
    clamped_at_zero, rectified, root_squared, by_einsum,
)  # fmt: skip


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {n: torch.randn(B, H, S, D, generator=g) for n in "qkv"}


def check(program: Program, kernel: str = "auto", grads: bool = False, dynamic: bool | None = None) -> Any:
    torch.compiler.reset()
    given = inputs()
    eager = checking.call(program, given, grads=grads)
    exact = checking.call(program, given, torch.float64, grads)
    got = checking.call(checking.compiled(program, kernel, dynamic=dynamic), given, grads=grads)
    checking.assert_same_accuracy(got, eager, exact)
    return got.site


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("program", READ, ids=lambda f: f.__name__)
def test_a_key_bias_is_left(program: Program, grads: bool, dynamic: bool | None) -> None:
    site = check(program, grads=grads, dynamic=dynamic)
    assert site.fused, site.reason
    assert any(f"bias[{axes}]" in site.spec for axes in ("bhj", "hj")) and "bias[bhi" not in site.spec
    assert "clamp" not in site.spec and "relu" not in site.spec


def other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    norms = q.pow(2).sum(-1, keepdim=True) + v.pow(2).sum(-1)[..., None, :]
    return ((norms - 2 * q @ k.mT).clamp(min=0) / -4).softmax(-1) @ v


def another_weight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    norms = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1)[..., None, :]
    return ((norms - q @ k.mT).clamp(min=0) / -4).softmax(-1) @ v


def another_bound(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (squared(q, k).clamp(min=0.5) / -4).softmax(-1) @ v


@pytest.mark.parametrize("program", [other_keys, another_weight, another_bound], ids=lambda f: f.__name__)
def test_what_may_be_negative_keeps_its_clamp(program: Program) -> None:
    site = check(program, "reference")
    assert site.fused and "clamp" in site.spec and "bias[bhij]" in site.spec


def differences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(q[:, :, :, None] - k[:, :, None]).pow(2).sum(-1)).softmax(-1) @ v


def few_points(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(torch.cdist(q[:, :, :9], k[:, :, :9]) ** 2)).softmax(-1) @ v[:, :, :9]


def never_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
    return (-(d**2)).softmax(-1) @ v


@pytest.mark.parametrize("program", [differences, few_points, never_by_products], ids=lambda f: f.__name__)
def test_squared_differences_stay(program: Program) -> None:
    """Far from the origin, products lose what differences keep."""
    site = check(program, "reference")
    assert not site.fused and "squared differences" in site.reason


def test_a_distance_that_is_not_squared_stays() -> None:
    site = check(lambda q, k, v: (-torch.cdist(q, k)).softmax(-1) @ v, "reference")
    assert not site.fused and "'sqrt'" in site.reason


def test_distances_that_are_read_elsewhere_stay() -> None:
    def program(q: Any, k: Any, v: Any) -> Any:
        d = torch.cdist(q, k)
        return (-(d**2)).softmax(-1) @ v, d

    with collector.collect() as seen:
        checking.compiled(program)(**inputs())
    assert [s.reason for s in seen.sites] == ["its scores or weights are returned, or kept in an attribute"]


def test_distances_within_one_tensor_keep_their_bound() -> None:
    """A point has distance zero from itself: the bound keeps rounding errors there out of the gradients."""

    def bounded(q: Any, v: Any) -> Any:
        return (-squared(q, q).clamp(min=0)).softmax(-1) @ v

    def of_root(q: Any, v: Any) -> Any:
        return (-(torch.cdist(q, q) ** 2)).softmax(-1) @ v

    given = {n: t for n, t in inputs().items() if n != "k"}
    for program in (bounded, of_root):
        eager, exact = (checking.call(program, given, dtype, True) for dtype in (None, torch.float64))
        got = checking.call(checking.compiled(program, "reference"), given, grads=True)
        checking.assert_same_accuracy(got, eager, exact)
        assert got.site.fused and "clamp" in got.site.spec


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("program", [of_cdist, clamped_at_zero], ids=lambda f: f.__name__)
def test_exported_programs(program: Program, decomposed: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return program(q, k, v)

    given = tuple(inputs().values())
    exported = torch.export.export(Module(), given)
    exported = exported.run_decompositions() if decomposed else exported
    with collector.collect() as seen:
        fused = fusepass.fuse(exported)
    assert [s.fused for s in seen.sites] == [True] and "bias[bhj]" in seen.sites[0].spec
    torch.testing.assert_close(fused.module()(*given), program(*given), rtol=1e-4, atol=1e-5)
