"""PyTorch's own flash kernel with a window, which ``scaled_dot_product_attention`` can only take as a mask.

``aten::_flash_attention_forward`` (flash-attn 2, built into PyTorch) has window bounds, aligned at the last
query and key, and PyTorch's derivative formula for the operator uses them too.  It takes ``[B, S, H, D]``,
and grouped heads without copies.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fusepass.kernels import gates
from fusepass.kernels.base import AROUND, Operands, Target
from fusepass.kernels.flash import bottom_right
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, Mask, Scale, ScaleBy
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder

TAKES = Takes(((Scale, ScaleBy), Mask), AROUND)
_MAJORS = (8, 9, 10, 12)


def window(spec: Attention, target: Target, dtype: torch.dtype) -> tuple[int | None, int | None] | None:
    """The window of a site, if this operator computes it; None if it does not, or if there is no window."""
    have, sizes = gates.capability(), (spec.head_dim, spec.value_dim)
    if target.device != "cuda" or target.aten or have is None or have[0] not in _MAJORS:
        return None
    if dtype not in (torch.float16, torch.bfloat16) or TAKES.refuse(spec) is not None:
        return None
    if sizes[0] != sizes[1] or not isinstance(sizes[0], int) or sizes[0] % 8 or sizes[0] > 256:
        return None
    bounds = bottom_right(spec)
    return None if isinstance(bounds, str) or bounds[0] is None else bounds


def emit(
    site: Site, build: Builder, x: Operands, scale: float, bounds: tuple[int | None, int | None]
) -> fx.Node:
    """Write the operator; the result is ``[B, H, Q, D]``."""
    q, k, v = (build.op("transpose", t, 1, 2) for t in (x.q, x.k, x.v))
    lengths = build.size(site.spec.queries), build.size(site.spec.keys)
    left, right = (-1 if b is None else b for b in bounds)
    results = build.call(
        torch.ops.aten._flash_attention_forward.default, q, k, v, None, None, *lengths, 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return build.op("transpose", build.call(operator.getitem, results, 0), 1, 2)


__all__ = ["emit", "window"]
