"""What all kernels share: the target, refusals with a reason, and the tensors of a site."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fusepass.dialects.torch.nodes import size_of
from fusepass.expressions.contents import FILL
from fusepass.expressions.ir import DTYPES, Expr, opmath
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    USUAL_SCORES,
    Attention,
    Band,
    Bias,
    Keep,
    KeyGate,
    KeyPadding,
    Mask,
    Scale,
    ScaleBy,
    WeightModifier,
    WeightScale,
    ZeroEmptyRows,
    empty_rows,
    is_hiding,
)
from fusepass.specification.program import slots
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder

#: Weight modifiers that are applied to the values or to the result: by :func:`operands`,
#: :func:`after_weights` and, for rows that see no key, :func:`finish_rows`.
AROUND: tuple[type[WeightModifier], ...] = (Keep, WeightScale, KeyGate, ZeroEmptyRows)
#: The modifiers that :func:`scaled`, :func:`operands` and :func:`after_weights` compute in separate
#: operations.
IN_GRAPH = (ScaleBy, WeightScale, KeyGate)


@dataclass(frozen=True)
class Target:
    """Where and how a site will run.

    Attributes:
        device: the type of the device, such as "cuda".
        training: are gradients wanted?
        aten: does the graph consist of ATen operators, as exported graphs do?
        requested: did the user request this kernel by name?
        precision: the user's ``precision=``.
        compiled: does a compiler follow, which expands plain mathematics?
    """

    device: str
    training: bool
    aten: bool
    requested: bool = False
    precision: str = "native"
    compiled: bool = False


#: CUDA launches no more blocks in the second and the third dimension of a grid.
MOST_BLOCKS = 65535


class Refused(Exception):
    """Raised while nodes are written: this kernel cannot serve the site."""


def nothing_more(spec: Attention, target: Target) -> str | None:
    """The default of ``Kernel.more``: the kernel takes everything that it declares."""
    return None


@dataclass(frozen=True)
class Kernel:
    """A way to compute a specification.

    Attributes:
        name: what users call it.
        takes: the specifications that it computes; it refuses all others.
        emit: writes the nodes and returns the result ``[B, H, Q, Dv]``, or raises :class:`Refused`.
        more: further reasons to refuse a specification that it takes: the machine, sizes, dtypes.
        of_torch: does it consist of operators whose derivatives PyTorch itself knows?
        rounds: does it round more than the dtype does, so that its error does not show whether it is correct?
        flat: on a GPU, are batch and heads one dimension of its grid?
    """

    name: str
    takes: Takes
    emit: Callable[[Site, Builder, Target], fx.Node]
    more: Callable[[Attention, Target], str | None] = nothing_more
    of_torch: bool = False
    rounds: bool = False
    flat: bool = False

    def refuse(self, spec: Attention, target: Target) -> str | None:
        """Why it does not compute ``spec``, judged by the specification and the target; None if it does."""
        return self.takes.refuse(spec, target.training) or self.more(spec, target)

    def write(self, site: Site, build: Builder, target: Target) -> fx.Node:
        """Write the nodes of a site that is not refused.

        Raises:
            Refused: its operands give a reason not to compute it.
        """
        for mod in site.spec.modifiers if target.training else ():
            if not isinstance(mod, self.takes.learned):
                for slot in mod.slots():
                    if needs_gradient(build, site.operands[slot].expr):
                        name = "a bias" if isinstance(mod, Bias) else f"'{mod}'"
                        raise Refused(f"it computes no gradient for {name}, which needs one")
        if target.device == "cuda" and self.takes.rows != "written":
            self._check_grid(site)
        out = self.emit(site, build, target)
        return out if self.takes.rows == "written" else with_infinite_rows(site, build, target, out)

    def _check_grid(self, site: Site) -> None:
        """Check that its blocks are not too many for a GPU.  Unknown sizes get a guard.

        Raises:
            Refused: a launch would fail, where the original's matrix products do not.
        """
        batch, heads = site.spec.batch, site.spec.heads
        for count in (batch * heads,) if self.flat else (batch, heads):
            if not site.space.facts.stays_below(count, MOST_BLOCKS):
                what = "batch times heads" if self.flat else "its batch or its heads"
                raise Refused(f"its kernels take at most {MOST_BLOCKS} blocks, and {what} are {count}")


def needs_gradient(build: Builder, node: Expr) -> bool:
    """Does a tensor, or anything that it would be made from, need a gradient?"""
    held = build.home(node)
    if held is not None:
        return bool(getattr(build.value(held), "requires_grad", False))
    return any(needs_gradient(build, argument) for argument in node.args)


@dataclass(frozen=True)
class Operands:
    """Query ``[B, H, Q, D]``, key ``[B, G, K, D]`` and value ``[B, G, K, Dv]`` of one dtype."""

    q: fx.Node
    k: fx.Node
    v: fx.Node


def refuse_far_elements(build: Builder, nodes: Sequence[fx.Node]) -> None:
    """Check tensors for kernels that count elements in 32 bits.  Unknown sizes get a guard.

    Raises:
        Refused: an element of one of the tensors is too far from the first one.
    """
    for node in nodes:
        value = build.value(node)
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if guard_or_false(last >= 2**31):
            raise Refused(f"it counts in 32 bits, and a tensor has {value.numel()} elements")


def operands(site: Site, build: Builder, gated: bool = True) -> Operands:
    """Lay out queries, keys and values, cast to one dtype; grouped heads are not copied.

    ``gated``: multiply factors of the weights that vary over the keys into the values,
    ``(w * g) . v = w . (g * v)``.

    Raises:
        Refused: such a factor differs between query heads that share values.
    """
    r = site.roles
    layouts = (
        (site.query, (r.batch, r.heads, r.query, r.head_dim)),
        (site.keys, (r.batch, r.kv_heads, r.key, r.head_dim)),
        (site.values, (r.batch, r.kv_heads, r.key, r.value_dim)),
    )
    nodes = []
    for chain, groups in layouts:
        nodes.append(build.layout(build.choose(chain, groups), groups, full=True))
    dtypes = [build.value(n).dtype for n in nodes]
    wide = max(dtypes, key=lambda d: (d.itemsize, d is torch.float32))
    if len(set(dtypes)) > 1 and torch.float16 in dtypes and torch.bfloat16 in dtypes:
        wide = torch.float32
    x = Operands(*(build.cast(n, wide) for n in nodes))
    if not gated:
        return x
    for mod in site.spec.weights:
        if isinstance(mod, KeyGate):
            x = Operands(x.q, x.k, _gated_values(site, build, x.v, mod))
    return x


def _gated_values(site: Site, build: Builder, v: fx.Node, mod: KeyGate) -> fx.Node:
    if "h" in mod.axes and site.roles.group:
        raise Refused("a gate of the weights varies over keys and heads, but groups of heads share values")
    gate = build.op("transpose", score_operand(site, build, mod.slot), 2, 3)
    return build.cast(build.op("mul", v, gate), build.value(v).dtype)


def without_hidden_keys(site: Site, build: Builder, target: Target, x: Operands) -> Operands:
    """The keys, with those that are hidden from every query set to zero, for kernels that add their masks.

    A mask that replaces scores also hides NaN, which uninitialised memory may hold; a mask that is added does
    not.  On a GPU this is done only for masks over the keys alone.  It is not done for a single query, where
    it would cost another read of the keys, nor for grouped heads.
    """
    spec = site.spec
    masks = [m for m in spec.masks if not m.additive and not all(isinstance(a, Band) for a in m.atoms)]
    if target.device != "cpu":
        masks = [m for m in masks if all(isinstance(a, KeyPadding) for a in m.atoms)]
    if not masks or spec.queries == 1 or spec.heads != spec.kv_heads:
        return x
    seen = build.op("any", conjunction(site, build, masks), 2, True)
    zero = build.number(0.0, x.k)
    return Operands(x.q, build.op("where", build.op("transpose", seen, 2, 3), x.k, zero), x.v)


def may_empty_rows(spec: Attention, target: Target, added: bool = False) -> bool:
    """Are there rows to mend: may a row see no key, and is adding the fills as they are not enough?

    ``added``: the kernel adds the fills of masks that replace scores.
    """
    return spec.unseen_rows or spec.biases_empty_rows(target.training, added)


def score_operand(site: Site, build: Builder, slot: int) -> Any:
    """A modifier's tensor, ``[B | 1, H | 1, Q | 1, K | 1]``, or a number of the graph."""
    r = site.roles
    term = site.operands[slot]
    operand = build.tensor(term.expr)
    if term.expr.rank == 0 and (
        not isinstance(operand, fx.Node) or not isinstance(build.value(operand), torch.Tensor)
    ):
        return operand  # a number
    groups = (r.batch, r.heads, r.query, r.key)
    laid = build.layout(build.reach(term, site.scope), groups, full=False)
    if term.expr.rank == 0 and build.value(laid).dtype is torch.float64:
        return build.cast(laid, opmath(site.spec.dtype))  # a number does not widen the dtype
    return laid


