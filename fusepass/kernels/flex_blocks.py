"""FlexAttention with block tables: hidden blocks are skipped, and no tensor over queries and keys is made.

Masks become one ``mask_mod`` and the tables of :mod:`fusepass.kernels.blocks`; biases that have a formula
become part of the ``score_mod``.  The log-sum-exp shows which rows see no key, so that they can be mended,
and it also serves to apply a sink: ``exp(s) / (sum(exp(s)) + exp(u)) = softmax(s) * sigmoid(logsumexp(s) -
u)``.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusepass.kernels import formula as fm
from fusepass.kernels import gates
from fusepass.kernels.base import (
    Operands,
    Refused,
    Target,
    mean_of_values,
    operands,
    refuse_far_elements,
    row_operand,
)
from fusepass.kernels.blocks import (
    BLOCK,
    keep_resident,
    plain_tables,
    stored_tables_op,
    table_shapes,
    tables_op,
)
from fusepass.kernels.flex_operators import LOWEST, block_attention
from fusepass.rules.engine import Term
from fusepass.rules.site import Site
from fusepass.rules.visibility import additive_mask
from fusepass.specification.attention import (
    Absolute,
    Attention,
    Bias,
    Clamp,
    Finite,
    Function,
    LeakyReLU,
    Mask,
    Scale,
    ScaleBy,
    ScoreModifier,
    SoftCap,
    empty_rows,
    one_level,
)
from fusepass.writing.emit import Builder

TILED_HEAD_DIM = 128
"""Above this head size, flash-attn 4's tiles are not blocks of 128 keys."""
SMALL_HEAD_DIM = SMALL_TILE = 64


@dataclass
class Plan:
    """A specification as formulas.

    ``hides_rows``: a bias of unknown contents may hide whole rows; the log-sum-exp does not tell which, nor
    their gradients.
    """

    site: Site
    scale: float = 1.0
    scores: list[Any] = field(default_factory=list)
    visible: list[Any] = field(default_factory=list)
    hides_rows: bool = False

    def __post_init__(self) -> None:
        self.of_scores, self.of_masks = fm.Writer(self.site), fm.Writer(self.site)

    @property
    def conjunction(self) -> Any:
        """All masks as one formula; None where everything is visible."""
        if not self.visible:
            return None
        whole = self.visible[0]
        for part in self.visible[1:]:
            whole = ["and", whole, part]
        return whole

    def code(self) -> str:
        """The text that the call takes."""
        return fm.text([self.scale, self.scores, self.conjunction])


def plan(site: Site, build: Builder) -> Plan | None:
    """The formulas of a site, or None if its modifiers cannot be written as formulas.

    Masks hide for good: nothing after the first of them may bring a hidden score back.
    """
    spec, planned = site.spec, Plan(site)
    masked = False
    biased = any(isinstance(m, Bias) for m in spec.scores)
    if biased and any(m.fill != -math.inf for m in spec.masks):
        return None  # in a row that a bias hides wholly, the bias would be compared with finite fills
    for position, mod in enumerate(spec.scores):
        if masked and not isinstance(mod, (Mask, Bias)):
            return None
        try:
            if isinstance(mod, Mask):
                masked = True
                if not spec.hides(mod):
                    return None
                planned.visible.append(_visible(planned.of_masks, mod))
            elif isinstance(mod, Scale) and position == 0:
                planned.scale = mod.factor
            elif (step := _step(mod)) is not None:
                planned.scores.append(step)
            elif isinstance(mod, Bias):
                value = _value(planned.of_scores, mod.slot, build)
                planned.hides_rows |= mod.hides and _may_hide(site, mod.slot)
                planned.scores.append(["add", value, mod.factor])
            elif isinstance(mod, ScaleBy):
                planned.scores.append(["times", _value(planned.of_scores, mod.slot, build)])
            elif isinstance(mod, Function):
                read = None if mod.slot is None else _value(planned.of_scores, mod.slot, build)
                planned.scores.append(["function", mod.steps, read])
            else:
                return None
        except fm.Unwritable:
            return None
    return planned


def _step(mod: ScoreModifier) -> list[Any] | None:
    """A function of the score alone, as a step of a formula; None for other modifiers."""
    match mod:
        case Scale(factor):
            return ["scale", factor]
        case SoftCap(cap):
            return ["softcap", cap]
        case Clamp(low, high):
            return ["clamp", low, high]
        case LeakyReLU(slope):
            return ["leaky_relu", slope]
        case Absolute():
            return ["abs"]
        case Finite(nan, low, high):
            return ["finite", nan, low, high]
    return None


def _may_hide(site: Site, slot: int) -> bool:
    """May a bias hide scores, by its formula, if it has one?"""
    try:
        return fm.may_hide(fm.Writer(site).term(site.operands[slot]), LOWEST)
    except fm.Unwritable:
        return True


