"""Sums of products are one product of concatenated features; terms of whole rows cancel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.reports import collector
from tests import checking

B, H, S, D = 2, 4, 24, 8
INF = float("inf")
Program = Callable[..., Tensor]

#: Programs and the words that their specification must hold.
JOINED: dict[str, tuple[Program, str]] = {}
APART: dict[str, tuple[Program, str]] = {}


def joined(words: str = "D=12") -> Callable[[Program], Program]:
    return lambda f: JOINED.setdefault(f.__name__, (f, words))[0]


def apart(words: str = "D=8 Dv=8; float32; bias[bhij]") -> Callable[[Program], Program]:
    return lambda f: APART.setdefault(f.__name__, (f, words))[0]


def hidden(n: int = S) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def inputs(program: Program, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    widths = {"q": D, "k": D, "v": D, "a": 4, "b": 4, "c": 6, "d": 6}
    drawn = {n: torch.randn(B, H, S, w, generator=g) for n, w in widths.items()}
    drawn["r"] = torch.randn(S, S, D, generator=g)
    return {n: drawn[n].to(dtype) for n in inspect.signature(program).parameters}


# ---------------------------------------------------------------------------------------- one product


@joined()
def two(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (q @ k.mT + a @ b.mT).softmax(-1) @ v


@joined("D=18 Dv=8; float32; scale 0.5")
def three_with_signs_and_factors(q: Any, k: Any, v: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    return (q @ k.mT / 3 + (a @ b.mT - c @ d.mT) * 0.5).softmax(-1) @ v


@joined("D=12 Dv=8; float32; scale -1")
def a_negative_first_term(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (-(q @ k.mT) + a @ b.mT).softmax(-1) @ v


@joined("D=12 Dv=8; float32; scale 0.7")
def factors_in_the_operands(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return ((q * 0.3) @ k.mT + (a * 0.7) @ b.mT).softmax(-1) @ v


@joined("D=12 Dv=8; float32; scale 0.5")
def baddbmm(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    q, k, v, a, b = (t.flatten(0, 1) for t in (q, k, v, a, b))
    w = torch.baddbmm(a @ b.mT, q, k.mT, beta=0.5, alpha=0.25).softmax(-1)
    return torch.bmm(w, v).view(B, H, S, D)


@joined("B=1 H=1 G=1 Q=24 K=24 D=12 Dv=8; float32; scale 2")
def addmm(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    q, k, v, a, b = (t[0, 0] for t in (q, k, v, a, b))
    return torch.addmm(a @ b.T, q, k.T, beta=2).softmax(-1) @ v


@joined("D=12 Dv=8; float32; causal")
def before_the_mask(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (q @ k.mT + a @ b.mT).masked_fill(hidden(), -INF).softmax(-1) @ v


@joined("D=12 Dv=8; float32; causal")
def after_the_mask(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return ((q @ k.mT).masked_fill(hidden(), -INF) + a @ b.mT).softmax(-1) @ v


@joined("D=12 Dv=8; float32; causal")
def after_the_lowest_number(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return ((q @ k.mT).masked_fill(hidden(), torch.finfo(q.dtype).min) + a @ b.mT).softmax(-1) @ v


@joined("D=12 Dv=8; float32; causal")
def within_a_bias_with_a_mask(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    mask = torch.zeros(S, S, dtype=q.dtype).masked_fill(hidden(), -INF)
    return (q @ k.mT + (mask + a @ b.mT)).softmax(-1) @ v


@joined("D=12 Dv=8; float32; softcap 5")
def under_a_softcap(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (torch.tanh((q @ k.mT + a @ b.mT) / 5) * 5).softmax(-1) @ v


@joined("G=4 Q=24 K=24 D=12")
def shared_keys_in_the_second(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (q @ k.mT + torch.einsum("bhid,bjd->bhij", a, b[:, 0])).softmax(-1) @ v


@joined("D=12")
def shared_keys_in_the_first(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (torch.einsum("bhid,bjd->bhij", q, k[:, 0]) + a @ b.mT).softmax(-1) @ v


@joined("H=4 G=1 Q=24 K=24 D=12")
def shared_keys_in_both(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    content = torch.einsum("bhid,bjd->bhij", q, k[:, 0])
    position = torch.einsum("bhid,bjd->bhij", a, b[:, 0])
    return (content + position).softmax(-1) @ v[:, :1]


@joined("H=4 G=2 Q=24 K=24 D=12")
def grouped_heads(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    k, v, b = (t[:, :2].repeat_interleave(2, 1) for t in (k, v, b))
    return (q @ k.mT + a @ b.mT).softmax(-1) @ v


@joined()
def positions_before_heads(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    q, k, v, a, b = (t.transpose(1, 2).contiguous() for t in (q, k, v, a, b))
    s = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,bjhd->bhij", a, b)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


@joined()
def positions_of_all_batches(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (q @ k.mT + a[0] @ b[0].mT).softmax(-1) @ v


@joined()
def heads_folded_in_one_alone(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    q, k, v = (t.reshape(B * H, S, -1) for t in (q, k, v))
    s = torch.bmm(q, k.mT).view(B, H, S, S) + a @ b.mT
    return torch.bmm(s.view(B * H, S, S).softmax(-1), v).view(B, H, S, D)


@joined()
def multiplied_and_summed(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (q @ k.mT + (a[:, :, :, None] * b[:, :, None]).sum(-1)).softmax(-1) @ v


@joined()
def stored_transposed(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (k @ q.mT + b @ a.mT).softmax(-2).mT @ v


@joined("D=12 Dv=8; float32; scale 0.333333")
def in_place(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    s = q @ k.mT
    s += a @ b.mT
    s /= 3
    return s.softmax(-1) @ v


@joined()
def for_two_values(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    w = (q @ k.mT + a @ b.mT).softmax(-1)
    return w @ v + 2 * (w @ k)


@joined("D=8 Dv=8; float32; plain")
def slices_of_the_same_tensors(q: Any, k: Any, v: Any) -> Any:
    (q1, q2), (k1, k2) = (t.split([5, 3], -1) for t in (q, k))
    return (q1 @ k1.mT + q2 @ k2.mT).softmax(-1) @ v


@joined("D=16")
def one_tensor_at_two_times(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    t = a.detach().clone()
    s = q @ k.mT + t @ b.detach().mT
    t = t * 2
    s = s + t @ b.detach().mT
    return s.softmax(-1) @ v


# ---------------------------------------------------------------------------------------- several


@apart("causal, bias[bhij]")
def after_a_fill_within_reach(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return ((q @ k.mT).masked_fill(hidden(), -9.0) + a @ b.mT).softmax(-1) @ v


@apart("softcap 5, bias[bhij]")
def after_a_softcap(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return (torch.tanh((q @ k.mT) / 5) * 5 + a @ b.mT).softmax(-1) @ v


@apart()
def keys_that_vary_over_the_queries(q: Any, k: Any, v: Any, r: Any) -> Any:
    """Relative positions (Shaw et al., arXiv 1803.02155)."""
    return (q @ k.mT + torch.einsum("bhid,ijd->bhij", q, r)).softmax(-1) @ v


@apart("bias[bhij]")
def gathered(q: Any, k: Any, v: Any, r: Any) -> Any:
    near = (torch.arange(S) - torch.arange(S)[:, None]).clamp(-3, 3) + 3
    scores = q @ r[0, :7].mT
    return (q @ k.mT + scores.gather(-1, near.expand(B, H, S, S))).softmax(-1) @ v


@apart("bias[bhj]")
def one_query_for_all(q: Any, k: Any, v: Any, a: Any) -> Any:
    return (q @ k.mT + a[:1, :, :1] @ k[..., :4].mT).softmax(-1) @ v


@apart("scale by [h], bias[bhij]")
def times_a_tensor(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
    return ((q @ k.mT) * a[0, :, :1, :1] + a @ b.mT).softmax(-1) @ v


def check(program: Program, kernel: str, dtype: torch.dtype, grads: bool, dynamic: bool | None) -> Any:
    """Compare with eager and float64, and return the sites."""
    torch.compiler.reset()
    given = inputs(program, dtype)
    eager = checking.call(program, given, grads=grads)
    exact = checking.call(program, given, torch.float64, grads)
    got = checking.call(checking.compiled(program, kernel, dynamic=dynamic), given, grads=grads)
    checking.assert_same_accuracy(got, eager, exact)
    return got.sites


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", JOINED)
def test_products_over_the_same_pairs_are_one(name: str, kernel: str) -> None:
    program, words = JOINED[name]
    for site in check(program, kernel, torch.float32, False, False):
        assert site.fused and words in site.spec and "bias" not in site.spec, f"{site.spec} {site.reason}"


@pytest.mark.parametrize("name", JOINED)
def test_gradients_are_those_of_each_product(name: str) -> None:
    assert all(s.fused for s in check(JOINED[name][0], "auto", torch.float32, True, False))


@pytest.mark.parametrize("name", JOINED)
def test_sizes_may_be_unknown(name: str) -> None:
    for site in check(JOINED[name][0], "auto", torch.float32, False, True):
        assert site.fused and "bias" not in site.spec, f"{site.spec} {site.reason}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", JOINED)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """A factor that would round the features in half precision leaves the product apart."""
    for site in check(JOINED[name][0], "auto", dtype, False, False):
        rounds = name == "three_with_signs_and_factors"
        assert site.fused and ("bias" in site.spec) is rounds, f"{site.spec} {site.reason}"


@pytest.mark.parametrize("name", APART)
def test_other_sums_stay_biases(name: str) -> None:
    program, words = APART[name]
    (site,) = check(program, "reference", torch.float32, True, False)
    assert site.fused and words in site.spec, f"{site.spec} {site.reason}"


def test_one_query_does_not_copy_long_keys() -> None:
    """Concatenating copies every key; the second product has one number for each."""
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 2, 1, 64), "k": (1, 2, 4096, 64), "v": (1, 2, 4096, 64)}
    given = {n: torch.randn(shape, generator=g) for n, shape in shapes.items()}
    given |= {"a": given["q"] + 1, "b": given["k"] + 1}
    (site,) = checking.call(checking.compiled(two), given).sites
    assert site.fused and "D=64" in site.spec and "bias[hj]" in site.spec


def test_one_query_reads_slices_of_one_cache() -> None:
    """Keys that lie side by side in one tensor are not copied."""

    def program(q: Any, cache: Any) -> Any:
        content = torch.einsum("bhc,bjc->bhj", q[..., :64], cache[..., :64])
        position = torch.einsum("bhr,bjr->bhj", q[..., 64:], cache[..., 64:])
        w = (content + position).softmax(-1)
        return torch.einsum("bhj,bjc->bhc", w, cache[..., :64])

    g = torch.Generator().manual_seed(0)
    given = {"q": torch.randn(2, 8, 80, generator=g), "cache": torch.randn(2, 2048, 80, generator=g)}
    got = checking.call(checking.compiled(program), given)
    torch.testing.assert_close(got.out, program(**given))
    assert got.site.fused and "D=80" in got.site.spec and "bias" not in got.site.spec, got.site


def test_a_product_that_is_read_elsewhere_stays_a_bias() -> None:
    def program(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
        p = a @ b.mT
        return (q @ k.mT + p).softmax(-1) @ v, p

    site = checking.compiled(program)
    given = inputs(program)
    with collector.collect() as seen:
        out, p = site(**given)
    torch.testing.assert_close((out, p), program(**given))
    assert seen.sites[0].fused and "D=8 Dv=8; float32; bias[bhij]" in seen.sites[0].spec


def test_products_of_other_precision_stay_biases() -> None:
    def program(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
        return (q @ k.mT + (a.to(torch.bfloat16) @ b.to(torch.bfloat16).mT)).softmax(-1) @ v

    (site,) = checking.call(checking.compiled(program), inputs(program)).sites
    assert site.fused and "bias[bhij]" in site.spec


def test_a_tensor_that_is_written_to_between_stays_apart() -> None:
    """The tensor that the first product reads is overwritten before the site: that product stays a bias."""

    def program(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
        t = a * 1.5
        s = t @ b.mT
        t.zero_()
        return (s + q @ k.mT).softmax(-1) @ v

    given = inputs(program)
    got = checking.call(checking.compiled(program), given)
    torch.testing.assert_close(got.out, program(**given))
    assert got.site.fused


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_terms_of_whole_rows_cancel(dtype: torch.dtype) -> None:
    def program(q: Any, k: Any, v: Any) -> Any:
        norms = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1)[..., None, :]
        return ((2 * q @ k.mT - norms) / math.sqrt(D)).softmax(-1) @ v

    for grads in (False, True):
        (site,) = check(program, "auto", dtype, grads, None)
        assert site.fused and "bias[bhj]" in site.spec and "bias[bhi" not in site.spec


@pytest.mark.parametrize("above", ["softcap", "sink", "unknown"])
def test_terms_of_whole_rows_that_do_not_cancel_stay(above: str) -> None:
    def program(q: Any, k: Any, v: Any) -> Any:
        rows = q[..., :1].exp() if above == "unknown" else q.pow(2).sum(-1, keepdim=True)
        s = q @ k.mT - (rows + k.pow(2).sum(-1)[..., None, :]) / 9
        if above == "softcap":
            s = torch.tanh(s / 5) * 5
        if above == "sink":
            return torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1] @ v
        return s.softmax(-1) @ v

    (site,) = check(program, "reference", torch.float32, True, False)
    assert site.fused and "bias[bhij]" in site.spec, site.spec


@pytest.mark.parametrize(("factor", "joins"), [(1.0, True), (1e4, False)])
def test_a_mask_before_it_absorbs_the_product(factor: float, joins: bool) -> None:
    """A product may join the scores below the mask only if the fill would have absorbed it above the mask."""

    def program(q: Any, k: Any, v: Any, a: Any, b: Any) -> Any:
        rows = torch.arange(S)[:, None] < 3
        return ((q @ k.mT).masked_fill(rows, -1e10) + (a @ b.mT) * factor).softmax(-1) @ v

    (site,) = check(program, "reference", torch.float32, False, False)
    assert ("bias" not in site.spec) is joins, site.spec


def test_a_mask_that_is_multiplied_is_no_feature() -> None:
    def program(q: Any, k: Any, v: Any, a: Any) -> Any:
        hides = torch.where(a[..., :1] > 0, 0.0, -1e9)
        return (q @ k.mT + torch.ones_like(hides) @ hides.mT).softmax(-1) @ v

    (site,) = check(program, "reference", torch.float32, False, False)
    assert "D=8 Dv=8" in site.spec, site.spec
