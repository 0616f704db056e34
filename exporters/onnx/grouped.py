"""``com.microsoft`` GroupQueryAttention (an operator that ONNX Runtime contributes).

It has sliding windows, sinks and rotary embeddings, in kernels that take no mask; on CUDA it computes only in
half precision.  ``local_window_size`` includes the current key (ONNX Runtime 1.24 and later).  With a cache
it takes several queries only for a single sequence, so several sequences are turned into one sequence with
more heads, if their number is known.
Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch

from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.exporters.onnx.cache import Cache, find_cache
from fusepass.exporters.onnx.contrib import DOMAIN, HALVES
from fusepass.exporters.onnx.operands import (
    CAPPED,
    Operands,
    Refused,
    added_mask,
    after_weights,
    alike,
    has_gates,
    laid_out_over,
    packed,
    scaled,
    score_operand,
    softcap_of,
    times,
)
from fusepass.exporters.onnx.operators import Operator, Target
from fusepass.exporters.onnx.turned import Turned, find_turned
from fusepass.expressions.index import Facts, Size
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, Band, Mask, intersect


def refuse(spec: Attention, target: Target) -> str | None:
    """Why GroupQueryAttention cannot compute ``spec``, or is not better than Attention."""
    reach = _reach(spec)
    if isinstance(reach, str):
        return reach
    if spec.queries != spec.keys and spec.queries != 1 and not isinstance(spec.batch, int):
        return (
            "queries and keys differ in number: it has no cross attention, and with a cache it takes "
            "several queries only if the number of sequences is constant"
        )
    if spec.head_dim != spec.value_dim or not isinstance(spec.head_dim, int) or spec.head_dim % 8:
        return f"head sizes {spec.head_dim} and {spec.value_dim}; it needs equal ones that are multiples of 8"
    if not all(isinstance(n, int) for n in (spec.heads, spec.kv_heads)):
        return "the number of heads is not known"
    if has_gates(spec):
        return (
            "a factor varies over the keys, and this operator needs keys and values as they are in the cache"
        )
    if spec.sink is not None:
        return None if spec.sink.axes in ("", "h") else "its sink may vary over heads only"
    if spec.dtype not in HALVES:
        return "its CUDA kernels compute in half precision only"
    return (
        None if _only_bands(spec) else "a mask or bias besides the window would keep it from its fast kernels"
    )


def _reach(spec: Attention) -> int | str | None:
    """How many keys a query sees, its own included; None if it sees all earlier ones; or a reason to refuse.

    The queries are at the last positions: causal attention must be aligned to the end of the keys.
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
    """Are bands all that is added to the scores?"""
    hide = all(isinstance(m, Mask) and spec.hides(m) for m in spec.added)
    return hide and all(isinstance(a, Band) for a in spec.atoms)


def emit(site: Site, build: OnnxBuilder, target: Target) -> ir.Value:
    """Write the operator; the length of every sequence is the number of keys."""
    spec = site.spec
    cache = None if spec.queries == spec.keys else find_cache(site, build)
    if cache is None and spec.queries != spec.keys:
        raise Refused("queries and keys differ in number, and no cache is joined to the keys")
    reach = _reach(spec)
    turned = find_turned(site, build, cache)
    plain = reach is None and cache is None and turned is None and not spec.sink
    if plain and softcap_of(spec):
        raise Refused("a causal mask and a softcap alone are faster as Attention")
    if plain and spec.heads == spec.kv_heads:
        raise Refused("a causal mask alone, without grouped heads, is faster as MultiHeadAttention")
    merged = int(spec.batch) if cache is not None and 1 not in (spec.batch, spec.queries) else 1
    x = _operands(site, build, cache, turned, merged > 1)
    factor, x = scaled(site, build, x, packed=True)
    dtype = build.dtype_of(x.q)
    attributes = _attributes(spec, factor, merged, reach, turned)
    batch, heads, groups = (1 if merged > 1 else spec.batch), merged * spec.heads, merged * spec.kv_heads
    past: Sequence[ir.Value | None] = (None, None)
    if cache is not None:
        size = (batch, groups, cache.length, spec.head_dim)
        past = [build.reshape(t, size) for t in (cache.past_key, cache.past_value)]
    inputs = [x.q, x.k, x.v, *past, *_lengths(build, spec.keys, batch)]
    inputs += (None, None) if turned is None else turned.tables(build, spec, cache)
    inputs += [None, _bias(site, build, dtype, merged), _sink(site, build, dtype, merged)]
    while inputs[-1] is None:
        inputs.pop()
    joined = (batch, groups, spec.keys, spec.head_dim)
    result = (batch, spec.queries, times(heads, spec.value_dim))
    types = [(shape, dtype) for shape in (result, joined, joined)]
    out, *present = build.node("GroupQueryAttention", inputs, types, attributes, DOMAIN)
    if cache is not None:
        whole = (spec.batch, spec.kv_heads, spec.keys, spec.head_dim)
        cache.take(build, [build.reshape(p, whole) for p in present])
    return _restored(site, build, out, merged > 1)


