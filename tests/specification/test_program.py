"""Modifiers as text: what is written is read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dense,
    Dropout,
    Finite,
    Floor,
    Keep,
    KeyGate,
    KeyPadding,
    Mask,
    Scale,
    ScaleBy,
    Sink,
    SoftCap,
    WeightScale,
    ZeroEmptyRows,
)
from fusepass.specification.program import decode, encode, known_bands, slots

slot = st.integers(0, 9)
axes = st.sampled_from(["", "h", "bj", "hij", "bhij"])
floats = st.floats(allow_nan=False)
fills = st.sampled_from(
    [-math.inf, -1e4, -1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min]
)
bound = st.none() | st.integers(-5, 5)
atoms = st.one_of(st.builds(Band, bound, bound), st.just(KeyPadding()), st.builds(Dense, axes))
scores = st.lists(
    st.one_of(
        st.builds(Scale, floats),
        st.builds(ScaleBy, slot, axes),
        st.builds(SoftCap, st.floats(0.1, 100)),
        st.builds(Bias, slot, axes, floats),
        st.builds(Mask, slot, fills, st.booleans(), st.booleans(), st.lists(atoms, max_size=2).map(tuple)),
        st.builds(Floor, fills.filter(math.isfinite)),
        st.builds(Finite, floats, fills, fills),
    ),
    max_size=5,
).map(tuple)
weights = st.lists(
    st.one_of(
        st.builds(Dropout, st.floats(0, 0.9)),
        st.builds(Keep, slot, st.booleans(), axes, st.booleans()),
        st.builds(WeightScale, floats, st.none() | slot, axes),
        st.builds(KeyGate, slot, axes),
        st.just(ZeroEmptyRows()),
    ),
    max_size=3,
).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
specs = st.builds(
    lambda s, w, soft, out, sink: Attention(1, 2, 2, 3, 3, 4, 4, torch.float32, s, w, soft, out, sink),
    scores, weights, dtypes, dtypes, st.none() | st.builds(Sink, slot, axes),
)  # fmt: skip


def renumbered(mod: Any, spec: Attention, bands: bool) -> Any:
    """The modifier as a program holds it: slots counted among those used, atoms in place of a tensor."""
    number = {slot: n for n, slot in enumerate(slots(spec, bands))}
    if isinstance(mod, Mask):
        closed = bands and known_bands(mod)
        kept = number.get(mod.slot, -1)
        return replace(mod, slot=kept, atoms=mod.atoms if closed else ())
    slot = getattr(mod, "slot", None)
    return mod if slot is None else replace(mod, slot=number[slot])


@given(specs, st.booleans())
def test_decode_reads_what_encode_wrote(spec: Attention, bands: bool) -> None:
    text = encode(spec, bands)
    program = decode(text)
    assert program.scores == tuple(renumbered(m, spec, bands) for m in spec.scores)
    assert program.weights == tuple(renumbered(m, spec, bands) for m in spec.weights)
    assert (program.softmax_dtype, program.out_dtype) == (spec.softmax_dtype, spec.out_dtype)
    assert program.sink == (None if spec.sink is None else renumbered(spec.sink, spec, bands))


@given(specs)
def test_the_text_is_json_and_one_text_a_program(spec: Attention) -> None:
    text = encode(spec)
    assert json.loads(text)
    assert encode(replace(spec, batch=9, queries=5)) == text, (
        "sizes are not part of it: one text for every shape"
    )
    assert decode(text) is decode(encode(spec))


@pytest.mark.parametrize("fill", [-math.inf, math.inf, -1e4, torch.finfo(torch.float16).min])
def test_fills_survive(fill: float) -> None:
    spec = Attention(1, 1, 1, 1, 1, 1, 1, torch.float32, (Mask(0, fill),))
    mask = decode(encode(spec)).scores[0]
    assert isinstance(mask, Mask) and mask.fill == fill


def test_bands_with_unknown_bounds_keep_their_tensor() -> None:
    s = sympy.Symbol("s", integer=True)
    masks = [
        Mask(0, -math.inf, atoms=(Band(None, s),)),
        Mask(1, -math.inf, atoms=(Band(3, 0),)),
        Mask(2, -math.inf),
    ]
    assert [known_bands(m) for m in masks] == [False, True, False]
    spec = Attention(1, 1, 1, 1, 1, 1, 1, torch.float32, tuple(masks))
    assert slots(spec) == [0, 1, 2] and slots(spec, bands=True) == [0, 2]
    assert [getattr(m, "slot", None) for m in decode(encode(spec, bands=True)).scores] == [0, -1, 1]


def test_a_slot_used_twice_is_one_operand() -> None:
    spec = Attention(1, 1, 1, 1, 1, 1, 1, torch.float32, (Bias(4), Scale(0.5), Bias(4)), (Keep(7),))
    assert slots(spec) == [4, 7]