def _value(writer: fm.Writer, slot: int, build: Builder) -> Any:
    """A bias or factor: its formula if that needs no tensor over queries and keys, else its tensor.

    A learned tensor is read as it is: the gradient of a formula would be summed score by score.
    """
    term = writer.site.operands[slot]
    known = len(writer.tensors)
    try:
        formula = writer.term(term)
    except fm.Unwritable:
        formula = None
    learns = any(build.value(build.as_tensor(t)).requires_grad for t in writer.tensors[known:])
    if formula is None or learns or fm.is_dense(formula):
        del writer.tensors[known:]
        return writer.write(writer.formulas.load(term))
    return formula


def thin_biases(site: Site) -> frozenset[int]:
    """The slots of biases that vary over queries and keys by a formula, not by a tensor."""
    slots = set()
    for mod in site.spec.scores:
        if isinstance(mod, Bias):
            with contextlib.suppress(fm.Unwritable):
                if not fm.is_dense(fm.Writer(site).term(site.operands[mod.slot])):
                    slots.add(mod.slot)
    return frozenset(slots)


def _visible(writer: fm.Writer, mask: Mask) -> Any:
    term, known = writer.site.operands[mask.slot], len(writer.tensors)
    try:
        formula = _understood(writer, mask, term)
    except fm.Unwritable:
        formula = None
    if formula is not None and not fm.is_dense(formula):
        return formula
    del writer.tensors[known:]
    tensor = writer.write(writer.formulas.load(term))
    if mask.additive:
        return ["eq", tensor, ["const", 0]]
    return tensor if mask.attends else ["not", tensor]


def _understood(writer: fm.Writer, mask: Mask, term: Term) -> Any:
    lifted = writer.formulas.lift(term)
    if mask.additive:
        hidden = additive_mask(writer.formulas, lifted, term.expr.dtype)
        return None if hidden is None else writer.write(hidden.attends)
    return writer.write(lifted) if mask.attends else ["not", writer.write(lifted)]


def emit(site: Site, build: Builder, target: Target, planned: Plan, options: dict[str, Any]) -> fx.Node:
    """Write the tables (once per graph), the call, and the repair of rows that see no key."""
    x = operands(site, build)
    scores, masks = (
        [build.as_tensor(t) for t in writer.tensors] for writer in (planned.of_scores, planned.of_masks)
    )
    if target.device == "cuda":
        refuse_far_elements(build, [x.q, x.k, x.v, *scores, *masks])
    scores, masks = ([_stored(build, t) for t in tensors] for tensors in (scores, masks))
    flash = options.get("BACKEND") == "FLASH"
    if flash and any(build.value(t).requires_grad for t in scores):
        raise Refused("its score modifiers read a tensor that needs a gradient")
    if flash and target.training and scores_by_position(site, planned):
        raise Refused(GROUPED)
    if flash and not target.training and (scores or masks):
        # TorchInductor 2.11 frees what a CuTe kernel captures before the kernel runs, unless a backward keeps
        # it.
        raise Refused("without gradients its score modifiers can read no tensors")
    tables = tables_of(site, build, planned, masks, target.training, stored=True)
    q, v = build.value(x.q), build.value(x.v)
    with build.trial():
        value = (
            q.new_empty((*q.shape[:3], v.shape[3])),
            q.new_empty(q.shape[:3], dtype=torch.float32),
        )
    sink = site.spec.sink
    reads = sink is not None or site.spec.unseen_rows
    if reads:  # without gradients the kernel writes no log-sum-exp unless it is told to
        options = options | {"OUTPUT_LOGSUMEXP": True}
    if not flash:
        dense = any(map(fm.is_dense, formulas_of(planned.scores)))
        options = options | tile(site.spec, dense)
    arguments = (x.q, x.k, x.v, scores, masks, tables, planned.code(), fm.text(sorted(options.items())))
    results = build.call_with(value, block_attention, *arguments)
    out = build.call(operator.getitem, results, 0)
    if not reads:
        return out
    lse = build.call(operator.getitem, results, 1)
    if sink is None:
        return mended(site, build, target, x, out, lse)
    return _with_sink(build, out, lse, row_operand(site, build, sink.slot))


def tile(spec: Attention, dense: bool) -> dict[str, int]:
    """FlexAttention's options for the tiles of its forward kernel; none if its defaults are better.

    If scores read a tensor over queries and keys, the kernel holds a tile of it beside the tile of scores; on
    Hopper smaller tiles are then faster for small heads (``bias`` in docs/attention.md).  Fewer queries than
    a block use the decoding kernel, which has other tiles.
    """
    half, many = spec.dtype in (torch.float16, torch.bfloat16), isinstance(spec.queries, int)
    small = isinstance(spec.head_dim, int) and spec.head_dim <= SMALL_HEAD_DIM
    if not (dense and half and small and many and spec.queries >= BLOCK and gates.capability() == (9, 0)):
        return {}
    return {"fwd_BLOCK_M": SMALL_TILE, "fwd_BLOCK_N": SMALL_TILE}


