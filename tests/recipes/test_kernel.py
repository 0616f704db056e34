"""docs/recipes/kernel.md: one file, what it takes, its gate, and a name that every `kernel=` takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fusepass
from fusepass.host.kernel_names import LIBRARIES
from fusepass.host.libraries import BUILT_IN, GATES
from fusepass.kernels import (
    BY_NAME,
    KERNELS,
    Builder,
    Gate,
    Kernel,
    Mask,
    Package,
    Scale,
    ScaleBy,
    Site,
    Takes,
    Target,
    operands,
    scaled,
)
from tests.attention import plain, softcapped
from tests.capture import agrees, qkv
from tests.import_rules import ROOT

# ------------------------------------------------------------ the file of another package


@torch.library.custom_op("recipes::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Stands for a library's call."""
    scores = q @ k.mT * scale
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1) @ v


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Step 1: write the call."""
    scale, x = scaled(site, build, operands(site, build))
    return build.call(torch.ops.recipes.attention.default, x.q, x.k, x.v, scale, site.spec.is_causal())


#: Step 2: what it computes.
TAKES = Takes((Scale, ScaleBy, Mask))
#: Step 3: where it runs.
GATE = Gate("toy", (torch.float32,), backward=False)


def register(**more: Any) -> None:
    """Step 4: its name."""
    given: dict[str, Any] = {"takes": TAKES, "gate": GATE, **more}
    fusepass.register_kernel("toy", emit, **given)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("program", [plain, causal])
def test_it_serves_by_its_name(program: Any) -> None:
    register()
    (site,) = agrees(program, *qkv(), kernel="toy").sites
    assert site.kernel == "toy"


def reason(program: Any, *args: Tensor) -> str:
    (site,) = fusepass.explain(program, *args, fusepass_options={"kernel": "toy"}).sites
    assert not site.fused
    return str(site.reason)


def test_what_it_does_not_declare_is_refused_with_a_reason() -> None:
    register()
    assert reason(softcapped, *qkv()) == "toy: it has no 'softcap 5'"
    assert reason(plain, *(t.double() for t in qkv())) == "toy: it computes in float32, and this is float64"
    assert reason(plain, *(t.requires_grad_() for t in qkv())) == "toy: it has no backward pass"


def test_without_its_library_it_says_how_to_get_it() -> None:
    package = Package("toy-attention", "toy_attention", "__init__.py", "pip install toy-attention")
    register(gate=replace(GATE, package=package))
    assert reason(plain, *qkv()) == "toy: toy-attention is not installed: pip install toy-attention"


def test_each_step_is_needed() -> None:
    with pytest.raises(ValueError, match="kernel='toy' is unknown"):
        fusepass.explain(plain, *qkv(), fusepass_options={"kernel": "toy"})
    with pytest.raises(ValueError, match="its gate is of 'flex'"):
        register(gate=GATES["flex"])
    register(takes=Takes(()))
    assert reason(causal, *qkv()) == "toy: it has no 'scale 0.3'"


# ------------------------------------------------------------ a kernel of fusepass itself

#: What stands above the code of the page: imports, and a library's operator.
ABOVE = """
import torch
from torch import Tensor, fx

from fusepass.kernels.base import Kernel, Target, after_weights, operands, scaled
from fusepass.kernels.gates import gate_refuses
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, Mask, Scale, ScaleBy
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder


@torch.library.custom_op("mine::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))
"""
TABLE = "BUILT_IN: tuple[Gate, ...] = (\n"

USE = """
import torch
import fusepass
from fusepass.host.kernel_names import LIBRARIES
from fusepass.kernels import KERNELS
from fusepass.tools.doctor import diagnose


def attention(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1) @ v


def capped(q, k, v):
    return (5 * torch.tanh(q @ k.mT / 5)).softmax(-1) @ v


q = torch.randn(1, 2, 4, 8)
compiled = torch.compile(attention, backend="fusepass", options={"kernel": "mine", "inner": "eager"})
with fusepass.collect() as seen:
    torch.testing.assert_close(compiled(q, q, q), attention(q, q, q))
print(fusepass.__file__)
print([site.kernel for site in seen.sites])
print(fusepass.explain(capped, q, q, q, fusepass_options={"kernel": "mine"}).sites[0].reason)
print(*LIBRARIES)
print(*(kernel.name for kernel in KERNELS))
print([(s.runs, s.head_sizes) for s in diagnose().kernels if s.kernel == "mine"])
"""


def test_one_file_and_its_gate_are_a_kernel_of_fusepass(tmp_path: Path) -> None:
    """The code of the page, added to a copy of the package."""
    package = tmp_path / "fusepass"
    shutil.copytree(ROOT / "fusepass", package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/recipes/kernel.md").read_text(encoding="utf-8")
    file, row = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (package / "kernels/mine.py").write_text(ABOVE + file, encoding="utf-8")
    table = package / "host/libraries.py"
    before = table.read_text(encoding="utf-8")
    assert before.count(TABLE) == 1 and row.count("\n") == 1
    table.write_text(before.replace(TABLE, f"{TABLE}{row.strip()[1:-1]}\n"), encoding="utf-8")

    command = [sys.executable, "-c", USE]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        str(package / "__init__.py"),
        "['mine']",
        "mine: it has no 'softcap 5'",
        "sdpa cudnn flash2 flash3 flash4 flex flex_flash mine",
        "sdpa mine flash3 flash4 flash2 cudnn flex flex_flash reference",
        "[(True, '1…128, ×8; forward only')]",
    ]


def test_every_kernel_of_fusepass_is_in_the_table() -> None:
    """A kernel without a row would serve nobody."""
    files = (path.stem for path in (ROOT / "fusepass/kernels").glob("*.py") if path.stem != "__init__")
    modules = [import_module(f"fusepass.kernels.{name}") for name in files]
    values = [value for module in modules for value in vars(module).values()]
    defined = {value.name for value in values if isinstance(value, Kernel)}
    assert defined == {"sdpa", "reference", *(gate.kernel for gate in BUILT_IN)}
    assert set(BY_NAME) == {*LIBRARIES, "reference"} and len(KERNELS) == len(BY_NAME)


@pytest.mark.parametrize("gate", BUILT_IN, ids=lambda gate: gate.kernel)
def test_a_row_says_what_it_was_read_from_and_where_its_kernel_is(gate: Gate) -> None:
    assert gate.source and all(isinstance(getattr(torch, name), torch.dtype) for name in gate.dtype_names())
    if gate.entry:
        assert resolve_name(f"fusepass.kernels.{gate.entry}") is BY_NAME[gate.kernel]
