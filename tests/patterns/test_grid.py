"""The property grid: programs over all axes are recognised as what they were made from, and fused rightly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import checking, programs
from tests.programs import AXES, CROSS, NARROW, SQUARE, Program

#: Reasons for which a kernel may leave a site under "auto"; anything else is a fault.
HONEST = (
    "plain mathematics is what the graph has already",
    "it has no 'softcap",
    "it has no 'relu",
    "it has no 'leaky relu",
    "it has no 'abs",
    "it has no 'clamp",
    "it has no 'function",
    "comes after",
    "multiplied by a tensor that varies over the keys",
    "within reach of real scores",
    "a row may see no key",
    "weights are hidden after the softmax without renormalising",
    "half precision rounds away",
    "no gradients on cpu",
    "a bias that needs a gradient",
)
BANDS = frozenset({"causal", "offset", "window", "band", "symmetric", "all"})

#: Why exponentials over their sum may stay.
WRITTEN_OUT = "its softmax is written out"


def sweep(base: Program) -> list[Program]:
    """Every choice on every axis, one at a time."""
    variants = []
    for axis, choices in AXES.items():
        for choice in choices:
            changed = replace(base, **{axis: choice})  # type: ignore[arg-type]
            variants.append(programs.repaired(changed, frozenset({axis})))
    return [p for p in variants if programs.valid(p)]


def grid() -> list[Program]:
    """Sweeps around typical programs, and a cover of all pairs."""
    typical = (Program(), Program(mask="causal+padding", heads="interleave", bias="head"))
    swept = [p for base in typical for p in sweep(base)]
    narrow = [replace(Program(mask="causal"), layout=x, sizes=NARROW) for x in ("4d", "bshd", "kt", "vpt")]
    paired = programs.pairwise(AXES, sizes=(SQUARE, CROSS))
    return list(dict.fromkeys([*swept, *narrow, *paired]))


def must_fuse(p: Program) -> bool:
    """Can a kernel of torch express exactly this, without gradients?

    A bias that is given may hide the keys that a finite fill leaves visible. In half precision, the scores of
    such rows are rounded away; programs in half precision, and programs that set weights to zero after the
    softmax, may then stay as they are.
    """
    if p.bias != "none" and p.fill != "-inf" and (p.after != "none" or p.dtype == "float16"):
        return False
    if p.function == "none" and p.fill != "-1e4" and p.apply != "multiplied":
        return True
    return p.after == "none" and p.build != "buffer" and BANDS.issuperset(p.masks)


def check(p: Program, kernel: str, grads: bool = False) -> checking.Run:
    """Compare a program's numbers under one kernel with eager and float64."""
    given = programs.inputs(p)
    eager = checking.call(programs.function(p), given, grads=grads)
    exact = checking.call(programs.function(p, exact=True), given, torch.float64, grads)
    got = checking.call(checking.compiled(programs.function(p), kernel), given, grads=grads)
    assert not eager.out.isnan().any(), "a program of the grid has a row that sees no key"
    checking.assert_same_accuracy(got, eager, exact)
    return got


def explained(p: Program) -> str:
    """The program's text, for messages."""
    return f"{p}\n{programs.source(p)}"


@pytest.mark.parametrize("p", grid(), ids=str)
def test_recognised_fused_and_right(p: Program) -> None:
    site = check(p, "reference").site
    if p.softmax in ("exp", "logsumexp") and WRITTEN_OUT in (site.reason or ""):
        return  # what rows that see no key give there depends on numbers
    assert site.fused, f"{site.reason}\n{explained(p)}"
    missing = [word for word in programs.words(p) if word not in site.spec]
    assert not missing, f"{missing} not in {site.spec}\n{explained(p)}"
    torch.compiler.reset()
    site = check(p, "auto").site
    if site.fused:
        return
    reasons = (site.reason or "").split("; ")
    unknown = [r for r in reasons if not any(honest in r for honest in HONEST)]
    assert not unknown and not must_fuse(p), f"{site.reason}\n{site.spec}\n{explained(p)}"


SMALL = {
    "layout": ("4d", "bshd", "3d", "einsum", programs.TRANSPOSED),
    "heads": ("equal", "interleave", "expand", "single"),
    "scale": ("mul", "q", "tensor", "0-d"),
    "bias": ("none", "head", "t5", "alibi", "product"),
    "function": ("none", "tanh", "relu", "leaky", "abs", "silu", "clamp"),
    "mask": ("none", "causal", "padding", "window"),
    "apply": ("masked_fill", "additive", "additive where", "setitem", "where"),
    "softmax": ("function", "float32", "safe"),
    "dtype": ("float32", "bfloat16"),
}


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("p", programs.pairwise(SMALL, seed=1), ids=str)
def test_gradients(p: Program, kernel: str) -> None:
    run = check(p, kernel, grads=True)
    if kernel == "reference" or (p.function == p.bias == "none" and "t" not in p.scale):
        assert run.site.fused, f"{run.site.reason}\n{explained(p)}"


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("heads", ["equal", "interleave"])
def test_dropout_in_training_has_eager_s_distribution(kernel: str, heads: str) -> None:
    """With equal scores and one-hot values the result shows the weights: 0 or 1 / (K (1 - p))."""
    p = Program(dropout="training", heads=heads, sizes=replace(SQUARE, B=16, Q=32, K=8, E=8, D=8))
    given = programs.inputs(p)
    given["q"].zero_()
    given["v"].copy_(torch.eye(8).expand_as(given["v"]))
    run = checking.call(checking.compiled(programs.function(p), kernel), given, grads=True)
    assert run.site.fused, run.site.reason
    assert f"dropout {programs.P_DROP}" in run.site.spec
    kept = run.out != 0
    assert torch.allclose(run.out[kept], torch.tensor(1 / (8 * (1 - programs.P_DROP))))
    assert abs(kept.float().mean().item() - (1 - programs.P_DROP)) < 0.02
    assert kept.float().mean((1, 2, 3)).std() > 0  # drawn afresh for every row
