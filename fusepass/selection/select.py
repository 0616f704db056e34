"""The order in which kernels are tried for a site.

Where a profile of the GPU exists (:mod:`.costs`), kernels are ranked by predicted time, and a site
that is measured faster as it is stays.  Of kernels that are equally fast the first of the list is taken,
which stands behind fewer compilers.  A kernel that was not measured for a kind of attention follows those
that were.  Without a profile the order is that of the list, except that a kernel that knows what is hidden
goes before one that is given a dense mask, for sequences where that mask is large.  On a CPU the order is
that of the list, but for short sequences (:func:`reference.beats_sdpa`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from fusepass.dialects.torch.nodes import operation
from fusepass.expressions.index import Size
from fusepass.host.config import Options
from fusepass.kernels import FP8, KERNELS, Kernel, Target, flash, flex_blocks, named, reference, sdpa
from fusepass.kernels.gates import runs_here
from fusepass.kernels.registry import registered
from fusepass.recognition.recognize import Site
from fusepass.selection import costs
from fusepass.specification.attention import Attention, Band, Bias, Document, Keep, KeyPadding, SoftCap

#: Queries times keys from which a dense mask costs more than the kernel that takes none.
LARGE = 1024 * 1024
#: A site stays unfused only where that is predicted faster by more than the model's error.
MARGIN = 1.1
#: Keys up to which a bias that learns is not taken for one that does not.  FlexAttention adds its gradient up
#: by atomic operations, and SDPA chooses another kernel for it: the windows of Swin, 49 keys, train faster by
#: SDPA, and the 512 keys of T5 by FlexAttention (docs/models-h100.md).
FEW_KEYS = 64
LEARNED, FIXED = "learned bias", "bias"
#: Predictions that are this close to the fastest are equal: measurements differ by as much.
EQUAL = 1.02
UNFUSED = "unfused"
SDPA_CALL = "scaled_dot_product_attention"

Write = Callable[[Kernel], tuple[fx.Node, Callable[[], None]] | None]


@dataclass(frozen=True)
class Work:
    """A site in the terms of the cost model."""

    kind: str
    head_dim: int
    mode: str
    size: float
    """Elements of queries and results."""
    keys: float
    """How many keys a query sees, on average."""
    all_keys: float
    tokens: float
    """How many queries there are of each head."""
    width: float
    """Elements of a query of all heads."""


@dataclass(frozen=True)
class Ranked:
    """A kernel, and its predicted milliseconds where there is a prediction; no kernel: leave the site."""

    kernel: Kernel | None
    milliseconds: float | None = None


def candidates(
    node: fx.Node, site: Site, target: Target, options: Options, write: Write, learned: frozenset[int]
) -> list[Kernel | None]:
    """The kernels that the options allow, in the order to be tried; None: leave the site as it is.

    Args:
        node: the node that computes the site.
        write: writes a kernel's nodes and returns the last one and what takes them back, or None.
        learned: the slots of biases whose gradients are wanted.
    """
    first: list[Kernel | None] = [FP8] if options.precision != "native" else []
    if options.kernel not in ("auto", "autotune"):
        return [*first, named(options.kernel)]
    others = [
        r.kernel for r in registered().values() if r.by_auto and runs_here(r.kernel.name, target.device)
    ]
    here = [k for k in KERNELS if runs_here(k.name, target.device)]
    if options.kernel == "auto":
        if operation(node)[0] != SDPA_CALL and reference.beats_sdpa(site.spec, target):
            here.sort(key=lambda k: k is not reference.REFERENCE)
        profile = costs.profile(costs.device_name()) if target.device == "cuda" else None
        first += [k for k in others if profile is None or not profile.measured(k.name)]
        here += [k for k in others if k not in first]
        return [*first, *(r.kernel for r in rank(site, target, here, profile, learned))]
    from fusepass.selection import autotune

    here = [*others, *here]
    best = autotune.fastest(node, site.spec, here, write, options, target.training)
    if best == UNFUSED:
        return [*first, None]
    return [*first, *sorted(here, key=lambda k: k.name != best)]


def rank(
    site: Site, target: Target, kernels: Sequence[Kernel], profile: costs.Profile | None,
    learned: frozenset[int] = frozenset(),
) -> list[Ranked]:  # fmt: skip
    """Kernels in the order to be tried; at ``Ranked(None)`` the site is faster as it is."""
    if target.device != "cuda":
        return [Ranked(k) for k in kernels]
    if profile is None:
        return [Ranked(k) for k in by_rule(site.spec, sizes_of(site), kernels)]
    work = work_of(site, target.training, learned)
    found = [Ranked(k, predicted(profile, k.name, work)) for k in kernels]
    known = sorted((r for r in found if r.milliseconds is not None), key=lambda r: r.milliseconds or 0.0)
    near = [r for r in found if r.milliseconds is not None and r.milliseconds <= EQUAL * _first(known)]
    known = [*near, *(r for r in known if r not in near)]
    rest = {r.kernel.name for r in found if r.milliseconds is None and r.kernel is not None}
    unknown = [Ranked(k) for k in by_rule(site.spec, sizes_of(site), kernels) if k.name in rest]
    if not known:
        return unknown
    plain = predicted(profile, UNFUSED, work)
    ordered = [*known, *unknown]
    if plain is None:
        return ordered
    at = next(
        (n for n, r in enumerate(ordered) if r.milliseconds is None or r.milliseconds > plain * MARGIN),
        len(ordered),
    )
    return [*ordered[:at], Ranked(None, plain), *ordered[at:]]


def _first(ranked: Sequence[Ranked]) -> float:
    return (ranked[0].milliseconds or 0.0) if ranked else 0.0


def predicted(profile: costs.Profile, kernel: str, work: Work) -> float | None:
    """The predicted milliseconds of a kernel, or None where its kind was not measured."""
    curve = profile.find(kernel, work.kind, work.head_dim, work.mode)
    if curve is None and work.all_keys > FEW_KEYS:
        curve = profile.find(kernel, work.kind.replace(LEARNED, FIXED), work.head_dim, work.mode)
    if curve is None:
        return None
    keys = work.all_keys if costs.sees_all(kernel, work.kind) else work.keys
    hidden = profile.overhead(work.mode) + profile.layer(work.tokens, work.width, work.mode)
    return curve.milliseconds(work.size, keys, hidden)


def by_rule(spec: Attention, sizes: dict[str, float], kernels: Sequence[Kernel]) -> list[Kernel]:
    """The order without measurements.

    A sink is one more column of a dense mask to SDPA, and of copies of the keys and values.
    """
    dense = bool(spec.added) and not spec.is_causal() and sizes["i"] * sizes["j"] >= LARGE
    if not dense and spec.sink is None:
        return list(kernels)
    native = not isinstance(flash.describe(spec, "flash4"), str)
    hidden = all(map(spec.hides, spec.masks))
    hidden = hidden and all(isinstance(a, (Band, KeyPadding, Document)) for a in spec.atoms)
    windows = native and spec.sink is None  # with a sink, SDPA's own are a dense mask

    def place(kernel: Kernel) -> int:
        if native and kernel.name.startswith("flash"):
            return 0
        if windows:
            return 1 if kernel is sdpa.SDPA else 2
        return 1 if kernel.name == "flex" and hidden and bool(spec.masks) else 2

    return sorted(kernels, key=place)


# ---------------------------------------------------------------------------------------- a site as work


def kind_of(
    spec: Attention, thin: frozenset[int] = frozenset(), learned: frozenset[int] = frozenset()
) -> str:
    """The kind of attention, as profiles name it: what changes a kernel's speed.

    Args:
        thin: the slots of biases that have a formula (:func:`flex_blocks.thin_biases`).
        learned: the slots of biases whose gradients are wanted.
    """
    words = [_visibility(spec)]
    if any(isinstance(m, SoftCap) for m in spec.scores):
        words.append("softcap")
    for mod in spec.scores:
        if isinstance(mod, Bias):
            dense = {"i", "j"} <= set(mod.axes) and mod.slot not in thin
            whole = LEARNED if mod.slot in learned else FIXED
            words.append(whole if dense else "thin bias")
    if spec.sink is not None:
        words.append("sink")
    if spec.dropout:
        words.append("dropout")
    if any(isinstance(w, Keep) and not w.implied for w in spec.weights):
        words.append("kept")
    return "+".join(dict.fromkeys(words))


def _visibility(spec: Attention) -> str:
    """The kind of what is visible."""
    if not spec.masks:
        return "one query" if spec.queries == 1 else "full"
    if not all(map(spec.hides, spec.masks)):
        return "mask"
    atoms = spec.atoms
    bands = [a for a in atoms if isinstance(a, Band)]
    if len(bands) < len(atoms):
        return "padding" if all(isinstance(a, (Band, KeyPadding)) for a in atoms) else "mask"
    return "window" if any(b.left is not None for b in bands) else "causal"


def sizes_of(site: Site) -> dict[str, float]:
    """The sizes of a site; symbolic ones as the example has them, which proves nothing and picks a kernel."""
    spec = site.spec
    named = {
        "b": spec.batch, "h": spec.heads, "g": spec.kv_heads, "i": spec.queries, "j": spec.keys,
        "d": spec.head_dim, "e": spec.value_dim,
    }  # fmt: skip
    return {name: float(hint(size, site)) for name, size in named.items()}


def hint(size: Size, site: Site) -> int:
    """A size's value in the example that was traced."""
    if isinstance(size, int):
        return size
    env: Any = site.space.facts._env
    values = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
    found = sympy.sympify(size).xreplace(dict(values))
    return int(found) if found.is_number else 1024


