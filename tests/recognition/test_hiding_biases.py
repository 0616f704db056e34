"""A bias of unknown values that hides whole rows, together with a mask: in every order, with every fill.

Models add padding as `(1.0 - mask) * finfo.min` and hide the future by filling or adding.  A row that
sees no key is then the mean of the values over the keys with the highest sum of fills, which depends on
the order, on each fill, and on sums that overflow to -inf.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusepass.reports import collector
from tests import checking
from tests.capture import compiled, qkv

N = 8
LOWEST = torch.finfo(torch.float32).min
FILLS: dict[str, float] = {"-inf": float("-inf"), "min": LOWEST, "-1e9": -1e9, "-1e4": -1e4}
BIASES = ("min", "-1e9", "-1e4")  # -inf times the zero of a kept key would be NaN
KERNELS = ("auto", "flex", "reference")
HOW = ("filled", "added")
ORDERS = ("bias first", "mask first")
GRID = list(itertools.product(BIASES, FILLS, HOW, ORDERS))


def program(bias: str, fill: str, how: str, order: str, cap: bool) -> Callable[..., Tensor]:
    """Causal attention with padding as a bias, and the padding as an integer tensor."""

    def hide_future(s: Tensor) -> Tensor:
        if how == "filled":
            future = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
            return s.masked_fill(future, FILLS[fill])
        return s + torch.full(s.shape[-2:], FILLS[fill], dtype=s.dtype).triu(1)

    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        s = q @ k.transpose(-2, -1) * 0.35
        if cap:
            s = torch.tanh(s / 2.0) * 2.0
        hidden = (1.0 - pad[:, None, None, :].to(s.dtype)) * FILLS[bias]
        s = hide_future(s + hidden) if order == "bias first" else hide_future(s) + hidden
        return s.softmax(-1) @ v

    return attention


def padding(side: str) -> Tensor:
    """One for keys, zero for padding; with `left` the first three queries of the second row see no key."""
    pad = torch.ones(2, N, dtype=torch.long)
    pad[1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return pad


def spread(*fills: str) -> float:
    """The rounding of a score next to the fills: fills within reach leave the scores a few digits."""
    return 1e-2 if "-1e4" in fills else 1e-5


@pytest.mark.parametrize(("side", "kernel"), [*(("left", k) for k in KERNELS), ("right", "auto")])
@pytest.mark.parametrize(("bias", "fill", "how", "order"), GRID)
def test_rows_that_a_bias_hides(bias: str, fill: str, how: str, order: str, side: str, kernel: str) -> None:
    """Eager's numbers, NaN included: the sums of the fills are eager's own, whatever they round to."""
    cap = GRID.index((bias, fill, how, order)) % 2 == 1
    fn, args = program(bias, fill, how, order, cap), (*qkv(Q=N), padding(side))
    want = fn(*args)
    got, seen = compiled(fn, *args, kernel=kernel)
    (site,) = seen.sites
    assert site.fused, site.reason
    assert torch.equal(got.isnan(), want.isnan())
    tolerance = spread(bias, fill)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def gradients(fn: Callable[..., Tensor], args: list[Tensor], pad: Tensor) -> list[Tensor]:
    given = [t.clone().requires_grad_() for t in args]
    out = fn(*given, pad)
    (out.nan_to_num() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [t.grad for t in given if t.grad is not None]


@pytest.mark.parametrize(("side", "kernel"), [("left", "auto"), ("left", "reference"), ("right", "auto")])
@pytest.mark.parametrize(("bias", "fill", "how", "order"), [g for g in GRID if "-1e4" not in g])
def test_gradients_of_rows_that_a_bias_hides(
    bias: str, fill: str, how: str, order: str, side: str, kernel: str
) -> None:
    fn, args = program(bias, fill, how, order, cap=False), list(qkv(Q=N))
    want = gradients(fn, args, padding(side))
    with collector.collect() as seen:
        got = gradients(checking.compiled(fn, kernel), args, padding(side))
    assert seen.fused and not seen.left, seen.sites
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


LEVELS = {
    "two levels": [LOWEST, LOWEST / 2, LOWEST, LOWEST / 2],
    "one level and -inf": [LOWEST, float("-inf"), LOWEST, float("-inf")],
    "raised": [0.0, -LOWEST, -LOWEST, 1.0],
    "raised a little": [2e3, 2e3 + 1, 2e3 - 1, 2e3],
}


@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())
def test_gradients_of_rows_whose_keys_differ(levels: list[float], kernel: str) -> None:
    """The weights of a row that absorbs its scores are known only at run time, and so are its gradients."""

    def attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        return (q @ k.mT * 0.35 + added).softmax(-1) @ v

    added = torch.tensor(levels).repeat(N // 4).expand(2, 1, N, N) * (torch.arange(N) % 2)[:, None]
    added = added.nan_to_num(0.0, float("inf"), float("-inf"))
    args = list(qkv(Q=N))
    want = gradients(attention, args, added)
    with collector.collect() as seen:
        got = gradients(checking.compiled(attention, kernel), args, added)
    assert seen.fused and not seen.left, seen.sites
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
def test_a_bias_of_integers(kernel: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + (torch.arange(N) - torch.arange(N)[:, None]) * -1).softmax(-1) @ v

    args = qkv(Q=N)
    got, seen = compiled(attention, *args, kernel=kernel)
    assert seen.fused and not seen.left, seen.sites
    torch.testing.assert_close(got, attention(*args))
