"""Attention around something that is not read: it is listed, and what stands in the way is named."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, ParamSpec
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusepass.reports.collector import Collector, collect

P = ParamSpec("P")
Program = Callable[[Tensor, Tensor, Tensor], Any]
Made = Callable[..., Tensor]
HEADS = torch.ones(2, 2, 1, 1)


def operator(name: str, function: Made, fake: Made) -> Made:
    """A custom operator, and what it returns for fake tensors."""
    definition = torch.library.custom_op(f"fusepass_tests::{name}", function, mutates_args=())
    definition.register_fake(fake)
    called: Made = definition
    return called


def weights_of(s: Tensor) -> Tensor:
    return s.softmax(-1)


def product_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.mT)


def fake_product(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], k.shape[-2]))


normalise = operator("normalise", weights_of, torch.empty_like)
product = operator("product", product_of, fake_product)


def double(s: Tensor) -> Tensor:
    return s * 2


not_compiled: Callable[[Tensor], Tensor] = torch.compiler.disable(double)


def normalised_by_an_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalise(q @ k.mT) @ v


def product_of_an_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return product(q, k).softmax(-1) @ v


def product_in_a_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s: Tensor = checkpoint(lambda a, b: a @ b.mT, q, k, use_reentrant=False)
    return s.softmax(-1) @ v


def gumbel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.gumbel_softmax(q @ k.mT, dim=-1) @ v


def sorted_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sort(-1).values.softmax(-1) @ v


def heads_mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(q @ k.mT, HEADS).softmax(-1) @ v


def accumulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).cumsum(-1).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q @ k.mT
    s: Tensor = torch.cond(t.sum() > 0, lambda x: x.clone(), lambda x: x * 2, (t,))
    return s.softmax(-1) @ v


NAMED = {
    normalised_by_an_operator: "fusepass_tests::normalise", product_of_an_operator: "fusepass_tests::product",
    product_in_a_checkpoint: "checkpoint", gumbel: "gumbel_softmax", sorted_scores: "sort",
    heads_mixed: "conv2d", accumulated: "cumsum", chosen: "cond",
}  # fmt: skip


def run(program: Program) -> Collector:
    """What the pass reports; the result is eager's."""
    given = [torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    torch._dynamo.reset()
    with mock.patch.dict(os.environ, FUSEPASS_STRICT="1"), collect() as seen:
        torch.manual_seed(0)
        got = torch.compile(program, backend="fusepass", options={"inner": "eager"})(*given)
    torch.manual_seed(0)
    torch.testing.assert_close(got, program(*given))
    return seen


@pytest.mark.parametrize(("program", "name"), NAMED.items(), ids=lambda p: getattr(p, "__name__", None))
def test_the_operation_in_the_way_is_named(program: Program, name: str) -> None:
    (site,) = run(program).sites
    assert not site.fused and site.reason is not None and name in site.reason


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax is over the result of an operation on one tensor, which is not a product of two."""
    return F.conv2d(q, HEADS).softmax(-1) @ k.mT


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products in a row, with a layer norm between them, are not attention."""
    return F.layer_norm(q @ k.mT, (6,)) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax is over features of an attention's result, after a convolution: these are not scores."""
    x = F.scaled_dot_product_attention(q, k, v)
    return F.conv2d(x, HEADS).softmax(-1) @ v.mT


@pytest.mark.parametrize("program", [pooled, normed])
def test_what_is_no_attention_is_not_listed(program: Program) -> None:
    assert not run(program).sites


def test_a_result_of_attention_is_no_score() -> None:
    assert all(site.fused or "already" in str(site.reason) for site in run(gated).sites)


def broken_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    torch._dynamo.graph_break()
    return s.softmax(-1) @ v


def broken_by_a_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return not_compiled(q @ k.mT).softmax(-1) @ v


def broken_by_a_branch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 3
    if s.max() > 1e9:
        s = s / 2
    return s.softmax(-1) @ v


def broken_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    torch._dynamo.graph_break()
    return w @ v


@pytest.mark.parametrize(
    ("program", "line", "what"),
    [
        (broken_before_the_softmax, 2, "scores"), (broken_by_a_function, 1, "scores"),
        (broken_by_a_branch, 2, "scores"), (broken_after_the_softmax, 2, "weights"),
    ],
)  # fmt: skip
def test_a_note_names_the_line_of_a_graph_break(program: Program, line: int, what: str) -> None:
    first = inspect.getsourcelines(program)[1]
    (note,) = run(program).notes
    assert f"{os.path.basename(__file__)}:{first + line}" in note and f"separates {what}" in note


def test_a_graph_break_after_attention_is_no_fault() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).softmax(-1) @ v
        torch._dynamo.graph_break()
        return out * 2

    seen = run(program)
    assert seen.fused and not seen.notes
