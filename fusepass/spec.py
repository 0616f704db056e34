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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusepass.index import Facts, Size

# ---------------------------------------------------------------------------------------- mask atoms


@dataclass(frozen=True)
class Band:
    """``i - left <= j <= i + right``; None is unbounded.  ``Band(None, 0)`` is causal, aligned top-left."""

    left: Size | None
    right: Size | None

    def __str__(self) -> str:
        if self.left is None and self.right == 0:
            return "causal"
        if self.left is None:
            return f"causal+{self.right}"
        if self.right == 0 and self.left != 0:
            return f"window({self.left})"
        return f"band({self.left}, {'' if self.right is None else self.right})"


@dataclass(frozen=True)
class KeyPadding:
    """Keys are hidden by a tensor that varies over ``b`` and ``j`` alone (or ``j`` alone)."""

    def __str__(self) -> str:
        return "key padding"


@dataclass(frozen=True)
class Prefix:
    """Causal, except that every query sees the keys below a bound."""

    def __str__(self) -> str:
        return "prefix"


@dataclass(frozen=True)
class Chunk:
    """Queries see the keys of their own block of ``size`` positions."""

    size: int

    def __str__(self) -> str:
        return f"chunk({self.size})"


@dataclass(frozen=True)
class Document:
    """Queries see the keys that carry the same label."""

    def __str__(self) -> str:
        return "document"


@dataclass(frozen=True)
class Dense:
    """Any other visibility, given as a tensor over the letters in ``axes``."""

    axes: str

    def __str__(self) -> str:
        return f"mask[{self.axes}]"


Atom = Band | KeyPadding | Prefix | Chunk | Document | Dense

# ---------------------------------------------------------------------------------------- modifiers


@dataclass(frozen=True)
class Scale:
    """``s * factor``."""

    factor: float

    def __str__(self) -> str:
        return f"scale {self.factor:.6g}"


@dataclass(frozen=True)
class ScaleBy:
    """``s * tensor``; ``axes`` are the letters the tensor varies over."""

    slot: int
    axes: str = ""

    def __str__(self) -> str:
        return f"scale by [{self.axes}]"


@dataclass(frozen=True)
class SoftCap:
    """``cap * tanh(s / cap)``  (Gemma 2, arXiv 2408.00118)."""

    cap: float

    def __str__(self) -> str:
        return f"softcap {self.cap:.6g}"


@dataclass(frozen=True)
class Bias:
    """``s + factor * tensor``.  ``hides``: the tensor may hold fills, and hide all keys of a row."""

    slot: int
    axes: str = ""
    factor: float = 1.0
    hides: bool = False

    def __str__(self) -> str:
        return f"bias[{self.axes}]" + ("" if self.factor == 1 else f" * {self.factor:.6g}")


@dataclass(frozen=True)
class Mask:
    """Hide the pairs outside the conjunction of ``atoms``.

    ``additive``: the operand in ``slot`` is a floating tensor of zeros and ``fill`` that is *added*;
    otherwise it is boolean, True where ``attends``, and hidden scores are *replaced* by ``fill``.
    """

    slot: int
    fill: float
    additive: bool = False
    attends: bool = True
    atoms: tuple[Atom, ...] = ()

    def __str__(self) -> str:
        return " & ".join(map(str, self.atoms)) or "mask"


@dataclass(frozen=True)
class Floor:
    """``max(s, bound)`` with a negligible bound: what was hidden by ``-inf`` is hidden by ``bound``."""

    bound: float

    def __str__(self) -> str:
        return f"floor {self.bound:.4g}"


@dataclass(frozen=True)
class Finite:
    """``nan_to_num(s)``: NaN becomes ``nan``, minus infinity ``low`` and infinity ``high``."""

    nan: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"nan to {self.nan:.6g}"


@dataclass(frozen=True)
class Dropout:
    """Weights dropped with probability ``p`` and the rest scaled by ``1 / (1 - p)``."""

    p: float

    def __str__(self) -> str:
        return f"dropout {self.p:.6g}"


@dataclass(frozen=True)
class Keep:
    """Weights set to zero where the boolean operand hides, *after* the softmax, without renormalising."""

    slot: int
    attends: bool = True
    axes: str = ""
    implied: bool = False  # the score masks hide at least these pairs
    product: bool = False  # written as a multiplication by zero, which keeps NaN

    def __str__(self) -> str:
        return f"kept where [{self.axes}]"


@dataclass(frozen=True)
class WeightScale:
    """Weights times a number or a tensor that does not vary over the keys."""

    factor: float = 1.0
    slot: int | None = None
    axes: str = ""

    def __str__(self) -> str:
        return f"weights * {self.factor:.6g}" if self.slot is None else f"weights * [{self.axes}]"


