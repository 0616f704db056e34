"""Derivatives of the reference semantics, written out.

The reference operator runs below autograd, so its backward is plain mathematics too: the chain rule
through the modifiers in reverse order, each of which knows its own derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusepass.specification.attention import Attention, softmax
from fusepass.specification.modifiers import add_gradient


def gradients(
    spec: Attention, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of ``sum(grad * reference(spec, q, k, v, operands))``.

    Args:
        spec: what was computed.
        grad: ``[B, H, Q, Dv]``; q, k, v and operands as for :func:`.attention.reference`.

    Returns:
        One tensor for q, k, v and each operand, of their shapes; zeros where nothing flows.
    """
    group = q.shape[1] // max(k.shape[1], 1) or 1
    wide_k, wide_v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    scores = [q @ wide_k.transpose(-2, -1)]
    for mod in spec.scores:
        scores.append(mod.apply(scores[-1], operands))
    weights = [softmax(spec, scores[-1], operands, spec.softmax_dtype)]
    for weight in spec.weights:
        weights.append(weight.apply(weights[-1], operands))
    of_operands: list[Tensor] = [torch.zeros_like(t) for t in operands]

    grad = grad.to(v.dtype)
    dv = weights[-1].to(v.dtype).transpose(-2, -1) @ grad
    dw = (grad @ wide_v.transpose(-2, -1)).to(weights[-1].dtype)
    for weight, before in zip(reversed(spec.weights), reversed(weights[:-1]), strict=True):
        dw = weight.backward(dw, before, operands, of_operands)
    w = weights[0]
    ds = torch._softmax_backward_data(dw, w, -1, w.dtype).to(scores[-1].dtype)
    if spec.sink is not None:
        mean = (dw * w).sum(-1, keepdim=True)
        add_gradient(of_operands, spec.sink.slot, -mean * (1 - w.sum(-1, keepdim=True)))
    for score, before in zip(reversed(spec.scores), reversed(scores[:-1]), strict=True):
        ds = score.backward(ds, before, operands, of_operands)
    ds = ds.to(q.dtype)
    dk = ds.transpose(-2, -1) @ q
    return [ds @ wide_k, _summed(dk, group), _summed(dv, group), *of_operands]


def _summed(grad: Tensor, group: int) -> Tensor:
    """Sum over the query heads that share a key/value head."""
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)
