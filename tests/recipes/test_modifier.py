"""docs/recipes/modifier.md: a class and a rule, which obey every law of modifiers and of rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.expressions.ir import pointwise
from fusepass.host.config import Options
from fusepass.kernels import KERNELS, REFERENCE
from fusepass.patterns import examples as eg
from fusepass.patterns.terms import number
from fusepass.recognition.recognize import RULES
from fusepass.reports.report import SiteReport
from fusepass.rules.engine import Peel, Rule, Scope, Term, rule
from fusepass.specification.attention import Band, Bias, Mask, Scale, ScoreModifier, empty_rows, merge_scales
from fusepass.specification.modifiers import KINDS, Sample, Tensors, kinds
from fusepass.specification.program import decode
from fusepass.specification.samples import Draw
from tests.capture import dynamo_graph, qkv
from tests.patterns import test_laws as laws_of_rules
from tests.specification import test_modifiers as laws_of_modifiers
from tests.written import CPU, spec_of

INF = float("inf")
MASK = Mask(0, -INF, atoms=(Band(None, 0),))


@pytest.fixture
def squash() -> Iterator[Any]:
    """Step 1: a new class that says no more than it must."""

    @dataclass(frozen=True)
    class Squash(ScoreModifier):
        """``height * sigmoid(s)``."""

        height: float

        def __str__(self) -> str:
            return f"squash {self.height:g}"

        def apply(self, x: Tensor, operands: Tensors) -> Tensor:
            return self.height * x.sigmoid()

        def backward(
            self, grad: Tensor, before: Tensor, operands: Tensors, gradients: list[Tensor]
        ) -> Tensor:
            return grad * self.height * before.sigmoid() * (1 - before.sigmoid())

        @classmethod
        def samples(cls, draw: Draw) -> list[Sample]:
            return [(cls(2.0), ())]

    yield Squash
    del KINDS["Squash"]
    decode.cache_clear()  # its texts name the class


@pytest.fixture
def squashed(squash: Any) -> Rule:
    """Step 2: a rule, an identity with an example."""

    @rule(
        "squash: c * sigmoid(x)",
        lambda: eg.binary("mul", pointwise("sigmoid", eg.scores()), eg.number(2.0)),
    )
    def squashed(term: Term, scope: Scope) -> Peel | None:
        """A height above zero, on either side of the product."""
        for position in (0, 1) if term.expr.op == "mul" else ():
            height = number(term.expr.args[1 - position], scope)
            if height is not None and height > 0 and term.expr.args[position].op == "sigmoid":
                return Peel(term.argument(position).argument(0), squash(height))
        return None

    return squashed


def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = ((q @ k.mT).sigmoid() * 2.0 * 8.0).masked_fill(torch.ones(6, 6).triu(1) > 0, -INF)
    return s.softmax(-1) @ v


def rewritten(kernel: str, *rules: Rule) -> tuple[SiteReport, fx.GraphModule]:
    """The program's one site, with more rules for scores, and its graph."""
    graph = dynamo_graph(program, *(t.requires_grad_() for t in qkv()))
    more = replace(RULES, scores=(*rules, *RULES.scores))
    (site,) = rewrite_graph(graph, Options(kernel=kernel), rules=more).sites
    return site, graph


# ------------------------------------------------------------ the class


def test_the_class_obeys_every_law_of_modifiers(squash: Any) -> None:
    """Those of tests/specification/test_modifiers.py, alone and around every other modifier."""
    for sample in squash.samples(Draw(1)):
        laws_of_modifiers.test_a_modifier_is_frozen_data_that_says_what_it_is(sample)
        laws_of_modifiers.test_a_program_reads_back_what_was_written_and_computes_it(sample)
        laws_of_modifiers.test_a_shift_of_rows_cancels_where_it_says_so(sample)
        for hurt in (False, True):
            laws_of_modifiers.test_the_derivative_is_that_of_the_meaning(sample, hurt)
        for factor in laws_of_modifiers.FACTORS:
            laws_of_modifiers.test_a_scale_passes_only_what_it_commutes_with(sample, factor)
        for fill in laws_of_modifiers.FILLS:
            laws_of_modifiers.test_what_is_hidden_stays_as_hidden_as_it_says(sample, fill)
            laws_of_modifiers.test_a_row_of_one_level_stays_one_where_it_says_so(sample, fill, torch.float32)
        laws_of_modifiers.test_merged_scales_compute_the_same_scores(sample)
        laws_of_modifiers.test_the_derivative_of_pairs_is_that_of_the_oracle(sample)
        laws_of_modifiers.test_a_mask_that_hides_leaves_no_weight(sample)


