"""Scores through functions of themselves, and shifts of them that the softmax cancels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusepass import report
from tests import checking  # noqa: F401  (faults of the pass are raised)
from tests.capture import agrees, qkv

Scores = Callable[[Tensor], Tensor]
DIAGONAL = torch.eye(6, dtype=torch.bool)


def hidden_later(s: Tensor) -> Tensor:
    return s.masked_fill(torch.ones(6, 6).triu(1) > 0, -math.inf)


def distance() -> Tensor:
    """A tenth of the distance between query and key."""
    return 0.1 * (torch.arange(6.0) - torch.arange(6.0)[:, None]).abs()


#: What is recognised -> spellings of it.
FUNCTIONS: dict[str, list[Scores]] = {
    "clamp -0.5 to inf, clamp -inf to 0.7": [
        lambda s: s.clamp(-0.5, 0.7),
        lambda s: torch.minimum(torch.maximum(s, torch.tensor(-0.5)), torch.tensor(0.7)),
    ],
    "clamp 0.1 to inf": [lambda s: s.clamp_min(0.1), lambda s: s.clip(min=0.1)],
    "relu": [F.relu, torch.relu, lambda s: F.relu(s.clone(), inplace=True)],
    "leaky relu 0.2": [
        lambda s: F.leaky_relu(s, 0.2),
        lambda s: torch.where(s > 0, s, 0.2 * s),
        lambda s: torch.maximum(s, s * 0.2),
    ],
    "abs": [torch.abs, lambda s: s.abs_()],
    "abs, scale -2": [lambda s: -2 * s.abs()],
    "relu, causal": [lambda s: hidden_later(F.relu(s))],
    "function mul(s, sigmoid(s))": [
        F.silu,
        lambda s: s * torch.sigmoid(s),
        lambda s: F.silu(s, inplace=True),
    ],
    "function mul(s, sigmoid(s)), causal": [lambda s: hidden_later(F.silu(s))],
    "function mul(s, sigmoid(mul(s, 1.702)))": [lambda s: s * torch.sigmoid(s * 1.702)],
    "function mul(s, mul(add(erf(div(s, 1.414)), 1), 0.5))": [
        F.gelu,
        lambda s: s * ((torch.erf(s / math.sqrt(2)) + 1) * 0.5),
    ],
    "function mul(s, sigmoid(mul(mul(s, 1.596), add(mul(mul(s, s), 0.04471…": [
        lambda s: F.gelu(s, approximate="tanh"),
    ],
    "function add(relu(s), expm1(min(s, 0)))": [F.elu, lambda s: s.relu() + torch.expm1(s.clamp(max=0))],
    "function add(relu(s), mul(expm1(div(min(s, 0), 0.5)), 0.5))": [lambda s: F.celu(s, 0.5)],
    "function add(relu(s), mul(expm1(min(s, 0)), 1.673)), scale 1.0507": [F.selu],
    "function add(relu(s), log1p(exp(neg(abs(s)))))": [F.softplus],
    "function add(relu(s), div(log1p(exp(neg(mul(abs(s), 2)))), 2))": [lambda s: F.softplus(s, beta=2)],
    "function log1p(exp(s))": [lambda s: torch.log1p(torch.exp(s))],
    "function log(add(exp(s), 1))": [lambda s: torch.log(torch.exp(s) + 1)],
    "function mul(s, tanh(add(relu(s), log1p(exp(neg(abs(s)))))))": [F.mish],
    "function div(s, add(abs(s), 1))": [F.softsign, lambda s: s / (s.abs() + 1)],
    "function mul(s, div(min(max(add(s, 3), 0), 6), 6))": [F.hardswish],
    "clamp -0.5 to inf, clamp -inf to 0.25": [lambda s: F.hardtanh(s, -0.5, 0.25)],
    "function sigmoid(s)": [torch.sigmoid],
    "function sub(s, tanh(s))": [F.tanhshrink],
    "function pow(s, 3)": [lambda s: s**3],
    "function mul(s, s)": [lambda s: s * s, torch.square],
    "function div(s, sqrt(add(abs(s), 0.01)))": [lambda s: s / (s.abs() + 0.01).sqrt()],
    "function div(1, add(abs(s), 1))": [lambda s: 1 / (s.abs() + 1)],
    "function max(s, [ij])": [
        lambda s: torch.maximum(s, -distance()),
        lambda s: s.clamp(min=-distance()),
    ],
    "function mul(s, sigmoid(add(s, [ij])))": [lambda s: s * torch.sigmoid(s + distance())],
    "causal, function sigmoid(s)": [lambda s: hidden_later(s).sigmoid()],
    "causal, clamp -3 to inf": [lambda s: hidden_later(s).clamp(min=-3)],
    "mask[ij]": [
        lambda s: s.masked_fill(DIAGONAL, -100.0),
        lambda s: torch.where(DIAGONAL, 0.0, s),
        lambda s: s.masked_fill(DIAGONAL, 2.5),
    ],
    "": [
        lambda s: s - s.max(),
        lambda s: s - s.detach().max(),
        lambda s: s - s.amax((-2, -1), keepdim=True),
        lambda s: s - s.mean(-1, keepdim=True),
        lambda s: s - s.mean(-1, keepdim=True).detach(),
        lambda s: s - s.mean(),
    ],
}

#: Programs that are neither a function of one score nor a shift of whole rows.
OTHERS: list[Scores] = [
    lambda s: torch.where(s > 0.5, s, 0.2 * s),
    lambda s: torch.where(s > 0, s, 0.2 * s.mT),
    lambda s: torch.maximum(s, s.mT),
    lambda s: torch.maximum(s, s * 3),
    lambda s: s - s.mean(-2, keepdim=True),
    lambda s: s.masked_fill(DIAGONAL, math.inf),
    lambda s: -s.masked_fill(DIAGONAL, 1e9),
    lambda s: s.masked_fill(DIAGONAL, -math.inf) - s.masked_fill(DIAGONAL, -math.inf).mean(-1, keepdim=True),
    lambda s: (s - s.mean(-1, keepdim=True)).relu(),
    lambda s: s * torch.sigmoid(s.mT),
    lambda s: s * torch.sigmoid(s.detach()),
    lambda s: s * (s > 0.2),
    lambda s: torch.log(s.abs()),
    lambda s: s.abs().sqrt(),
    lambda s: 1 / s,
    torch.exp,
    lambda s: (torch.exp(s) + 1) - torch.exp(s),
    lambda s: s**1.5,
    lambda s: hidden_later(s).sigmoid().log(),
    lambda s: F.silu(s.masked_fill(DIAGONAL, -math.inf)),
    lambda s: torch.maximum(s, s.amax(-1, keepdim=True) - 0.5),
    lambda s: F.softplus(s, threshold=1),
]


def result(scores: Scores, given: list[Tensor], call: Callable[..., Any] | None = None) -> list[Tensor]:
    """The attention of some scores, and the gradients of queries, keys and values."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q @ k.mT / 2).softmax(-1) @ v

    args = [t.clone().requires_grad_() for t in given]
    out = (call(attention) if call else attention)(*args)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(t.grad for t in args if t.grad is not None)]


