"""Look-alikes: what is not attention, or may not be rewritten, stays, with its reason and eager's numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import checking

B, H, Q, K, D = 2, 4, 5, 7, 8
Case = Callable[..., Tensor]

#: A part of the reason that a user reads; None if nothing is reported.
STAYS: dict[str, tuple[Case, str | None]] = {}


def stays(reason: str | None) -> Callable[[Case], Case]:
    """Register a look-alike with its reason."""

    def register(case: Case) -> Case:
        STAYS[case.__name__.strip("_").replace("_", " ")] = (case, reason)
        return case

    return register


def random_inputs() -> dict[str, Tensor]:
    """Query, key and value."""
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, Q, D), "k": (B, H, K, D), "v": (B, H, K, D)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


# ------------------------------------------------------------------------------- the wrong axis

_AXIS = "another axis"


@stays(_AXIS)
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -2) @ v


@stays(_AXIS)
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), 1) @ v


@stays(_AXIS)
def softmax_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), 0) @ v


@stays(_AXIS)
def exponentials_summed_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return (e / e.sum(-2, keepdim=True)) @ v


@stays("vary over the key position")
def softmax_over_heads_and_keys_together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhqd,bhkd->bqhk", q, k).reshape(B, Q, H * K)
    return torch.softmax(s, -1) @ v.reshape(B, H * K, D)


@stays("more keys")
def some_keys_dropped_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1)[..., :5] @ v[:, :, :5]


@stays(_AXIS)
def first_keys_dropped_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1)[..., 2:] @ v[:, :, 2:]


@stays(_AXIS)
def every_second_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1)[..., ::2] @ v[:, :, ::2]


@stays(_AXIS)
def values_summed_over_the_batch_too(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->hqd", torch.softmax(scores(q, k), -1), v)


@stays(_AXIS)
def values_not_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bqkd", torch.softmax(scores(q, k), -1), v)


@stays("do not vary over the keys")
def one_value_for_all_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1) @ v[:, :, :1].expand(-1, -1, K, -1)


# ------------------------------------------------------------------------------- mixed heads


@stays("head")
def talking_heads_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.einsum("gh,bhqk->bgqk", q[0, :, :H, 0], scores(q, k)), -1) @ v


@stays("head")
def talking_heads_by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = scores(q, k).permute(0, 2, 3, 1) @ q[0, :, :H, 0]
    return torch.softmax(mixed.permute(0, 3, 1, 2), -1) @ v


@stays(_AXIS)
def talking_heads_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("gh,bhqk->bgqk", q[0, :, :H, 0], torch.softmax(scores(q, k), -1)) @ v


@stays(None)
def groups_summed_in_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An einsum that forgets the groups in its result sums over them: not grouped heads."""
    s = torch.einsum("bghqd,bhkd->bhqk", q.view(B, 2, 2, Q, D), k[:, :2])
    return torch.softmax(s, -1) @ v[:, :2]


@stays("the weights go through 'conv2d'")
def heads_mixed_by_a_convolution_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(torch.softmax(scores(q, k), -1), q[0, :, :H, :1, None]) @ v


@stays(_AXIS)
def heads_mixed_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Talking heads (arXiv 2003.02436)."""
    before, after = q[0, :, :H, 0], q[1, :, :H, 0]
    w = torch.softmax(torch.einsum("gh,bhqk->bgqk", before, scores(q, k)), -1)
    return torch.einsum("gh,bhqk->bgqk", after, w) @ v


# ------------------------------------------------------------------------------- other readers

_USED, _THEMSELVES = "its scores or weights are", "computed from the scores themselves"


@stays(_USED)
def scores_reused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.softmax(s, -1) @ v + s.sum()


@stays(_USED)
def weights_averaged_and_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    return torch.cat([w @ v, w.mean(-1, keepdim=True)], -1)


@stays(_USED)
def dropped_weights_are_shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.dropout(torch.softmax(scores(q, k), -1), 1e-9, True)
    return torch.cat([w @ v, w @ k], -1)


@stays(_USED)
def weights_are_shared_with_values_of_every_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    relative = torch.linspace(-1, 1, w.shape[-2] * w.shape[-1] * v.shape[-1]).view(*w.shape[-2:], -1)
    return w @ v + torch.einsum("bhij,ijd->bhid", w, relative)


@stays(_USED)
def entropy_of_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    return w @ v - (w * w.log()).sum(-1, keepdim=True)


@stays(_USED)
def scores_handed_to_the_next_layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Residual attention: the next layer's scores start from these (RealFormer, arXiv 2012.11747)."""
    first = scores(q, k)
    second = scores(torch.softmax(first, -1) @ v, k) + first
    return torch.softmax(second, -1) @ v + second.mean(-1, keepdim=True)