def test_what_it_does_not_say_is_assumed_safely(squash: Any) -> None:
    mod = squash(2.0)
    assert squash in kinds(ScoreModifier) and merge_scales([mod, Scale(3.0)]) == (mod, Scale(3.0))
    assert merge_scales([Scale(2.0), Bias(0), mod, Scale(3.0)]) == (Scale(2.0), Bias(0), mod, Scale(3.0))
    assert spec_of([mod, MASK]).is_causal()
    assert not spec_of([MASK, mod]).is_causal() and not spec_of([MASK, mod]).hides(MASK)
    assert empty_rows(spec_of([MASK, mod], rows_seen=False)) == "unknown"
    assert not Scope(space=None, above=[mod]).shifts_cancel()  # type: ignore[arg-type]
    assert Scope(space=None, above=[Scale(2.0)]).shifts_cancel()  # type: ignore[arg-type]


def test_kernels_that_do_not_name_it_refuse_it(squash: Any) -> None:
    mod = squash(2.0)
    for kernel, device in itertools.product(KERNELS, ("cpu", "cuda")):
        for scores in ([mod], [mod, Scale(3.0)], [MASK, mod]):
            refused = kernel.refuse(spec_of(scores), replace(CPU, device=device))
            assert (refused is None) == (kernel is REFERENCE), kernel.name
        if kernel is not REFERENCE:
            assert "it has no 'squash 2'" in str(kernel.takes.refuse(spec_of([mod])))


@pytest.mark.parametrize(
    ("member", "wrong"),
    [
        ("backward", lambda self, grad, before, operands, gradients: grad),
        ("scaled", lambda self, factor: self),
        ("hidden", lambda self, fill: fill),
        ("keeps_shift", property(lambda self: True)),
    ],
)
def test_a_class_that_says_what_is_not_so_breaks_a_law(
    squash: Any, member: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squash, member, wrong)
    with pytest.raises(AssertionError):
        test_the_class_obeys_every_law_of_modifiers(squash)


# ------------------------------------------------------------ the rule


def test_the_rule_obeys_every_law_of_rules(squashed: Rule) -> None:
    """Those of tests/patterns/test_laws.py."""
    laws_of_rules.test_a_rule_says_its_law_and_what_it_does("scores", squashed)
    laws_of_rules.test_a_rule_applies_to_its_own_example("scores", squashed)
    laws_of_rules.test_a_rule_ignores_what_does_not_concern_it("scores", squashed)
    for seed in laws_of_rules.SEEDS:
        laws_of_rules.test_a_rule_is_an_identity("scores", squashed, seed)


def test_a_rule_that_is_no_identity_breaks_a_law(squash: Any, squashed: Rule) -> None:
    def wrong(term: Term, scope: Scope) -> Peel | None:
        """Takes another height."""
        peeled = squashed.apply(term, scope)
        return Peel(peeled.inner, squash(0.5)) if isinstance(peeled, Peel) else None

    with pytest.raises(AssertionError):
        test_the_rule_obeys_every_law_of_rules(replace(squashed, apply=wrong))


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_site_is_recognised_and_computed_with_its_gradients(squashed: Rule, kernel: str) -> None:
    site, graph = rewritten(kernel, squashed)
    assert "squash 2, scale 8, causal" in site.spec and site.kernel == "reference"
    args = qkv()
    letters = [n.target[2] for n in graph.graph.find_nodes(op="placeholder")]  # L_q_
    mine, theirs = ([t.clone().requires_grad_() for t in args] for _ in range(2))
    (got,), want = graph(*(mine["qkv".index(letter)] for letter in letters)), program(*theirs)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_kernel_asked_for_by_name_says_why_the_site_stays(squashed: Rule) -> None:
    site, _ = rewritten("flex", squashed)
    assert not site.fused and site.reason == "flex: it has no 'squash 2'"


def test_without_the_rule_it_is_one_of_all_functions_of_a_score() -> None:
    site, _ = rewritten("reference")
    assert site.fused and "function sigmoid(s), scale 16" in site.spec
