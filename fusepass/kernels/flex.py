"""FlexAttention, for what SDPA cannot say: softcaps, unusual fills, orders of modifiers, sparse visibility.

On a GPU, masks that hide for good become block tables (:mod:`fusepass.kernels.flex_blocks`).  What is
written here serves the rest.

The whole score formula becomes the ``score_mod``; tensors it reads are passed as its buffers.
Source: Dong et al., "Flex Attention" (arXiv 2412.05496), ``torch.nn.attention.flex_attention``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.symbol import SymT, free_symbol_is_type

from fusepass.host.surroundings import settings
from fusepass.kernels import flex_blocks
from fusepass.kernels import formula as fm
from fusepass.kernels.base import (
    AROUND,
    Kernel,
    Operands,
    Refused,
    Rows,
    Target,
    after_weights,
    all_operands,
    finish_rows,
    hiders,
    may_empty_rows,
    muted,
    operands,
    refuse_far_elements,
    rows_of,
    tensor_operand,
    without_hidden_keys,
)
from fusepass.kernels.flex_blocks import representable
from fusepass.kernels.gates import gate_refuses
from fusepass.recognition.recognize import Site
from fusepass.specification.attention import (
    Attention,
    Bias,
    Finite,
    Floor,
    Mask,
    Modifier,
    Scale,
    ScaleBy,
    ScoreModifier,
    SoftCap,
    finite,
)
from fusepass.specification.program import Program, decode, encode
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], program: str, options: str
) -> Tensor:
    """FlexAttention of a program; see :func:`fusepass.kernels.reference.attention` for the arguments.

    ``options`` are FlexAttention's, as :func:`fusepass.kernels.flex_blocks.block_attention` has them.

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
    found = operator(q, k, v, score_mod, blocks, scale, chosen, tuple(tensors), ())
    return found[0]


@torch.library.custom_op("fusepass::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """A copy of ``x``, of any shape, that a compiler must keep in memory.

    Inductor's FlexAttention reads its buffers from memory in a layout known beforehand, and fails (or
    reads what was never stored) where they are computed in the same graph.
    """
    return x.contiguous().clone()


@stored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


stored.register_autograd(lambda ctx, grad: grad)


def kernel_options(q: Tensor) -> dict[str, Any]:
    """The kernel options that the public function would set for a caller who reads the result alone.

    The CPU kernel writes no log-sum-exp, the others only where a gradient may be asked for.
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
        case Finite(nan, low, high):
            return finite(s, nan, max(low, flex_blocks.EXTREME), min(high, -flex_blocks.EXTREME))
        case Mask():
            return _masked(mod, s, at, captured, exact)
    raise ValueError(f"FlexAttention program: unknown modifier {mod!r}")


def _masked(
    mod: Mask, s: Tensor, at: tuple[Tensor, ...], captured: tuple[Tensor, ...], exact: bool
) -> Tensor:
    """Hidden scores.  ``exact``: a bias may hide whole rows, in which fills are compared with each other."""
    fill = max(mod.fill, flex_blocks.EXTREME)
    if exact:
        fill = mod.fill if mod.fill == -math.inf else max(mod.fill, flex_blocks.LOWEST)
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


stored_op = torch.ops.fusepass.stored.default


def refuse(spec: Attention, target: Target) -> str | None:
    """Why FlexAttention cannot compute ``spec``."""
    if target.device == "cuda" and (reason := gate_refuses("flex", spec, "cuda", target.training)):
        return reason
    if target.aten:
        return "FlexAttention is not written into exported graphs"
    if target.device == "cpu" and target.training:
        return "FlexAttention has no gradients on cpu"
    sizes = (spec.batch, spec.heads, spec.kv_heads, spec.queries, spec.keys)
    if any(isinstance(n, sympy.Expr) and free_symbol_is_type(n, SymT.UNBACKED_INT) for n in sizes):
        return "FlexAttention takes no size that depends on data"
    if spec.sink is not None and not takes_tables(target.device):
        return f"a sink takes the log-sum-exp, which FlexAttention does not return on {target.device}"
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention does not compute in {str(spec.dtype).removeprefix('torch.')}"
    return None


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write a call to FlexAttention; the result is mended for rows that see no key."""
    out = _with_tables(site, build, target, {})
    if out is None:
        out = _with_scores(site, build, target)
    return build.cast(after_weights(site, build, out), site.spec.out_dtype)


def takes_tables(device: str) -> bool:
    """Does FlexAttention's kernel for a device skip hidden blocks and write the log-sum-exp?"""
    return device == "cuda"


def _with_tables(site: Site, build: Builder, target: Target, options: dict[str, Any]) -> fx.Node | None:
    if not takes_tables(target.device) or not flex_blocks.mendable(site):
        return None
    made = flex_blocks.plan(site, build)
    return None if made is None else flex_blocks.emit(site, build, target, made, options)