def row_operand(site: Site, build: Builder, slot: int) -> Any:
    """A tensor that does not vary over the keys, ``[B | 1, H | 1, Q | 1, 1]``, or a number.

    Raises:
        Refused: the tensor varies over the keys.
    """
    if site.scope.varies_over_keys(site.operands[slot]):
        raise Refused("a tensor that should vary over the queries alone varies over the keys")
    tensor = score_operand(site, build, slot)
    if (
        isinstance(tensor, fx.Node)
        and isinstance(value := build.value(tensor), torch.Tensor)
        and value.dim() == 4
    ):
        return tensor if value.shape[3] == 1 else build.op("slice", tensor, 3, 0, 1, 1)
    return tensor


def scaled(site: Site, build: Builder, x: Operands) -> tuple[float, Operands]:
    """A positive scale for the kernel, and the operands; other factors are multiplied into the queries."""
    factor, q = 1.0, x.q
    for mod in site.spec.scores:
        if isinstance(mod, Scale):
            factor *= mod.factor
        elif isinstance(mod, ScaleBy):
            dtype = build.value(q).dtype
            q = build.cast(build.op("mul", q, row_operand(site, build, mod.slot)), dtype)
    if factor <= 0:
        q = build.op("mul_scalar", q, factor)
        factor = 1.0
    return factor, Operands(q, x.k, x.v)


