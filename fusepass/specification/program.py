"""A specification's modifiers as text, so that an operator in a graph can carry them.

The operators of :mod:`fusepass.kernels` take tensors and one string; the string is JSON and is read
back (once) into the same frozen modifiers.  Only what a computation needs is written: a mask whose atoms are
bands with known bounds is written as bands, any other as the slot of its tensor.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from fusepass.expressions.ir import DTYPE_NAMES, DTYPES
from fusepass.specification.attention import (
    Attention,
    Band,
    Mask,
    Modifier,
    ScoreModifier,
    Sink,
    WeightModifier,
)
from fusepass.specification.modifiers import KINDS


@dataclass(frozen=True)
class Program:
    """The computation of one site: modifiers over operand slots, and the dtypes it rounds in."""

    scores: tuple[ScoreModifier, ...]
    weights: tuple[WeightModifier, ...]
    softmax_dtype: torch.dtype
    out_dtype: torch.dtype
    sink: Sink | None = None

    def spec(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operands: int) -> Attention:
        """The specification for given tensors (``[B, H, Q, D]``, ``[B, G, K, D]``, ``[B, G, K, Dv]``)."""
        batch, heads, queries, head_dim = q.shape
        return Attention(
            batch, heads, k.shape[1], queries, k.shape[2], head_dim, v.shape[3], q.dtype,
            self.scores, self.weights, self.softmax_dtype, self.out_dtype, self.sink, False, operands,
        )  # fmt: skip


def known_bands(mask: Mask) -> bool:
    """Are all atoms of a mask bands with integer bounds?"""
    return bool(mask.atoms) and all(
        isinstance(a, Band) and all(b is None or isinstance(b, int) for b in (a.left, a.right))
        for a in mask.atoms
    )


def slots(spec: Attention, bands: bool = False) -> list[int]:
    """The operand slots a computation reads; with ``bands``, masks that are known bands need none."""
    used: list[int] = []
    for mod in spec.modifiers:
        if not (bands and isinstance(mod, Mask) and known_bands(mod)):
            used += [slot for slot in mod.slots() if slot not in used]
    return used


def encode(spec: Attention, bands: bool = False) -> str:
    """The modifiers of ``spec`` as JSON, with its slots renumbered as :func:`slots` lists them."""
    number = {slot: n for n, slot in enumerate(slots(spec, bands))}
    table = {
        "scores": [_encode(m, number, bands) for m in spec.scores],
        "weights": [_encode(m, number, bands) for m in spec.weights],
        "softmax": DTYPE_NAMES[spec.softmax_dtype],
        "out": DTYPE_NAMES[spec.out_dtype],
        "sink": None if spec.sink is None else _encode(spec.sink, number, bands),
    }
    return json.dumps(table, separators=(",", ":"))


def _encode(mod: Modifier, number: dict[int, int], bands: bool) -> dict[str, Any]:
    """The fields of a modifier by name; a slot that the computation does not read is -1."""
    out: dict[str, Any] = {"is": type(mod).__name__}
    for f in fields(mod):  # type: ignore[arg-type]
        value = getattr(mod, f.name)
        if f.name in mod.slot_fields():
            value = None if value is None else number.get(value, -1)
        elif isinstance(mod, Mask) and f.name == "atoms":
            value = [[a.left, a.right] for a in value] if bands and known_bands(mod) else []
        out[f.name] = value
    return out


@functools.lru_cache(maxsize=512)
def decode(text: str) -> Program:
    """The program that :func:`encode` wrote."""
    table = json.loads(text)
    return Program(
        tuple(_decode(m) for m in table["scores"]),
        tuple(_decode(m) for m in table["weights"]),
        DTYPES[table["softmax"]],
        DTYPES[table["out"]],
        None if table["sink"] is None else _decode(table["sink"]),
    )


def _decode(entry: dict[str, Any]) -> Any:
    """The modifier with the given fields; JSON has lists in place of tuples."""
    given = {name: _frozen(v) for name, v in entry.items() if name != "is"}
    if "atoms" in given:
        given["atoms"] = tuple(Band(*bounds) for bounds in given["atoms"])
    return KINDS[entry["is"]](**given)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
