"""Every rule is an identity: its example before and after gives the same numbers. So are the spec's laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusepass.expressions.index import AxisSpace, Facts
from fusepass.expressions.ir import expr
from fusepass.recognition.recognize import RULES
from fusepass.rules.engine import Core, Layer, Peel, Product, Rule, Scope, Term
from fusepass.specification.attention import (
    Band,
    Bias,
    Cast,
    Mask,
    Scale,
    SoftCap,
    intersect,
    merge_scales,
    negligible,
)
from tests.evaluate import Evaluator, Grid, random_inputs

LISTS = [field.name for field in fields(RULES)]
SEEDS = (0, 1, 2)


def every_rule() -> list[Any]:
    pairs = [(name, rule) for name in LISTS for rule in getattr(RULES, name)]
    return [pytest.param(name, rule, id=f"{name}-{rule.name}") for name, rule in pairs]


def applied(rule: Rule) -> tuple[Term, Scope, list[Layer]]:
    """The rule on its example, with one new axis per dimension; the last one stands for the keys."""
    root = rule.example()
    scope = Scope(AxisSpace(Facts()), views=RULES.layout)
    index = tuple(scope.space.new_axis("x", n) for n in root.shape)
    scope.keys = index[-1]
    term = Term(root, index)
    peeled = rule.apply(term, scope)
    if peeled is None:
        return term, scope, []
    return term, scope, list(peeled) if isinstance(peeled, Sequence) else [peeled]


def softmax(x: Tensor, dims: list[int], sink: Tensor | None = None) -> Tensor:
    norm = x.logsumexp(dims, keepdim=True)
    if sink is not None:
        assert torch.equal(sink.amin(dims), sink.amax(dims)), "a sink is one logit a row"
        norm = torch.logaddexp(norm, sink)
    return (x - norm).exp()


def after(layer: Layer, grid: Grid, scope: Scope) -> Tensor:
    """The value of the term according to a layer."""
    match layer:
        case Peel(inner, None | Cast()):  # the evaluator does not round
            return grid.term(inner)
        case Peel(inner, mod):
            assert mod is not None
            return mod.apply(grid.term(inner), [grid.term(t) for t in scope.operands])
        case Core(scores, dim):
            dims = grid.dims([scores.index[dim]])
            covered = scope.space.digits(scores.index[dim], scores.expr.shape[dim])
            assert covered is not None, "the softmax runs over a part of its dimension"
            sink = None if layer.sink is None else grid.term(layer.sink)
            return softmax(grid.term(scores), dims, sink)
        case Product(left, right, axes):
            return (grid.term(left) * grid.term(right)).sum(grid.dims(axes), keepdim=True).expand(grid.shape)
    raise AssertionError(f"unknown layer {layer!r}")


@pytest.mark.parametrize("name", LISTS)
def test_no_list_is_empty_and_no_name_is_twice(name: str) -> None:
    names = [rule.name for rule in getattr(RULES, name)]
    assert names and len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "rule"), every_rule())
def test_a_rule_says_its_law_and_what_it_does(name: str, rule: Rule) -> None:
    assert rule.law and rule.apply.__doc__, f"{name}.{rule.name} has no law or no docstring"


@pytest.mark.parametrize(("name", "rule"), every_rule())
def test_a_rule_applies_to_its_own_example(name: str, rule: Rule) -> None:
    term, _, layers = applied(rule)
    assert layers, f"{name}.{rule.name} does not apply to its example\n{term.expr}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "rule"), every_rule())
def test_a_rule_is_an_identity(name: str, rule: Rule, seed: int) -> None:
    term, scope, layers = applied(rule)
    assert layers, f"{name}.{rule.name} does not apply to its example"
    evaluate = Evaluator(random_inputs(term.expr, seed))
    grid = Grid(scope.space, evaluate)
    before = grid.term(term)
    for layer in layers:
        result = after(layer, grid, scope)
        if rule.name == "shift":  # an identity after the softmax only
            dims = grid.dims([scope.keys])
            before, result = softmax(before, dims), softmax(result, dims)
        torch.testing.assert_close(result, before, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("name", "rule"), every_rule())
def test_a_rule_ignores_what_does_not_concern_it(name: str, rule: Rule) -> None:
    scope = Scope(AxisSpace(Facts()), views=RULES.layout)
    x = expr("input", (), ("x",), (2, 3), torch.float64)
    term = Term(x, tuple(scope.space.new_axis("x", n) for n in x.shape))
    assert rule.apply(term, scope) is None


# ---------------------------------------------------------------------------------------- merge_scales


def test_a_scale_moves_through_a_bias_and_a_mask() -> None:
    assert merge_scales([Bias(0), Scale(0.5)]) == (Scale(0.5), Bias(0, factor=0.5))
    assert merge_scales([Scale(2.0), Mask(0, -1e4), Scale(0.5)]) == (Mask(0, -5e3),)
    assert merge_scales([Scale(2.0), SoftCap(5.0), Scale(0.5)]) == (Scale(2.0), SoftCap(5.0), Scale(0.5))


# ---------------------------------------------------------------------------------------- bands

bounds = st.none() | st.integers(-4, 5)
bands = st.builds(Band, bounds, bounds)


def visible(band: Band, queries: int = 6, keys: int = 7) -> Tensor:
    gap = torch.arange(keys) - torch.arange(queries)[:, None]
    out = torch.ones(queries, keys, dtype=torch.bool)
    if band.left is not None:
        out &= gap >= -int(band.left)
    if band.right is not None:
        out &= gap <= int(band.right)
    return out


@given(st.lists(bands, max_size=4))
def test_the_intersection_of_bands_is_their_conjunction(some: list[Band]) -> None:
    whole = intersect(some, Facts())
    assert whole is not None
    expected = torch.ones(6, 7, dtype=torch.bool)
    for band in some:
        expected &= visible(band)
    assert torch.equal(visible(whole), expected)


# ---------------------------------------------------------------------------------------- fills


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_negligible_fills_vanish_and_others_do_not(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    assert negligible(-math.inf, dtype) and negligible(lowest, dtype)
    assert not any(
        negligible(fill, dtype) for fill in (0.0, 1.0, -1.0, -1e2, -1e3, -1e4, 1e9, math.inf, math.nan)
    )


@given(st.floats(-1e38, 0), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_negligible_has_no_weight_beside_ordinary_scores(fill: float, dtype: torch.dtype) -> None:
    if not negligible(fill, dtype):
        return
    scores = torch.linspace(-1e4, 1e4, 9, dtype=dtype)
    weights = torch.cat([scores, torch.tensor([fill], dtype=dtype)]).float().softmax(0)
    assert float(weights[-1]) == 0.0
