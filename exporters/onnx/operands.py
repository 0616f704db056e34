"""The tensors of a site as ONNX operators need them: queries, keys, values, and one mask of rank 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from fusepass.exporters.onnx.bounds import lower_bound
from fusepass.exporters.onnx.builder import OnnxBuilder
from fusepass.expressions.index import Size
from fusepass.expressions.ir import Shape, scalar_of
from fusepass.rules.engine import Term
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Keep,
    KeyGate,
    Mask,
    Scale,
    ScaleBy,
    SoftCap,
    WeightScale,
    ZeroEmptyRows,
    empty_rows,
)
from fusepass.specification.takes import Takes
from fusepass.writing.layouts import Groups

_CAUSAL = Band(None, 0)
#: A float16 fill whose weight is zero (:func:`.attention.negligible`); the lowest float16 is -65504.
_MILD = -65024.0


class Refused(Exception):
    """Raised while nodes are written: this operator cannot serve the site."""


@dataclass(frozen=True)
class Operands:
    """Query ``[B, H, Q, D]``, key ``[B, G, K, D]`` and value ``[B, G, K, Dv]`` of one dtype, or packed."""

    q: ir.Value
    k: ir.Value
    v: ir.Value


# ---------------------------------------------------------------------------------------- what fits


#: Biases and masks are added as tensors; factors over the keys are multiplied into the keys.
PLAIN = Takes(
    ((Scale, ScaleBy), (Bias, Mask)), (Keep, WeightScale, KeyGate, ZeroEmptyRows), factors="keys",
    fills="added", rows="levels", hiding_biases=True,
    no_keys=True,  # a named dimension may always be zero
)  # fmt: skip
CAPPED = replace(PLAIN, scores=((Scale, ScaleBy), SoftCap, (Bias, Mask)), sink=True)


def softcap_of(spec: Attention) -> float:
    """The softcap; 0 for none."""
    return next((m.cap for m in spec.scores if isinstance(m, SoftCap)), 0.0)


# ---------------------------------------------------------------------------------------- operands


def laid_out_over(
    build: OnnxBuilder,
    chain: Sequence[Term],
    batch: Sequence[str],
    length: Sequence[str],
    width: Sequence[str],
    merged: bool = False,
) -> ir.Value:
    """One operand as ``[B, n, width]``, or as ``[1, n, B * width]`` if sequences are merged into one."""
    groups: Groups = ([], length, [*batch, *width]) if merged else (batch, length, width)
    return build.layout(build.choose(chain, groups), groups, full=True)


def laid_out(site: Site, build: OnnxBuilder, packed: bool = False) -> Operands:
    """Lay out queries, keys and values; grouped heads are not copied.

    Args:
        site: the site.
        build: where to write.
        packed: ``[B, Q, H*D]``, ``[B, K, G*D]``, ``[B, K, G*Dv]`` instead of a separate dimension for heads.
    """
    r = site.roles
    sides = (
        (site.query, r.heads, r.query, r.head_dim),
        (site.keys, r.kv_heads, r.key, r.head_dim),
        (site.values, r.kv_heads, r.key, r.value_dim),
    )
    values = []
    for chain, heads, length, width in sides:
        groups = (r.batch, length, [*heads, *width]) if packed else (r.batch, heads, length, width)
        values.append(build.layout(build.choose(chain, groups), groups, full=True))
    return alike(build, Operands(*values))


def has_gates(spec: Attention) -> bool:
    """Are the scores or the weights multiplied by a tensor that varies over the keys?"""
    return any(isinstance(m, KeyGate) or _scales_keys(m) for m in (*spec.scores, *spec.weights))


def _scales_keys(mod: object) -> bool:
    return isinstance(mod, ScaleBy) and "j" in mod.axes


def gated(site: Site, build: OnnxBuilder, x: Operands) -> Operands:
    """Factors that vary over the keys, multiplied into keys and values.

    ``(q k) * g = q (g * k)`` and ``(w * g) v = w (g * v)``.

    Raises:
        Refused: a factor varies over heads that share keys and values.
    """
    k, v = x.k, x.v
    for mod in (*site.spec.scores, *site.spec.weights):
        if not (isinstance(mod, KeyGate) or (isinstance(mod, ScaleBy) and _scales_keys(mod))):
            continue
        if "h" in mod.axes and site.spec.heads != site.spec.kv_heads:
            raise Refused("a factor varies over keys and heads, and the heads share their keys and values")
        gate = build.permute(score_operand(site, build, mod.slot), (0, 1, 3, 2))
        gate = build.cast(gate, build.dtype_of(v))
        if isinstance(mod, KeyGate):
            v = build.pointwise("Mul", gate, v)
        else:
            k = build.pointwise("Mul", gate, k)
    return Operands(x.q, k, v)


def alike(build: OnnxBuilder, x: Operands) -> Operands:
    """The operands in one dtype that holds them all."""
    dtypes = {build.dtype_of(v) for v in (x.q, x.k, x.v)}
    wide = max(dtypes, key=lambda d: (d.itemsize, d is torch.float32))
    if {torch.float16, torch.bfloat16} <= dtypes:
        wide = torch.float32
    return Operands(*(build.cast(v, wide) for v in (x.q, x.k, x.v)))


def times(a: Size, b: Size) -> Size:
    """The product of sizes."""
    return a * b


def packed(build: OnnxBuilder, value: ir.Value, merged: bool = False) -> ir.Value:
    """``[B, H, n, D]`` as ``[B, n, H*D]``, or as ``[1, n, B*H*D]`` if sequences are merged into one."""
    batch, heads, length, width = build.shape_of(value)
    if merged:
        wide = build.permute(value, (2, 0, 1, 3))
        return build.reshape(wide, (1, length, times(batch, times(heads, width))))
    return build.reshape(build.permute(value, (0, 2, 1, 3)), (batch, length, times(heads, width)))


def repeated(site: Site, build: OnnxBuilder, x: Operands) -> Operands:
    """Key/value heads copied for each query head, for operators without grouped heads."""
    spec = site.spec
    group = build.sizes(site.roles.group)
    copies = []
    for value in (x.k, x.v):
        batch, heads, length, width = build.shape_of(value)
        wide = build.reshape(value, (batch, heads, 1, length, width))
        wide = build.expand(wide, (batch, heads, group, length, width))
        copies.append(build.reshape(wide, (batch, spec.heads, length, width)))
    return Operands(x.q, *copies)


def scaled(site: Site, build: OnnxBuilder, x: Operands, packed: bool = False) -> tuple[float, Operands]:
    """The constant scale; factors that the operator's scale cannot express are multiplied into the queries.

    Raises:
        Refused: a factor is a tensor over the heads, and the heads are packed.
    """
    factor, q = 1.0, x.q
    for mod in site.spec.scores:
        if isinstance(mod, Scale):
            factor *= mod.factor
        elif isinstance(mod, ScaleBy) and not _scales_keys(mod):
            if packed and mod.axes:
                raise Refused("the scores are multiplied by a tensor over heads or queries")
            by = row_operand(site, build, mod.slot)
            by = build.reshape(by, (1, 1, 1)) if packed else by
            q = build.cast(build.pointwise("Mul", by, q), build.dtype_of(x.q))
    if not (0 < factor < math.inf):
        q = build.pointwise("Mul", build.constant(factor, build.dtype_of(q)), q)
        factor = 1.0
    return factor, Operands(q, x.k, x.v)


def score_operand(site: Site, build: OnnxBuilder, slot: int) -> ir.Value:
    """A modifier's tensor, ``[B | 1, H | 1, Q | 1, K | 1]``."""
    r, term = site.roles, site.operands[slot]
    number = scalar_of(term.expr)
    if number is not None:
        return build.constant([[[[number]]]], term.expr.dtype)
    groups = (r.batch, r.heads, r.query, r.key)
    return build.layout(build.reach(term, site.scope), groups, full=False)


