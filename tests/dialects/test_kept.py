"""Functions that Dynamo keeps as one node are read; what they do stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ParamSpec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture import compiled, qkv

P = ParamSpec("P")
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def kept(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A function that Dynamo keeps as one node."""
    same: Callable[P, Tensor] = torch._dynamo.allow_in_graph(function)
    return same


class Scaled(torch.autograd.Function):
    """Twice its operand, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


@kept
def normalise(s: Tensor, *, dim: int) -> Tensor:
    return s.softmax(dim)


@kept
def scores(text: str, q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum(text, q, k) / math.sqrt(q.shape[-1])


@kept
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v


@kept
def with_own_gradient(s: Tensor) -> Tensor:
    twice: Tensor = Scaled.apply(s)  # type: ignore[no-untyped-call]
    return twice.softmax(-1)


@kept
def drops(s: Tensor) -> Tensor:
    return F.dropout(s.softmax(-1), 0.5)


@kept
def writes(s: Tensor) -> Tensor:
    return s.mul_(2).softmax(-1)


def kept_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalise(q @ k.mT, dim=-1) @ v


def kept_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores("bhid,bhjd->bhij", q, k).softmax(-1) @ v


def kept_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q * 2, k, v) + 1


def kept_with_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_own_gradient(q @ k.mT) @ v


def kept_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return drops(q @ k.mT) @ v


def kept_write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    w = writes(s)
    return w @ v + s.sum()


def gradients(program: Program, args: tuple[Tensor, ...]) -> list[Tensor]:
    given = [t.clone().requires_grad_() for t in args]
    return list(torch.autograd.grad(program(*given).square().sum(), given, allow_unused=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("program", [kept_softmax, kept_product, kept_attention])
def test_steps_of_a_kept_function_are_fused(program: Program, dynamic: bool) -> None:
    args = qkv(Q=8)
    got, seen = compiled(program, *args, dynamic=dynamic)
    assert seen.fused and not seen.left, seen.sites
    torch.testing.assert_close(got, program(*args))


@pytest.mark.parametrize("program", [kept_softmax, kept_product, kept_attention, kept_with_gradient])
def test_gradients_of_a_kept_function(program: Program) -> None:
    args = qkv(Q=8)

    def call(*given: Tensor) -> Tensor:
        result: Tensor = compiled(program, *given)[0]
        return result

    for mine, theirs in zip(gradients(call, args), gradients(program, args), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("program", [kept_with_gradient, kept_write])
def test_a_kept_function_that_may_not_be_written_out_stays(program: Program) -> None:
    args = qkv(Q=8)
    got, seen = compiled(program, *args)
    assert not seen.fused
    torch.testing.assert_close(got, program(*args))


def test_a_kept_function_that_draws_stays() -> None:
    assert not compiled(kept_dropout, *qkv(Q=8))[1].fused


def test_a_kept_function_stays_under_autocast() -> None:
    args = qkv(Q=8)

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kept_product(q, k, v)

    got, _ = compiled(program, *args)
    torch.testing.assert_close(got, program(*args))
