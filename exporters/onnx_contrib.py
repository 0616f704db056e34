"""``com.microsoft`` GroupQueryAttention and MultiHeadAttention (ONNX Runtime's contributed operators).

GroupQueryAttention has sliding windows and sinks, in kernels that take no mask; on CUDA it computes in half
precision.  ``local_window_size`` counts the current key (ONNX Runtime 1.24 and later).  MultiHeadAttention
serves models below opset 23, which have no Attention operator.
Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from fusepass.exporters.onnx_builder import OnnxBuilder
from fusepass.exporters.onnx_operands import (
    Added,
    Operands,
    added_mask,
    after_weights,
    full_mask,
    laid_out,
    mend_rows,
    muted,
    refuse_modifiers,
    repeated,
    scaled,
    score_operand,
    softcap_of,
)
from fusepass.exporters.onnx_operators import Operator, Target
from fusepass.index import Facts, Size
from fusepass.recognize import Site
from fusepass.spec import Attention, Band, Mask, intersect

_DOMAIN = "com.microsoft"
_HALVES = (torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------- grouped query


def refuse_gqa(spec: Attention, target: Target) -> str | None:
    """Why GroupQueryAttention cannot compute ``spec``, or is no better than Attention."""
    band = _band(spec)
    if band is None or band.right != 0:
        return "the attention is not causal"
    if spec.queries != spec.keys:
        return "queries and keys differ in number, and it has no cross attention"
    if spec.head_dim != spec.value_dim or not isinstance(spec.head_dim, int) or spec.head_dim % 8:
        return f"head sizes {spec.head_dim} and {spec.value_dim}; it takes equal ones, multiples of 8"
    if not all(isinstance(n, int) for n in (spec.heads, spec.kv_heads)):
        return "the number of heads is not known"
    if band.left is not None and not isinstance(band.left, int):
        return f"the window {band.left} is not a constant"
    reason = refuse_modifiers(replace(spec, sink=None), softcap=True)
    if reason is not None:
        return reason
    if spec.sink is not None:
        return None if spec.sink.axes in ("", "h") else "its sink varies over heads only"
    if spec.dtype not in _HALVES:
        return "its CUDA kernels compute in half precision only"
    if not _only_bands(spec):
        return "a mask or bias besides the window would keep it from its fast kernels"
    return "a causal mask alone is faster as Attention" if band.left is None and target.opset >= 23 else None


def _band(spec: Attention) -> Band | None:
    """The conjunction of all bands."""
    bands = [a for a in spec.atoms if isinstance(a, Band)]
    return intersect(bands, Facts()) if bands else None


def _only_bands(spec: Attention) -> bool:
    """Is nothing added to the scores besides bands?"""
    return all(isinstance(m, Mask) for m in spec.added) and all(isinstance(a, Band) for a in spec.atoms)


def emit_gqa(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write GroupQueryAttention; its sequences are all as long as the keys."""
    spec = site.spec
    band = _band(spec)
    assert band is not None
    factor, x = scaled(site, build, laid_out(site, build, packed=True), packed=True)
    dtype = build.dtype_of(x.q)
    attributes: dict[str, Any] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": factor,
    }
    if band.left is not None:
        attributes["local_window_size"] = int(band.left) + 1
    if cap := softcap_of(spec):
        attributes["softcap"] = cap
    bias = None if _only_bands(spec) else added_mask(site, build, dtype, boolean=False).mask
    total = build.cast(build.length(spec.keys), torch.int32)
    last = build.pointwise("Sub", total, build.constant([1], torch.int32))
    lengths = build.expand(last, (spec.batch,))
    inputs = [x.q, x.k, x.v, None, None, lengths, build.reshape(total, []), None, None, None, bias]
    inputs.append(None if spec.sink is None else _sink(site, build, dtype))
    while inputs[-1] is None:
        inputs.pop()
    cache = (spec.batch, spec.kv_heads, spec.keys, spec.head_dim)
    types = [
        ((spec.batch, spec.queries, _times(spec.heads, spec.value_dim)), dtype),
        (cache, dtype),
        (cache, dtype),
    ]
    out = build.node("GroupQueryAttention", inputs, types, attributes, _DOMAIN)[0]
    return _finished(site, build, out, Added(None))