def row_operand(site: Site, build: OnnxBuilder, slot: int) -> ir.Value:
    """A tensor that does not vary over the keys, ``[..., 1]``.

    Raises:
        Refused: it does vary.
    """
    if site.scope.varies_over_keys(site.operands[slot]):
        raise Refused("a tensor that must be the same for all keys varies over the keys")
    value = score_operand(site, build, slot)
    return value if build.shape_of(value)[-1] == 1 else build.cut(value, 3, 0, 1)


def after_weights(site: Site, build: OnnxBuilder, out: ir.Value) -> ir.Value:
    """Factors of the weights that do not vary over the keys, moved to the result."""
    dtype = build.dtype_of(out)
    for mod in site.spec.weights:
        if isinstance(mod, WeightScale):
            factor = (
                build.constant(mod.factor, dtype)
                if mod.slot is None
                else build.cast(row_operand(site, build, mod.slot), dtype)
            )
            out = build.pointwise("Mul", factor, out)
        elif isinstance(mod, Keep) and "j" not in mod.axes:
            kept = row_operand(site, build, mod.slot)
            zero = build.constant(0.0, dtype)
            if mod.product:
                kept = kept if mod.attends else build.pointwise("Not", kept)
                out = build.pointwise("Mul", build.cast(kept, dtype), out)
            else:
                yes, no = (out, zero) if mod.attends else (zero, out)
                out = build.call("Where", [kept, yes, no], build.shape_of(out), dtype)
    return out