def compared(scores: Scores, kernel: str, dynamic: bool) -> report.Collector:
    """Compare with eager: at most twice eager's error against float64 is allowed."""
    draw = torch.Generator().manual_seed(3)
    given = [torch.randn(2, 2, 6, 8, generator=draw) for _ in range(3)]
    torch._dynamo.reset()
    options: Any = {"inner": "aot_eager", "kernel": kernel}
    with report.collect() as seen:
        fused = result(
            scores, given, lambda f: torch.compile(f, backend="fusepass", options=options, dynamic=dynamic)
        )
    eager, exact = result(scores, given), result(scores, [t.double() for t in given])
    for mine, theirs, truth in zip(fused, eager, exact, strict=True):
        places = truth.isfinite()
        assert torch.equal(mine.isfinite(), places)
        error = (theirs.double() - truth)[places].abs().max() if places.any() else torch.tensor(0.0)
        torch.testing.assert_close(mine.double()[places], truth[places], rtol=0, atol=2 * error.item() + 2e-6)
    return seen


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(
    ("words", "scores"), [(words, each) for words, spellings in FUNCTIONS.items() for each in spellings]
)
def test_a_function_of_a_score_is_recognised(words: str, scores: Scores, kernel: str, dynamic: bool) -> None:
    (site,) = compared(scores, kernel, dynamic).sites
    assert site.fused, site.reason
    assert f"scale 0.5, {words})".replace(", )", ")") in site.spec


@pytest.mark.parametrize("scores", OTHERS)
def test_what_is_none_is_right(scores: Scores) -> None:
    compared(scores, "reference", False)


def test_a_function_after_a_bias_that_may_hide_keys_stays() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.silu(q @ k.mT + mask).softmax(-1) @ v

    learned = torch.nn.Parameter(torch.randn(6, 6), requires_grad=False)
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -1e9)
    (site,) = agrees(attention, *qkv(), mask).sites
    assert not site.fused and "applied to scores that a bias may hide" in str(site.reason)
    (site,) = agrees(lambda q, k, v: attention(q, k, v, learned), *qkv()).sites
    assert site.fused and "bias[ij], function" in site.spec


def test_flex_computes_each_in_inference() -> None:
    for words, (scores, *_) in FUNCTIONS.items():
        if not words:
            continue
        q, k, v = (torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))

        def attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores = scores) -> Tensor:
            return scores(q @ k.mT).softmax(-1) @ v

        torch._dynamo.reset()
        with report.collect() as seen:
            fast: Any = torch.compile(
                attention, backend="fusepass", options={"kernel": "flex", "inner": "eager"}
            )
            got = fast(q, k, v)
        assert [s.kernel for s in seen.sites] == ["flex"], [s.reason for s in seen.sites]
        torch.testing.assert_close(got, attention(q, k, v))
