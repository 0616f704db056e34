"""FP8 attention on Hopper: queries, keys and values as e4m3, scaled per batch and key/value head.

Forward only.  Plain operations compute the scales on the GPU; the inner compiler fuses them with the casts.
cuDNN takes one scale for all heads, so the scales of queries and keys are balanced to a common product: ``s_q
s_k = c`` for every head, with ``q / s_q`` and ``k / s_k`` in the same range.  Values are scaled head by head,
and so is the result: it is an average of values, so it cannot exceed them.  flash-attn 3 takes scales per
head.

An orthogonal rotation of queries and keys leaves their product as it is and spreads outliers over the head
dimension (Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fusepass.host.libraries import FLASH3, GATES
from fusepass.kernels import fp8_ops
from fusepass.kernels.base import AROUND, Kernel, Refused, Target, after_weights, operands, scaled
from fusepass.kernels.flash import shard_where_used
from fusepass.kernels.gates import build_refuses, gate_refuses, import_refuses, installed
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention, Mask, Scale, ScaleBy
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder

_SMALL = 1e-12


def fp8_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, rotate: bool, library: str
) -> Tensor:
    """Attention with queries, keys and values rounded to e4m3.

    Args:
        q: ``[B, H, Q, D]``; k, v: ``[B, G, K, D]``, float16 or bfloat16.
        causal: aligned top-left; flash-attn 3 needs equal lengths.
        rotate: rotate queries and keys before they are rounded.
        library: ``"cudnn"`` or ``"flash3"``.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``q``.
    """
    if rotate:
        turn = hadamard(q.shape[-1], q)
        q, k = rotated(q, turn), rotated(k, turn)
    # In the order of memory: TorchInductor is slower at writing a tensor in another order.
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    compute = _of_flash3 if library == "flash3" else _of_cudnn
    return compute(q, k, v, scale, causal).transpose(1, 2)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """``x @ turn`` in the memory order of ``x``: as ``[B, S, H, D]`` if that avoids a copy."""
    if x.is_contiguous():
        return x @ turn
    return (x.transpose(1, 2) @ turn).transpose(1, 2)


def _of_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    q8, k8, descale = balanced(q, k)
    of_v = largest(v, v.shape[2]) / fp8_ops.E4M3_MAX
    turned = (t.transpose(1, 2) for t in (q8, k8, rounded(v, 1 / of_v)))
    out: Tensor = torch.ops.fusepass.fp8_cudnn(*turned, descale, scale, causal)
    return (out.transpose(1, 2).float() * per_head(of_v, q.shape[2])).to(q.dtype)


def _of_flash3(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    descales = [largest(t, k.shape[2]) / fp8_ops.E4M3_MAX for t in (q, k, v)]
    eight = [rounded(t, 1 / s) for t, s in zip((q, k, v), descales, strict=True)]
    out: Tensor = torch.ops.fusepass.fp8_flash3(*eight, *descales, scale, causal)
    return out.to(q.dtype)


def balanced(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, S, H, D]`` as e4m3, and the single number ``[1, 1, 1, 1]`` that multiplies the products."""
    heads = k.shape[2]
    of_q, of_k = largest(q, heads), largest(k, heads)
    descale = (of_q * of_k).amax().clamp(min=_SMALL) / fp8_ops.E4M3_MAX**2
    ratio = (of_q / of_k).sqrt()
    root = descale.sqrt()
    return rounded(q, 1 / (root * ratio)), rounded(k, ratio / root), descale.view(1, 1, 1, 1)


def largest(x: Tensor, heads: int) -> Tensor:
    """The largest magnitude in ``[B, S, H, D]`` of each batch and key/value head, float32 ``[B, G]``."""
    grouped: Tensor = x.unflatten(2, (heads, -1))
    return grouped.abs().amax((1, 3, 4)).float().clamp(min=_SMALL)


def rounded(x: Tensor, factor: Tensor) -> Tensor:
    """``[B, S, H, D]`` times a number per head, as e4m3: rounded to nearest, clamped to its range."""
    wide = x.float() * per_head(factor, x.shape[2])
    return wide.clamp(-fp8_ops.E4M3_MAX, fp8_ops.E4M3_MAX).to(torch.float8_e4m3fn)


def per_head(factor: Tensor, heads: int) -> Tensor:
    """``[B, G]`` as ``[B, 1, H, 1]``."""
    wide = factor.unsqueeze(2).expand(-1, -1, heads // factor.shape[1])
    return wide.reshape(factor.shape[0], 1, heads, 1)


def hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's orthogonal matrix of a size that is a power of two, in the dtype of ``like``."""
    index = torch.arange(size, device=like.device)
    bits = index.unsqueeze(1) & index
    parity = torch.zeros_like(bits)
    for shift in range(size.bit_length() - 1):
        parity = parity ^ (bits >> shift)
    signs: Tensor = 1 - 2 * (parity & 1)
    rotation: Tensor = (signs * size**-0.5).to(like.dtype)
    return rotation


def library() -> str:
    """The library to use: flash-attn 3, which writes bfloat16, if its build has FP8; else cuDNN."""
    if not installed(FLASH3) or import_refuses(FLASH3) is not None:
        return "cudnn"
    return "flash3" if build_refuses(FLASH3, {"fp8"}, GATES["fp8"].head_dims or 0) is None else "cudnn"


def refuse(spec: Attention, target: Target) -> str | None:
    """Why a site cannot be computed in FP8."""
    if target.aten:
        return "FP8 is not written into exported graphs"
    if target.training:
        return "FP8 is for inference, and this site needs gradients"
    reason = gate_refuses("fp8", spec, target.device, target.training)
    if reason is not None:
        return reason
    if spec.masks and not spec.is_causal():
        return f"its masks are causal, and this is '{', '.join(map(str, spec.masks))}'"
    if library() == "flash3" and spec.masks and spec.queries != spec.keys:
        return "its causal mask needs as many queries as keys"
    return None


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write the scaling, the casts and the call."""
    spec = site.spec
    scale, x = scaled(site, build, operands(site, build))
    if not GATES["fp8"].computes_in(build.value(x.q).dtype):
        raise Refused("queries, keys and values have different dtypes")
    shard_where_used()
    rotate = target.precision != "fp8_unrotated"
    out = build.call(fp8_attention, x.q, x.k, x.v, scale, spec.is_causal(), rotate, library())
    return build.cast(after_weights(site, build, out), spec.out_dtype)


FP8 = Kernel("fp8", Takes(((Scale, ScaleBy), Mask), AROUND), emit, refuse, rounds=True)
