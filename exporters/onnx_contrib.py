"""``com.microsoft`` GroupQueryAttention and MultiHeadAttention (ONNX Runtime's contributed operators).

GroupQueryAttention has sliding windows and sinks, in kernels that take no mask; on CUDA it computes in half
precision.  ``local_window_size`` counts the current key (ONNX Runtime 1.24 and later).  MultiHeadAttention
serves models below opset 23, which have no Attention operator, and masks in half precision, which it gives to
cuDNN on CUDA.
Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import sympy
import torch

from fusepass.exporters.onnx_builder import OnnxBuilder
from fusepass.exporters.onnx_cache import find_cache
from fusepass.exporters.onnx_lengths import find_lengths
from fusepass.exporters.onnx_operands import (
    Added,
    Operands,
    Refused,
    added_mask,
    after_weights,
    full_mask,
    laid_out,
    laid_out_query,
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
    reach = _reach(spec)
    if isinstance(reach, str):
        return reach
    if spec.queries != spec.keys and 1 not in (spec.batch, spec.queries):
        return (
            "queries and keys differ in number: it has no cross attention, and caches for one query or batch"
        )
    if spec.head_dim != spec.value_dim or not isinstance(spec.head_dim, int) or spec.head_dim % 8:
        return f"head sizes {spec.head_dim} and {spec.value_dim}; it takes equal ones, multiples of 8"
    if not all(isinstance(n, int) for n in (spec.heads, spec.kv_heads)):
        return "the number of heads is not known"
    reason = refuse_modifiers(replace(spec, sink=None), softcap=True)
    if reason is not None:
        return reason
    if spec.sink is not None:
        return None if spec.sink.axes in ("", "h") else "its sink varies over heads only"
    if spec.dtype not in _HALVES:
        return "its CUDA kernels compute in half precision only"
    if not _only_bands(spec):
        return "a mask or bias besides the window would keep it from its fast kernels"
    return "a causal mask alone is faster as Attention" if reach is None and target.opset >= 23 else None


def _reach(spec: Attention) -> int | str | None:
    """How many keys a query sees, itself included; None for all before it; a text where it is not causal.

    Queries are the last ones: causal attention is aligned to the end of the keys.
    """
    bands = [a for a in spec.atoms if isinstance(a, Band)]
    band = intersect(bands, Facts()) if bands else None
    past = sympy.expand(sympy.sympify(spec.keys) - spec.queries)
    right = None if band is None else band.right
    ends = right is None if spec.queries == 1 else right is not None and sympy.expand(right - past) == 0
    if not ends:
        return "the attention is not causal"
    if band is None or band.left is None:
        return None
    reach = sympy.expand(sympy.sympify(band.left) + past + 1)
    return int(reach) if reach.is_Integer else f"the window {reach} is not a constant"


def _only_bands(spec: Attention) -> bool:
    """Is nothing added to the scores besides bands?"""
    return all(isinstance(m, Mask) for m in spec.added) and all(isinstance(a, Band) for a in spec.atoms)


def emit_gqa(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write GroupQueryAttention; its sequences are all as long as the keys."""
    spec = site.spec
    cache = None if spec.queries == spec.keys else find_cache(site, build)
    if cache is None and spec.queries != spec.keys:
        raise Refused("queries and keys differ in number, and no cache is joined to the keys")
    if cache is None:
        x = laid_out(site, build, packed=True)
    else:
        new = [_packed(build, t) for t in (cache.new_key, cache.new_value)]
        x = Operands(laid_out_query(site, build), *new)
        if len({build.dtype_of(t) for t in (x.q, x.k, x.v)}) > 1:
            raise Refused("queries and the cache differ in dtype")
    factor, x = scaled(site, build, x, packed=True)
    dtype = build.dtype_of(x.q)
    attributes: dict[str, Any] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "scale": factor,
    }
    reach = _reach(spec)
    if isinstance(reach, int):
        attributes["local_window_size"] = reach
    if cap := softcap_of(spec):
        attributes["softcap"] = cap
    bias = None if _only_bands(spec) else added_mask(site, build, dtype, boolean=False).mask
    total = build.cast(build.length(spec.keys), torch.int32)
    last = build.pointwise("Sub", total, build.constant([1], torch.int32))
    lengths = build.expand(last, (spec.batch,))
    past = (None, None) if cache is None else (cache.past_key, cache.past_value)
    inputs = [x.q, x.k, x.v, *past, lengths, build.reshape(total, []), None, None, None, bias]
    inputs.append(None if spec.sink is None else _sink(site, build, dtype))
    while inputs[-1] is None:
        inputs.pop()
    joined = (spec.batch, spec.kv_heads, spec.keys, spec.head_dim)
    types = [
        ((spec.batch, spec.queries, _times(spec.heads, spec.value_dim)), dtype),
        (joined, dtype),
        (joined, dtype),
    ]
    out, *present = build.node("GroupQueryAttention", inputs, types, attributes, _DOMAIN)
    if cache is not None:
        cache.take(build, present)
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


def refuse_masked(spec: Attention, target: Target) -> str | None:
    """Why MultiHeadAttention is no better than Attention; on CUDA it runs cuDNN, which takes masks."""
    if spec.dtype not in _HALVES:
        return "it is faster in half precision only"
    if spec.is_causal() and target.opset >= 23:
        return "a causal mask alone is faster as Attention"
    return refuse_mha(spec, target)


def emit_masked(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write MultiHeadAttention where Attention could not do without a mask."""
    if find_cache(site, build) is not None:
        raise Refused("Attention takes the cache as it is")
    if target.opset >= 24 and find_lengths(site) is not None:
        raise Refused("Attention takes the lengths as they are")
    return emit_mha(site, build, target)


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
MASKED_HALF = Operator("MultiHeadAttention", refuse_masked, emit_masked)
MULTI_HEAD = Operator("MultiHeadAttention", refuse_mha, emit_mha)