@dataclass(frozen=True)
class KeyGate:
    """Weights times a tensor of the keys, not of the queries: ``(w * t) . v = w . (t * v)``."""

    slot: int
    axes: str = ""

    def __str__(self) -> str:
        return f"weights * [{self.axes}]"


@dataclass(frozen=True)
class ZeroEmptyRows:
    """NaN weights (rows that see no key) become zero."""

    def __str__(self) -> str:
        return "empty rows zero"


@dataclass(frozen=True)
class Sink:
    """One more logit in every row's softmax, of no key: ``exp(s) / (sum(exp(s)) + exp(sink))``.

    The operand is a tensor ``[B | 1, H | 1, Q | 1, 1]``.  Source: Xiao et al. (arXiv 2309.17453); gpt-oss.
    """

    slot: int
    axes: str = ""

    def __str__(self) -> str:
        return f"sink[{self.axes}]"


ScoreModifier = Scale | ScaleBy | SoftCap | Bias | Mask | Floor | Finite
WeightModifier = Dropout | Keep | WeightScale | KeyGate | ZeroEmptyRows


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
    rows_seen: bool = True  # proved: every query sees at least one key
    operands: int = 0

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
    def masks(self) -> tuple[Mask, ...]:
        """The score masks."""
        return tuple(m for m in self.scores if isinstance(m, Mask))

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms of all masks; their conjunction is the visibility."""
        return tuple(a for m in self.masks for a in m.atoms)

    @property
    def added(self) -> tuple[Bias | Mask, ...]:
        """What is added to the scores or hides some."""
        return tuple(m for m in self.scores if isinstance(m, (Bias, Mask)))

    def is_causal(self, offset: object = 0) -> bool:
        """Is the whole visibility ``j <= i + offset``, with no other term added to the scores?"""
        only = (isinstance(m, Mask) and m.atoms == (Band(None, offset),) for m in self.added)  # type: ignore[arg-type]
        return bool(self.added) and all(only)

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype whose lowest number is a fill."""
        return self.softmax_dtype if self.softmax_dtype.itemsize < 4 else self.dtype

    def refuse_weights(self, *taken: type) -> str | None:
        """Why the weights are not those of a softmax, but for what can be done before or after the products.

        Args:
            taken: the kinds of weight modifiers that the caller does.
        """
        for weight in self.weights:
            if not isinstance(weight, taken):
                return f"it has no '{weight}'"
            if isinstance(weight, Keep) and not weight.implied and "j" in weight.axes:
                return "weights are hidden after the softmax without renormalising"
        return None

    @property
    def dropout(self) -> float:
        """Dropout probability of the weights."""
        return next((w.p for w in self.weights if isinstance(w, Dropout)), 0.0)

    def kind(self) -> str:
        """A few words for tables."""
        words = [str(a) for a in dict.fromkeys(self.atoms)]
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
    """Move every constant scale as far in as it goes, and merge those that meet.

    ``(s + f*t) * c = s*c + (f*c)*t``; ``where(m, s, fill) * c = where(m, s*c, fill*c)``;
    ``(s * t) * c = (s * c) * t``; a softcap stops it.
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
        while at > 0 and not isinstance(out[at - 1], (SoftCap, Scale, Floor, Finite)):
            if isinstance(out[at - 1], Mask) and mod.factor <= 0:
                break  # a hidden score would change sides
            at -= 1
        out[at:] = [_scaled(m, mod.factor) for m in out[at:]]
        if at > 0 and isinstance(before := out[at - 1], Scale):
            out[at - 1] = Scale(before.factor * mod.factor)
        else:
            out.insert(at, mod)
    return tuple(m for m in out if m != Scale(1.0))


def _scaled(mod: ScoreModifier, factor: float) -> ScoreModifier:
    if isinstance(mod, Bias):
        return replace(mod, factor=mod.factor * factor)
    if isinstance(mod, Mask):
        if mod.additive and factor != 1:
            return Bias(mod.slot, "bhij", factor)
        return replace(mod, fill=mod.fill * factor)
    return mod


def intersect(bands: Sequence[Band], facts: Facts) -> Band | None:
    """The band that is the conjunction of several; None where two bounds cannot be ordered."""
    left: Size | None = None
    right: Size | None = None
    for band in bands:
        for mine, theirs in ((left, band.left), (right, band.right)):
            if (
                mine is not None
                and theirs is not None
                and not (facts.at_most(mine, theirs) or facts.at_most(theirs, mine))
            ):
                return None
        if band.left is not None and (left is None or facts.at_most(band.left, left)):
            left = band.left
        if band.right is not None and (right is None or facts.at_most(band.right, right)):
            right = band.right
    return Band(left, right)


def negligible(fill: float, dtype: torch.dtype) -> bool:
    """Does ``exp`` of a score replaced by ``fill`` vanish beside any score of ordinary size?

    True for ``-inf``, for the most negative number of the dtype, and below ``-1e8``.  Fills such as
    ``-1e4`` are within reach of real scores and are kept as they are.
    """
    lowest = torch.finfo(dtype).min if dtype.is_floating_point else -1e8
    return fill == -math.inf or fill <= max(-1e8, lowest * 0.99)


def empty_rows(spec: Attention) -> str:
    """What a row that sees no key gives: ``"zero"``, ``"nan"`` or ``"mean"`` (of the values)."""
    infinite = any(m.fill == -math.inf for m in spec.masks)
    if any(isinstance(w, Keep) and w.implied and not (w.product and infinite) for w in spec.weights):
        return "zero"
    if not infinite:
        return "mean"
    return "zero" if any(isinstance(w, ZeroEmptyRows) for w in spec.weights) else "nan"


# ---------------------------------------------------------------------------------------- reference


def finite(s: Tensor, nan: float, low: float, high: float) -> Tensor:
    """``nan_to_num(s, nan, high, low)``, its numbers within the range of the dtype of ``s``."""
    most = torch.finfo(s.dtype).max
    s = torch.where(s == math.inf, min(high, most) if high < math.inf else high, s)
    s = torch.where(s == -math.inf, max(low, -most) if low > -math.inf else low, s)
    return torch.where(s != s, nan, s)


def apply_score(mod: ScoreModifier, s: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """``s`` (``[B, H, Q, K]``) after one score modifier."""
    match mod:
        case Scale(factor):
            return s * factor
        case ScaleBy(slot):
            return s * operands[slot]
        case SoftCap(cap):
            return cap * torch.tanh(s / cap)
        case Bias(slot, _, factor):
            bias = operands[slot]
            return s + (bias if factor == 1 else bias * factor)
        case Floor(bound):
            return s.clamp(min=max(bound, torch.finfo(s.dtype).min))
        case Finite(nan, low, high):
            return finite(s, nan, low, high)
        case Mask(slot, fill, additive, attends):
            if additive:
                return s + operands[slot]
            hidden = ~operands[slot] if attends else operands[slot]
            return s.masked_fill(hidden, max(fill, torch.finfo(s.dtype).min) if fill != -math.inf else fill)


def apply_weight(mod: WeightModifier, w: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """``w`` (``[B, H, Q, K]``) after one weight modifier; dropout must have been made an operand."""
    match mod:
        case Keep(slot, attends, product=True):
            return w * (operands[slot] if attends else ~operands[slot])
        case Keep(slot, attends):
            return w.masked_fill(~operands[slot] if attends else operands[slot], 0.0)
        case WeightScale(factor, slot):
            return w * (factor if slot is None else operands[slot])
        case KeyGate(slot):
            return w * operands[slot]
        case ZeroEmptyRows():
            return torch.nan_to_num(w, nan=0.0)
        case Dropout():
            raise ValueError(
                "dropout in a reference computation: expected its drawn mask as a WeightScale operand"
            )


def softmax(spec: Attention, s: Tensor, operands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights of scores ``s`` (``[B, H, Q, K]``), computed in ``dtype``."""
    if spec.sink is None:
        return torch.softmax(s, -1, dtype=dtype)
    sink = operands[spec.sink.slot].to(s.dtype).expand(*s.shape[:-1], 1)
    return torch.softmax(torch.cat([s, sink], -1), -1, dtype=dtype)[..., :-1]


def reference(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain mathematics of a specification: the oracle.

    Args:
        spec: what to compute.
        q: ``[B, H, Q, D]``; k: ``[B, G, K, D]``; v: ``[B, G, K, Dv]``.
        operands: the tensors of the modifiers, each broadcastable to ``[B, H, Q, K]``.
        dtype: compute everything in it (float64 for an oracle); None rounds where the original does.

    Returns:
        ``[B, H, Q, Dv]`` in ``dtype``, or in the original's result dtype.

    Source: Vaswani et al., "Attention is all you need" (arXiv 1706.03762), equation 1.
    """
    soft, out = dtype or spec.softmax_dtype, dtype or spec.out_dtype
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        operands = [t.to(dtype) if t.is_floating_point() else t for t in operands]
    group = q.shape[1] // k.shape[1]
    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    s = q @ k.transpose(-2, -1)
    for mod in spec.scores:
        s = apply_score(mod, s, operands)
    w = softmax(spec, s, operands, soft)
    for weight in spec.weights:
        w = apply_weight(weight, w, operands)
    return (w.to(v.dtype) @ v).to(out)
