"""``ai.onnx`` Attention (opset 23 and later).

It computes ``softmax(softcap(scale * q k^T) + mask) v``, with grouped heads.  ``is_causal`` is aligned
top-left; with a cache it counts from the end of the cache (ONNX operator specification of Attention, versions
23 and 24).  Fused kernels of runtimes take no mask, so a mask that is proved to be causal is not passed as a
tensor.  Runtimes need a mask of rank 4 with all queries and keys, whatever the specification says about
broadcasting.  If a mask hides later keys and others, ``is_causal`` is set as well: kernels then skip the
blocks of later keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import sympy
import torch

from fusepass.exporters.onnx.builder import ONNX_DTYPES, OnnxBuilder
from fusepass.exporters.onnx.cache import Cache, find_cache
from fusepass.exporters.onnx.lengths import find_lengths, of_lengths
from fusepass.exporters.onnx.operands import (
    CAPPED,
    Added,
    Operands,
    added_mask,
    after_weights,
    gated,
    has_gates,
    laid_out,
    mend_rows,
    muted,
    row_operand,
    scaled,
    softcap_of,
)
from fusepass.exporters.onnx.operators import Operator, Target
from fusepass.expressions.index import Size
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, Band

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def refuse(spec: Attention, target: Target) -> str | None:
    """Why Attention cannot compute ``spec``."""
    if spec.dtype not in _FLOATS:
        return f"it does not compute in {str(spec.dtype).removeprefix('torch.')}"
    return None


def emit(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write the operator."""
    spec = site.spec
    sunk = spec.sink is not None
    takes_cache = target.caches and not sunk and not has_gates(spec)
    cache = find_cache(site, build) if takes_cache else None
    factor, x = scaled(site, build, gated(site, build, laid_out(site, build)))
    dtype = build.dtype_of(x.q)
    offset = 0 if cache is None else cache.length
    causal = spec.is_causal(offset) and not sunk
    lengths = find_lengths(site) if target.takes_lengths and cache is None and not sunk else None
    counts: ir.Value | None = None
    if lengths is not None:
        counts, x, extra = of_lengths(site, build, lengths, x)
    else:
        mild = not sunk and target.mild_fills
        extra = Added(None) if causal else added_mask(site, build, dtype, boolean=not sunk, mild=mild)
    if sunk:
        x, extra = _sunk(site, build, x, extra)
    else:
        beside = lengths is None and target.causal_with_mask and not extra.mute
        causal = causal or (beside and _hides_later(spec, offset))
    x = replace(x, q=muted(build, extra, x.q))
    out = _call(site, build, x, extra.mask, _attributes(spec, factor, causal, dtype), cache, counts)
    out = after_weights(site, build, mend_rows(site, build, out, extra))
    r = site.roles
    return build.restore(build.cast(out, spec.out_dtype), (r.batch, r.heads, r.query, r.value_dim), site.out)


def _hides_later(spec: Attention, offset: Size) -> bool:
    """Do the masks hide every key after ``i + offset``, for the query at ``i``?"""
    rights = [a.right for a in spec.atoms if isinstance(a, Band) and a.right is not None]
    return any(sympy.expand(sympy.sympify(right) - offset).is_nonpositive for right in rights)


def _sunk(site: Site, build: OnnxBuilder, x: Operands, extra: Added) -> tuple[Operands, Added]:
    """The sink as one more key and value of zeros, with a score of zero and the sink's logit as its bias."""
    assert site.spec.sink is not None
    spec, dtype = site.spec, build.dtype_of(x.q)
    logit = build.cast(row_operand(site, build, site.spec.sink.slot), dtype)
    mask = extra.mask if extra.mask is not None else build.constant([[[[0.0]]]], dtype)
    wide = [
        a if a != 1 else b for a, b in zip(build.shape_of(mask)[:2], build.shape_of(logit)[:2], strict=True)
    ]
    mask = build.expand(mask, (*wide, spec.queries, spec.keys))
    logit = build.expand(logit, (*wide, spec.queries, 1))
    sides = []
    for value, width in ((x.k, spec.head_dim), (x.v, spec.value_dim)):
        zeros = build.expand(build.constant([[[[0.0]]]], dtype), (spec.batch, spec.kv_heads, 1, width))
        sides.append(build.join([value, zeros], 2))
    return Operands(x.q, *sides), Added(build.join([mask, logit], 3))


def _attributes(spec: Attention, factor: float, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    attributes: dict[str, Any] = {"scale": factor}
    if causal:
        attributes["is_causal"] = 1
    if cap := softcap_of(spec):
        attributes["softcap"] = cap
    if spec.softmax_dtype is not dtype and spec.softmax_dtype.itemsize > dtype.itemsize:
        attributes["softmax_precision"] = int(ONNX_DTYPES[spec.softmax_dtype])
    return attributes


def _call(
    site: Site,
    build: OnnxBuilder,
    x: Operands,
    mask: ir.Value | None,
    attributes: dict[str, Any],
    cache: Cache | None,
    counts: ir.Value | None,
) -> ir.Value:
    spec, dtype = site.spec, build.dtype_of(x.q)
    result = ((spec.batch, spec.heads, spec.queries, spec.value_dim), dtype)
    if cache is None:
        inputs = [x.q, x.k, x.v, mask, None, None, counts]
        while inputs[-1] is None:
            inputs.pop()
        return build.node("Attention", inputs, [result], attributes, stem="Attention")[0]
    types = [result, *((build.shape_of(v), dtype) for v in (x.k, x.v))]
    given = [x.q, cache.new_key, cache.new_value, mask, cache.past_key, cache.past_value]
    out, *present = build.node("Attention", given, types, attributes, stem="Attention")
    cache.take(build, present)
    return out


ATTENTION = Operator("Attention", CAPPED, emit, refuse, since=23)
