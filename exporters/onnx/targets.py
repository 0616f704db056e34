"""The runtimes that models are written for, and what each is offered."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches

import onnx_ir as ir

from fusepass.exporters.onnx.attention import ATTENTION
from fusepass.exporters.onnx.contrib import MASKED_HALF, MULTI_HEAD
from fusepass.exporters.onnx.files import NEWEST_OPSET
from fusepass.exporters.onnx.grouped import GROUP_QUERY
from fusepass.exporters.onnx.operators import Operator, Target

#: Operators in order of preference.
OPERATORS: dict[str, tuple[Operator, ...]] = {
    "onnx": (ATTENTION,),
    "ort": (GROUP_QUERY, MASKED_HALF, ATTENTION, MULTI_HEAD),
    "tensorrt": (ATTENTION,),
}
#: The operator set of a model that names none.
DEFAULT_OPSET = 24
#: Operators that are attention, or a part of it.
FUSED = frozenset(
    "Attention GroupQueryAttention MultiHeadAttention RotaryEmbedding PackedMultiHeadAttention "
    "DecoderMaskedMultiHeadAttention SparseAttention PagedAttention".split()
)


def checked_target(name: str, opset: int | None) -> Target:
    """The target of a name.

    Raises:
        ValueError: an unknown target, or a version of the operators that it cannot have.
    """
    if name not in OPERATORS:
        near = get_close_matches(name, OPERATORS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown target {name!r}; accepted are {', '.join(OPERATORS)}{hint}")
    version = DEFAULT_OPSET if opset is None else opset
    if not isinstance(version, int) or isinstance(version, bool) or not 18 <= version <= NEWEST_OPSET:
        raise ValueError(f"opset {version!r}; expected a number from 18 to {NEWEST_OPSET}")
    if name != "ort" and version < 23:
        raise ValueError(f"opset {version} has no Attention operator; use 23, 24 or newer, or target='ort'")
    return Target(name, version)


def fused_operators(model: ir.Model) -> dict[str, int]:
    """How many fused operators a model has, by name."""
    found = Counter(
        n.op_type if n.domain == "" else f"{n.domain}.{n.op_type}"
        for n in model.graph.all_nodes()
        if n.op_type in FUSED
    )
    return dict(found.most_common())
