"""The verbs `export` and `optimize`, and PyTorch packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import fusepass
from fusepass.__main__ import main
from tests.onnx_models import Attention, drawn, nodes, sharpened

FACTORY = """
import torch
from tests.onnx_models import Attention, drawn, sharpened

def make():
    return sharpened(Attention(causal=True, kv=2)), (drawn(),)
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(FACTORY)
    return f"{path}:make"


def test_export_and_optimize(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    assert main(["export", factory, "--to", str(path), "--dynamic"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 attention sites fused (1 Attention), 0 softmaxes left" in printed
    assert "Checked by running it" in printed
    assert printed.rstrip().rpartition("Written")[2].count("m.onnx") == 1, "a table comes last"
    assert [str(n) for n in ir.load(path).graph.inputs[0].shape or ()][2] == "32", "a constant size stays one"
    assert main(["optimize", str(path), str(out), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["operators"] == {"Attention": 1} and report["sites"] == 0
    assert nodes(out, "Attention")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{}", "--to", "m.txt"], "expected a name that ends in .onnx, or in .pt2"),
        (["export", "{}", "--to", "m.onnx", "--target", "cuda"], "unknown target 'cuda'"),
        (["optimize", "none.onnx"], "there is no such file"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], message: str, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(factory) for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_package_runs_without_fusepass(factory: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    model = sharpened(Attention(causal=True, kv=2))
    report = fusepass.export_pt2(model, (drawn(),), path)
    assert (report.fused, report.sites, report.softmaxes, report.notes) == (1, 1, 0, [])
    x, y = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save(drawn(seed=3), x)
    code = (
        f"import sys, torch; y = torch.export.load({str(path)!r}).module()(torch.load({str(x)!r}));"
        f"torch.save(y, {str(y)!r}); sys.exit('fusepass' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(y), model(drawn(seed=3)), rtol=1e-5, atol=1e-5)


def test_a_package_that_needs_fusepass_says_so(tmp_path: Path) -> None:
    report = fusepass.export_pt2(sharpened(Attention()), (drawn(),), tmp_path / "m.pt2", kernel="reference")
    assert report.notes == ["it needs fusepass to run: it uses fusepass.attention.default"]


@pytest.mark.slow
def test_a_library_compiled_ahead_of_time(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    model = sharpened(Attention(causal=True, kv=2))
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    report = fusepass.compile_aoti(model, (drawn(),), path, dynamic_shapes=shapes)
    assert (report.fused, report.softmaxes) == (1, 0)
    loaded = torch._inductor.aoti_load_package(str(path))
    x = drawn(3, 9, seed=2)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
