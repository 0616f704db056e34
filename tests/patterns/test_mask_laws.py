"""Laws of masks: values under a condition, conjunctions and disjunctions, rows that see themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from fusepass.patterns.masks import conjuncts, every_row_sees_itself, visibility_factor
from fusepass.rules.formulas import Formulas
from tests.capture import agrees, close, compiled, qkv
from tests.evaluate import Evaluator, Grid
from tests.patterns.test_masks import LABELS, PAD, ij, read, text, visibilities

N = 8
INF = math.inf
LOWEST = torch.finfo(torch.float32).min
Make = Callable[..., Tensor]


def fused_as(expected: str, program: Callable[..., Tensor], *args: Tensor, kernel: str = "reference") -> None:
    seen = agrees(program, *args, kernel=kernel)
    assert [site.fused and expected in site.spec for site in seen.sites] == [True], seen.sites


# ----------------------------------------------------------------------------------- values under a condition

INVERTED: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill, bool()": lambda x: x.masked_fill(x.bool(), LOWEST),
    "masked_fill, to(bool)": lambda x: x.masked_fill(x.to(torch.bool), LOWEST),
    "masked_fill, != 0": lambda x: x.masked_fill(x != 0, -INF),
    "where, == 0": lambda x: torch.where(x == 0, x, LOWEST),
    "where, != 0.0": lambda x: torch.where(x != 0.0, LOWEST, x),
    "where, not equal": lambda x: torch.where(~(x == 0), LOWEST, 3 * x),
    "where twice": lambda x: torch.where(x == 0, torch.where(x == 0, x, 5.0), LOWEST),
}


@pytest.mark.parametrize("name", INVERTED)
@pytest.mark.parametrize("integers", [True, False])
def test_a_condition_says_what_a_value_is(name: str, integers: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        inverse = 1.0 - p[:, None, None].float()
        return (q @ k.mT * 0.25 + INVERTED[name](inverse)).softmax(-1) @ v

    mask = PAD.long() if integers else PAD.float()
    fused_as("key padding", program, *qkv(Q=N), mask)
    fused_as("key padding", program, *qkv(Q=N), mask * 3 - 2, kernel="auto")


UNPINNED: dict[str, Callable[[Tensor], Tensor]] = {
    "another value": lambda x: x.masked_fill(x != 1, LOWEST),
    "the other branch": lambda x: torch.where(x == 0, LOWEST, x),
    "another tensor": lambda x: (2 * x).masked_fill(x.flip(-1) != 0, LOWEST),
    "an inequality": lambda x: x.masked_fill(x > 0, LOWEST),
}


@pytest.mark.parametrize("name", UNPINNED)
def test_other_conditions_leave_a_bias(name: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + UNPINNED[name](1.0 - p[:, None, None])).softmax(-1) @ v

    seen = agrees(program, *qkv(Q=N), PAD.float() * 2)
    assert ["bias[" in site.spec for site in seen.sites] == [True], seen.sites


# ---------------------------------------------------------------------------------------- absorption

LOGIC: dict[str, tuple[str, Make]] = {
    "implied": ("causal+3", lambda: (ij()[1] <= ij()[0]) | (ij()[1] <= ij()[0] + 3)),
    "implied by the first keys": ("causal+2", lambda: (ij()[1] < 3) | (ij()[1] <= ij()[0] + 2)),
    "a or (not a and b)": (
        "causal+2",
        lambda: (ij()[1] < 2) | ((ij()[1] >= 2) & (ij()[1] - 2 <= ij()[0])),
    ),
    "a and (not a or b)": (
        "window(2)",
        lambda: (ij()[1] <= ij()[0]) & ((ij()[1] > ij()[0]) | (ij()[0] - ij()[1] < 3)),
    ),
    "a or not a": ("", lambda: (ij()[1] <= ij()[0]) | (ij()[1] > ij()[0])),
    "a or (a and b)": ("causal", lambda: (ij()[1] <= ij()[0]) | ((ij()[1] <= ij()[0]) & (ij()[1] < 3))),
    "a prefix is not implied": ("prefix", lambda: (ij()[1] < 3) | (ij()[1] <= ij()[0])),
    "where in where": (
        "causal",
        lambda: torch.where(ij()[1] <= ij()[0], torch.where(ij()[1] <= ij()[0], True, ij()[1] < 3), False),
    ),
}


@pytest.mark.parametrize("name", LOGIC)
def test_absorption(name: str) -> None:
    expected, make = LOGIC[name]
    assert text(make) == expected
    formula, _, scope, term = read(make)
    grid = Grid(scope.space, Evaluator({}))
    assert torch.equal(grid.formula(formula), grid.term(term))


@pytest.mark.parametrize("fills", [(-INF, -INF), (-INF, LOWEST)])
def test_an_additive_mask_chosen_by_a_third(fills: tuple[float, float]) -> None:
    """With one fill it is a mask; with two fills it stays a bias."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = ij()
        a, b = (torch.zeros(N, N).masked_fill(m, f) for m, f in zip((j > i, j > i + 2), fills, strict=True))
        return (q @ k.mT + torch.where(i < 4, a, b)).softmax(-1) @ v

    fused_as("mask[ij]" if fills[0] == fills[1] else "bias[ij]", program, *qkv(Q=N))


