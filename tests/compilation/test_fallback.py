"""A failing inner compiler: the original graph is compiled; Dynamo's own signals pass through."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo import exc

from fusepass.compilation.backend import compile_fused
from fusepass.dialects.torch.graph import Reader
from fusepass.expressions.index import AxisSpace
from fusepass.host.config import Options
from fusepass.reports.collector import Collector, collect
from fusepass.writing.emit import Builder
from tests.capture import dynamo_graph


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


@pytest.mark.parametrize("fault", [exc.RestartAnalysis, exc.SkipFrame, exc.TensorifyScalarRestartAnalysis])
def test_a_signal_of_dynamo_passes_through(fault: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """This is not a failure to compile: the graph is not compiled again, and the report has no note."""
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    attempts, seen = compiled_by(monkeypatch, fault("again, please"), fault)
    assert len(attempts) == 1 and "scaled_dot_product_attention" in attempts[0]
    assert seen.graphs[0].notes == []


def test_a_failed_compiler_is_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    fault = exc.BackendCompilerFailed(attention, ValueError("no such kernel"), None)
    attempts, seen = compiled_by(monkeypatch, fault, None)
    assert len(attempts) == 2 and "scaled_dot_product_attention" not in attempts[1]
    assert "no such kernel" in seen.graphs[0].notes[0]


def test_faults_are_raised_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_STRICT", "1")
    attempts, _ = compiled_by(monkeypatch, ValueError("no such kernel"), ValueError)
    assert len(attempts) == 1


def compiled_by(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, raised: type[Exception] | None
) -> tuple[list[str], Collector]:
    """The graphs that a compiler received, which fails on fused ones, and the reports."""
    attempts: list[str] = []

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        attempts.append(gm.code)
        if "scaled_dot_product_attention" in gm.code:
            raise fault
        return gm.forward

    given = list(torch.randn(3, 2, 4, 8, 16))
    with collect() as seen, pytest.raises(raised) if raised else contextlib.nullcontext():
        compile_fused(dynamo_graph(attention, *given), given, Options(), compiler)
    return attempts, seen


def test_what_is_taken_back_is_shared_with_nobody() -> None:
    """What a site takes back, a later site writes again; what earlier sites wrote stays."""
    gm = dynamo_graph(attention, *torch.randn(3, 2, 4, 8, 16))
    reader, before = Reader(gm.graph, gm), list(gm.graph.nodes)
    anchor, shared = before[-2], dict[Any, Any]()
    first, second, third = (Builder(reader, anchor, {}, AxisSpace(), shared) for _ in range(3))
    kept = first.once("kept", lambda: first.op("arange", 8))
    lost = second.once("lost", lambda: second.op("arange", 9))
    assert second.once("kept", lambda: second.op("arange", 8)) is kept
    second.discard()
    second.discard()
    assert shared == {"kept": kept} and set(gm.graph.nodes) == {*before, kept}
    again = third.once("lost", lambda: third.op("arange", 9))
    assert again is not lost and again in gm.graph.nodes and lost not in gm.graph.nodes
    assert third.once("kept", lambda: third.op("arange", 8)) is kept
    first.discard()
    assert shared == {"lost": again}
