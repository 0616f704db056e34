"""``com.microsoft`` MultiHeadAttention (an operator that ONNX Runtime contributes).

It serves models below opset 23, which have no Attention operator, and masks in half precision, for which it
runs cuDNN on CUDA.
Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.exporters.onnx.cache import find_cache
from fusepass.exporters.onnx.lengths import find_lengths
from fusepass.exporters.onnx.operands import (
    PLAIN,
    Added,
    Operands,
    Refused,
    added_mask,
    after_weights,
    full_mask,
    gated,
    has_gates,
    laid_out,
    mend_rows,
    muted,
    packed,
    repeated,
    scaled,
    times,
)
from fusepass.exporters.onnx.operators import Operator, Target
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention

DOMAIN = "com.microsoft"
HALVES = (torch.float16, torch.bfloat16)


def refuse_mha(spec: Attention, target: Target) -> str | None:
    """Why MultiHeadAttention cannot compute ``spec``."""
    if spec.dtype not in (torch.float32, *HALVES):
        return f"it does not compute in {str(spec.dtype).removeprefix('torch.')}"
    if not isinstance(spec.heads, int):
        return "the number of heads is not known"
    return None


def refuse_masked(spec: Attention, target: Target) -> str | None:
    """Why MultiHeadAttention, which on CUDA runs cuDNN with masks, is not better than Attention."""
    if spec.dtype not in HALVES:
        return "it is faster only in half precision"
    if spec.is_causal() and (spec.heads != spec.kv_heads or spec.queries != spec.keys):
        return "a causal mask alone is faster as GroupQueryAttention or Attention"
    return refuse_mha(spec, target)


def emit_masked(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write MultiHeadAttention if Attention would need a mask."""
    if not has_gates(site.spec) and find_cache(site, build) is not None:
        raise Refused("Attention takes the cache as it is")
    if target.takes_lengths and find_lengths(site) is not None:
        raise Refused("Attention takes the lengths as they are")
    return emit_mha(site, build, target)


def emit_mha(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write MultiHeadAttention; it has no grouped heads, so key/value heads are repeated."""
    spec = site.spec
    if spec.heads == spec.kv_heads and not has_gates(spec):
        x = laid_out(site, build, packed=True)
    else:
        x = gated(site, build, laid_out(site, build))
        x = x if spec.heads == spec.kv_heads else repeated(site, build, x)
        x = Operands(*(packed(build, t) for t in (x.q, x.k, x.v)))
    factor, x = scaled(site, build, x, packed=True)
    dtype = build.dtype_of(x.q)
    # On the CPU `unidirectional` is correct only for as many queries as keys.
    causal = spec.is_causal() and spec.queries == spec.keys
    extra = Added(None) if causal else added_mask(site, build, dtype, boolean=False)
    if extra.mute:
        heads = build.reshape(x.q, (spec.batch, spec.queries, spec.heads, spec.head_dim))
        quiet = muted(build, extra, build.permute(heads, (0, 2, 1, 3)))
        x = replace(x, q=packed(build, quiet))
    attributes: dict[str, Any] = {"num_heads": spec.heads, "scale": factor}
    if causal:
        attributes["unidirectional"] = 1
    inputs = [x.q, x.k, x.v] + (
        [] if extra.mask is None else [None, None, full_mask(site, build, extra.mask)]
    )
    shape = (spec.batch, spec.queries, times(spec.heads, spec.value_dim))
    out = build.node("MultiHeadAttention", inputs, [(shape, dtype)], attributes, DOMAIN)[0]
    return _finished(site, build, out, extra)


def _finished(site: Site, build: OnnxBuilder, out: ir.Value, extra: Added) -> ir.Value:
    """The result in the layout of the site, after the steps that the operator cannot express."""
    spec, r = site.spec, site.roles
    plain = not spec.weights and extra.seen is None
    if plain:
        groups: Sequence[Sequence[str]] = (r.batch, r.query, [*r.heads, *r.value_dim])
        return build.restore(build.cast(out, spec.out_dtype), groups, site.out)
    wide = build.reshape(out, (spec.batch, spec.queries, spec.heads, spec.value_dim))
    out = after_weights(site, build, mend_rows(site, build, build.permute(wide, (0, 2, 1, 3)), extra))
    return build.restore(build.cast(out, spec.out_dtype), (r.batch, r.heads, r.query, r.value_dim), site.out)


MASKED_HALF = Operator("MultiHeadAttention", PLAIN, emit_masked, refuse_masked)
MULTI_HEAD = Operator("MultiHeadAttention", PLAIN, emit_mha, refuse_mha)