# ---------------------------------------------------------------------------------------- factors of 0 and 1

FACTORS: dict[str, tuple[str | None, Make]] = {
    "tril of ones": ("causal", lambda: torch.ones(N, N).tril()),
    "one minus": ("causal", lambda: 1 - torch.ones(N, N).triu(1)),
    "cast": ("causal", lambda: (ij()[1] <= ij()[0]).float()),
    "half": ("causal", lambda: (ij()[1] <= ij()[0]).half().float()),
    "two": (None, lambda: 2 * torch.ones(N, N).tril()),
    "one and minus one": (None, lambda: 2 * torch.ones(N, N).tril() - 1),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_are_visibilities(name: str) -> None:
    expected, make = FACTORS[name]
    formula, _, scope, term = read(make)
    attends = visibility_factor(Formulas(scope), formula)
    assert (attends is not None) == (expected is not None)
    if attends is not None:
        assert [str(p) for p in conjuncts(attends)] == [
            str(p) for p in conjuncts(read(lambda: ij()[1] <= ij()[0])[0])
        ] or torch.equal(
            Grid(scope.space, Evaluator({})).formula(attends),
            Grid(scope.space, Evaluator({})).term(term).bool(),
        )


# ----------------------------------------------------------------------------------- rows that see themselves


def sees_itself(make: Make, *args: Any) -> bool:
    formula, at, scope, term = read(make, *args)
    return every_row_sees_itself(
        conjuncts(formula), at, term.expr.shape[-2], term.expr.shape[-1], Formulas(scope)
    )


def labels(d: Tensor) -> Tensor:
    return (d[:, :, None] == d[:, None, :])[:, None]


SEEN: dict[str, tuple[bool, Make, tuple[Tensor, ...]]] = {
    "chunk": (True, lambda: ij()[0] // 4 == ij()[1] // 4, ()),
    "causal chunk": (True, lambda: (ij()[0] // 4 == ij()[1] // 4) & (ij()[1] <= ij()[0]), ()),
    "document": (True, labels, (LABELS,)),
    "causal document": (True, lambda d: labels(d) & (ij()[1] <= ij()[0]), (LABELS,)),
    "document, chunk, window": (
        True,
        lambda d: labels(d) & (ij()[0] // 4 == ij()[1] // 4) & ((ij()[0] - ij()[1]).abs() < 2),
        (LABELS,),
    ),
    "prefix": (True, lambda n: (ij()[1] <= ij()[0]) | (ij()[1] < n[:, None, None, None]), (LABELS[:, 0],)),
    "more keys": (True, lambda: ij(4, 8)[1] // 2 == ij(4, 8)[0] // 2, ()),
    "the last queries": (True, lambda: (ij(4, 8)[0] + 4) // 2 == ij(4, 8)[1] // 2, ()),
    "causal": (True, lambda: ij()[1] <= ij()[0], ()),
    "the same parity, not proved": (False, lambda: (ij()[0] + ij()[1]) % 2 == 0, ()),
    "strictly causal document": (False, lambda d: labels(d) & (ij()[1] < ij()[0]), (LABELS,)),
    "two labels": (False, lambda a, b: (a[:, :, None] == b[:, None])[:, None], (LABELS, LABELS + 1)),
    "labels shifted": (False, lambda d: (d[:, 1:, None] == d[:, None, :-1])[:, None], (LABELS,)),
    "labels of floats": (False, labels, (LABELS.float(),)),
    "key padding": (False, lambda p: p[:, None, None].expand(2, 1, N, N), (PAD,)),
    "causal with padding": (False, lambda p: p[:, None, None] & (ij()[1] <= ij()[0]), (PAD,)),
    "document with padding": (False, lambda p, d: p[:, None, None] & labels(d), (PAD, LABELS)),
    "fewer keys": (False, lambda: ij(8, 4)[1] // 2 == ij(8, 4)[0] // 2, ()),
    "chunks of other sizes": (False, lambda: ij()[0] // 4 == ij()[1] // 2, ()),
}


@pytest.mark.parametrize("name", SEEN)
def test_rows_that_see_their_own_position(name: str) -> None:
    expected, make, args = SEEN[name]
    assert sees_itself(make, *args) == expected
    assert not expected or bool(make(*args).any(-1).all())


@settings(max_examples=30)
@given(visibilities())
def test_a_generated_mask_whose_rows_are_said_to_see_a_key_has_no_empty_row(make: Make) -> None:
    def mask() -> Tensor:
        i, j = ij(5, 6)
        return make(i, j).expand(5, 6)

    assert not sees_itself(mask) or bool(mask().any(-1).all())


# ------------------------------------------------------------------------------------- keys of a module's own


class Own(nn.Module):
    """`nn.MultiheadAttention` with keys that are not in its input."""

    def __init__(self, bias: bool, zero: bool, weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(
            16, 2, add_bias_kv=bias, add_zero_attn=zero, batch_first=batch_first
        )
        self.weights = weights

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        out: Tensor = self.attention(
            x, x, x, attn_mask=attn_mask, key_padding_mask=pad, need_weights=self.weights
        )[0]
        return out


MODULE_MASKS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "none": (None, None),
    "causal bools": (torch.ones(N, N, dtype=torch.bool).triu(1), None),
    "causal numbers": (torch.full((N, N), -INF).triu(1), None),
    "padding": (None, ~PAD),
    "both": (torch.ones(N, N, dtype=torch.bool).triu(1), ~PAD),
    "hides all of its input": (None, torch.ones(2, N, dtype=torch.bool)),
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(("bias", "zero"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("masks", MODULE_MASKS)
def test_modules_that_add_keys_of_their_own(masks: str, bias: bool, zero: bool, weights: bool) -> None:
    module, x = Own(bias, zero, weights).train(), torch.randn(2, N, 16)

    def program(*args: Any) -> Tensor:
        out: Tensor = module(*args)
        return out

    want = program(x, *MODULE_MASKS[masks])
    got, seen = compiled(program, x, *MODULE_MASKS[masks])
    close(got, want)
    assert [site.fused for site in seen.sites] == [True], seen.sites


def test_a_module_with_its_own_keys_and_one_sequence() -> None:
    module, x = Own(True, True, True).train(), torch.randn(N, 16)
    want = module(x)
    got, seen = compiled(lambda y: module(y), x)
    close(got, want)
    assert [site.fused and "K=10" in site.spec for site in seen.sites] == [True], seen.sites
