"""Conjunctions of masks by ``*``, ``min``, ``&``, ``where`` and others, in bool, int and float."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusepass.reports.collector import Collector
from tests import checking
from tests.capture import agrees, qkv

N = 8
PAD = torch.arange(N) < torch.tensor([[6], [N]])
LOW = -1e30
Join = Callable[[Tensor, Tensor], Tensor]


def in_kind(kind: torch.dtype, join: Join) -> Join:
    return lambda a, b: join(a.to(kind), b.to(kind))


TRUTH: dict[str, Join] = {
    "&": lambda a, b: a & b,
    "*": lambda a, b: a * b,
    "minimum": torch.minimum,
    "logical_and": torch.logical_and,
    "where": lambda a, b: torch.where(a, b, False),
    "where turned": lambda a, b: torch.where(~a, False, b),
    "masked_fill": lambda a, b: a.expand(2, 1, N, N).masked_fill(~b, False),
    "not or": lambda a, b: ~(~a | ~b),
    "not maximum": lambda a, b: ~torch.maximum(~a, ~b),
    "not sum": lambda a, b: ~(~a + ~b),
    "all": lambda a, b: torch.stack(torch.broadcast_tensors(a, b)).all(0),
    "not any": lambda a, b: ~torch.stack(torch.broadcast_tensors(~a, ~b)).any(0),
}
NUMBERS: dict[str, Join] = {
    "*": lambda a, b: (a * b) != 0,
    "* as bool": lambda a, b: (a * b).bool(),
    "minimum": lambda a, b: torch.minimum(a, b) == 1,
    "where": lambda a, b: torch.where(a > 0, b, 0) > 0,
    "sum": lambda a, b: a + b == 2,
    "sum of opposites": lambda a, b: (1 - a) + (1 - b) < 1,
    "product of opposites": lambda a, b: ~torch.maximum(1 - a, 1 - b).bool(),
}
JOINS = (
    {f"{name} of bool": join for name, join in TRUTH.items()}
    | {
        f"{name} of {str(kind)[6:]}": in_kind(kind, join)
        for name, join in NUMBERS.items()
        for kind in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16)
    }
    | {"& of int32": in_kind(torch.int32, lambda a, b: (a & b) == 1)}
)
OUTER: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda p: torch.einsum("bi,bj->bij", p, p)[:, None].bool(),
    "matmul": lambda p: ((p[:, :, None] @ p[:, None]) > 0.5)[:, None],
    "bmm": lambda p: torch.bmm(p[..., None], p[:, None]).bool()[:, None],
}


def hidden(make: Callable[[Tensor], Tensor], fill: float = LOW) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return (q @ k.mT * 0.35).masked_fill(~make(p), fill).softmax(-1) @ v

    return attention


def mask_parts(seen: Collector) -> list[set[str]]:
    """The parts of each fused site's mask."""
    return [set(site.kind.split(", ")) for site in seen.sites if site.fused]


def both(join: Join) -> Callable[[Tensor], Tensor]:
    return lambda p: join(p[:, None, :, None], p[:, None, None])


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("name", JOINS)
def test_paddings_of_queries_and_keys(name: str, kernel: str) -> None:
    """A query that is padding sees no key: its result is the mean of all values."""
    seen = agrees(hidden(both(JOINS[name])), *qkv(Q=N), PAD, kernel=kernel)
    assert mask_parts(seen) == [{"key padding", "mask[bi]"}], seen.sites


@pytest.mark.parametrize("name", JOINS)
def test_padding_beside_a_triangle(name: str) -> None:
    def make(p: Tensor) -> Tensor:
        return JOINS[name](p[:, None, None], torch.ones(N, N, dtype=torch.bool).tril())

    seen = agrees(hidden(make), *qkv(Q=N), PAD, kernel="auto")
    assert mask_parts(seen) == [{"causal", "key padding"}], seen.sites


@pytest.mark.parametrize("name", OUTER)
def test_outer_products(name: str) -> None:
    seen = agrees(hidden(lambda p: OUTER[name](p.float())), *qkv(Q=N), PAD)
    assert mask_parts(seen) == [{"key padding", "mask[bi]"}], seen.sites


def test_three_at_once() -> None:
    def make(p: Tensor) -> Tensor:
        p = p.half()
        return (p[:, None, None] * torch.ones(N, N).tril() * p[:, None, :, None]).bool()

    seen = agrees(hidden(make), *qkv(Q=N), PAD)
    assert mask_parts(seen) == [{"causal", "key padding", "mask[bi]"}], seen.sites


ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimum": lambda s, p: s + torch.minimum(torch.where(p, 0.0, LOW), torch.full((N, N), LOW).triu(1)),
    "inverted": lambda s, p: s + (1.0 - p.float() * torch.ones(N, N).tril()) * LOW,
    "multiplied": lambda s, p: (
        s * (p * torch.ones(N, N, dtype=torch.bool).tril())
        + (1 - (p * torch.ones(N, N, dtype=torch.bool).tril()).float()) * LOW
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_conjunctions_that_are_added(name: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return ADDED[name](q @ k.mT * 0.35, p[:, None, None]).softmax(-1) @ v

    seen = agrees(attention, *qkv(Q=N), PAD)
    assert mask_parts(seen) == [{"causal", "key padding"}], seen.sites


def test_narrow_integers_do_not_wrap_in_wider_ones() -> None:
    make = both(lambda a, b: (a.int() * b.int()).bool())
    numbers = PAD.to(torch.int8) * -128
    seen = agrees(hidden(make), *qkv(Q=N), numbers)
    assert mask_parts(seen) == [{"key padding", "mask[bi]"}]


@pytest.mark.parametrize(
    "numbers",
    [PAD.to(torch.uint8) * 16, PAD.to(torch.int64) << 32, PAD.float() * 1e-30],
    ids=["uint8", "int64", "float32"],
)
def test_products_that_may_be_zero_of_themselves_are_computed(numbers: Tensor) -> None:
    """16 * 16 is zero in a byte, and 1e-30 * 1e-30 in float32."""
    seen = agrees(hidden(both(lambda a, b: (a * b).bool())), *qkv(Q=N), numbers)
    assert mask_parts(seen) == [{"mask[bij]"}], seen.sites


@pytest.mark.parametrize("fill", [LOW, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_gradients_of_padded_queries(fill: float, kernel: str) -> None:
    fn = hidden(both(lambda a, b: a * b), fill)
    given = dict(zip("qkv", qkv(Q=N), strict=True)) | {"p": PAD}
    eager = checking.call(fn, given, grads=True)
    exact = checking.call(fn, given, torch.float64, grads=True)
    got = checking.call(checking.compiled(fn, kernel), given, grads=True)
    assert got.site.fused, got.site.reason
    checking.assert_same_accuracy(got, eager, exact)
