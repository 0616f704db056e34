"""Systems of inequalities: what is called impossible has no solution among all values of the axes."""

from __future__ import annotations

import itertools

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepass.expressions.index import Affine, AxisSpace, Facts
from fusepass.expressions.inequalities import implied, impossible
from tests.evaluate import value

SIZES = {"a": 3, "b": 4, "c": 2}
numbers = st.integers(-4, 4)
parts = st.builds(
    lambda a, b, c, const: Affine.of({"a": a, "b": b, "c": c}, const), numbers, numbers, numbers, numbers
)


def space() -> AxisSpace:
    return AxisSpace(Facts(), dict(SIZES))


def solutions(system: list[Affine]) -> list[dict[str, int]]:
    every = (dict(zip(SIZES, v, strict=True)) for v in itertools.product(*map(range, SIZES.values())))
    return [at for at in every if all(value(part, at) <= 0 for part in system)]


@settings(max_examples=400, deadline=None)
@given(st.lists(parts, min_size=1, max_size=4))
def test_an_impossible_system_has_no_solution(system: list[Affine]) -> None:
    assert not (impossible(system, space()) and solutions(system))


@settings(max_examples=200, deadline=None)
@given(st.lists(parts, max_size=3), parts)
def test_an_implied_inequality_holds_in_every_solution(system: list[Affine], part: Affine) -> None:
    if implied(part, system, space()):
        assert all(value(part, at) <= 0 for at in solutions(system))


def test_contradictions_across_axes_are_found() -> None:
    row, column = Affine.of({"a": 4, "b": 1}, -5), Affine.of({"a": -4, "b": -1}, 5)  # 4a + b = 5
    assert impossible([row, column, Affine.of({"a": 1}, 0)], space())
    assert not impossible([row, column], space())


def test_bounds_of_unknown_size_are_compared() -> None:
    n = sympy.Symbol("s0", integer=True, positive=True)
    unknown = AxisSpace(Facts(), {"i": n, "w": 3})
    at = Affine.of({"i": 1, "w": 1}, 0)
    assert implied(at - (n + 1), [], unknown)
    assert not implied(at - n, [], unknown)


def test_an_inequality_with_a_factor_of_unknown_size_proves_nothing() -> None:
    n = sympy.Symbol("s0", integer=True, positive=True)
    assert not impossible([Affine.of({"a": n}, 1)], space())
