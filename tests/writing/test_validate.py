"""Translation validation: it catches a rule that is broken on purpose, and passes right rewrites."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.recognition.recognize import RULES, Rules
from fusepass.reports.collector import collect
from fusepass.reports.report import SiteReport
from fusepass.rules.engine import Peel, Rule, Scope, Term
from fusepass.specification.attention import Mask, Scale
from fusepass.writing.validate import is_random, site_error


def broken(name: str, change: Callable[[Peel], Peel]) -> Rules:
    """The rules, with one score rule's result changed."""

    def spoil(old: Rule) -> Rule:
        def apply(term: Term, scope: Scope) -> Any:
            peeled = old.apply(term, scope)
            return change(peeled) if isinstance(peeled, Peel) else peeled

        return replace(old, apply=apply)

    return replace(RULES, scores=tuple(spoil(r) if r.name == name else r for r in RULES.scores))


def twice_as_much(peel: Peel) -> Peel:
    """A scale rule that records twice the factor."""
    return (
        replace(peel, modifier=Scale(2 * peel.modifier.factor)) if isinstance(peel.modifier, Scale) else peel
    )


def inside_out(peel: Peel) -> Peel:
    """A mask rule that confuses hidden with visible."""
    mask = peel.modifier
    return replace(peel, modifier=replace(mask, attends=not mask.attends)) if isinstance(mask, Mask) else peel


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with a scale."""
    scores = q @ k.transpose(-2, -1) * 0.3
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -1e30).softmax(-1) @ v


def run(rules: Rules, validate: bool, kernel: str) -> tuple[list[SiteReport], float]:
    """The sites' reports, and the largest difference from eager."""
    reports: list[SiteReport] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        options = Options(inner="eager", kernel=kernel, validate=validate)
        reports.extend(rewrite_graph(gm, options, inputs, rules).sites)
        return gm.forward

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
    out = torch.compile(attention, backend=backend)(q, k, v)
    return reports, (out - attention(q, k, v)).abs().max().item()


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(("name", "change"), [("scale", twice_as_much), ("mask", inside_out)])
def test_a_broken_rule_is_caught(
    name: str, change: Callable[[Peel], Peel], kernel: str, caplog: pytest.LogCaptureFixture
) -> None:
    rules = broken(name, change)
    trusted, error = run(rules, validate=False, kernel=kernel)
    assert trusted[0].fused
    assert error > 0.05  # it is really broken

    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, logger="fusepass"):
        checked, error = run(rules, validate=True, kernel=kernel)
    assert not checked[0].fused
    assert "validation" in (checked[0].reason or "")
    assert error < 1e-6
    assert any("stays" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_right_rules_pass(kernel: str) -> None:
    sites, error = run(RULES, validate=True, kernel=kernel)
    assert sites[0].fused
    assert sites[0].max_error is not None
    assert sites[0].max_error <= 1.0
    assert error < 1e-5


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Key padding as an added mask."""
    return (q @ k.mT * 0.25 + (1.0 - keep[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min).softmax(
        -1
    ) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Grouped heads, a softcap and padding, written in place."""
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    scores = 5 * torch.tanh(q @ k.mT / 5)
    scores.masked_fill_(~keep[:, None, None].bool(), -1e9)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("program", [padded, grouped])
def test_real_programs_pass(program: Callable[..., Tensor], dtype: torch.dtype, dynamic: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8, 16, dtype=dtype) for _ in range(3))
    keep = torch.ones(2, 8, dtype=torch.long)
    keep[1, 5:] = 0
    options: dict[str, Any] = {"inner": "eager", "validate": True}
    with collect() as seen, torch.no_grad():
        torch.compile(program, backend="fusepass", options=options, dynamic=dynamic)(q, k, v, keep)
    assert [site.fused for site in seen.sites] == [True], [site.reason for site in seen.sites]
    assert all(site.max_error is not None and site.max_error <= 1.0 for site in seen.sites)


# ---------------------------------------------------------------------------------------- what is allowed

EPS = torch.finfo(torch.float32).eps


def judged(original: Callable[..., Tensor], replacement: Callable[..., Tensor]) -> float:
    """The error of a replacement, both being functions of a tensor ``x`` of 4 by 8."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(4, 8)
    first, second = graph.call_function(original, (x,)), graph.call_function(replacement, (x,))
    first.meta["example_value"] = torch.empty(4, 8)
    return site_error(first, second)


def like_ones(x: Tensor) -> Tensor:
    """Exact in every dtype."""
    return torch.ones_like(x)


def off_by(roundings: float) -> Callable[[Tensor], Tensor]:
    """One element is wrong by this many units in the last place."""

    def almost(x: Tensor) -> Tensor:
        out = torch.ones_like(x)
        out[1, 2] += roundings * EPS
        return out

    return almost


@pytest.mark.parametrize(
    ("roundings", "ratio"), [(0, 0.0), (4, 0.25), (16, 1.0), (18, 1.125), (160, 10.0), (1e6, 62500.0)]
)
def test_sixteen_roundings_are_allowed(roundings: float, ratio: float) -> None:
    assert judged(like_ones, off_by(roundings)) == pytest.approx(ratio, rel=1e-3, abs=0)


def rounded(by: float) -> Callable[[Tensor], Tensor]:
    """Wrong by a number in its own dtype, and exact in float64."""

    def almost(x: Tensor) -> Tensor:
        return torch.ones_like(x) + (0.0 if x.dtype is torch.float64 else by)

    return almost


@pytest.mark.parametrize(("ours", "passes"), [(0.5, True), (1.9, True), (-1.9, True), (2.1, False)])
def test_twice_the_error_of_the_original_is_allowed(ours: float, passes: bool) -> None:
    assert (judged(rounded(1e-2), rounded(ours * 1e-2)) <= 1.0) is passes


def hidden(value: float) -> Callable[[Tensor], Tensor]:
    """One element is not finite."""

    def with_hole(x: Tensor) -> Tensor:
        out = torch.ones_like(x)
        out[0, 0] = value
        return out

    return with_hole


WRONG: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "a shape": (like_ones, lambda x: torch.ones(4, 1)),
    "a NaN": (like_ones, hidden(float("nan"))),
    "an infinity": (like_ones, hidden(float("inf"))),
    "a number for a NaN": (hidden(float("nan")), like_ones),
    "everything": (torch.sin, torch.cos),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_wrong(name: str) -> None:
    assert judged(*WRONG[name]) > 1.0


def test_what_is_not_finite_in_both_is_not_compared() -> None:
    assert judged(hidden(float("nan")), hidden(float("nan"))) == 0.0
    assert judged(lambda x: x / 0 * 0, lambda x: x / 0 * 0) == 0.0


@pytest.mark.parametrize(
    ("args", "kwargs", "random"),
    [
        ((0.1,), {}, True),
        ((0.1, True), {}, True),
        ((0.1, False), {}, False),
        ((0.1,), {"training": False}, False),
        ((0.1,), {"training": True}, True),
    ],
)
def test_what_is_drawn_is_not_run(args: tuple[Any, ...], kwargs: dict[str, Any], random: bool) -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.nn.functional.dropout, (graph.placeholder("x"), *args), kwargs)
    assert is_random(node) is random
