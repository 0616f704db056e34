"""A failing inner compiler: the graph is compiled as it was; Dynamo's own signals pass through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.report import collect


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention, scaled by a float that dynamic shapes make a symbol."""
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def test_a_failing_inner_compiler_gets_the_original_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    attempts: list[str] = []

    def inner(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        attempts.append(gm.code)
        if "scaled_dot_product_attention" in gm.code:
            raise NotImplementedError("no such kernel here")
        return gm.forward

    q, k, v = torch.randn(3, 2, 4, 8, 16)
    with collect() as seen:
        out = torch.compile(attention, backend="fusepass", options={"inner": inner})(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v))
    assert len(attempts) == 2
    assert any("no such kernel here" in note for note in seen.graphs[0].notes)


def test_signals_of_dynamo_are_not_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 0.3

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-2, -1) * self.factor).softmax(-1) @ v

    model = Scaled()
    q, k, v = torch.randn(3, 2, 4, 8, 16)
    with collect() as seen, torch.no_grad():
        out = torch.compile(model, backend="fusepass", options={"inner": "aot_eager"}, dynamic=True)(q, k, v)
    torch.testing.assert_close(out, model(q, k, v))
    assert seen.graphs[-1].notes == []
    assert [site.fused for site in seen.graphs[-1].sites] == [True]
