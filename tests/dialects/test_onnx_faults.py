"""A handler that fails affects only its node: the value is opaque, and report and log say so once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fusepass
from fusepass.dialects.onnx.call import HANDLERS, Call
from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.expressions.ir import Expr
from fusepass.host import faults
from tests.exporters.test_onnx_optimize import plain


class TwoSites(nn.Module):
    """A softcap in the scores of one site, and activations around both sites that use the same operator."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ torch.relu(v)
        second = (torch.tanh(first @ k.transpose(-1, -2)) * 5.0).softmax(-1) @ torch.relu(v + 1)
        return torch.relu(second)


QKV = tuple(torch.randn(2, 2, 6, 8) for _ in range(3))


def broken(c: Call, x: Expr) -> Expr:
    """A handler with a fault."""
    return x.shape["last"]  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which warnings were given."""
    monkeypatch.setattr(faults, "_warned", set())


def optimized(tmp_path: Path) -> Any:
    before = tmp_path / "before.onnx"
    plain(TwoSites().eval(), before, *QKV)
    return fusepass.optimize_onnx(before, tmp_path / "after.onnx")


@pytest.mark.parametrize(("operator", "fused"), [("Relu", 2), ("Tanh", 1), ("Softmax", 0)])
def test_a_handler_that_fails_costs_its_node(
    operator: str, fused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    whole = optimized(tmp_path)
    assert whole.fused >= fused and not whole.graph.notes
    monkeypatch.setitem(HANDLERS, ("", operator), broken)
    with caplog.at_level(logging.WARNING, logger="fusepass"):
        report = optimized(tmp_path)
    assert report.fused == fused and all(c.ok for c in report.checks), report.graph.sites
    (note,) = report.graph.notes
    assert note.startswith(f"'{operator}' is not looked into") and "TypeError: tuple indices" in note
    warned = [r for r in caplog.records if note in r.getMessage()]
    assert len(warned) == 1 and warned[0].exc_info


def test_a_fault_is_raised_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_STRICT", "1")
    monkeypatch.setitem(HANDLERS, ("", "Tanh"), broken)
    with pytest.raises(TypeError, match="tuple indices") as raised:
        optimized(tmp_path)
    assert raised.value.__notes__ == ["while fusepass read 'Tanh'"]


def test_numbers_that_fail_cost_their_node(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    """Integers that describe shapes are tracked separately from the meanings."""
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    monkeypatch.setattr("fusepass.dialects.onnx.sizes.total", broken)
    x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    size, cast = ir.node("Size", [x]), ir.node("Neg", [x])
    reader = OnnxReader(ir.Graph([x], cast.outputs, nodes=[size, cast], opset_imports={"": 20}), {"": 20})
    assert len(reader.faults.notes) == 1 and "'Size'" in reader.faults.notes[0]
    negated = reader.meaning[cast.outputs[0]]
    assert negated is not None and negated.op == "neg"


def test_a_form_that_is_not_described_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many inputs for the handler, or a missing one: the value is opaque, but nothing failed."""
    monkeypatch.setenv("FUSEPASS_STRICT", "1")
    x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    many, none = ir.node("Identity", [x, x]), ir.node("MatMul", [x, None])
    graph = ir.Graph([x], [*many.outputs, *none.outputs], nodes=[many, none], opset_imports={"": 20})
    reader = OnnxReader(graph, {"": 20})
    assert reader.meaning[many.outputs[0]] is None and reader.meaning[none.outputs[0]] is None
    assert not reader.faults.notes
