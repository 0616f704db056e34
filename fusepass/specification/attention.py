"""The attention specification: what a site computes, as data, with its reference semantics and laws.

Axis letters, one legend for the whole project: ``B`` batch, ``H`` query heads, ``G`` key/value heads
(``H`` is a multiple of ``G``; query head ``h`` reads key/value head ``h // (H // G)``), ``Q`` query
length, ``K`` key length, ``D`` and ``Dv`` head sizes of keys and values.  Positions are ``i`` (query)
and ``j`` (key).  In a boolean mask True means *attends*.

    out[b, h, i] = sum_j weights[b, h, i, j] * v[b, g, j]
    weights      = weight_modifiers(softmax_j(score_modifiers(q[b, h, i] . k[b, g, j])))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusepass.expressions.index import Size
from fusepass.expressions.ir import DTYPES
from fusepass.specification.atoms import (
    Atom,
    Band,
    Chunk,
    Dense,
    Document,
    KeyPadding,
    Prefix,
    Window,
    absorbs,
    intersect,
    negligible,
    rounds_scores,
)
from fusepass.specification.functions import Function
from fusepass.specification.modifiers import Modifier, ScoreModifier, WeightModifier, kinds
from fusepass.specification.score_modifiers import (
    Absolute,
    Bias,
    Cast,
    Clamp,
    Finite,
    Floor,
    LeakyReLU,
    Mask,
    Scale,
    ScaleBy,
    SoftCap,
    finite,
    is_hiding,
)
from fusepass.specification.weight_modifiers import Dropout, Keep, KeyGate, Sink, WeightScale, ZeroEmptyRows

#: Larger scores are rare: a fill that absorbs scores of this size counts as absorbing all.
USUAL_SCORES = 31.0  # half precision's lowest number absorbs them


@dataclass(frozen=True)
class Attention:
    """One attention site.  Modifiers are in the order of computation."""

    batch: Size
    heads: Size
    kv_heads: Size
    queries: Size
    keys: Size
    head_dim: Size
    value_dim: Size
    dtype: torch.dtype
    scores: tuple[ScoreModifier, ...] = ()
    weights: tuple[WeightModifier, ...] = ()
    softmax_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    sink: Sink | None = None
    rows_seen: bool = True  # proved: every query sees at least one key, or a sink that is finite
    operands: int = 0
    keys_exist: bool = True  # proved: there is at least one key

    def __str__(self) -> str:
        sizes = (
            f"B={self.batch} H={self.heads} G={self.kv_heads} Q={self.queries} K={self.keys} "
            f"D={self.head_dim} Dv={self.value_dim}"
        )
        sink = () if self.sink is None else (self.sink,)
        mods = [str(m) for m in (*self.scores, *sink, *self.weights)]
        kind = str(self.dtype).removeprefix("torch.")
        soft = (
            ""
            if self.softmax_dtype is self.dtype
            else f"; softmax in {str(self.softmax_dtype).removeprefix('torch.')}"
        )
        return f"attention({sizes}; {kind}{soft}; {', '.join(mods) or 'plain'})"

    @property
    def modifiers(self) -> tuple[Modifier, ...]:
        """All modifiers."""
        return (*self.scores, *self.weights, *(() if self.sink is None else (self.sink,)))

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The score masks."""
        return tuple(m for m in self.scores if isinstance(m, Mask))

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms of the masks that hide; their conjunction is the visibility."""
        return tuple(a for m in self.masks if self.hides(m) for a in m.atoms)

    @property
    def added(self) -> tuple[Bias | Mask, ...]:
        """The modifiers that add to the scores or hide some of them."""
        return tuple(m for m in self.scores if isinstance(m, (Bias, Mask)))

    def hides(self, mask: Mask) -> bool:
        """Do the pairs outside a mask get no weight, whatever their scores?

        Only such a mask is a visibility.  Any other mask just writes a number: its fill is within reach of
        real scores, is NaN, is not low at all, or is undone by a later modifier.  Of several equal masks the
        last one decides: no later one undoes what it hides.
        """
        return self._stays_hidden(self.scores, max(n for n, mod in enumerate(self.scores) if mod == mask))

    @property
    def without_hiding_biases(self) -> Attention:
        """The same, without the biases that may hold fills: they may bring back what a mask hides."""
        return replace(self, scores=tuple(m for m in self.scores if not is_hiding(m)))

    def masks_hide(self) -> bool:
        """Do all masks hide for good?"""
        return all(map(self.hides, self.masks))

    @property
    def unseen_rows(self) -> bool:
        """May a query see no key?

        Only masks that hide on their own count.  A later mask that replaces scores is ignored: it may leave
        some pairs to the earlier mask, and it is not certain to show any.
        """
        return not self.rows_seen and bool(self.hiding_alone)

    @property
    def hiding_alone(self) -> tuple[Mask, ...]:
        """The masks that hide, each on its own.

        Later masks that replace scores and biases that may hide could bring back what such a mask fills: they
        are ignored.
        """
        return tuple(
            mod
            for at, mod in enumerate(self.scores)
            if isinstance(mod, Mask)
            and self._stays_hidden((mod, *filter(_brings_nothing_back, self.scores[at + 1 :])), 0)
        )

    @property
    def fills_are_infinite(self) -> bool:
        """Do all masks write minus infinity?"""
        return all(m.fill == -math.inf for m in self.masks)

    def biases_empty_rows(self, training: bool, added: bool = False) -> bool:
        """Must a kernel mend rows that a bias may hide whole?

        In inference it is enough to add such a bias as it is, in the order of computation, except in two
        cases: its fills may absorb scores only in sums of half precision, while kernels add in single
        precision; and a kernel may add fills that replace scores, and do not absorb them.  The backward
        of every kernel gets such rows wrong (``exp(s - logsumexp)`` loses the number of keys).

        Args:
            training: are gradients wanted?
            added: does the kernel add the fills of masks that replace scores?
        """
        hiding = [m for m in self.scores if is_hiding(m)]
        half = self.dtype is torch.float16 and any(not m.dtype for m in hiding)
        replacing = (m.fill for m in self.masks if not m.additive and math.isfinite(m.fill))
        absorbed = not added or all(absorbs(fill, torch.float32, USUAL_SCORES) for fill in replacing)
        return bool(hiding) and (training or half or not absorbed)

    @property
    def fills_stay_finite(self) -> bool:
        """Is nothing added but masks, and does even the sum of all their finite fills stay finite?

        It must be below half the largest number of the scores' dtype.
        """
        finite = [n for n, m in enumerate(self.scores) if isinstance(m, Mask) and m.fill != -math.inf]
        written = sum(abs(mod.fill) for mod in self.masks if mod.fill != -math.inf)
        return (
            all(isinstance(m, Mask) for m in self.added)
            and written < torch.finfo(self.score_dtype).max / 2
            and not any(level == -math.inf for at in finite for level in fill_levels(self.scores, at))
        )

    def _stays_hidden(self, scores: Sequence[ScoreModifier], at: int) -> bool:
        """Are the scores that the mask at a position fills too low to count, through all later modifiers?"""
        return all(n is not None and negligible(n, self.score_dtype) for n in fill_levels(scores, at))

    def is_causal(self, offset: object = 0) -> bool:
        """Is the whole visibility ``j <= i + offset``, with no other term added to the scores?"""
        band = (Band(None, offset),)  # type: ignore[arg-type]
        only = (isinstance(m, Mask) and m.atoms == band and self.hides(m) for m in self.added)
        return bool(self.added) and all(only)

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype whose lowest number is a fill."""
        return self.softmax_dtype if self.softmax_dtype.itemsize < 4 else self.dtype

    @property
    def dropout(self) -> float:
        """Dropout probability of the weights."""
        return next((w.p for w in self.weights if isinstance(w, Dropout)), 0.0)

    def kind(self) -> str:
        """A few words for tables."""
        words = [str(a) for a in dict.fromkeys(a for m in self.masks for a in m.atoms)]
        words += ["softcap" for m in self.scores if isinstance(m, SoftCap)][:1]
        words += [f"bias[{m.axes}]" for m in self.scores if isinstance(m, Bias)]
        words += [] if self.sink is None else ["sink"]
        words += ["dropout"] if self.dropout else []
        if self.heads != self.kv_heads:
            words.append(
                "single kv head" if self.kv_heads == 1 else f"grouped heads {self.heads}:{self.kv_heads}"
            )
        return ", ".join(words) or "full"


