"""flash-attn 4 with formulas, without FlexAttention: computed biases, and masks with block tables.

``torch.ops.fusepass.flash4_mods`` takes a site in the form that :mod:`fusepass.kernels.flex_blocks` prepares:
steps of the score, a visibility, and the tables of its blocks.  flash-attn 4 compiles them into its kernels
(:mod:`fusepass.kernels.cute_mods`).  Bands remain the kernel's own windows, and need no tables.

    flash4_mods(q, k, v, scores, masks, tables, code, left?, right?) -> (out, lse)

``q`` is ``[B, Q, H, D]``, ``k`` and ``v`` are ``[B, K, G, D]`` and ``[B, K, G, Dv]``; ``scores`` and
``masks`` are what the formulas load; ``tables`` are those of ``fusepass::block_tables``: four for a forward,
eight if a backward follows, none if nothing except the window hides.  ``out`` is ``[B, Q, H, Dv]``; ``lse``
is float32 ``[B, H, Q]``, and minus infinity in rows that see no key.

``flash4_filled`` is the same, for sites in which such rows come first and give the mean of all values.  A
second call of the library, with queries of zeros, computes these rows: a tensor (``seqused_q``) says how many
there are, and the call writes no others.  Selecting rows afterwards would read and write the whole result
once more.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fusepass.host.surroundings import settings
from fusepass.kernels import blocks, cute_mods, flash_ops, flex_blocks
from fusepass.kernels import formula as fm
from fusepass.kernels.base import (
    AROUND,
    IN_GRAPH,
    Operands,
    Refused,
    Target,
    after_weights,
    may_empty_rows,
    operands,
)
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Absolute,
    Attention,
    Band,
    Bias,
    Clamp,
    Function,
    KeyPadding,
    LeakyReLU,
    Mask,
    Scale,
    ScaleBy,
    Sink,
    SoftCap,
    empty_rows,
)
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder

_LOADED = (torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)


# ---------------------------------------------------------------------------------------- operators

_FORWARD = (
    "Tensor q, Tensor k, Tensor v, Tensor[] scores, Tensor[] masks, Tensor[] tables, str code, "
    "int? left, int? right"
)


@functools.lru_cache(maxsize=256)
def _mods(code: str, scores: int) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """The scale of a call, and the modifiers of its forward and its backward."""
    scale, steps, visible = fm.read(code)
    if scale <= 0:
        scale, steps = 1.0, (("scale", scale), *steps)
    forward: dict[str, Any] = {}
    backward: dict[str, Any] = {}
    if steps:
        forward["score_mod"], bwd = cute_mods.score_mods(steps)
        backward = {**forward, "score_mod_bwd": bwd}
    if visible is not None:
        mod = cute_mods.mask_mod(visible, scores)
        forward["mask_mod"] = backward["mask_mod"] = mod
    return scale, forward, backward


def _optional_operands(scores: list[Tensor], masks: list[Tensor], tables: list[Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if loaded := [t.reshape(1) if t.dim() == 0 else t for t in (*scores, *masks)]:
        arguments["aux_tensors"] = loaded
    if tables:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        size = (blocks.BLOCK, blocks.BLOCK)
        arguments["block_sparse_tensors"] = BlockSparseTensorsTorch(*tables, block_size=size)
    return arguments


def _window(left: int | None, right: int | None) -> dict[str, Any]:
    causal = flash_ops.is_causal((left, right))
    return {"causal": causal, "window_size_left": left, "window_size_right": None if causal else right}


def _run(
    q: Tensor, k: Tensor, v: Tensor, scores: list[Tensor], masks: list[Tensor], tables: list[Tensor],
    code: str, left: int | None, right: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    interface: Any = flash_ops.library("flash4").interface  # type: ignore[attr-defined]
    scale, forward, _ = _mods(code, len(scores))
    out, lse, *_ = interface._flash_attn_fwd(
        q, k, v, softmax_scale=scale, return_lse=True, **_window(left, right), **forward,
        **_optional_operands(scores, masks, tables[:4]),
    )  # fmt: skip
    return out, lse


def _run_filled(
    q: Tensor, k: Tensor, v: Tensor, scores: list[Tensor], masks: list[Tensor], tables: list[Tensor],
    code: str, left: int | None, right: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    interface: Any = flash_ops.library("flash4").interface  # type: ignore[attr-defined]
    out, lse = _run(q, k, v, scores, masks, tables, code, left, right)
    first = torch.isneginf(lse[:, 0]).sum(1, dtype=torch.int32)
    zero = q.new_zeros((1, q.shape[1], 1, q.shape[3])).expand(q.shape)
    interface._flash_attn_fwd(zero, k, v, softmax_scale=1.0, seqused_q=first, out=out)
    return out, lse


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scores: list[Tensor], masks: list[Tensor],
    tables: list[Tensor], code: str, left: int | None, right: int | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    interface: Any = flash_ops.library("flash4").interface  # type: ignore[attr-defined]
    scale, _, backward = _mods(code, len(scores))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    interface._flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, softmax_scale=scale, **_window(left, right), **backward,
        **_optional_operands(scores, masks, tables[4:]), dq=dq, dk=dk, dv=dv,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _fake(q, k, v, scores, masks, tables, code, left, right):  # type: ignore[no-untyped-def]
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty((batch, queries, heads, v.shape[3])), lse


def _fake_backward(grad, q, k, v, *more):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, scores, masks, tables, *ctx.settings = inputs
    ctx.counts = (len(scores), len(masks), len(tables))
    ctx.save_for_backward(q, k, v, *scores, *masks, *tables, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, *rest = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(rest[:count])
        rest = rest[count:]
    nothing = ([None] * count for count in ctx.counts)
    if grad is None:
        return (None, None, None, *nothing, None, None, None)
    grads = torch.ops.fusepass.flash4_mods_backward(grad, q, k, v, *lists, *ctx.settings, *rest)
    return (*grads, *nothing, None, None, None)


def _gradient_filled(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    """The gradients, with those of rows that see no key: the library's backward skips such rows."""
    dq, dk, dv, *nothing = _gradient(ctx, grad, grad_lse)  # type: ignore[no-untyped-call]
    if grad is None:
        return dq, dk, dv, *nothing
    lse, (keys, groups) = ctx.saved_tensors[-1], dv.shape[1:3]
    seen_none = torch.isneginf(lse).transpose(1, 2).unsqueeze(-1)
    lost = torch.where(seen_none, grad, 0.0).sum(1, keepdim=True, dtype=torch.float32)
    lost = lost.unflatten(2, (groups, -1)).sum(3) / keys
    return dq, dk, (dv + lost).to(dv.dtype), *nothing


