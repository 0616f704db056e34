"""Keys in several tensors: scored separately, normalised together, multiplied with their own values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import checking

B, H, N, M, D = 2, 3, 11, 4, 8
Program = Callable[..., Tensor]
INF = float("inf")


def split(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat((q @ a.mT, q @ k.mT), -1).mul(D**-0.5).softmax(-1)
    first, second = w.split([M, N], -1)
    out: Tensor = first @ b + second @ v
    return out


def sliced(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.softmax(torch.cat([q @ k.mT / math.sqrt(D), q @ a.mT / math.sqrt(D)], dim=-1), dim=-1)
    return w[..., :N] @ v + w[..., N:] @ b


def memory_of_heads(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One memory for all sequences, in another layout than the keys."""
    far = torch.einsum("bhid,hmd->bhim", q, a[0])
    w = torch.cat([far, torch.einsum("bhid,bhjd->bhij", q, k)], -1).softmax(-1)
    near = torch.einsum("bhij,bhjd->bhid", w[..., M:], v)
    return torch.einsum("bhim,hmd->bhid", w[..., :M], b[0]) + near


def one_part_masked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    near = q @ k.mT
    near = near.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -INF)
    w = torch.cat([q @ a.mT, near], -1).softmax(-1)
    return w[..., :M] @ b + w[..., M:] @ v