def _with_scores(site: Site, build: Builder, target: Target) -> fx.Node:
    """Everything in the score formula, hidden scores by their fills."""
    if site.spec.sink is not None:
        raise Refused("a sink with scores that have no formula")
    x, spec, rows = operands(site, build), site.spec, None
    original, scale = x, 1.0
    if may_empty_rows(spec, target):
        original = x = without_hidden_keys(site, build, target, x)
        rows = rows_of(site, build, build.value(x.q).dtype)
        scale = math.prod(m.factor for m in spec.scores if isinstance(m, Scale))
        x = Operands(muted(build, rows, x.q), x.k, x.v)
        spec, tensors = _with_levels(site, build, rows)
    else:
        tensors = all_operands(site, build, bands=True)
    if target.device == "cpu":
        # PyTorch's template for CPUs is wrong where queries and keys are both computed in its own graph.
        x = Operands(*(_stored(build, n) for n in (x.q, x.k, x.v)))
    q, v = build.value(x.q), build.value(x.v)
    with build.trial():
        value = q.new_empty((*q.shape[:3], v.shape[3]))
    if target.device == "cuda":
        refuse_far_elements(build, [x.q, x.k, x.v, *tensors])
    tensors = [_stored(build, t) for t in tensors]
    dense = any({"i", "j"} <= set(m.axes) for m in spec.scores if isinstance(m, (Bias, ScaleBy)))
    options = fm.text(sorted(flex_blocks.tile(spec, dense).items()))
    out = build.call_with(value, flex_attention, x.q, x.k, x.v, tensors, encode(spec, bands=True), options)
    if target.device == "cpu":
        out = build.call(stored_op, out)  # the CPU template takes no epilogue
    if rows is not None:
        out = finish_rows(site, build, out, original, scale, rows, target)
    return out


def _stored(build: Builder, node: fx.Node) -> fx.Node:
    """A tensor that lies in memory; what the graph is given does."""
    return node if node.op == "placeholder" else build.call(stored_op, node)


def _with_levels(site: Site, build: Builder, rows: Rows) -> tuple[Attention, list[fx.Node]]:
    """The specification with its masks replaced by one bias, silent in rows that see no key."""
    kept: list[ScoreModifier] = []
    hiding = hiders(site.spec)
    tensors: list[fx.Node] = []
    for at, mod in enumerate(site.spec.scores):
        if mod in hiding:
            continue
        if any(m in hiding for m in site.spec.scores[:at]) and not isinstance(mod, Bias):
            raise Refused(f"'{mod}' comes after a mask under which a row may see no key")
        if isinstance(mod, (Bias, ScaleBy)):
            tensor = tensor_operand(site, build, mod.slot)
            tensors.append(muted(build, rows, tensor) if isinstance(mod, Bias) else tensor)
            mod = replace(mod, slot=len(tensors) - 1)
        kept.append(mod)
    tensors.append(rows.level)
    return replace(site.spec, scores=(*kept, Bias(len(tensors) - 1))), tensors


def refuse_flash(spec: Attention, target: Target) -> str | None:
    """Why FlexAttention's kernels of flash-attn 4 cannot compute ``spec``."""
    reason = gate_refuses("flex_flash", spec, target.device, target.training) or refuse(spec, target)
    if reason is None and target.training and settings().deterministic:
        return "its backward pass is not deterministic on this GPU"
    sizes = [size for size in (spec.head_dim, spec.value_dim) if isinstance(size, int)]
    if reason is None and spec.masks and max(sizes, default=0) > flex_blocks.TILED_HEAD_DIM:
        return f"its kernels take block tables up to head size {flex_blocks.TILED_HEAD_DIM}"
    return reason


def emit_flash(site: Site, build: Builder, target: Target) -> fx.Node:
    """As :func:`emit`, with ``BACKEND="FLASH"``; only the form with block tables."""
    out = _with_tables(site, build, target, {"BACKEND": "FLASH"})
    if out is None:
        raise Refused("its modifiers have no formula")
    return build.cast(after_weights(site, build, out), site.spec.out_dtype)


TAKES = Takes(
    ((Scale, ScaleBy, SoftCap, Bias, Mask, Floor, Finite),), AROUND, sink=True, learned=(Modifier,),
    factors="pairs", fills="written", lowest=flex_blocks.EXTREME, rows="levels", hiding_biases=True,
)  # fmt: skip
OF_FORMULAS = replace(TAKES, scores=((Scale, ScaleBy, SoftCap, Bias, Mask),), sink=False, fills="hidden")
FLEX = Kernel("flex", TAKES, emit, refuse)
FLEX_FLASH = Kernel("flex_flash", replace(OF_FORMULAS, rows="one level"), emit_flash, refuse_flash)
