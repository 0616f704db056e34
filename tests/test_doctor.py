"""doctor: an answer for every kernel, whatever the machine."""

import json
from io import StringIO

import pytest
from rich.console import Console

from fusepass import doctor
from fusepass.config import KERNELS
from fusepass.doctor import Machine, diagnose


def test_every_kernel_has_an_answer() -> None:
    diagnosis = diagnose()
    answered = {status.kernel: status for status in diagnosis.kernels}
    assert set(answered) == set(KERNELS) - {"auto"}
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


@pytest.mark.parametrize("kernel", ["cudnn", "flash2", "flash3", "flash4"])
def test_without_a_gpu(kernel: str) -> None:
    runs, why = doctor._ANSWERS[kernel](Machine(None, "no GPU, 2 CPU cores", {}))
    assert not runs
    assert "needs an NVIDIA GPU; no GPU here" in why or "not installed" in why


@pytest.mark.parametrize(
    ("kernel", "capability", "word"),
    [
        ("flash2", (7, 5), "8.0 or newer; this GPU has 7.5"),
        ("flash3", (10, 0), "Hopper"),
        ("cudnn", (7, 0), "8.0"),
    ],
)
def test_an_old_or_other_gpu(kernel: str, capability: tuple[int, int], word: str) -> None:
    runs, why = doctor._ANSWERS[kernel](Machine(capability, "1 × GPU", {}))
    assert not runs
    assert word in why


def test_a_package_that_is_there() -> None:
    machine = Machine((9, 0), "1 × GPU", {"flash-attn-4": "4.0.0b5"})
    assert doctor._package(machine, (9, 0), "flash-attn-4", True) == (True, "flash-attn-4 4.0.0b5")
    assert doctor._package(machine, (10, 0), "flash-attn-4", True)[0] is False
    runs, why = doctor._package(machine, (8, 0), "flash-attn", False)
    assert not runs
    assert "pip install flash-attn" in why


def test_flash_attn_is_told_apart_by_its_files() -> None:
    assert doctor._holds("fusepass", "doctor.py")
    assert not doctor._holds("fusepass", "cute/interface.py")
    assert not doctor._holds("no_such_package", "doctor.py")
