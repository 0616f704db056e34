"""Laws of every modifier, alone and combined with every other one; the classes are discovered, not listed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Mask,
    Modifier,
    Scale,
    ScaleBy,
    ScoreModifier,
    Sink,
    SoftCap,
    WeightModifier,
    kinds,
    merge_scales,
    negligible,
    reference,
)
from fusepass.specification.derivative import gradients
from fusepass.specification.modifiers import KINDS, Sample, Step
from fusepass.specification.program import decode, encode, slots
from fusepass.specification.samples import SIZES, Draw
from tests.written import qkv, spec_of

INF = math.inf
F64 = torch.float64
SHAPE = tuple(SIZES.values())
FACTORS = (0.5, 3.0, 1.0, -1.0, -0.7, 0.0)
FILLS = (-INF, -1e9, -1e30, torch.finfo(torch.float32).min)


def samples(of: Callable[..., Modifier]) -> list[Any]:
    """All samples of all classes of a kind."""
    drawn = [(kind, n, s) for kind in kinds(of) for n, s in enumerate(kind.samples(Draw(1)))]
    return [pytest.param(sample, id=f"{kind.__name__}{n}") for kind, n, sample in drawn]


def scores(seed: int = 0) -> Tensor:
    return 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=F64)


def broken() -> Tensor:
    """Scores with a row of NaN, and infinities in two other rows."""
    s = scores(1)
    s[0, 1, 2] = math.nan
    s[1, 0, 3, 2], s[1, 2, 1, 4] = -INF, INF
    return s


def joined(*parts: Sample) -> tuple[list[Any], list[Tensor]]:
    """Several samples over one list of operands."""
    mods: list[Any] = []
    operands: list[Tensor] = []
    for mod, tensors in parts:
        mods.append(moved(mod, len(operands)))
        operands += tensors
    return mods, operands


def moved(mod: Any, by: int) -> Any:
    """A modifier whose operands come later."""
    given = {name: getattr(mod, name) for name in mod.slot_fields()}
    return replace(mod, **{name: slot + by for name, slot in given.items() if slot is not None})


# ---------------------------------------------------------------------------------------- what a class is


def test_there_are_modifiers_of_every_kind() -> None:
    assert len(kinds(ScoreModifier)) >= 7 and len(kinds(WeightModifier)) >= 5 and Sink in kinds(Modifier)
    assert all(KINDS[k.__name__] is k for k in kinds(Modifier))


@pytest.mark.parametrize("sample", samples(Modifier))
def test_a_modifier_is_frozen_data_that_says_what_it_is(sample: Sample) -> None:
    mod, tensors = sample
    assert is_dataclass(mod) and type(mod).__dataclass_params__.frozen and hash(mod) == hash(replace(mod))
    assert str(mod) and type(mod).__doc__ and mod.slots() == list(range(len(tensors)))
    assert all(len(t.shape) == 4 for t in tensors)


@pytest.mark.parametrize("missing", ["__str__", "apply", "backward", "samples"])
def test_a_class_that_forgets_something_cannot_be_made(missing: str) -> None:
    members = {name: getattr(Scale, name) for name in ("__str__", "apply", "backward", "samples")}
    del members[missing]
    try:
        incomplete = type("Forgetful", (ScoreModifier,), members | {"__module__": __name__})
        with pytest.raises(TypeError, match=missing):
            incomplete()
        assert incomplete not in kinds(Modifier)
    finally:
        KINDS.pop("Forgetful")


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two modifiers are called 'Scale'"):
        type("Scale", (ScoreModifier,), {"__module__": __name__})
    assert KINDS["Scale"] is Scale


# ---------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("hurt", [False, True])
@pytest.mark.parametrize("sample", samples(Step))
def test_the_derivative_is_that_of_the_meaning(sample: tuple[Step, tuple[Tensor, ...]], hurt: bool) -> None:
    mod, tensors = sample
    x = broken() if hurt else scores()
    x = x.softmax(-1) if isinstance(mod, WeightModifier) else x
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in (x, *tensors)]
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=F64)
    (mod.apply(leaves[0], leaves[1:]) * grad).nansum().backward()
    of_operands = [torch.zeros_like(t) for t in tensors]
    after = mod.apply(x, tensors)
    mine = mod.backward(torch.where(after.isnan(), 0.0, grad), x, tensors, of_operands)
    assert mine.dtype is x.dtype and mine.shape == x.shape
    for got, leaf in zip([mine, *of_operands], leaves, strict=True):
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("sample", samples(Modifier))
def test_a_program_reads_back_what_was_written_and_computes_it(sample: Sample) -> None:
    """Beside operands that another modifier reads or nobody reads; forward and backward."""
    draw = Draw(5)
    (mod, bias), tensors = joined(sample, (Bias(0, "hij"), (draw.normal("hij"),)))
    mod = moved(mod, 2)  # two operands that nobody reads come first
    bias = moved(bias, 2)
    operands = [draw.normal("bhij"), draw.bits("j"), *tensors]
    spec = spec_of(
        [bias, mod] if isinstance(mod, ScoreModifier) else [bias],
        [mod] if isinstance(mod, WeightModifier) else [],
        mod if isinstance(mod, Sink) else None,
        F64, rows_seen=False, operands=len(operands),
    )  # fmt: skip
    used = slots(spec)
    assert set(used) == {*mod.slots(), *bias.slots()}
    program = decode(encode(spec))
    (again,) = [m for m in program.spec(*qkv(F64), len(used)).modifiers if type(m) is type(mod)][-1:]
    assert type(again) is type(mod) and [used[n] for n in again.slots()] == mod.slots()
    same = {name: value for name, value in vars(mod).items() if name not in mod.slot_fields()}
    assert {name: getattr(again, name) for name in same} == same | ({"atoms": ()} if "atoms" in same else {})
    mine, theirs = (
        [t.clone().requires_grad_(t.is_floating_point()) for t in (*qkv(F64), *operands)] for _ in range(2)
    )
    got = torch.ops.fusepass.attention(*mine[:3], [mine[3 + n] for n in used], encode(spec))
    want = reference(spec, theirs[0], theirs[1], theirs[2], theirs[3:])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    for out in (got, want):
        (out * weight).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        left, right = (torch.zeros_like(t) if t.grad is None else t.grad for t in (a, b))
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("sample", samples(ScoreModifier))
def test_a_scale_passes_only_what_it_commutes_with(
    sample: tuple[ScoreModifier, Sequence[Tensor]], factor: float
) -> None:
    mod, tensors = sample
    passed = mod.scaled(factor)
    if passed is not None:
        for s in (scores(), broken()):
            want, got = mod.apply(s, tensors) * factor, passed.apply(s * factor, tensors)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sample", samples(ScoreModifier))
def test_what_is_hidden_stays_as_hidden_as_it_says(
    sample: tuple[ScoreModifier, Sequence[Tensor]], fill: float
) -> None:
    mod, tensors = sample
    level = mod.hidden(fill)
    after = mod.apply(torch.full(SHAPE, fill, dtype=F64), tensors)
    if level is not None:
        most = level + 1e-7 * abs(level) if math.isfinite(level) else level
        assert not after.isnan().any() and float(after.amax()) <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("sample", samples(ScoreModifier))
def test_a_row_of_one_level_stays_one_where_it_says_so(
    sample: tuple[ScoreModifier, Sequence[Tensor]], fill: float, dtype: torch.dtype
) -> None:
    mod, tensors = sample
    if mod.keeps_level(fill, dtype) and fill >= torch.finfo(dtype).min:
        rows = torch.full(SHAPE, fill, dtype=dtype)
        tensors = [1e6 * t.to(dtype) if t.is_floating_point() and mod.slots() else t for t in tensors]
        after = mod.apply(rows, tensors)
        assert torch.equal(after, after[..., :1].expand(SHAPE)), mod


@pytest.mark.parametrize("sample", samples(ScoreModifier))
def test_a_shift_of_rows_cancels_where_it_says_so(sample: tuple[ScoreModifier, Sequence[Tensor]]) -> None:
    mod, tensors = sample
    s, shift = scores(), scores(7)[..., :1]
    if mod.keeps_shift:
        before, after = (mod.apply(x, tensors).softmax(-1) for x in (s, s + shift))
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------- with others around

SCORES = [s.values[0] for s in samples(ScoreModifier)]


def after_all(mods: Sequence[ScoreModifier], s: Tensor, operands: Sequence[Tensor]) -> Tensor:
    for mod in mods:
        s = mod.apply(s, operands)
    return s


@pytest.mark.parametrize("first", SCORES, ids=lambda s: str(s[0]))
def test_merged_scales_compute_the_same_scores(first: Sample) -> None:
    """Scales around and between one, two and three modifiers, in every combination."""
    others = [(), *((s,) for s in SCORES), *itertools.product(SCORES, repeat=2)]
    for n, more in enumerate(others):
        mods, operands = joined(first, *more)
        a, b = Scale(FACTORS[n % 5]), Scale(FACTORS[(n // 5) % 5])
        whole = [a, *mods[:1], b, *mods[1:], a]
        merged = merge_scales(whole)
        want, got = (after_all(m, scores(), operands) for m in (whole, merged))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-5, equal_nan=True)  # sums with 1e9
        assert merge_scales(merged) == merged and Scale(1.0) not in merged
        assert not any(isinstance(x, Scale) and isinstance(y, Scale) for x, y in itertools.pairwise(merged))


@pytest.mark.parametrize("first", SCORES, ids=lambda s: str(s[0]))
def test_the_derivative_of_pairs_is_that_of_the_oracle(first: Sample) -> None:
    """The chain rule through all pairs of score modifiers, with weight modifiers taking turns."""
    after = [s.values[0] for s in samples(WeightModifier)]
    for n, second in enumerate(SCORES):
        mods, operands = joined(first, second, after[n % len(after)])
        spec = spec_of(mods[:2], mods[2:], dtype=F64)
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in (*qkv(F64), *operands)]
        out = reference(spec, leaves[0], leaves[1], leaves[2], leaves[3:])
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(n), dtype=F64)
        (out * grad).sum().backward()
        for got, leaf in zip(gradients(spec, grad, *qkv(F64), operands), leaves, strict=True):
            want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("first", SCORES, ids=lambda s: str(s[0]))
def test_a_mask_that_hides_leaves_no_weight(first: Sample) -> None:
    """A mask that is said to hide gives its pairs no weight, whatever comes before and after it."""
    draw = Draw(3)
    for fill, more in itertools.product(
        [-INF, -1e9, -1e30, -3.0, math.nan, INF], [(), *((s,) for s in SCORES)]
    ):
        seen = draw.bits("bij")
        mods, operands = joined(first, (Mask(0, fill), (seen,)), *more)
        spec = spec_of(mods, dtype=F64)
        if spec.hides(mods[1]):
            weights = after_all(mods, scores(), operands).softmax(-1)
            assert not weights[(~seen).expand(SHAPE)].any(), (mods, fill)
    assert not spec.is_causal()


def test_only_a_mask_that_hides_is_a_visibility() -> None:
    def causal(fill: float, *after: ScoreModifier, additive: bool = False) -> Attention:
        return spec_of([Scale(0.5), Mask(0, fill, additive, atoms=(Band(None, 0),)), *after])

    low = torch.finfo(torch.float32).min
    assert all(causal(fill).is_causal() for fill in (-INF, -1e9, low))
    assert causal(-INF, Mask(1, -INF, atoms=(Band(None, 0),))).is_causal()
    for fill in (-1e4, -1e3, 0.0, 1e9, INF, math.nan):
        assert not causal(fill).is_causal() and causal(fill).atoms == () and not negligible(fill, F64)
    for after in (ScaleBy(1, "h"), SoftCap(30.0), Scale(-1.0), Scale(1e-9)):
        assert not causal(-1e9, after).is_causal()
    assert not causal(-1e4, additive=True).is_causal() and not causal(-INF, Bias(1)).is_causal()