def _with_sink(build: Builder, out: fx.Node, lse: fx.Node, sink: Any) -> fx.Node:
    """The result times the share of each row's weight that the keys keep; zero where the row sees no key.

    Args:
        out: ``[B, H, Q, Dv]``; so is the result.
        lse: base 2, ``[B, H, Q]``.
        sink: ``[B | 1, H | 1, Q | 1, 1]``, or a number.
    """
    natural = build.op("mul_scalar", build.op("unsqueeze", lse, -1), math.log(2))
    kept = build.op("sigmoid", build.op("sub", natural, sink))
    return build.cast(build.op("mul", out, kept), build.value(out).dtype)


GROUPED = "with grouped heads its backward pass takes no score modifiers that depend on the position"
"""In a backward pass on Hopper, flash-attn 4 4.0.0b36 takes heads for packed ones and misreads tensors."""


def scores_by_position(site: Site, planned: Plan) -> bool:
    """Are there grouped heads, and do steps of the score depend on batch, head or position?"""
    return bool(site.roles.group) and any(map(fm.letters, formulas_of(planned.scores)))


def formulas_of(steps: Sequence[Any]) -> list[Any]:
    """What the steps of a score read: the formulas of biases, factors and arguments of functions."""
    read = [s[1] if s[0] in ("add", "times") else s[2] for s in steps if s[0] in ("add", "times", "function")]
    return [formula for formula in read if formula is not None]


def _stored(build: Builder, node: fx.Node) -> fx.Node:
    """A tensor in memory, where FlexAttention can read it; stored once for all sites."""
    if node.op == "placeholder":
        return node
    store = torch.ops.fusepass.stored.default
    stored: fx.Node = build.once(("stored", node), lambda: build.call(store, node))
    return stored


def tables_of(
    site: Site, build: Builder, planned: Plan, masks: list[fx.Node], both: bool, stored: bool
) -> list[fx.Node]:
    """The block tables; sites with the same visibility share them.

    Tables that read no tensor are made in advance.  Others of known sizes are plain operations, which the
    inner compiler fuses.

    Args:
        both: include the tables that a backward reads.
        stored: keep them in memory, whatever the inner compiler would fuse, for a call that it does not see
            as an operator.
    """
    if not planned.visible:
        return []
    whole = fm.text(planned.conjunction)
    used, spec = fm.letters(planned.conjunction), site.spec
    sizes = (spec.batch if "b" in used else 1, spec.heads if "h" in used else 1, spec.queries, spec.keys)
    device = build.value(build.anchor).device
    known = all(isinstance(n, int) for n in sizes)

    def make() -> list[fx.Node]:
        b, h, i, j = map(build.size, sizes)
        arguments = (masks, whole, b, h, i, j, device, both)
        if known and not masks:
            keep_resident(whole, b, h, i, j, both, device)
        if not known or not masks or build.is_aten:
            return parts(build.call(tables_op, *arguments))
        with build.trial():
            value = table_shapes([], whole, b, h, i, j, device, both)
        tables = parts(build.call_with(value, plain_tables, *arguments))
        return parts(build.call(stored_tables_op, tables)) if stored else tables

    def parts(tables: fx.Node) -> list[fx.Node]:
        return [build.call(operator.getitem, tables, n) for n in range(8 if both else 4)]

    nodes: list[fx.Node] = build.once(("tables", whole, tuple(masks), sizes, both, stored), make)
    return nodes


def mendable(site: Site) -> bool:
    """Does the log-sum-exp alone determine the result of rows that see no key?"""
    return not site.spec.unseen_rows or one_level(site.spec)


def mended(
    site: Site, build: Builder, target: Target, x: Operands, out: fx.Node, lse: fx.Node, major: str = "heads"
) -> fx.Node:
    """Mend the rows that see no key: those whose log-sum-exp is minus infinity.

    Args:
        out: ``[B, H, Q, Dv]``, or ``[B, Q, H, Dv]`` with ``major="rows"``; so is the result.
        lse: ``[B, H, Q]``.
    """
    spec, like = site.spec, build.value(out)
    sizes = [build.size(s) for s in (spec.batch, spec.heads, spec.queries)]
    seen = build.op("reshape", build.op("isfinite", build.op("detach", lse)), [*sizes, 1])
    seen = build.op("transpose", seen, 1, 2) if major == "rows" else seen
    policy = empty_rows(spec)
    if policy == "mean":
        scale = math.prod(m.factor for m in spec.scores if isinstance(m, Scale))
        gradients = target.training and any(m.additive for m in spec.masks)
        other = build.cast(mean_of_values(site, build, x, scale, gradients), like.dtype)
        other = build.op("transpose", other, 1, 2) if major == "rows" else other
    else:
        number = 0.0 if policy == "zero" else math.nan
        other = build.number(number, out)
    return build.op("where", seen, out, other)


__all__ = [
    "GROUPED", "Plan", "emit", "mendable", "mended", "plan",
    "scores_by_position", "tables_of", "thin_biases", "tile",
]  # fmt: skip
