"""Two functions that call FlexAttention: with a program of modifiers, and with formulas and block tables.

They are nodes of graphs, and are traced when the graph is compiled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusepass.host.surroundings import settings
from fusepass.kernels import formula as fm
from fusepass.kernels.blocks import BLOCK
from fusepass.specification.attention import (
    Absolute,
    Bias,
    Clamp,
    Finite,
    Floor,
    Function,
    LeakyReLU,
    Mask,
    Scale,
    ScaleBy,
    SoftCap,
    finite,
)
from fusepass.specification.program import Program, decode

LOWEST = torch.finfo(torch.float32).min / 2
EXTREME = -1e30
"""Stands for every lower score: kernels work in powers of two, where float32's lowest number overflows."""


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], program: str, options: str
) -> Tensor:
    """FlexAttention with a program; see :func:`fusepass.kernels.reference.attention` for the arguments.

    ``options`` are FlexAttention's, as for :func:`block_attention`.

    Returns:
        ``[B, H, Q, Dv]`` in the dtype of ``q``.
    """
    from torch._higher_order_ops.flex_attention import flex_attention as operator
    from torch.nn.attention.flex_attention import _create_empty_block_mask

    code = decode(program)
    scale, scores = _leading_scale(code)
    exact = any(isinstance(m, Bias) for m in scores)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *captured: Tensor) -> Tensor:
        for mod in scores:
            s = _apply(mod, s, (b, h, i, j), captured, exact)
        return s

    blocks = _create_empty_block_mask(q, k).as_tuple()
    chosen = kernel_options(q) | dict(fm.read(options))
    results = operator(q, k, v, score_mod, blocks, scale, chosen, tuple(tensors), ())
    return results[0]


def kernel_options(q: Tensor) -> dict[str, Any]:
    """The kernel options that the public function would set for a caller who reads only the result.

    The CPU kernel writes no log-sum-exp; the others do only if a gradient may be needed.
    """
    return {
        "BACKEND": "AUTO",
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": q.device.type != "cpu" and settings().grad,
        "OUTPUT_MAX": False,
    }


def _leading_scale(code: Program) -> tuple[float, tuple[Any, ...]]:
    first = code.scores[0] if code.scores else None
    return (first.factor, code.scores[1:]) if isinstance(first, Scale) else (1.0, code.scores)