@stays(_USED)
def relative_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights are multiplied with values of keys and with values of offsets (arXiv 1803.02155)."""
    offsets = (torch.arange(K)[None] - torch.arange(Q)[:, None]).clamp(-2, 2) + 2
    w = torch.softmax(scores(q, k), -1)
    return w @ v + torch.einsum("bhqk,qkd->bhqd", w, q[0, 0][offsets])


@stays(_THEMSELVES)
def top_k_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.softmax(s.masked_fill(s < s.topk(3, -1).values[..., -1:], float("-inf")), -1) @ v


@stays(_THEMSELVES)
def scores_above_a_threshold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.softmax(s.masked_fill(s < -4, float("-inf")), -1) @ v


@stays(_THEMSELVES)
def scores_times_those_of_the_next_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.softmax(s * s.roll(1, -2), -1) @ v


# ------------------------------------------------------------------------------- other functions


@stays(None)
def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(scores(q, k)) @ v


@stays(None)
def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k)) @ v


@stays(None)
def exponentials_without_a_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(scores(q, k)) @ v


@stays("'pow'")
def scores_to_a_power_that_is_not_defined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) ** 1.5, -1) @ v


@stays("'exp'")
def exponentials_that_may_overflow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).exp(), -1) @ v


@stays("'sqrt'")
def roots_with_infinite_slopes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).relu().sqrt(), -1) @ v


@stays(None)
def negative_distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-torch.cdist(q, k), -1) @ v


@stays("softmax")
def softmax_of_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.softmax(scores(q, k), -1), -1) @ v


@stays(None)
def divided_by_another_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (torch.exp(s) / torch.exp(s * 2).sum(-1, keepdim=True)) @ v


@stays(None)
def another_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.exp(s - torch.logsumexp(2 * s, -1, keepdim=True)) @ v


@stays(None)
def clamped_denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return (e / e.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


@stays(None)
def rescaled_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1) + 1e-3
    return (w / w.sum(-1, keepdim=True)) @ v


@stays(None)
def slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries compete for keys, and the weights of each query are made to sum to one (arXiv 2006.15055)."""
    w = torch.softmax(scores(q, k), -2) + 1e-8
    return (w / w.sum(-1, keepdim=True)) @ v


@stays(None)
def outlook_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights of a linear layer, for values around each query (VOLO, arXiv 2106.13112)."""
    near = v[:, :, (torch.arange(Q)[:, None] + torch.arange(K)[None]) % K]
    return torch.einsum("bhqk,bhqkd->bhqd", torch.softmax(F.linear(q, k[0, 0]), -1), near)


@stays(None)
def renormalised_after_masking(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Masked weights divided by their sum and a little more, as in AllenNLP's `masked_softmax`."""
    seen = (~later()).float()
    w = torch.softmax(scores(q, k) * seen, -1) * seen
    return (w / (w.sum(-1, keepdim=True) + 1e-13)) @ v


@stays("the denominator adds")
def denominator_plus_a_value_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return (e / (e.sum(-1, keepdim=True) + e[..., :1])) @ v


# ------------------------------------------------------------------------------- masks that are none


def later(n: int = Q, m: int = K) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).triu(1)


@stays("another tensor")
def where_chooses_scaled_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.softmax(torch.where(later(), s * 2, s), -1) @ v


@stays("another tensor")
def where_chooses_another_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.where(later(), k[:, :, :Q, :K], scores(q, k)), -1) @ v


@stays("other than zero")
def weights_replaced_by_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1).masked_fill(later(), 0.1) @ v


@stays("not zero")
def nan_weights_become_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nan_to_num(torch.softmax(scores(q, k), -1), nan=1.0) @ v


# ------------------------------------------------------------------------------- routers


@stays(None)
def mixture_of_experts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens, router, experts = q[0, 0], k[0, 0], v[0, 0].unsqueeze(-1) * k[0, 1].unsqueeze(1)
    gates = torch.softmax(tokens @ router.t(), -1)
    return torch.einsum("te,teo->to", gates, torch.einsum("td,edo->teo", tokens, experts))


@stays(None)
def top_experts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gates = torch.softmax(q[0, 0] @ k[0, 0].t(), -1)
    best, which = gates.topk(2, -1)
    return (best.unsqueeze(-1) * v[0, 0][which]).sum(1)


