"""doctor: an answer for every kernel, on any machine."""

import json
from io import StringIO

import pytest
from rich.console import Console

from fusepass.host.kernel_names import KERNELS
from fusepass.host.libraries import GATES, Package
from fusepass.tools import doctor
from fusepass.tools.doctor import Machine, diagnose


def test_every_kernel_has_an_answer() -> None:
    diagnosis = diagnose()
    answered = {status.kernel: status for status in diagnosis.kernels}
    assert set(answered) == {*KERNELS, "fp8"} - {"auto", "autotune"}
    assert answered["sdpa"].runs
    assert answered["reference"].runs
    assert all(status.why for status in diagnosis.kernels)
    json.dumps(diagnosis.to_json())


def test_the_table_prints() -> None:
    printed = StringIO()
    Console(width=100, file=printed).print(diagnose())
    text = printed.getvalue()
    assert "Kernels on this machine" in text
    assert "reference" in text


GPU_KERNELS = ["cudnn", "flash2", "flash3", "flash4", "flex_flash", "fp8"]


@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_without_a_gpu(kernel: str) -> None:
    runs, why = doctor._ANSWERS[kernel](Machine(None, "no GPU, 2 CPU cores", {}))
    assert not runs
    assert "it needs an NVIDIA GPU, and there is none" in why


@pytest.mark.parametrize(
    ("kernel", "capability", "words"),
    [
        ("flash2", (7, 5), "needs compute capability 8.x, 9.x, 10.x, 11.x, 12.x; this GPU has 7.5 (Turing)"),
        ("flash2", (7, 0), "this GPU has 7.0 (Volta)"),
        ("flash3", (10, 0), "needs compute capability 9.x; this GPU has 10.0 (Blackwell)"),
        ("flash4", (8, 9), "this GPU has 8.9 (Ada)"),
        ("fp8", (8, 0), "this GPU has 8.0 (Ampere)"),
        ("cudnn", (7, 0), "8.x"),
    ],
)
def test_an_old_or_other_gpu(kernel: str, capability: tuple[int, int], words: str) -> None:
    runs, why = doctor._ANSWERS[kernel](Machine(capability, "1 × GPU", {}))
    assert not runs
    assert words in why


@pytest.mark.parametrize("kernel", ["flash2", "flash3", "flash4"])
def test_a_package_that_is_there_and_one_that_is_not(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = GATES[kernel].package
    assert package is not None
    machine = Machine((9, 0), "1 × GPU", {package.name: "1.2"})
    monkeypatch.setattr(doctor, "installed", lambda package: True)
    assert doctor._ANSWERS[kernel](machine) == (True, f"{package.name} 1.2")
    assert "is installed" in doctor._ANSWERS[kernel](Machine((6, 0), "1 × GPU", {}))[1]
    monkeypatch.setattr(doctor, "installed", lambda package: False)
    runs, why = doctor._ANSWERS[kernel](machine)
    assert not runs
    assert package.install in why


def test_flash_attn_is_told_apart_by_its_files() -> None:
    assert Package("", "fusepass", "__main__.py", "").installed()
    assert not Package("", "fusepass", "cute/interface.py", "").installed()
    assert not Package("", "no_such_package", "__main__.py", "").installed()


def test_the_table_says_what_kernels_take() -> None:
    status = {s.kernel: s for s in diagnose().kernels}
    assert status["flash4"].gpus == "9.x, 10.x, 11.x"
    assert status["flash2"].dtypes == "fp16 bf16"
    assert status["fp8"].head_sizes.endswith("forward only")
    assert status["sdpa"].gpus == status["reference"].gpus == "any"
