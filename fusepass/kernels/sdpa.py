"""``torch.nn.functional.scaled_dot_product_attention``.

``softmax(q k^T * scale + attn_mask) v`` with dropout and grouped heads; ``is_causal`` is aligned
top-left (PyTorch documentation of ``scaled_dot_product_attention``).  Its flash kernels take no
``attn_mask``, so a mask that is proved to be causal, or to hide nothing, is never passed as a tensor, and a
window on a GPU goes to the operator behind it (:mod:`fusepass.kernels.torch_flash`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

from fusepass.dialects.torch.nodes import size_of
from fusepass.expressions.index import Size
from fusepass.expressions.ir import opmath
from fusepass.kernels import torch_flash
from fusepass.kernels.base import (
    AROUND,
    Kernel,
    Operands,
    Refused,
    Rows,
    Target,
    after_weights,
    conjunction,
    filled_dtype,
    finish_rows,
    hiders,
    learns_hidden_rows,
    may_empty_rows,
    muted,
    operands,
    repeat_heads,
    row_operand,
    rows_of,
    scaled,
    score_operand,
    visible,
    without_hidden_keys,
)
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Bias,
    Dropout,
    Mask,
    Modifier,
    Scale,
    ScaleBy,
    ScoreModifier,
    absorbs,
    empty_rows,
    is_hiding,
    is_less_precise,
)
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder
from fusepass.writing.stored import stored_op

#: The function that is called, even if the user has replaced
#: ``torch.nn.functional.scaled_dot_product_attention``.
CALL = torch.ops.aten.scaled_dot_product_attention.default
TAKES = Takes(
    ((Scale, ScaleBy), (Bias, Mask)), (Dropout, *AROUND), sink=True, learned=(Modifier,), fills="added",
    rows="levels", hiding_biases=True,
)  # fmt: skip


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write the call."""
    spec = site.spec
    scale, x = scaled(site, build, operands(site, build))
    bounds = torch_flash.window(spec, target, build.value(x.q).dtype)
    if bounds is not None:
        out = torch_flash.emit(site, build, x, scale, bounds)
        return build.cast(after_weights(site, build, out), spec.out_dtype)
    x = without_hidden_keys(site, build, target, x)
    original = x
    causal = spec.is_causal() and spec.sink is None
    rows: Rows | None = None
    if causal:
        mask = None
    elif not may_empty_rows(spec, target, added=True) or _absorbs(site, target, build.value(x.q).dtype):
        mask = attn_mask(site, build, target, x)
    else:
        dtype = build.value(x.q).dtype
        rows = rows_of(site, build, opmath(dtype))
        x = _with_absorbed_scores(site, build, target, rows, x)
        mask = _levels_and_biases(site, build, rows, opmath(dtype))
        if spec.sink is None:
            mask = _as_operand(site, build, target, mask, dtype)
    if spec.sink is not None:
        x, mask = _with_sink(site, build, target, x, mask)
    out = _call(site, build, target, x, mask, causal, scale)
    if rows is not None:
        out = finish_rows(site, build, out, original, scale, rows, target)
    return build.cast(after_weights(site, build, out), spec.out_dtype)


def _with_absorbed_scores(site: Site, build: Builder, target: Target, rows: Rows, x: Operands) -> Operands:
    """The operands, changed to give scores of zero in rows that see no key, where a fill absorbs the scores.

    In training under a bias that may hold fills, the weights of such a row are known only at run time, and so
    are the gradients of its scores.  There each score is written as ``q·k - q·k``, over twice the features,
    and the second product has no gradients.

    Raises:
        Refused: the gradients of such rows are not known.
    """
    if not learns_hidden_rows(site, build, target):
        return Operands(muted(build, rows, x.q), x.k, x.v)
    hidden = build.cast(build.op("logical_not", rows.seen), build.value(x.q).dtype)
    negative = build.op("neg", build.op("mul", build.op("detach", x.q), hidden))
    q = build.op("cat", [x.q, negative], 3)
    return Operands(q, build.op("cat", [x.k, build.op("detach", x.k)], 3), x.v)


def _levels_and_biases(site: Site, build: Builder, rows: Rows, dtype: torch.dtype) -> fx.Node:
    total = rows.level
    for mod in site.spec.scores:
        if isinstance(mod, Bias) and not mod.hides:
            bias = build.cast(_added(site, build, mod), dtype)
            total = build.op("add", total, muted(build, rows, bias))
    return total