@stays(None)
def classifier(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(F.linear(q, k[0, 0]), -1)


# ------------------------------------------------------------------------------- written over

_OVER = "written over"


@stays(_OVER)
def query_written_over_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    q.mul_(2)
    return torch.softmax(s, -1) @ v + q.sum()


@stays(_OVER)
def key_written_over_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    k[:, :, 0].zero_()
    return torch.softmax(s, -1) @ v


@stays(_OVER)
def key_cache_written_over_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A step that advances its cache between the two products."""
    s = scores(q, k)
    k.copy_(torch.cat([k[:, :, 1:], q[:, :, :1]], 2))
    return torch.softmax(s, -1) @ v


@stays(_OVER)
def key_cache_scaled_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k[:, :, 2:3] = q[:, :, :1]
    w = torch.softmax(scores(q, k), -1)
    k.index_copy_(2, torch.tensor([3]), q[:, :, :1])
    return w @ v


@stays("detach")
def weights_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1).detach() @ v


@stays("the weights go through 'argmax'")
def straight_through_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    hard = F.one_hot(w.argmax(-1), K).to(w.dtype)
    return (w + (hard - w).detach()) @ v


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("name", STAYS)
def test_stays_with_its_reason(name: str, kernel: str) -> None:
    case, reason = STAYS[name]
    eager = checking.call(case, random_inputs())
    got = checking.call(checking.compiled(case, kernel), random_inputs())
    fused = [s for s in got.sites if s.fused]
    assert not fused, f"fused as {fused[0].spec}:\n{inspect.getsource(case)}"
    checking.assert_identical(got.out, eager.out)
    if reason is None:
        return
    reasons = [s.reason or "" for s in got.sites]
    assert any(reason in r for r in reasons), f"expected {reason!r} in {reasons}:\n{inspect.getsource(case)}"


# ------------------------------------------------------------------------------- fused or not, right


def query_written_over_and_copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = q * 1
    s = scores(own, k)
    own.zero_()
    return torch.softmax(s, -1) @ v + own.sum()


def value_written_over_before_its_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    v.add_(1)
    return w @ v


def inputs_written_over_after_the_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.softmax(scores(q, k), -1) @ v
    q.zero_()
    v.zero_()
    return out


def mask_written_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = later()
    s = scores(q, k).masked_fill(hidden, -1e9)
    hidden.fill_(False)
    return torch.softmax(s, -1) @ v


def bias_written_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = k[0, 0, :, 0].clone()
    s = scores(q, k) + bias
    bias.zero_()
    return torch.softmax(s, -1) @ v


def column_of_the_weights_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    w[..., 0] = 0
    return w @ v


def weights_zeroed_after_their_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(scores(q, k), -1)
    out = w @ v
    w.zero_()
    return out


def row_of_the_scores_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[:, :, 1] = 0.25
    return torch.softmax(s, -1) @ v


def batch_mask_that_broadcasts_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask [B, K] over scores [Q, K] with Q = B: its rows belong to queries, so it is not key padding."""
    s = torch.einsum("qd,kd->qk", q[0, 0, :B], k[0, 0])
    return torch.softmax(s.masked_fill(k[:, 0, :, 0] > 1, float("-inf")), -1) @ v[0, 0]


def head_bias_on_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias over the batch in 3-D scores, whose first axis may be mistaken for heads."""
    s = scores(q[:, 0], k[:, 0]) + v[:, 0, 0, 0].view(B, 1, 1) * torch.arange(K)
    return torch.softmax(s, -1) @ v[:, 0]


def values_of_other_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1) @ v.flip(1)


def reversed_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k.flip(2)), -1) @ v


def unsigned_positions_wrap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(Q, dtype=torch.uint8)[:, None], torch.arange(K, dtype=torch.uint8)[None]
    return torch.softmax(scores(q, k).masked_fill((j - i) > 0, -1e9), -1) @ v


def narrow_positions_wrap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(Q, dtype=torch.int8)[:, None], torch.arange(K, dtype=torch.int8)[None]
    return torch.softmax(scores(q, k).masked_fill((j * 40 - i * 40) > 0, -1e9), -1) @ v


def fractional_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.arange(K)[None] * 0.5 > torch.arange(Q)[:, None]
    return torch.softmax(scores(q, k).masked_fill(hidden, -1e9), -1) @ v


def truncated_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gap = torch.arange(K)[None] - torch.arange(Q)[:, None]
    hidden = torch.div(gap, 2, rounding_mode="trunc") > 0
    return torch.softmax(scores(q, k).masked_fill(hidden, -1e9), -1) @ v


def weights_times_a_number_for_every_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(scores(q, k), -1) * k[0, 0, :, 0]) @ v


def scores_that_are_the_next_layer_s_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Residual attention: only the last layer's scores have no other reader."""
    first = scores(q, k)
    second = scores(torch.softmax(first, -1) @ v, k) + first
    return torch.softmax(second, -1) @ v


def mask_then_negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-scores(q, k).masked_fill(later(), -1e9), -1) @ v


def mask_then_a_small_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).masked_fill(later(), -1e9) / 1e8, -1) @ v