# ---------------------------------------------------------------------------------------- laws


def merge_scales(mods: Sequence[ScoreModifier]) -> tuple[ScoreModifier, ...]:
    """Move every constant scale as far inwards as possible, and merge those that meet.

    A scale passes the modifiers that allow it (:meth:`ScoreModifier.scaled`) and stops at all others.
    """
    before: tuple[ScoreModifier, ...] = ()
    now = tuple(mods)
    while now != before:
        before, now = now, _merged(now)
    return now


def _merged(mods: Sequence[ScoreModifier]) -> tuple[ScoreModifier, ...]:
    out: list[ScoreModifier] = []
    for mod in mods:
        if not isinstance(mod, Scale):
            out.append(mod)
            continue
        at = len(out)
        while at > 0 and not isinstance(out[at - 1], Scale):
            passed = out[at - 1].scaled(mod.factor)
            if passed is None:
                break
            at -= 1
            out[at] = passed
        if at > 0 and isinstance(before := out[at - 1], Scale):
            out[at - 1] = Scale(before.factor * mod.factor)
        else:
            out.insert(at, mod)
    return tuple(m for m in out if m != Scale(1.0))


def fills_after(scores: Sequence[ScoreModifier], at: int, fill: float) -> Iterator[float | None]:
    """The value of a score that modifier ``at`` sets to ``fill``, after each of the modifiers that follow.

    The sequence ends with None where the value is no longer known.
    """
    for mod in scores[at + 1 :]:
        after = mod.hidden(fill)
        yield after
        if after is None:
            return
        fill = after