_definitions = torch.library.Library("fusepass", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_definitions.define(f"flash4_mods({_FORWARD}) -> (Tensor, Tensor)", tags=_tags)
_definitions.define(
    f"flash4_mods_backward(Tensor grad, {_FORWARD}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)
_definitions.define(f"flash4_filled({_FORWARD}) -> (Tensor, Tensor)", tags=_tags)
_definitions.impl("flash4_mods", _run, "CUDA")
_definitions.impl("flash4_filled", _run_filled, "CUDA")
_definitions.impl("flash4_mods_backward", _run_backward, "CUDA")
torch.library.register_fake("fusepass::flash4_mods", _fake, lib=_definitions)
torch.library.register_fake("fusepass::flash4_filled", _fake, lib=_definitions)
torch.library.register_fake("fusepass::flash4_mods_backward", _fake_backward, lib=_definitions)
torch.library.register_autograd("fusepass::flash4_mods", _gradient, setup_context=_save, lib=_definitions)
torch.library.register_autograd(
    "fusepass::flash4_filled", _gradient_filled, setup_context=_save, lib=_definitions
)


# ---------------------------------------------------------------------------------------- sites


#: What formulas can compute, judged by the specification alone.
TAKES = Takes(
    ((Scale, ScaleBy, SoftCap, Clamp, LeakyReLU, Absolute, Function, Bias, Mask),), AROUND,
    learned=IN_GRAPH, factors="pairs", rows="one level", hiding_biases=True,
)  # fmt: skip
#: The same, plus what the library computes itself: it has sinks.
OR_NATIVE = replace(TAKES, sink=True, learned=(*IN_GRAPH, Sink))


def fills_first_rows(spec: Attention, training: bool) -> bool:
    """May there be rows that see no key, give the mean of all values, and come first, in all heads alike?

    If visibility has no lower bound, a later query sees all that an earlier one sees.  A mask that is added
    leaves gradients of the scores in such rows (:func:`base.mean_of_values`).
    """

    def grows(mask: Mask) -> bool:
        bounds = (a.left is None if isinstance(a, Band) else isinstance(a, KeyPadding) for a in mask.atoms)
        return bool(mask.atoms) and all(bounds) and not (training and mask.additive)

    return spec.unseen_rows and all(map(grows, spec.masks)) and empty_rows(spec) == "mean"


def emit(
    site: Site, build: Builder, target: Target, band: Callable[[Attention], tuple[Any, Any] | str]
) -> fx.Node:
    """Write the tables, if any, the call, and the repair of rows that see no key.

    Args:
        band: the window of a specification, aligned at the last query and key, or why it is not one.
    """
    plan = flex_blocks.plan(site, build)
    if plan is None:
        raise Refused("its modifiers have no formula")
    if plan.hides_rows and may_empty_rows(site.spec, target):
        raise Refused("a bias may hide all keys of a query, in training or in half precision")
    window = band(site.spec)
    native = not isinstance(window, str)
    visible = None if native else plan.conjunction
    x = operands(site, build)
    scores, masks = (
        [build.as_tensor(t) for t in writer.tensors] for writer in (plan.of_scores, plan.of_masks)
    )
    masks = [] if native else masks
    if target.training and flex_blocks.scores_by_position(site, plan):
        raise Refused(flex_blocks.GROUPED)
    _check(build, target, x, plan, visible, scores, masks)
    tables: list[fx.Node] = []
    if visible is not None:
        tables = flex_blocks.tables_of(site, build, plan, masks, target.training, stored=False)
    q, k, v = (build.op("transpose", t, 1, 2) for t in (x.q, x.k, x.v))
    code = fm.text([plan.scale, plan.scores, visible])
    filled = fills_first_rows(site.spec, target.training)
    name = "flash4_filled" if filled else "flash4_mods"
    results = build.call(
        getattr(torch.ops.fusepass, name).default, q, k, v, scores, masks, tables, code,
        *(window if native else (None, None)),
    )  # fmt: skip
    out = build.call(operator.getitem, results, 0)
    if site.spec.unseen_rows and not filled and empty_rows(site.spec) != "zero":
        lse = build.call(operator.getitem, results, 1)
        out = flex_blocks.mended(site, build, target, x, out, lse, major="rows")
    out = build.op("transpose", out, 1, 2)
    return build.cast(after_weights(site, build, out), site.spec.out_dtype)


def _check(
    build: Builder, target: Target, x: Operands, plan: flex_blocks.Plan, visible: Any,
    scores: list[fx.Node], masks: list[fx.Node],
) -> None:  # fmt: skip
    """Refuse what its kernels, or the formulas in this file, do not take."""
    values = [build.value(n) for n in (x.q, x.k, x.v)]
    if any(v.dtype not in (torch.float16, torch.bfloat16) for v in values):
        raise Refused("queries, keys and values have different dtypes")
    parts = [visible] if visible is not None else []
    parts += flex_blocks.formulas_of(plan.scores)
    for part in parts:
        written = fm.read(fm.text(part))
        if fm.is_dense(written):
            raise Refused("it reads no tensor over queries and keys")
        if (unknown := cute_mods.unwritable(written)) is not None:
            raise Refused(f"its formulas have no {unknown}")
    if visible is not None:
        if max(int(values[0].shape[3]), int(values[2].shape[3])) > flex_blocks.TILED_HEAD_DIM:
            raise Refused(f"its kernels take block tables up to head size {flex_blocks.TILED_HEAD_DIM}")
        if target.training and settings().deterministic:
            raise Refused("its backward pass with block tables is not deterministic")
    for node in (*scores, *masks):
        value = build.value(node)
        if value.requires_grad and node in scores:
            raise Refused("its score modifiers read a tensor that needs a gradient")
        if value.dtype not in _LOADED or value.device != values[0].device:
            raise Refused("its formulas read only truth values, integers and floats on the same GPU")


__all__ = ["OR_NATIVE", "TAKES", "emit", "fills_first_rows"]