def mask_then_zero_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).masked_fill(later(), -1e9) * 0.0, -1) @ v


def mask_below_a_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(5 * torch.tanh(scores(q, k).masked_fill(later(), float("-inf")) / 5), -1) @ v


def large_positive_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) + torch.full((Q, K), 1e9).triu(1), -1) @ v


def lowest_number_added_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.full((Q, K), torch.finfo(torch.float32).min).triu(1)
    return torch.softmax(scores(q, k) + bias + bias, -1) @ v


def constant_mask_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    everything = torch.ones(Q, K, dtype=torch.bool)
    return torch.softmax(scores(q, k), -1).masked_fill(~everything, 0.0) @ v


def float_mask_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """K equals the head size here: the factor would also fit the result, but means something else there."""
    seen = (~later(Q, D)).float()
    keys = torch.cat([k, k[:, :, :1]], 2)
    return (torch.softmax(scores(q, keys), -1) * seen) @ torch.cat([v, v[:, :, :1]], 2)


RIGHT: list[Case] = [
    query_written_over_and_copied,
    value_written_over_before_its_use,
    inputs_written_over_after_the_result,
    mask_written_over,
    bias_written_over,
    column_of_the_weights_zeroed,
    weights_zeroed_after_their_use,
    row_of_the_scores_written,
    batch_mask_that_broadcasts_over_queries,
    head_bias_on_the_batch,
    values_of_other_heads,
    reversed_keys,
    unsigned_positions_wrap,
    narrow_positions_wrap,
    fractional_positions,
    truncated_positions,
    weights_times_a_number_for_every_key,
    scores_that_are_the_next_layer_s_bias,
    mask_then_negative_scale,
    mask_then_a_small_scale,
    mask_then_zero_scale,
    mask_below_a_softcap,
    large_positive_bias,
    lowest_number_added_twice,
    constant_mask_after_the_softmax,
    float_mask_after_the_softmax,
]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.__name__)
def test_right_whether_fused_or_not(case: Case, kernel: str) -> None:
    eager, exact = checking.call(case, random_inputs()), checking.call(case, random_inputs(), torch.float64)
    inputs, mine = random_inputs(), random_inputs()
    case(**inputs)
    got = checking.call(checking.compiled(case, kernel), random_inputs())
    checking.compiled(case, kernel)(**mine)
    checking.assert_as_accurate(got.out, eager.out, exact.out)
    for name, tensor in inputs.items():
        assert torch.equal(mine[name], tensor), f"{name} is not written over as in eager"


# ------------------------------------------------------------------------------- gradients that stop


def query_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q.detach(), k), -1) @ v


def scores_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).detach(), -1) @ v


def value_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1) @ v.detach()


def maximum_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True).detach())
    return (e / e.sum(-1, keepdim=True)) @ v


def sum_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k))
    return (e / e.sum(-1, keepdim=True).detach()) @ v


def weights_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        w = torch.softmax(scores(q, k), -1)
    return w @ v


def scores_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = scores(q, k)
    return torch.softmax(s, -1) @ v


def scaled_key_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k * 0.5
    return torch.softmax(scores(q, k), -1) @ v


def key_view_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.reshape(B, H, K, D).transpose(-2, -1)
    return torch.softmax(q @ k, -1) @ v


def bias_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        bias = k.sum(-1)[:, :, None]
    return torch.softmax(scores(q, k) + bias, -1) @ v


def all_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        out = torch.softmax(scores(q, k), -1) @ v
    return out + v.sum(2, keepdim=True)


STOPPED: list[Case] = [
    query_detached,
    scores_detached,
    value_detached,
    maximum_detached,
    sum_detached,
    weights_without_gradient,
    scores_without_gradient,
    scaled_key_without_gradient,
    key_view_without_gradient,
    bias_without_gradient,
    all_without_gradient,
    weights_detached,
    straight_through_weights,
]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("case", STOPPED, ids=lambda case: case.__name__)
def test_gradients_stop_where_eager_s_do(case: Case, kernel: str) -> None:
    got = checking.call(checking.compiled(case, kernel), random_inputs(), grads=True)
    eager, exact = (
        checking.call(case, random_inputs(), dtype, grads=True) for dtype in (None, torch.float64)
    )
    checking.assert_same_accuracy(got, eager, exact)


def test_a_detached_maximum_is_still_a_softmax() -> None:
    assert checking.call(
        checking.compiled(maximum_detached, "reference"), random_inputs(), grads=True
    ).site.fused


def test_nothing_is_reported_for_a_function_without_attention() -> None:
    def mlp(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.gelu(q @ k[0, 0].t()).mean(-1) + v.sum()

    assert not checking.call(checking.compiled(mlp), random_inputs()).sites