def all_operands(site: Site, build: Builder, bands: bool = False) -> list[fx.Node]:
    """The tensors of all slots that a program reads, in its order."""
    return [tensor_operand(site, build, slot) for slot in slots(site.spec, bands)]


def tensor_operand(site: Site, build: Builder, slot: int) -> fx.Node:
    """A modifier's operand as a tensor: a number becomes one without dimensions."""
    operand = score_operand(site, build, slot)
    if isinstance(operand, fx.Node) and isinstance(build.value(operand), torch.Tensor):
        return operand
    dtype, device = site.operands[slot].expr.dtype, build.value(build.anchor).device
    dtype = dtype if dtype is torch.bool else opmath(site.spec.dtype)
    return build.op("scalar_tensor", operand, dtype=dtype, device=device)


def after_weights(site: Site, build: Builder, out: fx.Node) -> fx.Node:
    """The result times the factors of the weights that do not vary over the keys."""
    for mod in site.spec.weights:
        if isinstance(mod, WeightScale):
            factor = mod.factor if mod.slot is None else row_operand(site, build, mod.slot)
            out = build.op("mul" if isinstance(factor, fx.Node) else "mul_scalar", out, factor)
        elif isinstance(mod, Keep) and mod.product and "j" not in mod.axes:
            kept = row_operand(site, build, mod.slot)
            keeps = kept if mod.attends else build.op("logical_not", kept)
            out = build.op("mul", out, build.cast(keeps, build.value(out).dtype))
        elif isinstance(mod, ZeroEmptyRows) and mod.every:
            out = _without_nan_rows(build, out)
    return _zero_hidden_rows(site, build, out)


def _zero_hidden_rows(site: Site, build: Builder, out: fx.Node) -> fx.Node:
    """The result, zero in the rows whose weights, even NaN, were all set to zero after the softmax."""
    for mod in site.spec.weights:
        if isinstance(mod, Keep) and not mod.product and "j" not in mod.axes:
            kept, zero = row_operand(site, build, mod.slot), build.number(0.0, out)
            out = build.op("where", kept, out, zero) if mod.attends else build.op("where", kept, zero, out)
    return out


def _without_nan_rows(build: Builder, out: fx.Node) -> fx.Node:
    """The result, zero in the rows whose weights were NaN for any reason: such rows are NaN throughout."""
    nan = build.op("all", build.op("isnan", out), -1, True)
    return build.op("where", nan, build.number(0.0, out), out)


