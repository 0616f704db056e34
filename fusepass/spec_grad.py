"""Derivatives of the reference semantics, written out.

The reference operator runs below autograd, so its backward is plain mathematics too: the chain rule
through the modifiers of :mod:`fusepass.spec` in reverse order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusepass.spec import (
    Attention,
    Bias,
    Finite,
    Floor,
    Keep,
    KeyGate,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    SoftCap,
    WeightModifier,
    WeightScale,
    ZeroEmptyRows,
    apply_score,
    apply_weight,
    softmax,
)


def gradients(
    spec: Attention, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of ``sum(grad * reference(spec, q, k, v, operands))``.

    Args:
        spec: what was computed.
        grad: ``[B, H, Q, Dv]``; q, k, v and operands as for :func:`fusepass.spec.reference`.

    Returns:
        One tensor for q, k, v and each operand, of their shapes; zeros where nothing flows.
    """
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    scores = [q @ wide_k.transpose(-2, -1)]
    for mod in spec.scores:
        scores.append(apply_score(mod, scores[-1], operands))
    weights = [softmax(spec, scores[-1], operands, spec.softmax_dtype)]
    for weight in spec.weights:
        weights.append(apply_weight(weight, weights[-1], operands))
    found: list[Tensor] = [torch.zeros_like(t) for t in operands]

    grad = grad.to(v.dtype)
    dv = weights[-1].to(v.dtype).transpose(-2, -1) @ grad
    dw = (grad @ wide_v.transpose(-2, -1)).to(weights[-1].dtype)
    for weight, before in zip(reversed(spec.weights), reversed(weights[:-1]), strict=True):
        dw = _through_weight(weight, dw, before, operands, found)
    w = weights[0]
    mean = (dw * w).sum(-1, keepdim=True)
    ds = (w * (dw - mean)).to(scores[-1].dtype)
    if spec.sink is not None:
        _add(found, spec.sink.slot, -mean * (1 - w.sum(-1, keepdim=True)))
    for score, before in zip(reversed(spec.scores), reversed(scores[:-1]), strict=True):
        ds = _through_score(score, ds, before, operands, found)
    ds = ds.to(q.dtype)
    dk = ds.transpose(-2, -1) @ q
    return [ds @ wide_k, _summed(dk, group), _summed(dv, group), *found]


def _summed(grad: Tensor, group: int) -> Tensor:
    """Sum over the query heads that share a key/value head."""
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)


def _add(found: list[Tensor], slot: int, grad: Tensor) -> None:
    """Add a gradient, summed over the dimensions in which its operand is broadcast."""
    if found[slot].is_floating_point():
        found[slot] = found[slot] + grad.sum_to_size(found[slot].shape).to(found[slot].dtype)


def _through_score(
    mod: ScoreModifier, ds: Tensor, before: Tensor, operands: Sequence[Tensor], found: list[Tensor]
) -> Tensor:
    match mod:
        case Scale(factor):
            return (ds * factor).to(before.dtype)
        case ScaleBy(slot):
            _add(found, slot, ds * before)
            return (ds * operands[slot]).to(before.dtype)
        case SoftCap(cap):
            return ds * (1 - torch.tanh(before / cap) ** 2)
        case Bias(slot, _, factor):
            _add(found, slot, ds * factor)
            return ds.to(before.dtype)
        case Floor(bound):
            return torch.where(before >= bound, ds, torch.zeros_like(ds))
        case Finite():
            return torch.where(before.isfinite(), ds, 0.0)
        case Mask(slot, _, additive, attends):
            if additive:
                _add(found, slot, ds)
                return ds.to(before.dtype)
            return ds.masked_fill(~operands[slot] if attends else operands[slot], 0.0)


def _through_weight(
    mod: WeightModifier, dw: Tensor, before: Tensor, operands: Sequence[Tensor], found: list[Tensor]
) -> Tensor:
    match mod:
        case Keep():
            return apply_weight(mod, dw, operands)
        case WeightScale(factor, slot):
            if slot is None:
                return dw * factor
            _add(found, slot, dw * before)
            return (dw * operands[slot]).to(before.dtype)
        case KeyGate(slot):
            _add(found, slot, dw * before)
            return (dw * operands[slot]).to(before.dtype)
        case ZeroEmptyRows():
            return torch.where(torch.isnan(before), torch.zeros_like(dw), dw)
    raise ValueError(f"no derivative of {mod!r}: dropout must have been made an operand")
