"""docs/recipes/kernel.md: one file, what it takes, its gate, and a name that every `kernel=` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fusepass
from fusepass.host.kernel_names import LIBRARIES
from fusepass.kernels import (
    BY_NAME,
    KERNELS,
    Builder,
    Gate,
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
from fusepass.kernels.gates import GATES
from tests.attention import plain, softcapped
from tests.capture import agrees, qkv

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


def test_a_kernel_of_fusepass_is_in_the_list_and_among_the_names() -> None:
    """The list is in order of preference, the names are there where no kernel is loaded."""
    assert set(BY_NAME) == {*LIBRARIES, "reference"} and len(KERNELS) == len(BY_NAME)


@pytest.mark.parametrize("name", sorted(set(LIBRARIES) - {"sdpa"}))
def test_a_kernel_of_fusepass_has_a_gate(name: str) -> None:
    """A row of the table of what libraries accept; SDPA takes whatever PyTorch takes."""
    assert GATES[name].kernel == name and GATES[name].source