def visible(site: Site, build: Builder, mask: Mask) -> fx.Node:
    """A mask as a boolean tensor: True where a query attends."""
    tensor = score_operand(site, build, mask.slot)
    if mask.additive:
        return build.op("eq_scalar", tensor, 0)
    return tensor if mask.attends else build.op("logical_not", tensor)


def conjunction(site: Site, build: Builder, masks: Sequence[Mask]) -> fx.Node:
    """Several masks as one boolean tensor."""
    out = visible(site, build, masks[0])
    for mask in masks[1:]:
        out = build.op("logical_and", out, visible(site, build, mask))
    return out


@dataclass(frozen=True)
class Rows:
    """Which queries see a key, and the scores that the masks alone would give.

    level: ``[B | 1, H | 1, Q | 1, K | 1]``, the masks (and biases that may hide) applied to a score of
    zero, minus the row maximum; with a sink, it is subtracted only in rows that see no key.
    top: ``[..., 1]``, that maximum, which is a fill in rows that see no key.
    seen: ``[..., 1]``, boolean.
    """

    level: fx.Node
    top: fx.Node
    seen: fx.Node


def rows_of(site: Site, build: Builder, dtype: torch.dtype) -> Rows:
    """The rows of a site.  In a row that sees no key the fills absorb the scores, so its weights are uniform
    over the keys with the highest fill.  Every kernel computes exactly that, in any precision, if the queries
    of such rows are set to zero and their highest level is moved to zero.

    Without a sink, the highest level of every other row is moved to zero as well.  The softmax stays the
    same, and a large level would cost the kernel's log-sum-exp, and so its gradients, their precision.
    """
    level = _levels(site, build)
    top = build.op("amax", level, [-1], True)
    zero = build.number(0.0, top)
    if len(site.spec.masks) == len(hiders(site.spec)):
        seen = build.op("eq_scalar", top, 0)
    else:
        seen = _reached(site, build, top)
    moved = build.op("isfinite", top)
    if site.spec.sink is not None:
        moved = build.op("logical_and", moved, build.op("logical_not", seen))
    level = build.cast(build.op("sub", level, build.op("where", moved, top, zero)), dtype)
    lowest = build.number(torch.finfo(dtype).min, top, dtype)
    return Rows(build.op("maximum", level, lowest), top, seen)


def _reached(site: Site, build: Builder, top: fx.Node) -> fx.Node:
    """Are the highest levels of rows above the fills of masks, and too small to absorb scores?"""
    known = torch.finfo(build.value(top).dtype)
    scales = (abs(m.factor) for m in site.spec.scores if isinstance(m, Bias) and m.hides and m.factor)
    bound = min(max(FILL, 2 * USUAL_SCORES / known.eps), 0.99 * known.max) * min((1.0, *scales))
    spec = site.spec.without_hiding_biases
    highest = max((m.fill for m in spec.masks if spec.hides(m)), default=-math.inf)
    low, high = (build.number(n, top) for n in (max(-bound, 0.99 * highest), bound))
    usual = build.op("logical_and", build.op("lt", low, top), build.op("lt", top, high))
    return build.op("logical_or", usual, build.op("isnan", top))  # kernels return NaN for NaN


def with_infinite_rows(site: Site, build: Builder, target: Target, out: fx.Node) -> fx.Node:
    """The result, with NaN in rows whose keys are all hidden by biases of minus infinity that were added as
    they are.

    Kernels return zero there, as SDPA defines it; rows that see no key for other reasons are already mended.
    """
    spec = site.spec
    added = any(map(is_hiding, spec.scores)) and not may_empty_rows(spec, target)
    sink = spec.sink
    if not added or (sink is not None and sink.finite):
        return out
    if any(isinstance(w, ZeroEmptyRows) for w in spec.weights):
        return out
    after = spec.scores[max(n for n, m in enumerate(spec.scores) if is_hiding(m)) :]
    if any(
        m.hidden(-math.inf) != -math.inf for m in after if not isinstance(m, (Scale, ScaleBy, Bias, Mask))
    ):
        return out  # minus infinity becomes a finite number
    top = build.op("amax", _levels(site, build), [-1], True)
    if sink is not None:
        top = build.op(
            "maximum", top, build.cast(tensor_operand(site, build, sink.slot), build.value(top).dtype)
        )
    nan = build.number(math.nan, out)
    lost = build.op("logical_or", build.op("eq_scalar", top, -math.inf), build.op("isnan", top))
    return _zero_hidden_rows(site, build, build.op("where", lost, nan, out))