def fill_levels(scores: Sequence[ScoreModifier], at: int) -> Iterator[float | None]:
    """The fill of the mask at a position, and its values after each of the modifiers that follow."""
    mask = scores[at]
    assert isinstance(mask, Mask)
    yield mask.fill
    yield from fills_after(scores, at, mask.fill)


def _brings_nothing_back(mod: ScoreModifier) -> bool:
    return mod.additive if isinstance(mod, Mask) else not is_hiding(mod)


def dtype_of_sum(mask: Mask, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype that an additive mask is added in: its own, or else the first of ``dtypes`` that holds its
    fill, or float64."""
    if mask.dtype:
        return DTYPES[mask.dtype]
    return next((d for d in dtypes if mask.fill >= torch.finfo(d).min), torch.float64)


def rounds_softmax(softmax_dtype: torch.dtype, operands: torch.dtype) -> bool:
    """Is a softmax computed in a narrower dtype than its operands have?"""
    return is_less_precise(softmax_dtype, operands)


def is_less_precise(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Is a dtype less precise than another one, or does it overflow earlier?"""
    mine, theirs = torch.finfo(dtype), torch.finfo(other)
    return mine.eps > theirs.eps or mine.max < theirs.max


def empty_rows(spec: Attention) -> str:
    """What a row that sees no key gives.

    Returns:
        ``"zero"``; ``"nan"``; ``"mean"``, the mean of the values of the keys with the highest fill, which are
        all keys where :func:`one_level` holds; or ``"unknown"``: it depends on scores, biases or a sink.
    """
    if spec.sink is not None or not spec.without_hiding_biases.masks_hide() or not _keeps_levels(spec):
        return "unknown"
    infinite = any(m.fill == -math.inf for m in spec.masks)
    for weight in spec.weights:
        if isinstance(weight, Keep) and weight.implied and not (weight.product and infinite):
            return "zero" if weight.covers else "unknown"
    if not infinite:
        return "mean"
    return "zero" if any(isinstance(w, ZeroEmptyRows) for w in spec.weights) else "nan"


def _keeps_levels(spec: Attention) -> bool:
    """Does a fill that is the same for all keys of a row stay so through all later modifiers?

    Other masks, and biases that may hide, may follow, because they have fills of their own, which count as
    well.  Biases may follow an additive mask, because it absorbs them as it absorbs scores of usual size.
    """
    dtype = min((spec.dtype, spec.softmax_dtype), key=lambda d: torch.finfo(d).eps)
    scale = 1.0
    for at, mask in enumerate(spec.scores):
        scale *= abs(mask.factor) if isinstance(mask, Scale) else 1.0
        if not isinstance(mask, Mask):
            continue
        level: float | None = mask.fill
        added_in = dtype_of_sum(mask, spec.dtype, dtype)
        if mask.additive and not absorbs(mask.fill, added_in, USUAL_SCORES * max(scale, 1.0)):
            return False
        for mod, after in zip(spec.scores[at + 1 :], fills_after(spec.scores, at, mask.fill), strict=False):
            own = isinstance(mod, Mask) or (isinstance(mod, Bias) and (mod.hides or mask.additive))
            if level is None or not (own or mod.keeps_level(level, dtype)):
                return False
            level = after
    return True


def one_level(spec: Attention) -> bool:
    """In a row that sees no key, do all keys have the same fill?"""
    if any(map(is_hiding, spec.scores)) and not spec.fills_are_infinite:
        return False
    same = len({m.fill for m in spec.masks}) <= 1
    one_way = spec.fills_are_infinite or not any(m.additive for m in spec.masks)
    return same and (len(spec.masks) <= 1 or one_way)


# ---------------------------------------------------------------------------------------- reference


def softmax(spec: Attention, s: Tensor, operands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights of scores ``s`` (``[B, H, Q, K]``), computed in ``dtype``."""
    if spec.sink is None:
        weights = torch.softmax(s, -1, dtype=dtype)
        if not any(isinstance(w, ZeroEmptyRows) and not w.every for w in spec.weights):
            return weights
        return weights.masked_fill((s == -math.inf).all(-1, keepdim=True), 0.0)
    wide = torch.promote_types(s.dtype, dtype)  # finfo.min of the one may be infinite in the other
    sink = operands[spec.sink.slot].to(wide).expand(*s.shape[:-1], 1)
    return torch.softmax(torch.cat([s.to(wide), sink], -1), -1, dtype=dtype)[..., :-1]


def reference(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What a specification computes, in plain mathematics: the oracle.

    Args:
        spec: what to compute.
        q: ``[B, H, Q, D]``; k: ``[B, G, K, D]``; v: ``[B, G, K, Dv]``.
        operands: the tensors of the modifiers, each broadcastable to ``[B, H, Q, K]``.
        dtype: the dtype to compute everything in (float64 for an oracle); with None, rounding happens where
            the original rounds.

    Returns:
        ``[B, H, Q, Dv]`` in ``dtype``, or in the original's result dtype.

    Source: Vaswani et al., "Attention is all you need" (arXiv 1706.03762), equation 1.
    """
    soft, out = dtype or spec.softmax_dtype, dtype or spec.out_dtype
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        operands = [t.to(dtype) if t.is_floating_point() else t for t in operands]
    group = q.shape[1] // max(k.shape[1], 1) or 1
    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    s = q @ k.transpose(-2, -1)
    for mod in spec.scores:
        s = mod.apply(s, operands)
    w = softmax(spec, s, operands, soft)
    for weight in spec.weights:
        w = weight.apply(w, operands)
    return (w.to(v.dtype) @ v).to(out)


__all__ = [
    "Absolute", "Atom", "Attention", "Band", "Bias", "Cast", "Chunk", "Clamp", "Dense", "Document", "Dropout",
    "Finite", "Floor", "Function", "Keep", "KeyGate", "KeyPadding", "LeakyReLU", "Mask", "Modifier", "Prefix",
    "Scale", "ScaleBy", "ScoreModifier", "Sink", "SoftCap", "WeightModifier", "WeightScale", "Window",
    "ZeroEmptyRows", "absorbs", "dtype_of_sum", "empty_rows", "fill_levels", "fills_after", "finite",
    "intersect", "is_hiding", "is_less_precise", "kinds", "merge_scales", "negligible", "one_level",
    "reference", "rounds_scores", "rounds_softmax", "softmax",
]  # fmt: skip
