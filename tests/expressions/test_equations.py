"""What guards tell of symbolic sizes, and what they do not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from fusepass.expressions.equations import Equations

A, B, C = (sympy.Symbol(name, integer=True, positive=True) for name in "abc")


def known(*claims: Any) -> dict[Any, Any]:
    """What equations tell where ``a // (a // 4)`` is known to be exact."""
    guards = [SimpleNamespace(expr=claim) for claim in claims]
    parts = FloorDiv(A, FloorDiv(A, 4))
    return Equations(
        SimpleNamespace(guards=guards), lambda size: size.xreplace({parts: A / FloorDiv(A, 4)})
    ).known()


@pytest.mark.parametrize(
    ("claims", "told"),
    [
        ([sympy.Eq(A * 64, 512)], {A: 8}),
        ([sympy.Eq(FloorDiv(A, FloorDiv(A, 4)), B)], {B: A / FloorDiv(A, 4)}),
        ([sympy.Eq(FloorDiv(A, 4), FloorDiv(B, 2)), sympy.Eq(FloorDiv(A, 4), C)], {C: FloorDiv(B, 2)}),
    ],
)
def test_equations_that_tell_a_symbol(claims: list[Any], told: dict[Any, Any]) -> None:
    assert known(*claims) == told


@pytest.mark.parametrize(
    "claim",
    [
        sympy.Eq(A * B, B * 8),  # B may be zero
        sympy.Eq(A * 2, B),  # of symbols alone: PyTorch replaces these itself
        sympy.Eq(FloorDiv(A, 4) * 2, B * 3),  # B is not a whole multiple
        sympy.Eq(Mod(A, 4), 0),
        sympy.Ne(A, 4),
        sympy.Eq(A * A, 16),
    ],
)
def test_equations_that_tell_nothing(claim: Any) -> None:
    assert known(claim) == {}


def test_a_later_guard_tells_what_an_earlier_one_left_open() -> None:
    env = SimpleNamespace(guards=[SimpleNamespace(expr=sympy.Eq(FloorDiv(A, 4) + B, C * B + 7))])
    equations = Equations(env, lambda size: size)
    assert equations.known() == {}
    env.guards.append(SimpleNamespace(expr=sympy.Eq(C * 2, 2)))
    assert equations.known() == {C: 1}