def _levels(site: Site, build: Builder) -> fx.Node:
    """The scores that the masks, and the biases that may hide, give for scores of zero, in the order of
    computation.

    Raises:
        Refused: a modifier follows them whose effect is not known.
    """
    level: fx.Node | None = None
    for mod in site.spec.scores:
        if isinstance(mod, Mask) or is_hiding(mod):
            level = _hide(site, build, level, mod)
        elif level is not None and isinstance(mod, Scale):
            level = build.op("mul_scalar", level, mod.factor)
        elif level is not None and isinstance(mod, ScaleBy):
            level = build.op("mul", level, tensor_operand(site, build, mod.slot))
        elif level is not None and not isinstance(mod, Bias):
            raise Refused(f"'{mod}' follows a mask or bias that may hide all keys of a query")
    assert level is not None
    return level


def hiders(spec: Attention) -> list[Mask | Bias]:
    """The modifiers that may hide keys, in order: masks, and biases that may hold fills."""
    return [m for m in spec.scores if isinstance(m, Mask) or is_hiding(m)]


def filled_dtype(mod: Mask, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a mask replaces scores of a dtype: one that holds its fill as it was written."""
    return torch.promote_types(dtype, DTYPES[mod.dtype]) if mod.dtype else dtype


def _hide(site: Site, build: Builder, level: fx.Node | None, mod: Mask | Bias) -> fx.Node:
    tensor = score_operand(site, build, mod.slot)
    if isinstance(mod, Bias):
        if not isinstance(tensor, fx.Node) or not isinstance(build.value(tensor), torch.Tensor):
            raise Refused("a bias is a single number for all keys")
        if site.operands[mod.slot].expr.rank == 0:
            tensor = build.cast(tensor, site.product.dtype)  # a number is added in the dtype of the scores
        tensor = tensor if mod.factor == 1 else build.op("mul_scalar", tensor, mod.factor)
        return tensor if level is None else build.op("add", level, tensor)
    if mod.additive:
        return tensor if level is None else build.op("add", level, tensor)
    dtype = filled_dtype(mod, site.product.dtype if level is None else build.value(level).dtype)
    if math.isfinite(mod.fill):
        wide = (d for d in (torch.float32, torch.float64) if mod.fill >= torch.finfo(d).min)
        dtype = dtype if mod.fill >= torch.finfo(dtype).min else next(wide, torch.float64)
    level = level if level is None else build.cast(level, dtype)
    fill = build.number(mod.fill, build.anchor, dtype)
    before = level if level is not None else build.number(0.0, build.anchor, dtype)
    return build.op("where", visible(site, build, mod), before, fill)


def learns_hidden_rows(site: Site, build: Builder, target: Target) -> bool:
    """Are gradients of rows that see no key wanted, and is it not known which keys have weight in such a row?

    Raises:
        Refused: these gradients are not known.
    """
    if not (target.training and _is_opaque(site.spec)):
        return False
    _check_gradients(site, build)
    return True


def _is_opaque(spec: Attention) -> bool:
    """Are keys hidden by a bias whose elements are not known?"""
    return any(isinstance(m, Bias) for m in hiders(spec))


def muted(build: Builder, rows: Rows, node: fx.Node) -> fx.Node:
    """``node`` with the rows that see no key set to zero."""
    return build.op("mul", node, build.cast(rows.seen, build.value(node).dtype))


def finish_rows(
    site: Site, build: Builder, out: fx.Node, x: Operands, scale: float, rows: Rows, target: Target
) -> fx.Node:
    """Finish the rows that see no key: NaN for ``-inf`` fills, zero for masks after the softmax.

    Raises:
        Refused: their gradients are not known.
    """
    spec, value = site.spec, build.value(out)
    fills = hiders(spec)
    additive = [m for m in fills if isinstance(m, Bias) or m.additive]
    policy = empty_rows(spec)
    opaque = _is_opaque(spec)
    if policy == "zero" and any(isinstance(w, Keep) and w.implied for w in spec.weights):
        cleared = build.number(0.0, out)
        if not opaque:
            return build.op("where", rows.seen, out, cleared)
        kept = build.op("any", conjunction(site, build, spec.masks), -1, True)
        lost = build.op("where", build.op("isfinite", rows.top), out, build.number(math.nan, out))
        return build.op("where", kept, lost, cleared)  # what a bias alone hides is not zeroed
    if target.training and policy != "zero" and 0 < len(additive) < len(fills):
        raise Refused(
            "it has no gradients of rows that see no key where some masks are added and others replace scores"
        )
    if target.training and (opaque or any(math.isfinite(m.fill) for m in additive if isinstance(m, Mask))):
        if len(fills) > 1:
            raise Refused("it has no gradients of rows that see no key under several masks (join the masks)")
        if not opaque:
            mended = build.cast(_with_gradients(site, build, x, scale, out), value.dtype)
            out = build.op("where", rows.seen, out, mended)
    if policy != "mean" or len(fills) > 1 or opaque:  # finite fills may sum to -inf
        finite = build.op("isfinite", rows.top)
        zero = policy == "zero" or any(isinstance(w, ZeroEmptyRows) for w in spec.weights)
        number = 0.0 if zero else math.nan
        other = build.number(number, out)
        if target.training and not zero:
            one = build.number(1.0, out)
            nan = build.op("where", finite, one, other)  # a finite number where the row's gradient is zero
            # This depends on everything that the row's weights depend on, so all of that gets NaN gradients.
            row = mean_of_values(site, build, x, scale, bool(additive))
            other = build.op("mul", build.cast(row, value.dtype), nan)
        out = build.op("where", finite, out, other)
    return out


def mean_of_values(site: Site, build: Builder, x: Operands, scale: float, gradients: bool) -> fx.Node:
    """The mean of all values, ``[B, H, 1 | Q, Dv]``: the result of rows whose scores one fill absorbs.

    ``gradients``: include gradients of the scores, which a mask that is added lets through; a mask that
    replaces scores does not.

    Raises:
        Refused: its gradients are not known.
    """
    mean = build.op("mean", x.v, [2], True)
    if site.roles.group:
        mean = repeat_heads(site, build, mean)
    return _with_gradients(site, build, x, scale, mean) if gradients else mean


def _with_gradients(site: Site, build: Builder, x: Operands, scale: float, mean: fx.Node) -> fx.Node:
    """The mean of the values, with the gradients that an additive mask lets through.

    The scores ``s`` are absorbed by the fill but still have gradients: to first order the row is
    ``mean(v) + sum_j s_j (v_j - mean(v)) / K``, and ``sum_j s_j (v_j - mean(v)) = q . (k^T (v - mean(v)))``,
    which needs no tensor over queries and keys.  The term itself is subtracted again without gradient.
    """
    _check_gradients(site, build)
    centred = build.op("detach", build.op("sub", x.v, build.op("mean", x.v, [2], True)))
    moments = build.op("matmul", build.op("transpose", x.k, -2, -1), centred)
    if site.roles.group:
        moments = repeat_heads(site, build, moments)
    keys = build.size(site.spec.keys)
    term = build.op("div_number", build.op("mul_scalar", build.op("matmul", x.q, moments), scale), keys)
    return build.op("sub", build.op("add", mean, term), build.op("detach", term))


def _check_gradients(site: Site, build: Builder) -> None:
    """Check that gradients of rows that see no key reach only queries, keys and values.

    Raises:
        Refused: they reach a learned bias, or pass through another function of the scores.
    """
    for mod in site.spec.scores:
        learned = isinstance(mod, Bias) and build.value(tensor_operand(site, build, mod.slot)).requires_grad
        if learned or not isinstance(mod, (Scale, ScaleBy, Mask, Bias)):
            raise Refused(f"it has no gradients of rows that see no key under '{mod}'")


def repeat_heads(site: Site, build: Builder, node: fx.Node) -> fx.Node:
    """``[B, G, n, m]`` as ``[B, H, n, m]``: one copy for each query head."""
    r, shape = site.roles, [size_of(n) for n in build.value(node).shape]
    batch, heads, group = build.sizes(r.batch), build.sizes(r.kv_heads), build.sizes(r.group)
    thin = build.op("reshape", node, build.shape([batch, heads, 1, *shape[2:]]))
    wide = build.op("expand", thin, [build.size(s) for s in (batch, heads, group, *shape[2:])])
    return build.op("reshape", wide, build.shape([batch, site.spec.heads, *shape[2:]]))