# ---------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Added:
    """What is added to the scores, and what is left to do for rows that see no key.

    mask: ``[B | 1, H | 1, Q, K]``, boolean (True attends) or of the queries' dtype; None if nothing is added.
    seen: ``[B | 1, H | 1, Q | 1, 1]``, boolean: which rows see a key; None if nothing is left to do.
    mute: must the queries be zero in rows that see no key?
    """

    mask: ir.Value | None
    seen: ir.Value | None = None
    mute: bool = False


def added_mask(
    site: Site, build: OnnxBuilder, dtype: torch.dtype, boolean: bool = True, mild: bool = False
) -> Added:
    """All biases and masks as one tensor.

    Rows that see no key keep the meaning that the model gives them: the mean of the values under finite
    fills, NaN under ``-inf``, zero where the weights were set to zero.

    Args:
        site: the site.
        build: where to write.
        dtype: the dtype of the queries, and of a floating mask.
        boolean: may the mask be boolean?
        mild: use fills just above those that runtimes take for "hidden"?  If a mask has fills of that kind,
            their kernels search every row, key by key, for a key that is not hidden.
    """
    spec = site.spec
    extra = spec.added
    if not extra:
        return Added(None)
    hide = all(isinstance(m, Mask) and spec.hides(m) for m in extra)
    if mild and dtype is torch.float16 and spec.rows_seen and hide:
        visible = _conjunction(site, build, spec.masks)
        levels = [build.constant(level, dtype) for level in (0.0, _MILD)]
        mask = build.call("Where", [visible, *levels], build.shape_of(visible), dtype)
        return Added(full_mask(site, build, mask))
    if spec.sink is not None:  # every row sees it
        return Added(full_mask(site, build, _total(site, build, extra, dtype, -math.inf)))
    rows_differ = spec.unseen_rows
    if rows_differ and len({m.fill == -math.inf for m in spec.masks}) > 1:
        raise Refused(
            "a row may see no key, and some masks fill with -inf, others with finite numbers (use one fill)"
        )
    policy = empty_rows(spec) if rows_differ else "none"
    if boolean and policy != "mean" and not any(_is_sum(m) for m in extra):
        mask = _conjunction(site, build, [m for m in extra if isinstance(m, Mask)])
        seen = _any_key(build, mask) if policy == "nan" else None
        return Added(full_mask(site, build, mask), seen)
    reaches = [m for m in extra if isinstance(m, Bias) and not _above(site, build, m, dtype)]
    if policy != "mean" and not (policy == "none" and reaches):
        total = _total(site, build, extra, dtype, -math.inf)
        seen = _seen(site, build) if policy in ("nan", "zero") else None
        return Added(full_mask(site, build, total), seen)
    return _muted(site, build, extra, dtype)


def _above(site: Site, build: OnnxBuilder, mod: Bias, dtype: torch.dtype) -> bool:
    """Is it known that a bias is never low enough to hide a key?"""
    bound = lower_bound(site.operands[mod.slot].expr, build.reader)
    return mod.factor > 0 and bound * mod.factor > _faint(dtype)


def _faint(dtype: torch.dtype) -> float:
    """A bias below this absorbs scores of ordinary size when they are added."""
    return -32768.0 if dtype is torch.float16 else -5e7


def _is_sum(mod: Bias | Mask) -> bool:
    """Is it a floating tensor already, which can be added unchanged?"""
    return isinstance(mod, Bias) or mod.additive


