"""flash-attn 2, 3 and 4: causal and windowed attention with softcap and grouped heads, and each one's extras.

flash 2 also has dropout and ALiBi; flash 4 also has a sink, and formulas
(:mod:`fusepass.kernels.flash4_mods`).  The masks of all three are bands aligned at the bottom right: query
``i`` sees the keys ``i + K - Q - left .. i + K - Q + right`` (README of flash-attention, changes in version
2.1).  Bands of a specification are aligned at the top left, so they are moved by ``K - Q``.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from functools import cache

import sympy
import torch
from torch import fx

from fusepass.expressions.index import simplify_size
from fusepass.host.libraries import GATES
from fusepass.kernels import flash4_mods, flash_ops, fp8_ops
from fusepass.kernels import formula as fm
from fusepass.kernels.base import (
    AROUND,
    IN_GRAPH,
    Kernel,
    Refused,
    Target,
    after_weights,
    operands,
    row_operand,
    scaled,
)
from fusepass.kernels.gates import build_refuses, gate_refuses
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dropout,
    Mask,
    Scale,
    ScaleBy,
    Sink,
    SoftCap,
)
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder


@dataclass(frozen=True)
class Call:
    """A specification as arguments of a flash kernel; ``left`` and ``right`` are aligned bottom-right."""

    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    dropout: float = 0.0


#: The modifiers that the libraries compute themselves.  The biases of flash 2 are ALiBi.
NATIVE = {
    "flash2": Takes(
        ((Scale, ScaleBy), SoftCap, (Bias, Mask)), (Dropout, *AROUND), learned=IN_GRAPH, hiding_biases=True
    ),
    "flash3": Takes(((Scale, ScaleBy), SoftCap, Mask), AROUND, learned=IN_GRAPH),
    "flash4": Takes(((Scale, ScaleBy), SoftCap, Mask), AROUND, sink=True, learned=(*IN_GRAPH, Sink)),
}


def describe(spec: Attention, name: str) -> Call | str:
    """The call that computes ``spec``, or why there is none."""
    if (reason := NATIVE[name].refuse(spec)) is not None:
        return reason
    caps = [m.cap for m in spec.scores if isinstance(m, SoftCap)]
    if any(cap < 0 for cap in caps):
        return "its softcap must be positive"
    window = bottom_right(spec)
    if isinstance(window, str):
        return window
    biases = [m for m in spec.scores if isinstance(m, Bias)]
    if biases and (len(biases) > 1 or window[1] != 0):
        return f"it has no '{biases[0]}'"
    if spec.sink is not None and not set(spec.sink.axes) <= {"h"}:
        return "its sink must be one number per head"
    return Call(*window, softcap=sum(caps), dropout=spec.dropout)


def bottom_right(spec: Attention) -> tuple[int | None, int | None] | str:
    """The visibility as a window aligned at the last query and the last key, or why it is not one."""
    bands: list[Band] = []
    for mask in spec.masks:
        if not all(isinstance(a, Band) for a in mask.atoms) or not mask.atoms:
            return f"its masks are bands, and this is '{mask}'"
        if not spec.hides(mask):
            return f"hidden scores are set to {mask.fill:g}, which is within reach of real scores"
        bands += [a for a in mask.atoms if isinstance(a, Band)]
    if not bands:
        return None, None
    if not spec.rows_seen:
        return "a query may see no key"
    offset = simplify_size(spec.keys - spec.queries)
    left = [simplify_size(b.left + offset) for b in bands if b.left is not None]
    right = [simplify_size(b.right - offset) for b in bands if b.right is not None]
    ends = [
        _as_integer(min(side, key=str) if len(set(side)) == 1 else _least(side)) for side in (left, right)
    ]
    if "unknown" in ends:
        return "the distance of the band from the last key is not known when it is compiled"
    if any(isinstance(e, int) and e < 0 for e in ends):
        return "its windows must contain the diagonal that ends at the last key"
    return ends[0], ends[1]  # type: ignore[return-value]


def _least(sizes: list[int | sympy.Expr]) -> int | sympy.Expr | None:
    if not sizes:
        return None
    return min(sizes) if all(isinstance(s, int) for s in sizes) else sympy.Symbol("unknown")


def _as_integer(size: int | sympy.Expr | None) -> int | str | None:
    return size if size is None or isinstance(size, int) else "unknown"


def kernel(name: str) -> Kernel:
    """The kernel of one library."""

    def refuse(spec: Attention, target: Target) -> str | None:
        reason = gate_refuses(name, spec, target.device, target.training)
        if reason is not None:
            return reason
        call = describe(spec, name)
        if isinstance(call, str) and name == "flash4" and flash4_mods.TAKES.refuse(spec) is None:
            return None
        if isinstance(call, str):
            return call
        package, needs = GATES[name].package, _needs(call, spec, target.training)
        return None if package is None else build_refuses(package, needs, spec.head_dim)

    def emit(site: Site, build: Builder, target: Target) -> fx.Node:
        if name == "flash4" and isinstance(describe(site.spec, name), str):
            return flash4_mods.emit(site, build, target, bottom_right)
        return _emit(name, site, build)

    takes = flash4_mods.OR_NATIVE if name == "flash4" else NATIVE[name]
    return Kernel(name, takes, emit, refuse)


def _needs(call: Call, spec: Attention, training: bool) -> set[str]:
    """The parts of a library that a call uses and that a build may lack."""
    used = {
        "backward": training,
        "softcap": bool(call.softcap),
        "local": call.left is not None or call.right not in (None, 0),
        "fp16": spec.dtype is torch.float16,
    }
    return {part for part, needed in used.items() if needed}


def _emit(name: str, site: Site, build: Builder) -> fx.Node:
    spec = site.spec
    call = describe(spec, name)
    if isinstance(call, str):
        raise Refused(call)
    scale, x = scaled(site, build, operands(site, build))
    if build.value(x.q).dtype not in (torch.float16, torch.bfloat16):
        raise Refused("queries, keys and values have different dtypes")
    shard_where_used()
    q, k, v = (build.op("transpose", t, 1, 2) for t in (x.q, x.k, x.v))
    bias = next((m for m in spec.scores if isinstance(m, Bias)), None)
    extra = _sink(site, build) if bias is None else _slopes(site, build, bias)
    results = build.call(
        getattr(torch.ops.fusepass, name).default, q, k, v, extra, scale, call.left, call.right,
        call.softcap, call.dropout,
    )  # fmt: skip
    out = build.op("transpose", build.call(operator.getitem, results, 0), 1, 2)
    return build.cast(after_weights(site, build, out), spec.out_dtype)


def _sink(site: Site, build: Builder) -> fx.Node | None:
    """The sink as float32 ``[H]``."""
    if site.spec.sink is None:
        return None
    heads, like = build.size(site.spec.heads), build.value(build.anchor)
    sink = row_operand(site, build, site.spec.sink.slot)
    if not isinstance(sink, fx.Node) or not isinstance(build.value(sink), torch.Tensor):
        return build.op("full", [heads], sink, dtype=torch.float32, device=like.device)
    if build.value(sink).dim() == 4:  # it varies over the heads alone, however it was expanded
        for dim in (3, 2, 0):
            sink = build.op("select", sink, dim, 0)
    flat = build.op("reshape", build.cast(sink, torch.float32), [-1])
    return build.op("expand", flat, [heads])


def _slopes(site: Site, build: Builder, bias: Bias) -> fx.Node:
    """The slopes of ALiBi, float32 ``[H]``: the bias is ``slope[h] * n * j`` plus one number per row.

    Under a causal mask flash 2 adds ``slope * (j - i)`` plus one number per row, which cancels in the
    softmax.

    Raises:
        Refused: the bias has another form.
    """
    writer = fm.Writer(site)
    refusal = Refused(f"its only bias is ALiBi, and this is '{bias}'")
    try:
        formula = fm.read(fm.text(writer.term(site.operands[bias.slot])))
    except fm.Unwritable:
        raise refusal from None
    step = _linear(formula)
    if step is None:
        raise refusal
    _, slot, indices = step[0]
    node = build.as_tensor(writer.tensors[slot])
    for dim, (constant, terms) in reversed(list(enumerate(indices))):
        if not terms:
            node = build.op("select", node, dim, constant)
    value = build.value(node)
    if value.dim() != 1:
        raise refusal
    return build.op("mul_scalar", build.cast(node, torch.float32), step[1] * bias.factor)


def _linear(formula: fm.Formula) -> tuple[fm.Formula, int] | None:
    """From ``load(h) * (n * j + ...)``: the load of a slope per head, and the factor of ``j``."""
    while formula[0] == "cast":
        formula = formula[1]
    if formula[0] != "mul":
        return None
    parts = list(formula[1:])
    for n, part in enumerate(parts):
        while part[0] == "cast":
            part = part[1]
        parts[n] = part
    for load, index in (parts, parts[::-1]):
        if load[0] != "load" or index[0] != "index" or fm.letters(load) != {"h"}:
            continue
        whole = all(terms in ((), ((1, "h", 1, 0),)) for _, terms in load[2])
        along = [t for t in index[2] if t[1] == "j"]
        if whole and len(along) == 1 and along[0][2:] == (1, 0) and fm.letters(index) <= {"i", "j"}:
            return load, along[0][0]
    return None


def shard_where_used() -> None:
    """Register sharding rules if DTensor is in use; DTensor is not imported for that."""
    if "torch.distributed.tensor" in sys.modules:
        _shard_once()


@cache
def _shard_once() -> None:
    flash_ops.shard_heads()
    fp8_ops.shard_heads()


FLASH2, FLASH3, FLASH4 = (kernel(name) for name in flash_ops.NAMES)