def work_of(site: Site, training: bool, learned: frozenset[int] = frozenset()) -> Work:
    """A site as the cost model sees it."""
    spec, sizes = site.spec, sizes_of(site)
    mode = costs.TRAINING if training else costs.FORWARD
    size = sizes["b"] * sizes["h"] * sizes["i"] * (sizes["d"] + sizes["e"])
    keys = pairs_of(spec, sizes["i"], sizes["j"]) / max(sizes["i"], 1.0)
    kind = kind_of(spec, flex_blocks.thin_biases(site), learned)
    tokens, width = sizes["b"] * sizes["i"], sizes["h"] * sizes["d"]
    return Work(kind, int(sizes["d"]), mode, size, keys, sizes["j"], tokens, width)


def pairs_of(spec: Attention, queries: float, keys: float) -> float:
    """How many queries and keys the bands of a site let meet; other masks count as open."""
    left: float | None = None
    right: float | None = None
    for atom in spec.atoms:
        if isinstance(atom, Band):
            if isinstance(atom.left, int):
                left = atom.left if left is None else min(left, atom.left)
            if isinstance(atom.right, int):
                right = atom.right if right is None else min(right, atom.right)
    total = queries * keys
    if right is not None:
        total -= _beyond(queries, keys, right)
    if left is not None:
        total -= _beyond(keys, queries, left)
    return max(total, 1.0)


def _beyond(rows: float, columns: float, bound: float) -> float:
    """Pairs with ``column - row > bound``."""
    first = max(0.0, columns - 1 - bound)  # in row 0; one less in each row after it
    last = max(0.0, first - rows)
    return (first * (first + 1) - last * (last + 1)) / 2


__all__ = [
    "LARGE",
    "MARGIN",
    "UNFUSED",
    "Ranked",
    "Work",
    "by_rule",
    "candidates",
    "kind_of",
    "pairs_of",
    "rank",
    "work_of",
]
