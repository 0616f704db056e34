"""The runtimes that models are written for, one row each. No other file of the exporter knows their names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from difflib import get_close_matches

import onnx_ir as ir

from fusepass.exporters.onnx.attention import ATTENTION
from fusepass.exporters.onnx.contrib import MASKED_HALF, MULTI_HEAD
from fusepass.exporters.onnx.files import NEWEST_OPSET
from fusepass.exporters.onnx.grouped import GROUP_QUERY
from fusepass.exporters.onnx.operators import Target
from fusepass.specification.attention import SoftCap

#: Every target by its name.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnx", "ONNX", (ATTENTION,)),
        Target("ort", "ONNX Runtime", (GROUP_QUERY, MASKED_HALF, ATTENTION, MULTI_HEAD)),
        # Source: importAttention of onnx-tensorrt, and the documentation of TensorRT's IAttention.
        Target(
            "tensorrt", "TensorRT's importer", (ATTENTION,), lacks=(SoftCap,), caches=False, lengths=False,
            causal_with_mask=False, mild_fills=False, rotary=False,
        ),
    )
}  # fmt: skip
#: Operators that are attention, or a part of it.
FUSED = frozenset(
    "Attention GroupQueryAttention MultiHeadAttention RotaryEmbedding PackedMultiHeadAttention "
    "DecoderMaskedMultiHeadAttention SparseAttention PagedAttention".split()
)


def checked_target(name: str, opset: int | None) -> Target:
    """The target of this name, with this version of the operators.

    Raises:
        ValueError: an unknown target, or a version of the operators that it cannot have.
    """
    if name not in TARGETS:
        near = get_close_matches(name, TARGETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown target {name!r}; accepted are {', '.join(TARGETS)}{hint}")
    row = TARGETS[name]
    version = row.opset if opset is None else opset
    if not isinstance(version, int) or isinstance(version, bool) or not 18 <= version <= NEWEST_OPSET:
        raise ValueError(f"opset {version!r}; expected a number from 18 to {NEWEST_OPSET}")
    if version < row.since:
        first = " or ".join(o.name for o in row.operators if o.since == row.since)
        others = (f"target={t.name!r}" for t in TARGETS.values() if t.since <= version)
        newer = f"use {row.since}, {row.since + 1} or newer"
        raise ValueError(f"opset {version} has no {first} operator; {', or '.join((newer, *others))}")
    return replace(row, opset=version)


def fused_operators(model: ir.Model) -> dict[str, int]:
    """How many fused operators a model has, by name."""
    counts = Counter(
        n.op_type if n.domain == "" else f"{n.domain}.{n.op_type}"
        for n in model.graph.all_nodes()
        if n.op_type in FUSED
    )
    return dict(counts.most_common())
