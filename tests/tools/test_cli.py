"""The command line: what it prints, its exit codes, and errors without tracebacks."""

import json
import sys
from pathlib import Path

import pytest

from fusepass.__main__ import main
from tests import engines

MODELS = """
import torch
from tests.engines import Attention

def model():
    return Attention(), (torch.randn(2, 8, 16),), {"scale": 0.5}

def by_name():
    return Attention(), {"x": torch.randn(2, 8, 16)}

def random():
    return Attention(dropout=0.5), (torch.randn(2, 8, 16),)

def alone():
    return Attention()

number = 3
"""
SCRIPT = """
import sys
import torch
from models import model

print(__name__, sys.argv[1:])
made, args, kwargs = model()
torch.compile(made, options={"max_autotune": False})(*args, **kwargs)
sys.exit(7 if "--fail" in sys.argv else 0)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with models in it, and an idle engine."""
    engines.install(monkeypatch, engines.idle)
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "broken.py").write_text("def model(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return tmp_path


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "models.py:model", "--kernel", "flex"]) == 0
    printed = capsys.readouterr().out
    assert "idle, kernel flex" in printed
    assert "0 of 1 attention site fused" in printed


def test_explain_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "models.py:by_name", "--json", "--dtype", "bf16", "--dynamic"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"] == 1


def test_a_model_by_module_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    assert main(["explain", "models:model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 1


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "models.py:model", "--inner", "eager", "--repeats", "0", "--grads", "--json"]
    assert main(arguments) == 0
    verification = json.loads(capsys.readouterr().out)
    assert verification["ok"]
    assert verification["inner"] == "eager"
    assert len(verification["gradients"]) == 2


def test_verify_fails_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.install(monkeypatch, engines.wrong)
    assert main(["verify", "models.py:model", "--inner", "eager", "--repeats", "0"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert {kernel["kernel"] for kernel in json.loads(capsys.readouterr().out)["kernels"]} >= {"sdpa", "flex"}
    assert main(["doctor"]) == 0
    assert "Kernels on this machine" in capsys.readouterr().out


@pytest.mark.usefixtures("instant_inductor")
def test_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--kernel", "flex", "script.py", "--kernel", "mine", "--report"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.out == "__main__ ['--kernel', 'mine', '--report']\n"
    assert printed.err.startswith("fusepass: 0 of 1 attention site fused")


@pytest.mark.usefixtures("instant_inductor")
def test_run_keeps_the_exit_code_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--report", "script.py", "--fail"])
    assert ended.value.code == 7
    assert "Attention sites" in capsys.readouterr().err


@pytest.mark.usefixtures("instant_inductor")
def test_run_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "-m", "script", "one"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "__main__ ['one']\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "nothing.py:model"], ["'nothing.py'", "no such file", "file.py:factory"]),
        (["explain", "no.module:model"], ["'no.module'", "package.module:factory"]),
        (["explain", "models.py"], ["'models.py'", "file.py:factory"]),
        (["explain", "models.py:modle"], ["'modle'", "did you mean 'model'?"]),
        (["explain", "models.py:number"], ["'number' is a int", "a factory returns"]),
        (["explain", "models.py:alone"], ["returned a Attention", "(model, args) or (model, args, kwargs)"]),
        (["explain", "broken.py:model"], ["'broken.py'", "SyntaxError"]),
        (["explain", "models.py:model", "--kernel", "flush2"], ["'flush2'", "did you mean 'flash2'?"]),
        (["explain", "models.py:model", "--precision", "fp4"], ["'fp4'", "'native', 'fp8', 'fp8_unrotated'"]),
        (["explain", "models.py:model", "--dtype", "bf61"], ["'bf61'", "'bfloat16'"]),
        (["verify", "models.py:model", "--inner", "eagre"], ["'eagre'", "did you mean 'eager'?"]),
        (["verify", "models.py:random", "--inner", "eager"], ["changes from run to run"]),
        (["run", "nothing.py"], ["'nothing.py'", "no such file"]),
        (["run", "--kernel", "flush2", "script.py"], ["'flush2'"]),
    ],
)
def test_errors(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fusepass: error: ")
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["explain"], ["verify", "a:b", "--repeats", "x"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: fusepass" in capsys.readouterr().err