def _total(
    site: Site, build: OnnxBuilder, extra: Sequence[Bias | Mask], dtype: torch.dtype, lowest: float
) -> ir.Value:
    """What a score of zero becomes by all masks and biases, with fills no lower than ``lowest``."""
    lowest = max(lowest, torch.finfo(dtype).min) if lowest > -math.inf else lowest
    total: ir.Value | None = None
    for mod in extra:
        value = score_operand(site, build, mod.slot)
        if isinstance(mod, Mask) and not mod.additive:
            before = total if total is not None else build.constant(0.0, dtype)
            fill = build.constant(max(_representable(mod.fill, dtype), lowest), dtype)
            chosen = [value, before, fill] if mod.attends else [value, fill, before]
            total = build.call("Where", chosen, _joint(build, value, before), dtype)
            continue
        if isinstance(mod, Bias) and mod.factor != 1:
            value = build.pointwise("Mul", build.constant(mod.factor, build.dtype_of(value)), value)
        if lowest > -math.inf and not (isinstance(mod, Bias) and _above(site, build, mod, dtype)):
            value = build.pointwise("Max", build.constant(lowest, build.dtype_of(value)), value)
        value = build.cast(value, dtype)
        total = value if total is None else build.pointwise("Add", total, value)
    assert total is not None
    return total


def _representable(fill: float, dtype: torch.dtype) -> float:
    """A finite fill that the dtype can hold."""
    return fill if fill == -math.inf else max(fill, torch.finfo(dtype).min)


def _joint(build: OnnxBuilder, a: ir.Value, b: ir.Value) -> Shape:
    shapes = [build.shape_of(v) for v in (a, b)]
    return tuple(next((s[d] for s in shapes if len(s) == 4 and s[d] != 1), 1) for d in range(4))


def _muted(site: Site, build: OnnxBuilder, extra: Sequence[Bias | Mask], dtype: torch.dtype) -> Added:
    """All biases and masks, for operators that are given zero queries in rows that see no key.

    Runtimes do not agree on rows that hold only fills, and half precision has no fill that absorbs scores.
    Zero queries make all scores of such a row equal, and the row of the mask is shifted so that its highest
    number is zero: the weights are uniform over the keys that have it.
    """
    level = _total(site, build, extra, dtype, torch.finfo(dtype).min)
    top = build.reduce("ReduceMax", level, 3)
    seen = build.pointwise("Greater", top, build.constant(_faint(dtype), dtype))
    lifted = build.pointwise("Sub", level, top)
    level = build.call("Where", [seen, level, lifted], build.shape_of(level), dtype)
    return Added(full_mask(site, build, level), seen, mute=True)


def _conjunction(site: Site, build: OnnxBuilder, masks: Sequence[Mask]) -> ir.Value:
    """Several masks as one boolean tensor."""
    out: ir.Value | None = None
    for mask in masks:
        value = score_operand(site, build, mask.slot)
        if mask.additive:
            value = build.pointwise("Equal", value, build.constant(0.0, build.dtype_of(value)))
        elif not mask.attends:
            value = build.pointwise("Not", value)
        out = value if out is None else build.pointwise("And", out, value)
    assert out is not None
    return out


def _seen(site: Site, build: OnnxBuilder) -> ir.Value:
    return _any_key(build, _conjunction(site, build, site.spec.masks))


def _any_key(build: OnnxBuilder, visible: ir.Value) -> ir.Value:
    """``[..., 1]``: is any key visible?"""
    number = build.cast(visible, torch.int32)
    return build.cast(build.reduce("ReduceMax", number, 3), torch.bool)


def full_mask(site: Site, build: OnnxBuilder, mask: ir.Value) -> ir.Value:
    """The mask expanded over all queries and keys: runtimes broadcast over neither."""
    spec, shape = site.spec, build.shape_of(mask)
    return build.expand(mask, (*shape[:2], spec.queries, spec.keys))


def mend_rows(site: Site, build: OnnxBuilder, out: ir.Value, extra: Added) -> ir.Value:
    """Restore the model's result in rows that see no key, if the operator gives another one."""
    if extra.seen is None or extra.mute:
        return out
    dtype = build.dtype_of(out)
    other = build.constant(0.0 if empty_rows(site.spec) == "zero" else math.nan, dtype)
    return build.call("Where", [extra.seen, out, other], build.shape_of(out), dtype)


def muted(build: OnnxBuilder, extra: Added, q: ir.Value) -> ir.Value:
    """The queries, set to zero in rows that see no key if ``extra.mute``."""
    if not extra.mute or extra.seen is None:
        return q
    return build.pointwise("Mul", build.cast(extra.seen, build.dtype_of(q)), q)
