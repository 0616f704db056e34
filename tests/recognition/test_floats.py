"""Laws of the reals that fail in floats: each program equals eager, NaN included, fused or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.recognition.as_eager import (
    CAUSAL,
    INF,
    KERNELS,
    KEYS,
    LOW,
    NAN,
    ROWS,
    B,
    H,
    N,
    Scores,
    agrees,
    attention_with,
    gradients_agree,
    inputs,
)

FUSED: list[Any] = []
UNSOUND: list[Any] = []


def fused(program: Scores) -> Scores:
    """A program from scores to weights that is attention, whatever the numbers are."""
    FUSED.append(pytest.param(program, id=program.__name__))
    return program


def unsound(program: Scores) -> Scores:
    """A look-alike, which only a kernel that computes it as written may take."""
    UNSOUND.append(pytest.param(program, id=program.__name__))
    return program


# ---------------------------------------------------------------------------------------- shifts of rows


@fused
def shifted_by_a_number(s: Tensor) -> Tensor:
    return (s + 3.5).softmax(-1)


@fused
def shifted_by_the_row_maximum(s: Tensor) -> Tensor:
    s = s.masked_fill(~CAUSAL, -INF)
    return (s - s.amax(-1, keepdim=True)).softmax(-1)


@fused
def shifted_by_positions(s: Tensor) -> Tensor:
    return (s + torch.arange(N)[:, None] * 0.5).softmax(-1)


@fused
def shifted_by_minus_infinity(s: Tensor) -> Tensor:
    return (s + torch.where(ROWS, 0.0, -INF)).softmax(-1)


@fused
def shifted_by_the_lowest_number(s: Tensor) -> Tensor:
    return (s + (~ROWS).float() * LOW).softmax(-1)


@unsound
def shifted_by_nan(s: Tensor) -> Tensor:
    return (s + torch.where(ROWS, 0.0, NAN)).softmax(-1)


@unsound
def shifted_by_zero_times_infinity(s: Tensor) -> Tensor:
    return (s + (~ROWS).float() * -INF).softmax(-1)


@unsound
def shifted_beside_a_sink(s: Tensor) -> Tensor:
    wide = torch.cat([s + torch.arange(N)[:, None] * 1.0, torch.zeros(B, H, N, 1)], -1)
    return wide.softmax(-1)[..., :-1]


# ---------------------------------------------------------------------------------------- fills


@unsound
def fills_that_overflow_together_and_are_cleaned(s: Tensor) -> Tensor:
    s = s + torch.where(ROWS, 0.0, LOW) + torch.where(ROWS, 0.0, LOW)
    return s.nan_to_num(0.0).softmax(-1)


@unsound
def cleaned_and_overflowing_again(s: Tensor) -> Tensor:
    return (s.masked_fill(~ROWS, -INF).nan_to_num(0.0) / (1 / 3)).softmax(-1)


@unsound
def fill_scaled_to_usual_size(s: Tensor) -> Tensor:
    e = (s.masked_fill(~CAUSAL, -1e9) * 1e-9).exp()
    return e / (1 + e.sum(-1, keepdim=True))


@unsound
def kept_where_a_bias_hides(s: Tensor) -> Tensor:
    s = s.masked_fill(~CAUSAL, LOW) + (1 - torch.ones(N, N).tril(-1)) * -INF
    return s.softmax(-1).masked_fill(~CAUSAL, 0.0)


@fused
def hidden_rows_are_nan(s: Tensor) -> Tensor:
    return s.masked_fill(~ROWS, -INF).softmax(-1)


@fused
def hidden_rows_are_means(s: Tensor) -> Tensor:
    return s.masked_fill(~ROWS, -1e9).softmax(-1)


@fused
def scaled_after_the_mask(s: Tensor) -> Tensor:
    return (s.masked_fill(~(CAUSAL & ROWS), -INF) * 0.25).softmax(-1)


@unsound
def hidden_rows_biased(s: Tensor) -> Tensor:
    return (torch.where(ROWS, s, -1e9) + (~KEYS).float() * -1e4).softmax(-1)


@unsound
def negated_after_the_mask(s: Tensor) -> Tensor:
    return (-s.masked_fill(~CAUSAL, -INF)).clamp(min=-1e9).softmax(-1)


@unsound
def infinite_fill_times_zero(s: Tensor) -> Tensor:
    return (s.masked_fill(~CAUSAL, -INF) * 0.0).softmax(-1)


@unsound
def fill_capped(s: Tensor) -> Tensor:
    return torch.tanh(s.masked_fill(~CAUSAL, -1e9)).softmax(-1).masked_fill(~CAUSAL, 0.0)


@unsound
def fill_times_a_tensor(s: Tensor) -> Tensor:
    return (s.masked_fill(~CAUSAL, -1e9) * torch.zeros(())).softmax(-1).masked_fill(~CAUSAL, 0.0)


@unsound
def fill_of_nan(s: Tensor) -> Tensor:
    return s.masked_fill(~CAUSAL, NAN).nan_to_num(0.0).softmax(-1)


@unsound
def fill_that_overflows_in_half(s: Tensor) -> Tensor:
    return s.masked_fill(~(CAUSAL & ROWS), -1e9).half().softmax(-1).float()


@unsound
def shifted_by_the_lowest_half(s: Tensor) -> Tensor:
    return (s.half() + (~ROWS).half() * torch.finfo(torch.float16).min).softmax(-1).float()


@unsound
def scalar_fill_that_overflows_in_half(s: Tensor) -> Tensor:
    s = s.half()
    return (s + torch.zeros(()).masked_fill(torch.tensor(True), -1e9)).softmax(-1).float()


@unsound
def rows_that_overflow_in_half(s: Tensor) -> Tensor:
    s = s.bfloat16() * ROWS + (1 - ROWS.bfloat16()) * torch.finfo(torch.bfloat16).min
    return (-s / 2).half().softmax(-1).float()


@unsound
def raised_by_what_absorbs(s: Tensor) -> Tensor:
    return (-(s + torch.zeros(N, N).masked_fill(~CAUSAL, -1e9))).softmax(-1)


@unsound
def fill_that_overflows_when_scaled(s: Tensor) -> Tensor:
    return (s.masked_fill(~ROWS, LOW) * 2 * 0.3).softmax(-1)


@unsound
def fill_times_a_negative_tensor(s: Tensor) -> Tensor:
    return ((s * 3 + (~CAUSAL).float() * -1e8) * torch.full((), -0.5)).double().softmax(-1).float()


@unsound
def rows_absorbed_in_part(s: Tensor) -> Tensor:
    return ((s * 3 + (~ROWS).float() * -1e8) * 200).softmax(-1)


@unsound
def rows_absorbed_in_part_and_divided(s: Tensor) -> Tensor:
    return ((s * 3 + torch.zeros(N, 1).masked_fill(~ROWS, -1e8)) / 8**0.5).softmax(-1)


@unsound
def rows_absorbed_in_part_and_divided_by_a_tensor(s: Tensor) -> Tensor:
    s = (s * 3 + torch.zeros(N, 1).masked_fill(~ROWS, -1e8)) / (torch.full((), 0.5).abs() + 1)
    return s.double().softmax(-1).float()


@unsound
def rows_absorbed_in_part_after_a_shift(s: Tensor) -> Tensor:
    s = s * 4 - (s * 4).amax(-1, keepdim=True)
    return (s + (~ROWS).float() * -1e8).softmax(-1)


@unsound
def a_bias_that_a_fill_before_it_does_not_absorb(s: Tensor) -> Tensor:
    s = s + (~ROWS).float() * -1e9
    return (s + torch.where(KEYS, 0.0, -1e4)).softmax(-1)


@unsound
def rows_below_single_precision(s: Tensor) -> Tensor:
    s = s.double() + (~ROWS).double() * torch.finfo(torch.float64).min
    return s.softmax(-1).float()


@unsound
def fills_that_are_raised_and_vanish(s: Tensor) -> Tensor:
    s = s.masked_fill(~ROWS, -1e4) + torch.zeros(N, 1).masked_fill(~ROWS, -INF)
    e = (s.clamp(-1e4, 1e4) * 0.5).exp()
    return e / e.sum(-1, keepdim=True)


@unsound
def nan_through_a_rectifier(s: Tensor) -> Tensor:
    return (s + (~ROWS).float() * -INF).relu().softmax(-1)


@unsound
def fills_that_overflow_before_they_are_cleaned(s: Tensor) -> Tensor:
    s = s.masked_fill(~ROWS, LOW) + torch.zeros(N, 1).masked_fill(~ROWS, LOW)
    return s.nan_to_num().softmax(-1)


@unsound
def masked_after_the_maximum(s: Tensor) -> Tensor:
    """The only key that the first row sees is the one of its maximum, and is hidden later."""
    e = s.masked_fill(~CAUSAL, LOW)
    e = (e - e.amax(-1, keepdim=True)).exp() * (1 - torch.eye(N))
    return e / e.sum(-1, keepdim=True)


@unsound
def biases_that_a_fill_keeps(s: Tensor) -> Tensor:
    s = s + torch.where(KEYS, 0.0, -1e4)
    return (s + torch.zeros(N, N).masked_fill(~ROWS, -1e9)).softmax(-1)


@unsound
def hidden_before_and_after_a_cap(s: Tensor) -> Tensor:
    e = s.masked_fill(~ROWS, LOW).tanh().masked_fill(~ROWS, -1e8).exp()
    return e / (1 + e.sum(-1, keepdim=True))


@unsound
def hidden_before_and_after_a_scaled_cap(s: Tensor) -> Tensor:
    return (s.masked_fill(~ROWS, -INF).tanh() * 2).masked_fill(~ROWS, -INF).softmax(-1)


@unsound
def scores_absorbed_in_part(s: Tensor) -> Tensor:
    return ((s * 3 - 1e8) / 0.1 + torch.full((N, N), -INF).triu(1)).softmax(-1)


@unsound
def nan_where_keys_are_seen(s: Tensor) -> Tensor:
    below = CAUSAL.tril(-1)
    s = s * below + (1 - below.float()) * -INF + torch.where(below, 0.0, LOW)
    return s.softmax(-1).masked_fill(~below, 0.0)


@unsound
def infinity_negated(s: Tensor) -> Tensor:
    return (-(s + torch.zeros(ROWS.shape).masked_fill(~ROWS, INF))).softmax(-1)


@unsound
def infinity_negated_below_a_mask(s: Tensor) -> Tensor:
    s = s + torch.zeros(ROWS.shape).masked_fill(~ROWS, INF)
    return (-s.masked_fill(~CAUSAL, LOW)).softmax(-1)


# ---------------------------------------------------------------------------------------- written out


@unsound
def exponentials_less_the_mean_of_fills(s: Tensor) -> Tensor:
    s = s + torch.full((N, N), -1e4).triu(1)
    e = (s - s.mean(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


@fused
def exponentials_less_their_mean(s: Tensor) -> Tensor:
    e = (s - s.mean(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


@fused
def exponentials_over_their_sum(s: Tensor) -> Tensor:
    e = s.masked_fill(~CAUSAL, LOW).exp()
    return e / e.sum(-1, keepdim=True)


@fused
def exponentials_of_hidden_rows(s: Tensor) -> Tensor:
    e = s.masked_fill(~ROWS, LOW).exp()  # their sum is zero
    return e / e.sum(-1, keepdim=True)


@fused
def exponentials_less_their_maximum(s: Tensor) -> Tensor:
    s = s.masked_fill(~ROWS, LOW)
    e = (s - s.amax(-1, keepdim=True)).exp()  # their sum is the number of keys
    return e / e.sum(-1, keepdim=True)


@unsound
def exponentials_of_absorbed_rows(s: Tensor) -> Tensor:
    e = (s + (~ROWS).float() * -1e4).exp()
    return e / e.sum(-1, keepdim=True)


@unsound
def less_a_logsumexp_that_absorbs(s: Tensor) -> Tensor:
    s = s.masked_fill(~ROWS, LOW)
    return (s - s.logsumexp(-1, keepdim=True)).exp()  # each weight is one


@unsound
def less_a_logsumexp_of_negated_fills(s: Tensor) -> Tensor:
    s = -s.masked_fill(torch.eye(N, dtype=torch.bool).logical_not(), LOW)
    return (s - s.logsumexp(-1, keepdim=True)).exp()  # three weights of one in each row


@unsound
def less_a_logsumexp_rounded_to_half(s: Tensor) -> Tensor:
    s = (s + (~ROWS).float() * -1e4).half()
    return (s - s.logsumexp(-1, keepdim=True)).exp().float()  # four weights of one in a row


@unsound
def sink_of_minus_infinity(s: Tensor) -> Tensor:
    return F.pad(s.masked_fill(~ROWS, -INF), (0, 1), value=-INF).softmax(-1)[..., :-1]


@fused
def weights_without_nan(s: Tensor) -> Tensor:
    return s.masked_fill(~ROWS, -INF).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("program", FUSED)
def test_attention_is_fused_and_right(program: Scores, kernel: str) -> None:
    seen = agrees(attention_with(program), kernel)
    if kernel in ("auto", "reference"):
        assert [s.fused for s in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("program", UNSOUND)
def test_a_look_alike_is_right_fused_or_not(program: Scores, kernel: str) -> None:
    seen = agrees(attention_with(program), kernel)
    if kernel == "sdpa":
        assert not any(s.fused and s.kind == "full" for s in seen.sites)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_overwritten_where_autograd_does_not_see_it(kernel: str) -> None:
    """The derivative of a clamp reads the scores again."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT) * 0.5
        clamped = s.clamp(max=0.5)
        s.data.mul_(7)
        return clamped.softmax(-1) @ v

    gradients_agree(attention, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_overwritten_where_autograd_does_not_see_it(kernel: str) -> None:
    """The derivative of a softmax reads the weights again, and what is written needs a gradient itself."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (q @ k.mT).softmax(-1)
        out = w @ v
        w.data.add_(q.sum())
        return out

    gradients_agree(attention, kernel)


@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
def test_inductor_keeps_the_casts_of_scores(kernel: str) -> None:
    agrees(attention_with(fill_that_overflows_in_half), kernel, "inductor")


@pytest.mark.parametrize("kernel", KERNELS)
def test_nobody_sees_nan_in_a_hidden_key(kernel: str) -> None:
    keys = inputs()["k"].index_fill(2, torch.tensor([1]), NAN)
    agrees(attention_with(lambda s: s.masked_fill(~KEYS, -INF).softmax(-1)), kernel, k=keys)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_nan_become_zero(kernel: str) -> None:
    queries = inputs()["q"].index_fill(2, torch.tensor([1]), NAN)
    agrees(attention_with(lambda s: s.softmax(-1).nan_to_num(0.0)), kernel, q=queries)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("low", [-INF, NAN])
def test_sdpa_s_own_rule_is_about_hidden_rows_alone(kernel: str, low: float) -> None:
    mask = torch.zeros(N, N).masked_fill(~ROWS, low)
    agrees(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [-INF, LOW, -1e9, -1e4])
def test_a_bias_from_outside_may_hide_rows(kernel: str, fill: float) -> None:
    bias = torch.zeros(N, N).masked_fill(~(CAUSAL & ROWS), fill)

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT + b).softmax(-1) @ v

    agrees(program, kernel, b=bias)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [-1e8, -1e9, LOW, -INF])
def test_a_mask_hides_a_row_whatever_a_bias_from_outside_holds(kernel: str, fill: float) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return torch.where(ROWS, q @ k.mT * 8 + b, fill).softmax(-1) @ v

    agrees(program, kernel, b=torch.randn(N, N, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_neither_keys_nor_a_sink_are_seen(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return F.pad(q @ k.mT + b, (0, 1), value=-INF).softmax(-1)[..., :-1] @ v

    agrees(program, kernel, b=torch.zeros(N, N).masked_fill(~ROWS, -INF))


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_cleaned_scores_keep_gradients_that_are_nan(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).masked_fill(~ROWS, -INF).nan_to_num(0.0)
        return s.masked_fill(~ROWS, -INF).softmax(-1).masked_fill(~ROWS, 0.0) @ v

    gradients_agree(program, kernel)


@pytest.mark.parametrize(("queries", "keys"), [(4, 0), (0, 4), (0, 0), (1, 1)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_of_zero_and_one(kernel: str, queries: int, keys: int) -> None:
    given = inputs()
    agrees(
        attention_with(lambda s: s.softmax(-1)), kernel,
        q=given["q"][:, :, :queries], k=given["k"][:, :, :keys], v=given["v"][:, :, :keys],
    )  # fmt: skip


def nothing(w: Tensor) -> Tensor:
    return w


def without_nan(w: Tensor) -> Tensor:
    return w.nan_to_num()


def without_hidden_rows(w: Tensor) -> Tensor:
    return w.masked_fill(~ROWS, 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("after", [nothing, without_nan, without_hidden_rows])
@pytest.mark.parametrize("written", ["replaced", "added", "given"])
def test_gradients_of_rows_of_nan_are_nan_where_eager_s_are(
    kernel: str, written: str, after: Callable[[Tensor], Tensor]
) -> None:
    hidden = ~ROWS.expand(N, N)

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT
        if written == "replaced":
            s = s.masked_fill(hidden, -INF)
        else:
            s = s + (b if written == "given" else torch.zeros(N, N).masked_fill(hidden, -INF))
        return after(s.softmax(-1)) @ v

    gradients_agree(program, kernel, b=torch.zeros(N, N).masked_fill(hidden, -INF))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [-1e9, -INF])
@pytest.mark.parametrize("replaced", [True, False])
def test_gradients_of_rows_without_exponentials_are_nan_where_eager_s_are(
    kernel: str, fill: float, replaced: bool
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        s = s.masked_fill(~ROWS, fill) if replaced else s + torch.zeros(N, N).masked_fill(~ROWS, fill)
        e = s.exp()
        return e / e.sum(-1, keepdim=True) @ v

    gradients_agree(program, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_rows_between_two_masks_that_are_added(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = torch.arange(N)[:, None] - torch.arange(N)
        s = q @ k.mT + torch.zeros(N, N).masked_fill(near.abs() > 1, -INF)
        seen = (torch.arange(N) < 2) & (near.abs() <= 1)
        return (s + (1 - seen.to(s.dtype)) * LOW).softmax(-1) @ v

    gradients_agree(program, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_biases_that_are_cleaned_beside_a_fill(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT - b + (1 - CAUSAL.to(q.dtype)) * torch.finfo(q.dtype).min
        return s.nan_to_num(0.0).softmax(-1) @ v

    bias = torch.zeros(N, N).index_fill(1, torch.tensor([2]), -INF)
    agrees(program, kernel, b=bias)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_may_be_hidden_by_a_mask_that_a_later_one_overwrites_in_part(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        s = torch.where(ROWS, q @ k.mT, -INF)
        return torch.where(m, -1e4, s).softmax(-1) @ v

    agrees(program, kernel, m=torch.zeros(H, 1, 1, dtype=torch.bool).index_fill(0, torch.tensor([0]), True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("replaced", [True, False])
def test_rows_that_a_fill_hides_before_an_unknown_bias(kernel: str, replaced: bool) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT
        s = s.masked_fill(~ROWS, -1e8) if replaced else s + torch.zeros(N, N).masked_fill(~ROWS, -1e9)
        return (s + b).softmax(-1) @ v

    agrees(program, kernel, b=torch.randn(H, N, N) * 6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_that_are_zeroed_where_a_bias_hides_the_rest(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = torch.where(CAUSAL, q @ k.mT, LOW) + b
        return s.softmax(-1).masked_fill(~CAUSAL, 0.0) @ v

    bias = torch.zeros(N).index_fill(0, torch.tensor([0]), -INF)
    agrees(program, kernel, b=bias)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_gradients_pass_a_rectifier(kernel: str) -> None:
    gradients_agree(attention_with(nan_through_a_rectifier), kernel)
