"""docs/recipes/onnx-target.md: one row of capabilities, and every file is written for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fusepass
from fusepass.exporters.onnx.attention import ATTENTION
from fusepass.exporters.onnx.operators import Target
from fusepass.exporters.onnx.targets import TARGETS
from fusepass.specification.attention import Bias, SoftCap
from tests.exporters.test_onnx_export import Cached
from tests.exporters.test_onnx_rotary import Rotated
from tests.import_rules import ROOT, python_files
from tests.onnx_models import Attention, drawn, exported, nodes, sharpened

#: Reads Attention of opset 23: no biases, no caches, no lengths, a mask or causality, no rotary embeddings.
TOY = Target(
    "toy", "Toy's importer", (ATTENTION,), opset=23, lacks=(Bias,), caches=False, causal_with_mask=False,
    rotary=False,
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one step: a row in the table."""
    monkeypatch.setitem(TARGETS, "toy", TOY)


@pytest.mark.usefixtures("toy")
def test_a_row_is_a_target(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    report = exported(sharpened(Attention(causal=True, window=3, cap=5.0)), before, drawn(), target="toy")
    assert (report.fused, report.softmaxes) == (1, 0) and report.target == "toy"
    (node,) = nodes(before, "Attention")
    assert ir.load(before).opset_imports[""] == 23
    assert len(node.inputs) == 4 and "softcap" in node.attributes and "is_causal" not in node.attributes
    again = fusepass.optimize_onnx(before, after, target="toy")
    assert again.sites == 0 and ir.load(after).opset_imports[""] == 23


@pytest.mark.usefixtures("toy")
def test_what_its_row_lacks_is_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = exported(sharpened(Attention(bias=True)), path, drawn(), target="toy")
    (site,) = report.graph.sites
    assert not site.fused and site.reason == "Attention: Toy's importer reads no bias"
    with pytest.raises(ValueError, match="opset 22 has no Attention operator; use 23, 24"):
        fusepass.export_onnx(Attention(), (drawn(),), path, target="toy", opset=22)


def test_without_its_row_it_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown target 'toy'; accepted are onnx, ort"):
        fusepass.export_onnx(Attention(), (drawn(),), tmp_path / "model.onnx", target="toy")


@pytest.mark.parametrize(("lacks", "fused"), [((SoftCap,), 0), ((Bias,), 1)])
def test_a_capability_decides(
    lacks: tuple[Any, ...], fused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model and another row."""
    monkeypatch.setitem(TARGETS, "toy", replace(TOY, lacks=lacks))
    assert exported(sharpened(Attention(cap=5.0)), tmp_path / "m.onnx", drawn(), target="toy").fused == fused


class Lengths(nn.Module):
    """Keys from a length on are hidden."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = torch.arange(x.shape[2]) >= lengths[:, None]
        return (x @ x.mT * 0.3).masked_fill(hidden[:, None, None], -torch.inf).softmax(-1) @ x


#: Capability -> a model that is written in another way without it, and its arguments.
ASKED: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "caches": (Cached, lambda: (*torch.randn(3, 2, 2, 4, 8), *torch.randn(2, 2, 2, 3, 8))),
    "lengths": (Lengths, lambda: (torch.randn(2, 2, 6, 8), torch.tensor([4, 6]))),
    "causal_with_mask": (lambda: Attention(causal=True, window=3), lambda: (drawn(),)),
    "mild_fills": (lambda: Attention(causal=True, window=3).half(), lambda: (drawn().half(),)),
    "rotary": (lambda: Rotated(even=True), lambda: (torch.randn(2, 3, 5, 8), torch.arange(5)[None])),
}


@pytest.mark.parametrize("capability", ASKED)
def test_every_capability_is_asked(capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the capability, a model becomes different files; twice with it, the same file."""
    model, inputs = ASKED[capability]
    module, given = sharpened(model()), inputs()

    def written(has: bool) -> bytes:
        only: dict[str, Any] = {capability: has}
        row = Target("toy", "Toy's importer", (ATTENTION,), **only)
        monkeypatch.setitem(TARGETS, "toy", row)
        exported(module, tmp_path / "model.onnx", *given, target="toy")
        return (tmp_path / "model.onnx").read_bytes()

    assert written(True) == written(True) != written(False)


def test_every_capability_has_such_a_model() -> None:
    assert set(ASKED) == {f.name for f in fields(Target) if f.default is True}


#: Who may know a target by its name: the table.
TABLE = ROOT / "exporters/onnx/targets.py"


FILES = [path for path in python_files("exporters") if path.parent == TABLE.parent and path != TABLE]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_file_asks_for_the_name_of_a_target(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = "|".join(TARGETS)
    asked = re.findall(rf'\b(?:target|aim)\.name\b|(?:[=!]=|\bin\b|\bcase\b) *[("]*(?:{names})"', text)
    assert not asked


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_documented(name: str) -> None:
    for page in ("docs/onnx.md", "fusepass/__main__.py", "exporters/onnx/export.py"):
        assert re.search(rf"\b{name}\b", (ROOT / page).read_text(encoding="utf-8")), page
