"""FP8 attention on Hopper: queries, keys and values as e4m3, scaled per batch and key/value head.

Forward only.  Scales are computed on the GPU in plain operations, which the inner compiler fuses with the
casts.  cuDNN takes one scale for all heads, so the scales of queries and keys are balanced to one product:
``s_q s_k = c`` for every head, with ``q / s_q`` and ``k / s_k`` of one range; values are scaled head by
head, and so is the result, which an average of values cannot exceed.  flash-attn 3 takes scales per head.

An orthogonal rotation of queries and keys leaves their product as it is and spreads outliers over the head
dimension (Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fusepass.emit import Builder
from fusepass.kernels import fp8_ops, sdpa
from fusepass.kernels.base import Kernel, Refused, Target, after_weights, operands, scaled
from fusepass.kernels.gates import FLASH3, GATES, gate_refuses, installed
from fusepass.recognize import Site
from fusepass.spec import Attention, Mask, Scale, ScaleBy

_SMALL = 1e-12


def fp8_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, rotate: bool, library: str
) -> Tensor:
    """Attention of e4m3 roundings.

    Args:
        q: ``[B, H, Q, D]``; k, v: ``[B, G, K, D]``, float16 or bfloat16.
        causal: aligned top-left (cuDNN), and for flash-attn 3 of equal lengths.
        rotate: rotate queries and keys before they are rounded.
        library: ``"cudnn"`` or ``"flash3"``.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``q``.
    """
    if rotate:
        turn = hadamard(q.shape[-1], q)
        q, k = rotated(q, turn), rotated(k, turn)
    if library == "flash3":
        return _by_head(q, k, v, scale, causal)
    q8, k8, descale = balanced(q, k)
    largest = _largest(v, v.shape[1])
    v8 = _rounded(v, fp8_ops.E4M3_MAX / largest)
    out: Tensor = torch.ops.fusepass.fp8_cudnn(q8, k8, v8, descale, scale, causal)
    # As it lies in memory, [B, S, H, D]: in another order TorchInductor writes it, and copies it once more.
    per_head = _per_head(largest / fp8_ops.E4M3_MAX, q.shape[1]).transpose(1, 2)
    return (out.transpose(1, 2).float() * per_head).to(q.dtype).transpose(1, 2)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """``x @ turn`` in the memory order of ``x``: as ``[B, S, H, D]`` where that spares a copy."""
    if x.is_contiguous():
        return x @ turn
    return (x.transpose(1, 2) @ turn).transpose(1, 2)


def balanced(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as e4m3, and the one number ``[1, 1, 1, 1]`` that their products are multiplied by."""
    heads = k.shape[1]
    of_q, of_k = _largest(q, heads), _largest(k, heads)
    descale = (of_q * of_k).amax().clamp(min=_SMALL) / fp8_ops.E4M3_MAX**2
    ratio = (of_q / of_k).sqrt()
    root = descale.sqrt()
    return _rounded(q, 1 / (root * ratio)), _rounded(k, ratio / root), descale.view(1, 1, 1, 1)


def _by_head(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    heads, rounded, descales = k.shape[1], [], []
    for tensor in (q, k, v):
        largest = _largest(tensor, heads)
        rounded.append(_rounded(tensor, fp8_ops.E4M3_MAX / largest).transpose(1, 2))
        descales.append(largest / fp8_ops.E4M3_MAX)
    out: Tensor = torch.ops.fusepass.fp8_flash3(*rounded, *descales, scale, causal)
    return out.transpose(1, 2).to(q.dtype)


def _largest(x: Tensor, heads: int) -> Tensor:
    """The largest magnitude of each batch and key/value head, float32 ``[B, G]``.

    First of each place, then of all: elements that lie side by side are read together.
    """
    places: Tensor = x.transpose(1, 2).unflatten(2, (heads, -1))
    return places.abs().amax((3, 4)).amax(1).float().clamp(min=_SMALL)


def _rounded(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` times a number a head, as e4m3: rounded to nearest, never beyond the largest."""
    wide = x.float() * _per_head(factor, x.shape[1])
    return wide.clamp(-fp8_ops.E4M3_MAX, fp8_ops.E4M3_MAX).to(torch.float8_e4m3fn)


def _per_head(factor: Tensor, heads: int) -> Tensor:
    """``[B, G]`` as ``[B, H, 1, 1]``."""
    wide = factor.unsqueeze(2).expand(-1, -1, heads // factor.shape[1])
    return wide.reshape(factor.shape[0], heads, 1, 1)


def hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's orthogonal matrix of a size that is a power of two, in the dtype of ``like``."""
    index = torch.arange(size, device=like.device)
    bits = index.unsqueeze(1) & index
    parity = torch.zeros_like(bits)
    for shift in range(size.bit_length() - 1):
        parity = parity ^ (bits >> shift)
    signs: Tensor = 1 - 2 * (parity & 1)
    found: Tensor = (signs * size**-0.5).to(like.dtype)
    return found


def library() -> str:
    """flash-attn 3, which writes bfloat16, where it is installed; else cuDNN."""
    return "flash3" if installed(FLASH3) else "cudnn"


def refuse(spec: Attention, target: Target) -> str | None:
    """Why a site cannot be computed in FP8."""
    if target.aten:
        return "FP8 is not written into exported graphs"
    if target.training:
        return "FP8 is for inference, and this site needs gradients"
    reason = gate_refuses("fp8", spec, target.device, target.training) or sdpa.refuse(spec, target)
    if reason is not None:
        return reason
    if spec.sink is not None or spec.dropout:
        return "it has no sink and no dropout"
    if not all(isinstance(m, (Scale, ScaleBy, Mask)) for m in spec.scores):
        return "it adds nothing to the scores"
    if spec.masks and not spec.is_causal():
        return f"its masks are causal, and this is '{', '.join(map(str, spec.masks))}'"
    if library() == "flash3" and spec.masks and spec.queries != spec.keys:
        return "its causal mask needs as many queries as keys"
    return None


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write the scaling, the casts and the call."""
    spec = site.spec
    scale, x = scaled(site, build, operands(site, build))
    if build.value(x.q).dtype not in GATES["fp8"].dtypes:
        raise Refused("queries, keys and values have different dtypes")
    rotate = target.precision != "fp8_unrotated"
    out = build.call(fp8_attention, x.q, x.k, x.v, scale, spec.is_causal(), rotate, library())
    return build.cast(after_weights(site, build, out), spec.out_dtype)


FP8 = Kernel("fp8", refuse, emit)
