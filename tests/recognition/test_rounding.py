"""Rounding: numbers of half precision, sums in wider dtypes, and fills that overflow, as eager has them."""

from __future__ import annotations

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
    ROWS,
    B,
    H,
    N,
    Scores,
    agrees,
    attention_with,
    gradients,
    inputs,
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_a_wide_bias_hides_in_half(kernel: str) -> None:
    def weights(s: Tensor) -> Tensor:
        return (s + torch.zeros(N, 1).masked_fill(~ROWS, -65504.0)).half().softmax(-1)

    given: Any = inputs(torch.float16)
    agrees(attention_with(weights), kernel, close=2e-3, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fill_and_a_bias_that_overflow_in_half(kernel: str) -> None:
    def weights(s: Tensor) -> Tensor:
        s = s.masked_fill(~ROWS, -65504.0) + torch.where(KEYS, -100.0, -120.0)
        return s.half().softmax(-1)

    given: Any = inputs(torch.float16)
    agrees(attention_with(weights), kernel, close=2e-3, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fill_that_a_wider_dtype_holds_stays_finite(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).float().masked_fill(~ROWS, -1e9)
        return F.softmin(-s, -1).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=2e-3, **given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("kind", "wide", "fill"),
    [(torch.float32, torch.float64, -1e9), (torch.bfloat16, torch.float32, -1e8)],
)
def test_a_sum_absorbs_in_its_own_dtype(
    kind: torch.dtype, wide: torch.dtype, fill: float, known: bool, kernel: str
) -> None:
    """A low number that is added to scores rounds them, in the dtype of that sum."""

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        added = torch.zeros(N, N, dtype=wide).masked_fill(~ROWS, fill) if known else b
        return ((q @ k.mT).to(wide) + added).softmax(-1).to(v.dtype) @ v

    given: Any = {name: (t * 2).to(kind) for name, t in inputs().items()}
    given["b"] = torch.zeros(N, N, dtype=wide).masked_fill(~ROWS, fill)
    agrees(program, kernel, close=1e-4 if kind is torch.float32 else 4e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_biases_beside_a_large_one_are_not_rounded_away(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT + torch.zeros(N, N).masked_fill(~ROWS, -30000) + b
        return s.softmax(-1).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    given["b"] = torch.randn(N, N, generator=torch.Generator().manual_seed(3)).half() * 4
    agrees(program, kernel, close=1e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_lowest_number_stays_finite_in_a_sink(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).masked_fill(~ROWS, -INF).float()
        return F.pad(s, (0, 1), value=LOW).softmax(-1)[..., :-1].to(v.dtype) @ v

    given: Any = inputs(torch.bfloat16)
    agrees(program, kernel, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sdpa_adds_masks_of_half_in_single_precision(kernel: str) -> None:
    bias = torch.full((N, N), -9984.0, dtype=torch.bfloat16).tril()
    given: Any = inputs(torch.bfloat16)
    agrees(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias), kernel, close=2e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("low", [-INF, torch.finfo(torch.bfloat16).min])
def test_a_sink_is_compared_with_sums_of_single_precision(kernel: str, low: float) -> None:
    """Two fills of half precision, one of which hides whole rows: only their sinks are left."""
    least = torch.finfo(torch.bfloat16).min

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT + b.masked_fill(~ROWS, low)
        s = s + (1 - torch.ones(N, N).tril()) * least
        return F.pad(s, (0, 1)).softmax(-1)[..., :-1].to(v.dtype) @ v

    given: Any = inputs(torch.bfloat16)
    agrees(program, kernel, close=3e-2, b=torch.zeros(N, 1, dtype=torch.bfloat16), **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_number_is_added_in_the_dtype_of_the_sum_before(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q * 0.5) @ k.mT + torch.zeros(N, 1).masked_fill(~ROWS, -30000) + 1e9
        return (s * 0.5 * -0.5).softmax(-1).to(v.dtype) @ v

    given: Any = {name: t[:, :, :1].half() for name, t in inputs().items()}
    agrees(program, kernel, close=1e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_large_number_is_added_in_the_dtype_of_its_sum(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = b + ((q @ k.mT).double() + 1e4)
        return F.pad(s, (0, 1)).softmax(-1)[..., :-1].to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=2e-2, b=torch.randn(N, 1).half(), **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinity_times_less_than_half_precision_holds(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        s = (q @ k.mT + (1 - m.to(q.dtype)) * 1e9) * 1e-9
        return ((s / 3).tanh() * 3).softmax(-1).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, m=ROWS, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_a_number_that_half_precision_does_not_hold(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT + (1.0 - CAUSAL.tril(-1)[:, :1].float()) * -1e8) / 2
        return s.softmax(-1).to(v.dtype) @ v

    given: Any = {name: t[:, :, :1].half() if name != "q" else t.half() for name, t in inputs().items()}
    agrees(program, kernel, close=1e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fill_that_overflows_and_changes_its_sign(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.where(ROWS, q @ k.mT, torch.finfo(q.dtype).min) * 4 * -0.5
        return s.softmax(-1, dtype=torch.float32).nan_to_num(0.0).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_a_fill_hides_beside_an_unknown_bias_in_half(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = q @ k.mT + torch.zeros(N, N).masked_fill(~ROWS, -1e9)
        return (b + s).softmax(-1).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, b=torch.randn(N).half(), **given)


def test_gradients_of_a_softmax_in_half_cancel_as_eager_s_do() -> None:
    """A hidden row gives the divisor no gradient: large terms must cancel."""

    def program(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        s = (q @ k.mT).masked_fill(~ROWS, -1e4).half() / (t.abs() + 1)
        return (s.softmax(-1).to(v.dtype) @ v).square()

    constant = {n: t[..., :2, :] for n, t in inputs().items()} | {"q": inputs()["q"][..., :1, :]}
    learned = {"t": torch.tensor(0.5)}
    (ours,), (eager,) = (gradients(program, how, learned, constant) for how in ("reference", None))
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_shift_that_a_later_scale_makes_overflow(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT + 1e4) * torch.full((N, 1), 200, dtype=torch.uint8) * 2
        return s.float().softmax(-1).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_that_a_fill_of_half_rounds(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = torch.where(ROWS, q @ k.mT, torch.finfo(q.dtype).min) / 8**0.5
        return (s + b).softmax(-1) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, b=torch.randn(N, N).half() * 2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [torch.finfo(torch.float16).min, -1e4])
def test_rows_whose_visible_keys_a_bias_hides_in_half(kernel: str, fill: float) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        causal = torch.ones(N, N, dtype=torch.bool).tril()
        return torch.where(causal, q @ k.mT + b, fill).softmax(-1) @ v

    bias = torch.zeros(N, dtype=torch.float16).index_fill(0, torch.tensor([0]), -INF)
    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, b=bias, **given)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(
    "promote",
    [
        lambda s: s + torch.zeros(N, 1),
        lambda s: s - torch.zeros(N, N),
        lambda s: s * torch.ones(N, 1),
        lambda s: s + torch.ones(N, N).triu(N) * -1e4,
    ],
    ids=["shift", "bias", "scale", "mask"],
)
def test_what_only_promotes_scores_is_kept(kernel: str, promote: Scores) -> None:
    """The fill is a number of single precision, and overflows in a softmax of half precision."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = promote((q @ k.mT).half())
        return torch.where(ROWS, s, torch.finfo(s.dtype).min).softmax(-1, dtype=torch.float16).to(v.dtype) @ v

    agrees(program, kernel, close=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_a_fill_hides_beside_a_bias_of_single_precision(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        s = q @ k.mT + keys * -100.0
        s = s.to(q.dtype) + torch.zeros(N, N, dtype=q.dtype).masked_fill(~ROWS, torch.finfo(q.dtype).min)
        return s.softmax(-1) @ v

    given: Any = inputs(torch.bfloat16)
    agrees(program, kernel, close=3e-2, keys=KEYS, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_a_number_that_overflows_after_it_was_cleaned(kernel: str) -> None:
    """Zero times the gradient of a row of NaN is NaN."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = ROWS.to(torch.int8)
        s = ((q @ k.mT).float() * shown + (1 - shown.float()) * LOW).nan_to_num()
        return s.half().softmax(-1).to(v.dtype) @ v

    learned = inputs(torch.float16)
    ours, eager = (gradients(program, how, learned, {}) for how in (kernel, None))
    torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_that_are_cleaned_in_single_precision_and_narrowed(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).float().masked_fill(~ROWS, -INF).nan_to_num()
        return s.half().softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1.0, 3**-0.5])
@pytest.mark.parametrize("shape", [(N, N), (N, 1), (N,), ()])
def test_rows_that_a_bias_of_half_hides(shape: tuple[int, ...], scale: float, kernel: str) -> None:
    """Kernels add the bias in single precision, where it leaves the scores some digits."""

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return ((q @ k.mT + b) * scale).float().softmax(-1).to(v.dtype) @ v

    lowest = torch.full(shape, torch.finfo(torch.float16).min).half()
    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, b=lowest * ~ROWS if len(shape) == 2 else lowest, **given)


def scores_that_overflow(s: Tensor) -> Tensor:
    return s * 100 * torch.full((N, 1), 200, dtype=torch.uint8)


def fills_that_overflow_and_are_scaled(s: Tensor) -> Tensor:
    s = s + torch.zeros(N).masked_fill(~KEYS, -1e4).half() + (~CAUSAL).half() * torch.finfo(s.dtype).min
    return s * 1e-5


def fills_that_overflow_times_zero(s: Tensor) -> Tensor:
    return fills_that_overflow_and_are_scaled(s) * 0.0


def infinity_times_zero_cleaned(s: Tensor) -> Tensor:
    s = torch.where(~CAUSAL, -INF, s)
    return (s * CAUSAL + (1 - CAUSAL.to(s.dtype)) * -1e9).nan_to_num()


def a_large_number_in_half(s: Tensor) -> Tensor:
    wide = torch.zeros(B, H, N, N)
    wide[...] = s
    return torch.where(CAUSAL, wide, 1e9)


def a_number_that_absorbs_rows(s: Tensor) -> Tensor:
    return (s + torch.where(ROWS, 0.0, torch.finfo(torch.float16).min)).mul(0.3).half()


def fill_that_is_scaled_in_single_precision(s: Tensor) -> Tensor:
    lowest = torch.finfo(s.dtype).min
    return (s + (~ROWS).to(s.dtype) * lowest) / torch.full((N, 1), 0.1, dtype=torch.bfloat16)


def fills_that_overflow_together_once_cleaned(s: Tensor) -> Tensor:
    s = torch.where(CAUSAL, s.tanh(), torch.tensor(-1e8, dtype=s.dtype))
    seen = torch.eye(N, dtype=torch.bool) & ROWS
    return (s + (~seen).to(s.dtype) * torch.finfo(s.dtype).min).nan_to_num()


def a_shift_that_rounds_scores_beside_a_wide_fill(s: Tensor) -> Tensor:
    return (s * 0.1 + 1e4) + torch.zeros(N, N).masked_fill(~ROWS, torch.finfo(s.dtype).min)


def a_shift_and_a_fill_that_overflow_together(s: Tensor) -> Tensor:
    s = s + torch.zeros_like(s).masked_fill_(~ROWS[:, :1], -1e4)
    return s + (~ROWS[:, :1]).to(s.dtype) * torch.finfo(s.dtype).min


def a_shift_and_a_fill_that_overflow_times_zero(s: Tensor) -> Tensor:
    s = s.masked_fill(~CAUSAL, torch.finfo(s.dtype).min)
    return (s + torch.ones(N, 1, dtype=torch.bool) * -100.0) * 0.0


def a_fill_that_is_scaled_up_and_down(s: Tensor) -> Tensor:
    hidden = (~ROWS[:, :1]).to(s.dtype)
    s = (s * ROWS[:, :1] + hidden * torch.finfo(s.dtype).min) * 4
    return s.masked_fill(~CAUSAL, torch.finfo(s.dtype).min) / torch.full((N, 1), 200, dtype=torch.uint8)


def a_wide_fill_that_overflows_beside_infinite_ones(s: Tensor) -> Tensor:
    s = s.masked_fill(~torch.eye(N, dtype=torch.bool), -INF).float()
    return torch.where(CAUSAL.tril(-1), s, torch.finfo(torch.float32).min).bfloat16().float()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "function",
    [torch.abs, torch.neg, lambda s: s * 0.0, lambda s: F.leaky_relu(s, -0.5), lambda s: s.abs().neg()],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_infinite_fills_that_a_function_of_the_scores_changes(
    function: Scores, dtype: torch.dtype, kernel: str
) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT + torch.full((N, N), -INF).triu(1)
        s = torch.where(torch.arange(N)[:, None] > 0, s, torch.tensor(-1e4, dtype=s.dtype)) * 1e-3
        return function(s).softmax(-1).to(v.dtype) @ v

    given: Any = inputs(dtype)
    agrees(program, kernel, close=2e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shift", [1e4, torch.arange(N).double()[:, None] * 1e4])
def test_digits_of_scores_beside_a_large_number_in_double_precision(
    shift: float | Tensor, kernel: str
) -> None:
    """The sink keeps the shift from being dropped."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).double() + shift
        return F.pad(s, (0, 1)).softmax(-1)[..., :-1].to(v.dtype) @ v

    agrees(program, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_fills_beside_a_large_bias_of_single_precision(kernel: str) -> None:
    """The keys that only the bias lowers have all the weight; half precision holds no lower number."""

    def program(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        s = q @ k.mT + torch.full((N, N), -65504.0).triu(1)
        return s.masked_fill(~kept, -INF).softmax(-1).to(v.dtype) @ v

    kept = torch.ones(N, N, dtype=torch.bool).index_fill(1, torch.tensor([0, 2]), False)
    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=5e-3, kept=kept, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fills_that_the_dtype_of_the_product_does_not_hold(kernel: str) -> None:
    """Both fills are the same number in single precision, and different ones in bfloat16."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.where(KEYS, (q @ k.mT).float(), -1e9)
        s = s + torch.zeros(N, N).masked_fill(~torch.eye(N, dtype=torch.bool), -1e9)
        return s.softmax(-1).to(v.dtype) @ v

    given: Any = inputs(torch.bfloat16)
    agrees(program, kernel, close=2e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "change",
    [
        a_shift_that_rounds_scores_beside_a_wide_fill, a_shift_and_a_fill_that_overflow_together,
        a_shift_and_a_fill_that_overflow_times_zero, a_fill_that_is_scaled_up_and_down,
        a_wide_fill_that_overflows_beside_infinite_ones,
        scores_that_overflow, fills_that_overflow_and_are_scaled, fills_that_overflow_times_zero,
        infinity_times_zero_cleaned, a_large_number_in_half, a_number_that_absorbs_rows,
        fill_that_is_scaled_in_single_precision, fills_that_overflow_together_once_cleaned,
    ],
)  # fmt: skip
def test_numbers_that_half_precision_loses(change: Scores, kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return change(q @ k.mT).softmax(-1).to(v.dtype) @ v

    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=2e-2, **given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_digits_of_a_bias_beside_a_large_number_in_half(kernel: str) -> None:
    """The bias hides the keys that the mask leaves visible; the mask adds one low number to all others."""

    def program(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        s = (q @ k.mT + b).float() + torch.where(CAUSAL, 0.0, -1e4)
        return s.softmax(-1).to(v.dtype) @ v

    bias = torch.randn(N, N, generator=torch.Generator().manual_seed(2)).masked_fill(CAUSAL, -INF).half()
    given: Any = inputs(torch.float16)
    agrees(program, kernel, close=1e-2, b=bias.index_fill(0, torch.tensor([N - 1]), 0.0), **given)
