"""cuDNN's fused attention, called by name: PyTorch's operator for it, forward and backward.

``torch.nn.functional.scaled_dot_product_attention`` prefers cuDNN on some GPUs only.  This kernel is for
comparisons, and for graphs that must not depend on that preference.
Source: ``aten::_scaled_dot_product_cudnn_attention`` (``native_functions.yaml`` of PyTorch).
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from fusepass.kernels import sdpa
from fusepass.kernels.base import (
    IN_GRAPH,
    Kernel,
    Refused,
    Target,
    after_weights,
    may_empty_rows,
    operands,
    scaled,
)
from fusepass.kernels.gates import gate_refuses
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention
from fusepass.writing.emit import Builder

operator_of_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default


TAKES = replace(sdpa.TAKES, sink=False, learned=IN_GRAPH, rows="seen")


def refuse(spec: Attention, target: Target) -> str | None:
    """Why cuDNN, through torch, cannot compute ``spec``."""
    if may_empty_rows(spec, target, added=True):
        return "a query may see no key"
    return gate_refuses("cudnn", spec, target.device, target.training)


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write the operator; its first result is the attention."""
    spec = site.spec
    scale, x = scaled(site, build, operands(site, build))
    if build.value(x.q).dtype not in (torch.float16, torch.bfloat16):
        raise Refused("queries, keys and values have different dtypes")
    causal = spec.is_causal()
    mask = None if causal else sdpa.attn_mask(site, build, target, x)
    if mask is not None:
        mask = _full(site, build, mask)
    results = build.call(
        operator_of_cudnn, x.q, x.k, x.v, mask, target.training, spec.dropout, causal, False, scale=scale
    )
    out = build.call(operator.getitem, results, 0)
    return build.cast(after_weights(site, build, out), spec.out_dtype)


def _full(site: Site, build: Builder, mask: fx.Node) -> fx.Node:
    """A mask as a floating tensor expanded to ``[B, H, Q, K]``: cuDNN takes no other form."""
    spec, dtype = site.spec, site.spec.dtype
    if build.value(mask).dtype is torch.bool:
        zero, hidden = (build.number(n, mask, dtype) for n in (0.0, float("-inf")))
        mask = build.op("where", mask, zero, hidden)
    sizes = [build.size(s) for s in (spec.batch, spec.heads, spec.queries, spec.keys)]
    return build.op("expand", build.cast(mask, dtype), sizes)


CUDNN = Kernel("cudnn", TAKES, emit, refuse, of_torch=True)