def _with_sink(
    site: Site, build: Builder, target: Target, x: Operands, mask: fx.Node | None
) -> tuple[Operands, fx.Node]:
    """A sink as one more key and value of zeros: its score is zero plus the sink, and its value is zero."""
    spec, like = site.spec, build.value(x.q)
    assert spec.sink is not None
    k, v = (_with_zeros(build, t, 2, 1) for t in (x.k, x.v))
    sink = row_operand(site, build, spec.sink.slot)
    if not isinstance(sink, fx.Node) or not isinstance(build.value(sink), torch.Tensor):
        sink = build.op("full", [1, 1, 1, 1], sink, dtype=like.dtype, device=like.device)
    sink = sink if build.value(sink).dim() == 4 else build.op("reshape", sink, [1, 1, 1, 1])
    if mask is None:
        mask = build.op("full", [1, 1, 1, 1], 0.0, dtype=like.dtype, device=like.device)
    if build.value(mask).dtype is torch.bool:
        zero, hidden = (build.number(n, x.q) for n in (0.0, -math.inf))
        mask = build.op("where", mask, zero, hidden)
    sink = build.cast(sink, build.value(mask).dtype)
    shapes = [[size_of(n) for n in build.value(t).shape] for t in (mask, sink)]
    whole = [build.size(next((s[d] for s in shapes if s[d] != 1), 1)) for d in range(3)]
    keys = build.size(spec.keys)
    columns = [build.op("expand", mask, [*whole, keys]), build.op("expand", sink, [*whole, 1])]
    return Operands(x.q, k, v), _as_operand(site, build, target, build.op("cat", columns, 3), like.dtype)


def attn_mask(site: Site, build: Builder, target: Target, x: Operands) -> fx.Node | None:
    """Everything that is added to the scores, as one tensor; None if nothing is.

    With a sink, which is joined to the tensor later, the tensor keeps the dtype of the sum.
    """
    spec, dtype = site.spec, build.value(x.q).dtype
    extra = spec.added
    if not extra:
        return None
    if all(isinstance(m, Mask) and not m.additive for m in extra) and spec.rows_seen:
        return conjunction(site, build, [m for m in extra if isinstance(m, Mask)])
    total: fx.Node | None = None
    for mod in extra:
        if isinstance(mod, Mask) and not mod.additive:
            total = _filled(site, build, mod, total, filled_dtype(mod, dtype))
        else:
            term = _added(site, build, mod)
            total = term if total is None else build.op("add", total, term)
    assert total is not None
    return total if spec.sink is not None else _as_operand(site, build, target, total, dtype)


