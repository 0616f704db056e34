"""The reference operator: the specification's semantics, forward and backward."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusepass.kernels  # noqa: F401  (registers the operator)
from fusepass.specification.attention import (
    Attention,
    Bias,
    Finite,
    Floor,
    Keep,
    KeyGate,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    Sink,
    SoftCap,
    WeightModifier,
    WeightScale,
    ZeroEmptyRows,
    reference,
)
from fusepass.specification.program import decode, encode, slots

B, H, G, Q, K, D, DV = 2, 4, 2, 5, 6, 4, 3
INF = math.inf
F64 = torch.float64

#: Slots: 0, 1 biases, 2 factor of heads, 3 bits (7: their opposite), 4 added mask, 5 factor of rows, 6 sink.
SCORES: dict[str, ScoreModifier] = {
    "scale": Scale(0.5),
    "negative scale": Scale(-0.7),
    "scale by heads": ScaleBy(2, "h"),
    "softcap": SoftCap(2.0),
    "bias": Bias(0, "bhij"),
    "bias of heads and keys, scaled": Bias(1, "hj", -0.5),
    "mask": Mask(3, -INF),
    "mask hides": Mask(7, -INF, attends=False),
    "mask within reach": Mask(3, -3.0),
    "added mask": Mask(4, -1e9, additive=True),
    "floor": Floor(-1e30),
    "finite": Finite(0.5, -2.0, 2.0),
}
WEIGHTS: dict[str, WeightModifier] = {
    "keep": Keep(3, True, "bij"),
    "keep hides": Keep(7, False, "bij"),
    "factor": WeightScale(0.25),
    "factor of rows": WeightScale(1.0, 5, "i"),
    "gate of keys": KeyGate(1, "hj"),
    "empty rows": ZeroEmptyRows(),
}


def spec_of(
    scores: list[ScoreModifier],
    weights: list[WeightModifier] | None = None,
    **more: Any,
) -> Attention:
    return Attention(
        B, H, G, Q, K, D, DV, F64, tuple(scores), tuple(weights or ()), F64, F64,
        rows_seen=False, operands=8, **more
    )  # fmt: skip


def inputs(seed: int = 0, dtype: torch.dtype = F64) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the tensors of every slot; every row sees a key."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    bits = torch.rand((B, 1, Q, K), generator=g) < 0.6
    bits[..., 2] = True
    added = torch.zeros(B, 1, Q, K, dtype=dtype).masked_fill(~bits, max(-1e9, torch.finfo(dtype).min))
    operands = [
        normal(B, H, Q, K), normal(1, H, 1, K), normal(1, H, 1, 1), bits, added,
        normal(1, 1, Q, 1), normal(1, H, 1, 1), ~bits,
    ]  # fmt: skip
    return [normal(B, H, Q, D), normal(B, G, K, D), normal(B, G, K, DV)], operands


def given_to(spec: Attention, operands: list[Tensor]) -> list[Tensor]:
    """The operands that the encoded program takes, in its order."""
    return [operands[slot] for slot in slots(spec)]


def operator(spec: Attention, tensors: list[Tensor], operands: list[Tensor]) -> Tensor:
    out: Tensor = torch.ops.fusepass.attention(*tensors, given_to(spec, operands), encode(spec))
    return out


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def check(spec: Attention, seed: int = 0) -> None:
    """Same values as the oracle, same gradients as autograd of the oracle, for every operand."""
    tensors, operands = inputs(seed)
    grad = torch.randn((B, H, Q, DV), generator=torch.Generator().manual_seed(99), dtype=F64)
    mine, theirs = leaves([*tensors, *operands]), leaves([*tensors, *operands])
    got = operator(spec, mine[:3], mine[3:])
    want = reference(spec, theirs[0], theirs[1], theirs[2], theirs[3:])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    got.backward(grad)
    want.backward(grad)
    for a, b in zip(mine, theirs, strict=True):
        mine_grad = torch.zeros_like(a) if a.grad is None else a.grad
        their_grad = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(mine_grad, their_grad, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(
    "pair", list(itertools.product([None, *SCORES], repeat=2)), ids=lambda p: " then ".join(map(str, p))
)
def test_every_pair_of_score_modifiers(pair: tuple[str | None, ...]) -> None:
    check(spec_of([SCORES[name] for name in pair if name is not None]))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("score", [None, *SCORES])
def test_every_weight_modifier_after_every_score_modifier(score: str | None, weight: str) -> None:
    check(spec_of([SCORES[score]] if score else [], [WEIGHTS[weight]]))


@pytest.mark.parametrize("pair", list(itertools.product(WEIGHTS, repeat=2)), ids=" then ".join)
def test_every_pair_of_weight_modifiers(pair: tuple[str, ...]) -> None:
    check(spec_of([Scale(0.5), Mask(3, -INF)], [WEIGHTS[name] for name in pair]))


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(list(SCORES.values())), max_size=6),
    st.lists(st.sampled_from(list(WEIGHTS.values())), max_size=4),
    st.booleans(),
    st.integers(0, 5),
)
def test_any_modifiers(
    scores: list[ScoreModifier], weights: list[WeightModifier], sink: bool, seed: int
) -> None:
    check(spec_of(scores, weights, sink=Sink(6, "h") if sink else None), seed)


@pytest.mark.parametrize("score", [None, *SCORES])
def test_a_sink_after_every_score_modifier(score: str | None) -> None:
    check(spec_of([SCORES[score]] if score else [], sink=Sink(6, "h")))


def test_rows_that_see_no_key() -> None:
    """NaN where the fill is -inf; the mean of the values where it is finite; zero where cleaned."""
    tensors, operands = inputs()
    operands[3][0, 0, 1] = False
    operands[7] = ~operands[3]
    row = operator(spec_of([Mask(3, -INF)]), tensors, operands)[0, :, 1]
    assert row.isnan().all()
    row = operator(spec_of([Mask(3, -1e30)]), tensors, operands)[0, :, 1]
    torch.testing.assert_close(row, tensors[2][0].mean(1).repeat_interleave(H // G, 0))
    assert not operator(spec_of([Mask(3, -INF)], [ZeroEmptyRows()]), tensors, operands)[0, :, 1].any()


def test_the_oracle_is_plain_attention() -> None:
    """Compared with PyTorch's SDPA: grouped heads, a scale, a bias and a mask."""
    tensors, operands = inputs()
    q, k, v = tensors
    spec = spec_of([Scale(0.3), Bias(0, "bhij"), Mask(3, -INF)])
    mask = operands[0].masked_fill(~operands[3], -INF)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(reference(spec, q, k, v, operands), want)
    torch.testing.assert_close(operator(spec, tensors, operands), want)