def one_part_biased(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    near = (q @ k.mT) * 0.3 + (torch.arange(N) - torch.arange(N)[:, None]).abs() * -0.1
    w = torch.cat([q @ a.mT * 0.3 + 0.5 * a.sum(-1)[:, :, None], near], -1)
    w = w.softmax(-1, dtype=torch.float32).to(q.dtype)
    return w[..., :M] @ b + w[..., M:] @ v


def three(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    mean, of_values = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    w = torch.cat([q @ mean.mT, q @ a.mT, q @ k.mT], -1).softmax(-1)
    out = w[..., :1] @ of_values + w[..., 1 : M + 1] @ b
    return out + w[..., M + 1 :] @ v


def blocks_beside_global(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Queries see their own block and some global keys, which all blocks share."""
    q, k, v = (x[:, :, :10].unflatten(2, (2, 5)) for x in (q, k, v))
    far, near = torch.einsum("bhnid,bhgd->bhnig", q, a), torch.einsum("bhnid,bhnjd->bhnij", q, k)
    w = torch.cat([far, near], -1).softmax(-1)
    out = torch.einsum("bhnij,bhnjd->bhnid", w[..., M:], v)
    return out + torch.einsum("bhnig,bhgd->bhnid", w[..., :M], b)


FUSED: dict[str, Program] = {
    f.__name__: f
    for f in (split, sliced, memory_of_heads, one_part_masked, one_part_biased, three, blocks_beside_global)
}


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"q": N, "k": N, "v": N, "a": M, "b": M}
    return {name: torch.randn(B, H, n, D) for name, n in sizes.items()}


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_joined(name: str, dtype: torch.dtype, grads: bool) -> None:
    program, given = FUSED[name], inputs()
    for kernel in ("auto", "reference"):
        torch._dynamo.reset()
        got = checking.call(checking.compiled(program, kernel, "aot_eager"), given, dtype, grads)
        assert got.site.fused, got.site.reason
        eager = checking.call(program, given, dtype, grads)
        exact = checking.call(program, given, torch.float64, grads)
        checking.assert_same_accuracy(got, eager, exact)


def prompt_apart(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The prompt has its own softmax with a gate, and its keys are next to the others."""
    w = q @ torch.cat([a, k], 2).mT * 0.3
    near = w[..., M:] + q.new_full((N, N), -INF).triu(1)
    gate = a.mean((2, 3), keepdim=True).tanh()
    w = torch.cat([gate * w[..., :M].softmax(-1), near.softmax(-1)], -1)
    return w @ torch.cat([b, v], 2)


def value_first(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat([(q @ k.mT).softmax(-1), (q @ a.mT).softmax(-1)], -1)
    return torch.einsum("bhjd,bhij->bhid", torch.cat([v, b], 2), w)


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("program", [prompt_apart, value_first], ids=lambda f: f.__name__)
def test_softmaxes_beside_each_other(program: Program, grads: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        got = checking.call(checking.compiled(program, inner="aot_eager"), inputs(), dtype, grads)
        assert len(got.sites) == 2 and all(s.fused for s in got.sites), got.sites
        eager = checking.call(program, inputs(), dtype, grads)
        checking.assert_same_accuracy(got, eager, checking.call(program, inputs(), torch.float64, grads))


def two_lists_of_values(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.softmax(q @ k.mT * 0.4, -1)
    return w @ v + torch.tanh(w @ (v * k))


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "training"])
def test_weights_that_two_products_share(grads: bool) -> None:
    torch._dynamo.reset()
    got = checking.call(checking.compiled(two_lists_of_values, inner="aot_eager"), inputs(), grads=grads)
    assert [s.fused for s in got.sites] == [True, True], got.sites
    eager = checking.call(two_lists_of_values, inputs(), grads=grads)
    exact = checking.call(two_lists_of_values, inputs(), torch.float64, grads)
    checking.assert_same_accuracy(got, eager, exact)


def test_what_is_recognised() -> None:
    masked = checking.call(checking.compiled(one_part_masked), inputs()).site
    assert f"K={N + M}" in masked.spec and masked.kind == f"causal+{M}", "a memory before the sequence"
    shared = checking.call(checking.compiled(memory_of_heads), inputs()).site
    assert shared.kind == "full"


def test_sizes_that_may_grow() -> None:
    torch._dynamo.reset()
    got = checking.call(checking.compiled(split, dynamic=True), inputs())
    assert got.site.fused, got.site.reason
    torch.testing.assert_close(got.out, split(**inputs()))


# ---------------------------------------------------------------------------------------- look-alikes


def a_gap(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat((q @ a.mT, q @ k.mT), -1).softmax(-1)
    return w[..., 1:M] @ b[:, :, 1:] + w[..., M:] @ v


def twice_the_same(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat((q @ k.mT, q @ k.mT), -1).softmax(-1)
    return w[..., :N] @ v + w[..., :N] @ v


def other_queries(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat((v @ a.mT, q @ k.mT), -1).softmax(-1)
    return w[..., :M] @ b + w[..., M:] @ v


def a_difference(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat((q @ a.mT, q @ k.mT), -1).softmax(-1)
    return w[..., :M] @ b - w[..., M:] @ v


def normalised_apart(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat(((q @ a.mT).sigmoid(), q @ k.mT), -1).softmax(-1)
    return w[..., :M] @ b + w[..., M:] @ v


def one_softmax_beside_scores(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat([(q @ a.mT).sigmoid(), (q @ k.mT).softmax(-1)], -1)
    return w @ torch.cat([b, v], 2)


def one_value_for_all(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The einsum repeats a single value for all keys."""
    w = torch.cat((q @ a.mT, q @ k.mT), -1).softmax(-1)
    far = torch.einsum("bhij,bhjd->bhid", w[..., :M], b[:, :, :1])
    return far + torch.einsum("bhij,bhjd->bhid", w[..., M:], v)


def one_value_for_two_softmaxes(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    w = torch.cat([(q @ a.mT).softmax(-1), (q @ k.mT).softmax(-1)], -1)
    return torch.einsum("bhij,bhjd->bhid", w, v[:, :, :1])


LOOK_ALIKES: list[Program] = [
    one_value_for_all,
    one_value_for_two_softmaxes,
    one_softmax_beside_scores,
    a_gap,
    twice_the_same,
    other_queries,
    a_difference,
    normalised_apart,
]


@pytest.mark.parametrize("program", LOOK_ALIKES, ids=lambda f: f.__name__)
def test_look_alikes_stay(program: Program) -> None:
    torch._dynamo.reset()
    got = checking.call(checking.compiled(program, "reference"), inputs())
    assert got.sites and not any(s.fused for s in got.sites)
    assert all(s.reason for s in got.sites)
    checking.assert_identical(got.out, program(**inputs()))


def test_weights_that_are_read_stay() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        w = torch.cat((q @ a.mT, q @ k.mT), -1).softmax(-1)
        return torch.cat([(w[..., :M] @ b + w[..., M:] @ v).flatten(), w.flatten()])

    torch._dynamo.reset()
    got = checking.call(checking.compiled(both), inputs())
    assert not any(s.fused for s in got.sites) and "returned" in (got.site.reason or "")