def _attributes(
    spec: Attention, factor: float, merged: int, reach: int | str | None, turned: Turned | None
) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "num_heads": merged * spec.heads,
        "kv_num_heads": merged * spec.kv_heads,
        "scale": factor,
    }
    if isinstance(reach, int):
        attributes["local_window_size"] = reach
    if cap := softcap_of(spec):
        attributes["softcap"] = cap
    if turned is not None:
        attributes["do_rotary"] = 1
        attributes["rotary_interleaved"] = int(turned.neighbours)
    return attributes


def _operands(
    site: Site, build: OnnxBuilder, cache: Cache | None, turned: Turned | None, merged: bool
) -> Operands:
    """Packed queries and (new) keys and values of one dtype.

    If ``merged``, the sequences become heads of one sequence.
    """
    r = site.roles
    query, keys = (site.query, site.keys) if turned is None else (turned.query, turned.keys)
    q = laid_out_over(build, query, r.batch, r.query, [*r.heads, *r.head_dim], merged)
    if cache is None:
        k = laid_out_over(build, keys, r.batch, r.key, [*r.kv_heads, *r.head_dim])
        v = laid_out_over(build, site.values, r.batch, r.key, [*r.kv_heads, *r.value_dim])
    else:
        new = cache.new_key if turned is None else turned.new_key(build)
        k, v = (packed(build, t, merged) for t in (new, cache.new_value))
    if cache is not None and len({build.dtype_of(t) for t in (q, k, v)}) > 1:
        raise Refused("queries and the cache differ in dtype")
    return alike(build, Operands(q, k, v))


def _lengths(build: OnnxBuilder, keys: Size, batch: Size) -> tuple[ir.Value, ir.Value]:
    """The position of the last key in every sequence, and the number of keys."""
    total = build.cast(build.length(keys), torch.int32)
    last = build.pointwise("Sub", total, build.constant([1], torch.int32))
    return build.expand(last, (batch,)), build.reshape(total, [])


def _bias(site: Site, build: OnnxBuilder, dtype: torch.dtype, merged: int) -> ir.Value | None:
    """Everything that is added to the scores, or None if these are only bands."""
    spec = site.spec
    bias = None if _only_bands(spec) else added_mask(site, build, dtype, boolean=False).mask
    if bias is None or merged == 1:
        return bias
    bias = build.expand(bias, (spec.batch, spec.heads, spec.queries, spec.keys))
    return build.reshape(bias, (1, merged * spec.heads, spec.queries, spec.keys))


def _sink(site: Site, build: OnnxBuilder, dtype: torch.dtype, merged: int) -> ir.Value | None:
    """The sink's logits, one per head."""
    spec = site.spec
    if spec.sink is None:
        return None
    value = build.cast(score_operand(site, build, spec.sink.slot), dtype)
    for dim in (0, 2, 3):  # it does not vary over the other axes
        if build.shape_of(value)[dim] != 1:
            value = build.cut(value, dim, 0, 1)
    value = build.expand(value, (merged, spec.heads, 1, 1))
    return build.reshape(value, (merged * spec.heads,))


def _restored(site: Site, build: OnnxBuilder, out: ir.Value, merged: bool) -> ir.Value:
    """The result in the layout of the site, after the steps that the operator cannot express."""
    spec, r = site.spec, site.roles
    width = [*r.heads, *r.value_dim]
    groups = ([], r.query, [*r.batch, *width]) if merged else (r.batch, r.query, width)
    if not spec.weights:
        return build.restore(build.cast(out, spec.out_dtype), groups, site.out)
    if merged:
        wide = build.reshape(out, (spec.queries, spec.batch, spec.heads, spec.value_dim))
        wide = build.permute(wide, (1, 2, 0, 3))
    else:
        wide = build.reshape(out, (spec.batch, spec.queries, spec.heads, spec.value_dim))
        wide = build.permute(wide, (0, 2, 1, 3))
    out = build.cast(after_weights(site, build, wide), spec.out_dtype)
    return build.restore(out, (r.batch, r.heads, r.query, r.value_dim), site.out)


GROUP_QUERY = Operator("GroupQueryAttention", CAPPED, emit, refuse)