def _as_operand(site: Site, build: Builder, target: Target, total: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Everything that is added to the scores, including a sink, in the dtype that the call takes."""
    extra = site.spec.added
    wide = torch.promote_types(build.value(total).dtype, dtype)
    overflows = 2 * torch.finfo(dtype).max < torch.finfo(wide).max  # not in bfloat16
    precise = wide is torch.float64  # its digits count; kernels add in single precision
    large = len(extra) > 1 or precise or (overflows and any(map(is_hiding, extra)))
    if large and wide.itemsize > dtype.itemsize:
        total = _lifted(build, total)
    total = build.cast(total, dtype)
    opaque = target.device != "cpu" and any(isinstance(m, Bias) for m in extra)
    return _representable(build, total) if opaque else total


def _lifted(build: Builder, total: fx.Node) -> fx.Node:
    """A sum minus its row maximum: in a narrower dtype it would overflow, or round small numbers away."""
    top = build.op("amax", total, [-1], True)
    known = build.op("where", build.op("isfinite", top), top, build.number(0.0, top))
    return build.op("sub", total, known)


def _filled(site: Site, build: Builder, mod: Mask, before: fx.Node | None, dtype: torch.dtype) -> fx.Node:
    """The sum so far, replaced by the fill where the mask hides.

    The fill ``-inf`` is kept only if every row is known to see a key, because it gives NaN gradients in other
    rows.  Otherwise the lowest finite number replaces it, and rows that see no key are mended.
    """
    lowest = torch.finfo(dtype).min
    fill = mod.fill if mod.fill == -math.inf and site.spec.rows_seen else max(mod.fill, lowest)
    zero, hidden = (build.number(n, build.anchor, dtype) for n in (0.0, fill))
    kept = zero if before is None else build.cast(before, dtype)
    return build.op("where", visible(site, build, mod), kept, hidden)


def _representable(build: Builder, added: fx.Node) -> fx.Node:
    """``added`` with finite values below ``finfo.min / 2`` raised to it: kernels work in powers of two.

    ``finfo.min * log2(e)`` overflows: a row that the user's float mask hides completely would be NaN.  Half
    of it hides just as much, and keeps such a row uniform.
    """
    value = build.value(added)
    if value.dtype is torch.float16:
        return added  # computed in float32, where nothing overflows
    half = build.number(torch.finfo(value.dtype).min / 2, added)
    infinite = build.op("eq_scalar", added, -math.inf)
    return build.op("where", infinite, added, build.op("maximum", added, half))


def _absorbs(site: Site, target: Target, dtype: torch.dtype) -> bool:
    """Does adding the masks as they are give the original's result for rows that see no key?

    ``score + finfo.min`` rounds to ``finfo.min`` in float32 and bfloat16, so that such a row is uniform.  A
    higher fill does not absorb all scores, which is correct only if the original adds it too.  All this holds
    for a single mask, on the CPU (CUDA's kernels compute in powers of two, where ``finfo.min`` overflows) and
    without gradients (the backward's ``exp(s - logsumexp)`` loses the number of keys).  A sum of wider
    numbers is moved to a maximum of zero (:func:`_as_operand`), where it absorbs nothing.
    """
    spec, added = site.spec, [site.operands[m.slot].expr for m in site.spec.added]
    if len(added) > 1 and any(a.is_float and a.rank and is_less_precise(dtype, a.dtype) for a in added):
        return False
    if target.device != "cpu" or target.training or dtype is torch.float16:
        return False
    if not len(spec.masks) == 1 == len(hiders(spec)) or empty_rows(spec) != "mean":
        return False
    (mask,) = spec.masks
    return mask.fill >= torch.finfo(dtype).min and (mask.additive or absorbs(mask.fill, dtype))


def _added(site: Site, build: Builder, mod: ScoreModifier) -> fx.Node:
    """One bias or additive mask as a floating tensor."""
    assert isinstance(mod, (Bias, Mask))
    tensor = score_operand(site, build, mod.slot)
    if not isinstance(tensor, fx.Node) or not isinstance(build.value(tensor), torch.Tensor):
        raise Refused("a bias is a single number for all keys")
    if isinstance(mod, Bias) and mod.factor != 1:
        return build.op("mul_scalar", tensor, mod.factor)
    return tensor


def _call(
    site: Site, build: Builder, target: Target, x: Operands, mask: fx.Node | None, causal: bool, scale: float
) -> fx.Node:
    """Write the call, in the first form for which the device has a fused kernel."""
    p = site.spec.dropout
    if mask is not None and not target.training and build.value(mask).requires_grad:
        mask = build.op(
            "detach", mask
        )  # PyTorch checks whether it requires gradients, not whether any are kept
    x = Operands(*(_as_written(build, n) for n in (x.q, x.k, x.v)))
    if mask is not None and target.device != "cpu" and build.value(mask).shape[-1] == 1:
        shape = [build.size(size_of(n)) for n in build.value(mask).shape[:-1]]
        wide = build.op("expand", mask, [*shape, build.size(size_of(build.value(x.k).shape[2]))])
        mask = build.op("contiguous", wide)  # GPU kernels need a stride of 1 over the keys
    forms = _forms(site, build, x)
    chosen = next((f for f in forms if not _is_math(build, f[0], mask, p, causal, scale, f[1])), None)
    if chosen is None:
        if not target.requested:
            raise Refused(_why_math(site, build, target, mask, p))
        chosen = (x, bool(site.roles.group), None)
    y, gqa, cut = chosen
    kwargs: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": p,
        "is_causal": causal,
        "scale": scale,
        "enable_gqa": gqa,
    }
    given = {k: v for k, v in kwargs.items() if v not in (None, False, 0.0)}
    out = build.call(CALL, y.q, y.k, y.v, **given)
    return out if cut is None else build.op("slice", out, 3, 0, build.size(cut), 1)


def _as_written(build: Builder, node: fx.Node) -> fx.Node:
    """A copy of the tensor if the graph writes to it through a transposed view.

    In torch 2.13, AOTAutograd passes SDPA such a tensor as it was before the write, even in hand-written
    code.
    """
    turned = not build.reader.turned.isdisjoint(build.reader.memory.of(node))
    return build.call(stored_op, node) if turned else node


def _forms(site: Site, build: Builder, x: Operands) -> Iterator[tuple[Operands, bool, Size | None]]:
    """Ways to write the call, cheapest first: operands, are heads grouped, a width to cut the result to.

    Each form writes its nodes only when the iterator reaches it, so unneeded forms leave no nodes.
    """
    grouped, width = bool(site.roles.group), site.spec.value_dim
    head_dim = size_of(build.value(x.q).shape[3])
    forms: list[tuple[Operands, Size | None]] = [(x, None)]
    yield x, grouped, None
    dense = _dense(build, x)
    if dense is not None:
        forms = [(dense, None)]
        yield dense, grouped, None
    at_most = site.space.facts.at_most
    if head_dim != width and (at_most(width, head_dim) or at_most(head_dim, width)):
        forms.append((_same_width(site, build, forms[0][0], head_dim), width))
        yield forms[-1][0], grouped, width
    for form, cut in forms if grouped else ():
        yield _repeated(site, build, form), False, cut


def _dense(build: Builder, x: Operands) -> Operands | None:
    """Operands, copied if the elements of a head are not contiguous, as fused kernels require."""
    nodes = (x.q, x.k, x.v)
    strided = [not statically_known_true(build.value(n).stride(-1) == 1) for n in nodes]
    if not any(strided):
        return None
    return Operands(*(build.op("contiguous", n) if far else n for n, far in zip(nodes, strided, strict=True)))


def _is_math(
    build: Builder, x: Operands, mask: fx.Node | None, p: float, causal: bool, scale: float, gqa: bool
) -> bool:
    """Would PyTorch compute this call with its unfused fallback?  The call is run on fake tensors to see."""
    q, k, v = (build.value(n) for n in (x.q, x.k, x.v))
    added = None if mask is None else build.value(mask)
    if q.device.type == "cuda" and not torch.cuda.is_available():
        return not fused_on_cuda(q, v, added is not None, gqa)  # the graph is compiled for another machine
    with build.trial(), _Dispatched() as seen:
        CALL(q, k, v, attn_mask=added, dropout_p=p, is_causal=causal, scale=scale, enable_gqa=gqa)
    return not any(name.startswith("_scaled_dot_product") and "math" not in name for name in seen.names)


def fused_on_cuda(q: torch.Tensor, v: torch.Tensor, masked: bool, gqa: bool) -> bool:
    """PyTorch's conditions (``sdp_utils.cpp``) for a fused kernel on NVIDIA GPUs, for use without a GPU."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    small = max(size_of(q.shape[3]), size_of(v.shape[3])) <= 256 and q.shape[3] % 8 == 0
    flash = half and small and not masked and q.shape[3] == v.shape[3]
    efficient = q.dtype in (torch.float32, torch.float16, torch.bfloat16) and not gqa
    return flash or efficient


class _Dispatched(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[-1])
        return func(*args, **(kwargs or {}))


def _why_math(site: Site, build: Builder, target: Target, mask: fx.Node | None, p: float) -> str:
    where = f"on {target.device} SDPA has no fused kernel for"
    if p > 0 and target.device == "cpu":
        return f"{where} dropout"
    if mask is not None and build.value(mask).requires_grad:
        return f"{where} a bias that needs a gradient"
    dtype, sizes = str(site.spec.dtype).removeprefix("torch."), (site.spec.head_dim, site.spec.value_dim)
    return f"{where} {dtype} with head sizes {sizes[0]} and {sizes[1]}"


def _same_width(site: Site, build: Builder, x: Operands, head_dim: Size) -> Operands:
    """Pad values, or queries and keys, if they are narrower, with zeros, which add nothing to a product."""
    width = site.spec.value_dim
    if site.space.facts.at_most(width, head_dim):
        return Operands(x.q, x.k, _with_zeros(build, x.v, 3, head_dim - width))
    q, k = (_with_zeros(build, t, 3, width - head_dim) for t in (x.q, x.k))
    return Operands(q, k, x.v)


def _with_zeros(build: Builder, tensor: fx.Node, dim: int, count: Size) -> fx.Node:
    """A tensor with zeros appended.  Unlike ``pad``, its gradient has known strides at symbolic sizes."""
    like = build.value(tensor)
    shape = [build.size(size_of(n)) for n in like.shape]
    shape[dim] = build.size(count)
    return build.op("cat", [tensor, build.op("full", shape, 0.0, dtype=like.dtype, device=like.device)], dim)


def _repeated(site: Site, build: Builder, x: Operands) -> Operands:
    """Key/value heads copied for each query head, for kernels without grouped heads."""
    return Operands(x.q, repeat_heads(site, build, x.k), repeat_heads(site, build, x.v))


SDPA = Kernel("sdpa", TAKES, emit, of_torch=True)