@pytest.mark.parametrize(
    ("low", "soft", "out"),
    list(itertools.product([torch.bfloat16, torch.float16], [torch.float32, None], [None, torch.float32])),
)
def test_it_rounds_where_the_original_does(
    low: torch.dtype, soft: torch.dtype | None, out: torch.dtype | None
) -> None:
    tensors, operands = inputs(dtype=low)
    spec = replace(
        spec_of([Scale(0.5), Mask(3, -INF)]), dtype=low, softmax_dtype=soft or low, out_dtype=out or low
    )
    k, v = (t.repeat_interleave(H // G, 1) for t in tensors[1:])
    scores = ((tensors[0] @ k.mT) * 0.5).masked_fill(~operands[3], -INF)
    want = (scores.softmax(-1, dtype=soft).to(low) @ v).to(out or low)
    got = operator(spec, tensors, operands)
    assert got.dtype is want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(
    "spec",
    [
        spec_of([]),
        spec_of([Scale(0.5), SoftCap(3.0), Bias(1, "hj"), Mask(3, -INF)], [WeightScale(1.0, 5, "i")]),
        spec_of([ScaleBy(2, "h"), Mask(4, -1e9, True)], [Keep(3), ZeroEmptyRows()], sink=Sink(6, "h")),
    ],
    ids=str,
)
def test_the_operator_is_a_good_citizen(spec: Attention) -> None:
    tensors, operands = inputs()
    mine = leaves([*tensors, *given_to(spec, operands)])
    torch.library.opcheck(torch.ops.fusepass.attention.default, (*mine[:3], mine[3:], encode(spec)))


@pytest.mark.parametrize(
    "names", [("scale", "softcap"), ("scale by heads", "bias", "mask"), ("bias of heads and keys, scaled",)]
)
def test_gradients_are_the_slopes(names: tuple[str, ...]) -> None:
    """Finite differences, which share nothing with either derivation."""
    spec = spec_of([SCORES[name] for name in names], [WEIGHTS["factor of rows"]])
    tensors, operands = inputs()
    mine = leaves([*tensors, *given_to(spec, operands)])
    program = encode(spec)
    assert torch.autograd.gradcheck(
        lambda *t: torch.ops.fusepass.attention(*t[:3], list(t[3:]), program), mine, fast_mode=True
    )


def test_a_gradient_goes_where_it_is_asked_for_alone() -> None:
    tensors, operands = inputs()
    spec = spec_of([Bias(0, "bhij"), Mask(3, -INF)])
    tensors[1].requires_grad_()
    operator(spec, tensors, operands).sum().backward()
    assert tensors[1].grad is not None and all(t.grad is None for t in (tensors[0], tensors[2], *operands))


def test_gradients_are_contiguous_copies_of_transposed_inputs_too() -> None:
    tensors, operands = inputs()
    spec = spec_of([Scale(0.5)])
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for t in tensors]
    plain = leaves(tensors)
    operator(spec, turned, operands).square().sum().backward()
    reference(spec, plain[0], plain[1], plain[2]).square().sum().backward()
    for a, b in zip(turned, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_half_precision_gradients_have_the_inputs_dtypes() -> None:
    tensors, operands = inputs(dtype=torch.bfloat16)
    spec = replace(
        spec_of([Scale(0.5), Bias(1, "hj")]),
        dtype=torch.bfloat16,
        softmax_dtype=torch.float32,
        out_dtype=torch.bfloat16,
    )
    mine = leaves([*tensors, *operands])
    operator(spec, mine[:3], mine[3:]).sum().backward()
    for t in (*mine[:3], mine[4]):
        assert t.grad is not None and t.grad.dtype is torch.bfloat16 and t.grad.shape == t.shape


def test_the_fake_result_is_the_real_one() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, operands = inputs()
    spec = replace(spec_of([Scale(0.5), Mask(3, -INF)]), out_dtype=torch.float32)
    real = operator(spec, tensors, operands)
    with FakeTensorMode() as mode:
        fakes: list[list[Tensor]] = [[mode.from_tensor(t) for t in group] for group in (tensors, operands)]
        fake = operator(spec, fakes[0], fakes[1])
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_unused_slots_are_not_asked_for() -> None:
    spec = spec_of([Bias(0), Mask(3, -INF)], [WeightScale(1.0, 5)], sink=Sink(6))
    assert slots(spec) == [0, 3, 5, 6]
    program = decode(encode(spec))
    assert [getattr(m, "slot", None) for m in (*program.scores, *program.weights, program.sink)] == [
        0,
        1,
        2,
        3,
    ]