def _times(a: Size, b: Size) -> Size:
    return a * b


def _sink(site: Site, build: OnnxBuilder, dtype: torch.dtype) -> ir.Value:
    """The sink's logits, one a head."""
    assert site.spec.sink is not None
    value = build.cast(score_operand(site, build, site.spec.sink.slot), dtype)
    for dim in (0, 2, 3):  # it does not vary over these
        if build.shape_of(value)[dim] != 1:
            value = build.cut(value, dim, 0, 1)
    value = build.expand(value, (1, site.spec.heads, 1, 1))
    return build.reshape(value, (site.spec.heads,))


# ---------------------------------------------------------------------------------------- multi head


def refuse_mha(spec: Attention, target: Target) -> str | None:
    """Why MultiHeadAttention cannot compute ``spec``."""
    if spec.sink is not None:
        return "it has no sink"
    if spec.dtype not in (torch.float32, *_HALVES):
        return f"it does not compute in {str(spec.dtype).removeprefix('torch.')}"
    if not isinstance(spec.heads, int):
        return "the number of heads is not known"
    return refuse_modifiers(spec, softcap=False)


def emit_mha(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write MultiHeadAttention; grouped heads are repeated, for it has none."""
    spec = site.spec
    if spec.heads == spec.kv_heads:
        x = laid_out(site, build, packed=True)
    else:
        x = repeated(site, build, laid_out(site, build))
        x = Operands(*(_packed(build, t) for t in (x.q, x.k, x.v)))
    factor, x = scaled(site, build, x, packed=True)
    dtype = build.dtype_of(x.q)
    # On the CPU `unidirectional` is right for as many queries as keys only.
    causal = spec.is_causal() and spec.queries == spec.keys
    extra = Added(None) if causal else added_mask(site, build, dtype, boolean=False)
    if extra.mute:
        heads = build.reshape(x.q, (spec.batch, spec.queries, spec.heads, spec.head_dim))
        quiet = muted(build, extra, build.permute(heads, (0, 2, 1, 3)))
        x = replace(x, q=_packed(build, quiet))
    attributes: dict[str, Any] = {"num_heads": spec.heads, "scale": factor}
    if causal:
        attributes["unidirectional"] = 1
    inputs = [x.q, x.k, x.v] + (
        [] if extra.mask is None else [None, None, full_mask(site, build, extra.mask)]
    )
    shape = (spec.batch, spec.queries, _times(spec.heads, spec.value_dim))
    out = build.node("MultiHeadAttention", inputs, [(shape, dtype)], attributes, _DOMAIN)[0]
    return _finished(site, build, out, extra)


def _packed(build: OnnxBuilder, value: ir.Value) -> ir.Value:
    """``[B, H, n, D]`` as ``[B, n, H*D]``."""
    batch, heads, length, width = build.shape_of(value)
    return build.reshape(build.permute(value, (0, 2, 1, 3)), (batch, length, _times(heads, width)))


def _finished(site: Site, build: OnnxBuilder, out: ir.Value, extra: Added) -> ir.Value:
    """The result in the layout of the site, after what the operator cannot say."""
    spec, r = site.spec, site.roles
    plain = not spec.weights and extra.seen is None
    if plain:
        groups: Sequence[Sequence[str]] = (r.batch, r.query, [*r.heads, *r.value_dim])
        return build.restore(build.cast(out, spec.out_dtype), groups, site.out)
    wide = build.reshape(out, (spec.batch, spec.queries, spec.heads, spec.value_dim))
    out = after_weights(site, build, mend_rows(site, build, build.permute(wide, (0, 2, 1, 3)), extra))
    return build.restore(build.cast(out, spec.out_dtype), (r.batch, r.heads, r.query, r.value_dim), site.out)


GROUP_QUERY = Operator("GroupQueryAttention", refuse_gqa, emit_gqa)
MULTI_HEAD = Operator("MultiHeadAttention", refuse_mha, emit_mha)