def _element(t: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """``t[b, h, i, j]`` with broadcast dimensions read at 0."""
    if t.dim() == 0:
        return t
    return t[tuple(at[d] if t.shape[d] != 1 else torch.zeros_like(at[d]) for d in range(4))]


def _apply(mod: Any, s: Tensor, at: tuple[Tensor, ...], captured: tuple[Tensor, ...], exact: bool) -> Tensor:
    match mod:
        case Scale(factor):
            return s * factor
        case ScaleBy(slot):
            return s * _element(captured[slot], at)
        case SoftCap(cap):
            return cap * torch.tanh(s / cap)
        case Bias(slot, _, factor):
            return s + representable(_element(captured[slot], at) * factor)
        case Floor(bound):
            return torch.maximum(s, torch.full_like(s, max(bound, torch.finfo(torch.float32).min)))
        case Clamp() | LeakyReLU() | Absolute():
            return mod.apply(s, ())
        case Function(steps, slot):
            return _function(steps, s, None if slot is None else _element(captured[slot], at))
        case Finite(nan, low, high):
            return finite(s, nan, max(low, EXTREME), min(high, -EXTREME))
        case Mask():
            return _masked(mod, s, at, captured, exact)
    raise ValueError(f"FlexAttention program: unknown modifier {mod!r}")


def _masked(
    mod: Mask, s: Tensor, at: tuple[Tensor, ...], captured: tuple[Tensor, ...], exact: bool
) -> Tensor:
    """Scores after a mask.  ``exact``: keep the fill, since it is compared with a bias that may hide rows."""
    fill = max(mod.fill, EXTREME)
    if exact:
        fill = mod.fill if mod.fill == -math.inf else max(mod.fill, LOWEST)
    if mod.slot >= 0:
        tensor = _element(captured[mod.slot], at)
        if mod.additive:
            return s + (representable(tensor) if exact else tensor)
        return torch.where(tensor, s, fill) if mod.attends else torch.where(tensor, fill, s)
    hidden: Any = s + fill if mod.additive and exact else fill
    gap = at[3] - at[2]
    for band in mod.atoms:
        right, left = getattr(band, "right", None), getattr(band, "left", None)
        if right is not None:
            s = torch.where(gap <= right, s, hidden)
        if left is not None:
            s = torch.where(gap >= -left, s, hidden)
    return s


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_tensors: list[Tensor],
    mask_tensors: list[Tensor],
    tables: list[Tensor],
    code: str,
    options: str,
) -> tuple[Tensor, Tensor]:
    """FlexAttention with formulas.

    Args:
        q: ``[B, H, Q, D]``; k: ``[B, G, K, D]``; v: ``[B, G, K, Dv]``.
        score_tensors, mask_tensors: what the formulas load.
        tables: the tensors of ``fusepass::block_tables``, or none if everything is visible; the tables by
            queries, which only a backward reads, may be missing.
        code: ``[scale, [[kind, ...], ...], formula or null]``, the steps of the scores and the visibility.
        options: ``[[name, value], ...]``, kernel options of FlexAttention.

    Returns:
        ``[B, H, Q, Dv]`` in the dtype of ``q``, and the log-sum-exp, base 2, ``[B, H, Q]``.
    """
    from torch._higher_order_ops.flex_attention import flex_attention as operator
    from torch.nn.attention.flex_attention import BlockMask, _create_empty_block_mask

    scale, scores, visible = fm.read(code)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *captured: Tensor) -> Tensor:
        at = {"b": b, "h": h, "i": i, "j": j}
        for mod in scores:
            s = _scored(mod, s, at, captured)
        return s

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, *captured: Tensor) -> Tensor:
        seen = fm.evaluate(visible, {"b": b, "h": h, "i": i, "j": j}, captured)
        return seen if seen.dtype is torch.bool else seen != 0

    if tables:
        lengths, size = (q.shape[2], k.shape[2]), (BLOCK, BLOCK)
        block_mask: Any = BlockMask
        by_queries = tables[4:] or tables[:4]
        blocks = block_mask(lengths, *tables[:4], *by_queries, BLOCK_SIZE=size, mask_mod=mask_mod).as_tuple()
    else:
        blocks = _create_empty_block_mask(q, k).as_tuple()
    chosen = kernel_options(q) | dict(fm.read(options))
    results = operator(q, k, v, score_mod, blocks, scale, chosen, tuple(score_tensors), tuple(mask_tensors))
    return results[0], results[1]


def _scored(mod: tuple[Any, ...], s: Tensor, at: dict[str, Tensor], captured: tuple[Tensor, ...]) -> Tensor:
    match mod:
        case "scale", factor:
            return Scale(factor).apply(s, ())
        case "softcap", cap:
            return SoftCap(cap).apply(s, ())
        case "clamp", low, high:
            return Clamp(low, high).apply(s, ())
        case "leaky_relu", slope:
            return LeakyReLU(slope).apply(s, ())
        case ("abs",):
            return s.abs()
        case "function", steps, formula:
            return _function(steps, s, None if formula is None else fm.evaluate(formula, at, captured))
        case "add", formula, factor:
            added = fm.evaluate(formula, at, captured)
            added = added if factor == 1 else added * factor
            return s + (representable(added) if fm.may_hide(formula, LOWEST) else added)
        case "times", formula:
            return s * fm.evaluate(formula, at, captured)
        case "finite", nan, *ends:
            low, high = (max(min(end, -EXTREME), EXTREME) for end in ends)
            return finite(s, nan, low, high)
    raise ValueError(f"FlexAttention program: unknown step {mod!r}")


def _function(steps: Any, s: Tensor, element: Tensor | None) -> Tensor:
    if element is None:
        return Function(steps).apply(s, ())
    return Function(steps, 0).apply(s, (element,))


def representable(added: Tensor) -> Tensor:
    """Raise lower finite values to ``LOWEST``: they hide as much, and do not overflow in powers of two."""
    if added.dtype is torch.float16 or not added.is_floating_point():
        return added
    too_low = torch.logical_and(added < LOWEST, added > -math.inf)
    return torch.where(too_low, LOWEST, added)  # comparisons, because CuTe has no maximum in torch 2.11
