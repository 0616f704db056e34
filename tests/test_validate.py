"""Translation validation: a rule broken on purpose is caught, and right rewrites pass."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.config import Options
from fusepass.recognize import RULES, Rules
from fusepass.report import SiteReport, collect
from fusepass.rewrite import rewrite_graph
from fusepass.rule import Peel, Rule, Scope, Term
from fusepass.spec import Mask, Scale


def broken(name: str, change: Callable[[Peel], Peel]) -> Rules:
    """The rules, with one score rule's result changed."""

    def spoil(old: Rule) -> Rule:
        def apply(term: Term, scope: Scope) -> Any:
            found = old.apply(term, scope)
            return change(found) if isinstance(found, Peel) else found

        return replace(old, apply=apply)

    return replace(RULES, scores=tuple(spoil(r) if r.name == name else r for r in RULES.scores))


def twice_as_much(peel: Peel) -> Peel:
    """A scale rule that records twice the factor."""
    return (
        replace(peel, modifier=Scale(2 * peel.modifier.factor)) if isinstance(peel.modifier, Scale) else peel
    )


def inside_out(peel: Peel) -> Peel:
    """A mask rule that takes hidden for visible."""
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
