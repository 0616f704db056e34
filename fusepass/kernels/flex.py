"""FlexAttention, for what SDPA cannot express: softcaps, unusual fills, orders of modifiers, sparse
visibility.

On a GPU, masks that hide for good become block tables (:mod:`fusepass.kernels.flex_blocks`).  This module
handles the rest.

Here the whole score formula becomes the ``score_mod``, and the tensors that it reads are passed as its
buffers.
Source: Dong et al., "Flex Attention" (arXiv 2412.05496), ``torch.nn.attention.flex_attention``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, free_symbol_is_type

from fusepass.expressions.ir import opmath
from fusepass.host.surroundings import settings
from fusepass.kernels import flex_blocks, flex_operators
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
    learns_hidden_rows,
    may_empty_rows,
    muted,
    operands,
    refuse_far_elements,
    rows_of,
    tensor_operand,
    without_hidden_keys,
)
from fusepass.kernels.flex_operators import flex_attention
from fusepass.kernels.gates import gate_refuses
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Absolute,
    Attention,
    Bias,
    Clamp,
    Finite,
    Floor,
    Function,
    LeakyReLU,
    Mask,
    Modifier,
    Scale,
    ScaleBy,
    ScoreModifier,
    SoftCap,
)
from fusepass.specification.program import encode
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder
from fusepass.writing.stored import stored_op


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
        return f"a sink needs the log-sum-exp, which FlexAttention does not return on {target.device}"
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention does not compute in {str(spec.dtype).removeprefix('torch.')}"
    return None


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write a call of FlexAttention, and mend the result in rows that see no key."""
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
    plan = flex_blocks.plan(site, build)
    if plan is None or (plan.hides_rows and may_empty_rows(site.spec, target)):
        return None
    return flex_blocks.emit(site, build, target, plan, options)


def _with_scores(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write everything into the score formula; hidden scores get their fills."""
    if site.spec.sink is not None:
        raise Refused("it computes a sink only with scores that have a formula")
    x, spec, rows = operands(site, build), site.spec, None
    original, scale = x, 1.0
    if may_empty_rows(spec, target):
        original = x = without_hidden_keys(site, build, target, x)
        rows = rows_of(site, build, opmath(build.value(x.q).dtype))
        scale = math.prod(m.factor for m in spec.scores if isinstance(m, Scale))
        learns = learns_hidden_rows(site, build, target)
        x = x if learns else Operands(muted(build, rows, x.q), x.k, x.v)
        spec, tensors = _with_levels(site, build, rows, learns)
    else:
        tensors = all_operands(site, build, bands=True)
    if target.device == "cpu":
        # PyTorch's CPU template gives wrong results if queries and keys are both computed in the same graph.
        x = Operands(*(_stored(build, n) for n in (x.q, x.k, x.v)))
    q, v = build.value(x.q), build.value(x.v)
    with build.trial():
        value = q.new_empty((*q.shape[:3], v.shape[3]))
    if target.device == "cuda":
        refuse_far_elements(build, [x.q, x.k, x.v, *tensors])
    tensors = [_stored(build, t) for t in tensors]
    dense = any({"i", "j"} <= set(m.axes) for m in spec.scores if isinstance(m, (Bias, ScaleBy, Function)))
    options = fm.text(sorted(flex_blocks.tile(spec, dense).items()))
    out = build.call_with(value, flex_attention, x.q, x.k, x.v, tensors, encode(spec, bands=True), options)
    if target.device == "cpu":
        out = build.call(stored_op, out)  # the CPU template takes no epilogue
    if rows is not None:
        out = finish_rows(site, build, out, original, scale, rows, target)
    return out


def _stored(build: Builder, node: fx.Node) -> fx.Node:
    """A tensor that is in memory, as inputs of the graph are."""
    return node if node.op == "placeholder" else build.call(stored_op, node)


#: Added in float32 to a score of at most 2 ** 15, this absorbs it completely.
LARGE = 2.0**40


def _with_levels(site: Site, build: Builder, rows: Rows, learns: bool) -> tuple[Attention, list[fx.Node]]:
    """The specification with its masks replaced by one bias, which has no effect in rows that see no key.

    If ``learns``, the scores of such rows are absorbed by a large number that is added and subtracted again:
    it leaves zero, and the gradients of the scores.
    """
    kept: list[ScoreModifier] = []
    hiding = hiders(site.spec)
    tensors: list[fx.Node] = []
    for at, mod in enumerate(site.spec.scores):
        if mod in hiding:
            continue
        if any(m in hiding for m in site.spec.scores[:at]) and not isinstance(mod, Bias):
            raise Refused(f"'{mod}' comes after a mask under which a row may see no key")
        if isinstance(mod, Function) and mod.slot is not None:
            raise Refused(f"a query may see no key, and '{mod}' depends on the key even there")
        if isinstance(mod, (Bias, ScaleBy)):
            tensor = tensor_operand(site, build, mod.slot)
            tensors.append(muted(build, rows, tensor) if isinstance(mod, Bias) else tensor)
            mod = replace(mod, slot=len(tensors) - 1)
        kept.append(mod)
    if learns:
        hidden = build.cast(build.op("logical_not", rows.seen), torch.float32)
        tensors.append(build.op("mul_scalar", hidden, LARGE))
        kept += [Bias(len(tensors) - 1), Bias(len(tensors) - 1, factor=-1.0)]
    tensors.append(rows.level)
    return replace(site.spec, scores=(*kept, Bias(len(tensors) - 1))), tensors


def refuse_flash(spec: Attention, target: Target) -> str | None:
    """Why FlexAttention with flash-attn 4's kernels cannot compute ``spec``."""
    reason = gate_refuses("flex_flash", spec, target.device, target.training) or refuse(spec, target)
    if reason is None and target.training and settings().deterministic:
        return "its backward pass is not deterministic on this GPU"
    sizes = [size for size in (spec.head_dim, spec.value_dim) if isinstance(size, int)]
    if reason is None and spec.masks and max(sizes, default=0) > flex_blocks.TILED_HEAD_DIM:
        return f"its kernels take block tables up to head size {flex_blocks.TILED_HEAD_DIM}"
    return reason


def emit_flash(site: Site, build: Builder, target: Target) -> fx.Node:
    """The same as :func:`emit`, with ``BACKEND="FLASH"`` and block tables only."""
    out = _with_tables(site, build, target, {"BACKEND": "FLASH"})
    if out is None:
        raise Refused(
            "its modifiers have no formula, or a bias may hide all keys of a query, in training or in half "
            "precision"
        )
    return build.cast(after_weights(site, build, out), site.spec.out_dtype)


TAKES = Takes(
    ((Scale, ScaleBy, SoftCap, Bias, Mask, Floor, Finite, Clamp, LeakyReLU, Absolute, Function),), AROUND,
    sink=True, learned=(Modifier,), factors="pairs", fills="written", lowest=flex_operators.EXTREME,
    rows="levels", hiding_biases=True,
)  # fmt: skip
OF_FORMULAS = replace(TAKES, scores=((Scale, ScaleBy, SoftCap, Bias, Mask),), sink=False, fills="hidden")
FLEX = Kernel("flex", TAKES, emit, refuse, flat=True)
FLEX_FLASH = Kernel("flex_flash", replace(OF_FORMULAS, rows="one level"), emit_flash, refuse_flash, flat=True)
