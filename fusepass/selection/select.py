"""The order in which kernels are tried for a site.

If a profile of the GPU exists (:mod:`.costs`), kernels are ranked by predicted time, and a site that is
predicted to be faster unfused stays.  Of kernels that are equally fast the first in the list
(:data:`fusepass.kernels.KERNELS`) is taken, because it depends on fewer compilers.  A kernel that was not
measured for a kind of attention comes after those that were.  Without a profile the order is that of the
list, with one exception: where there is a sink, or a dense mask would be large, a kernel that skips what is
hidden comes before one that needs such a mask.  On a CPU the order is that of the list, except for short
sequences (:func:`reference.beats_sdpa`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from fusepass.dialects.torch.nodes import operation
from fusepass.host.config import Options
from fusepass.kernels import FP8, KERNELS, Kernel, Target, flash, named, reference, sdpa, torch_flash
from fusepass.kernels.gates import runs_here
from fusepass.kernels.registry import registered
from fusepass.rules.site import Site
from fusepass.selection import costs
from fusepass.selection.work import FIXED, LEARNED, UNFUSED, Work, kind_of, sizes_of, work_of
from fusepass.specification.attention import Attention, Band, Bias, Document, Function, KeyPadding

#: Above this many query–key pairs a dense mask is the slower choice.
LARGE = 1024 * 1024
#: From this many elements in unfolded keys and values, FlexAttention over the original ones is faster.
COPIED = 1 << 25
#: A site stays unfused only if that is predicted to be faster by more than the model's error.
MARGIN = 1.1
#: Up to this many keys, times with a learned bias are not predicted from times with a fixed one.
#: FlexAttention sums the gradient of a learned bias with atomic operations, and SDPA chooses another kernel
#: for it: Swin's windows of 49 keys train faster with SDPA, and T5's 512 keys with FlexAttention
#: (docs/models-h100.md).
FEW_KEYS = 64
#: Predictions this close to the fastest count as equal: measurements vary as much.
EQUAL = 1.02
SDPA_CALL = "scaled_dot_product_attention"

Measure = Callable[[Sequence[Kernel]], str | None]
"""Finds the name of the fastest of some kernels, or ``UNFUSED``; None if nothing could be timed."""


@dataclass(frozen=True)
class Ranked:
    """A kernel, or None for leaving the site as it is, and the predicted milliseconds if they are known."""

    kernel: Kernel | None
    milliseconds: float | None = None


def candidates(
    node: fx.Node, site: Site, target: Target, options: Options, learned: frozenset[int], measure: Measure
) -> list[Kernel | None]:
    """The kernels that the options allow, in the order in which to try them; None: leave the site as it is.

    Args:
        node: the node that computes the site.
        learned: the slots of biases whose gradients are wanted.
        measure: finds the fastest kernel, for "autotune".
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
    here = [*others, *here]
    best = measure(here)
    if best == UNFUSED:
        return [*first, None]
    return [*first, *sorted(here, key=lambda k: k.name != best)]


def rank(
    site: Site, target: Target, kernels: Sequence[Kernel], profile: costs.Profile | None,
    learned: frozenset[int] = frozenset(),
) -> list[Ranked]:  # fmt: skip
    """Kernels in the order in which to try them; ``Ranked(None)`` means that the site is faster unfused."""
    if target.device != "cuda":
        return [Ranked(k) for k in kernels]
    if target.compiled and site.windowed is not None and site.spec.queries == 1:
        # Each query has its copy of keys; TorchInductor reads it as fast as kernels whose tiles have one row.
        return [Ranked(None), *map(Ranked, kernels)]
    if profile is None:
        return [Ranked(k) for k in by_rule(site.spec, sizes_of(site), kernels)]
    work = work_of(site, target.training, learned)
    ranked = [Ranked(k, predicted(profile, k.name, work)) for k in kernels]
    known = sorted((r for r in ranked if r.milliseconds is not None), key=lambda r: r.milliseconds or 0.0)
    near = [r for r in ranked if r.milliseconds is not None and r.milliseconds <= EQUAL * _first(known)]
    known = [*near, *(r for r in known if r not in near)]
    rest = {r.kernel.name for r in ranked if r.milliseconds is None and r.kernel is not None}
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
    """The predicted milliseconds of a kernel; None if it was not measured for this kind of attention."""
    curve = profile.find(kernel, work.kind, work.head_dim, work.mode)
    if curve is None and work.all_keys > FEW_KEYS:
        curve = profile.find(kernel, work.kind.replace(LEARNED, FIXED), work.head_dim, work.mode)
    if curve is None:
        return None
    keys = work.all_keys if costs.sees_all(kernel, work.kind) else work.keys
    hidden = profile.overhead(work.mode) + profile.layer(work.tokens, work.width, work.mode)
    return curve.milliseconds(work.size, keys, hidden)


def skips_copies(kernel: Kernel, site: Site, target: Target) -> bool:
    """Is a kernel faster over the original keys of a window than any kernel over the copies?

    It has to skip hidden keys without a tensor over queries and keys; on a CPU no kernel does.  On an H100, a
    kernel that takes the window's bounds was always faster.  FlexAttention, which needs block tables, was
    faster from about ``COPIED`` copied elements: for neighbourhoods of 7 by 7, from a grid of 16 by 16; for
    blocks of 128 that look one block back, from a length of 8192.  It was slower in training where a tensor
    is read at distances, because it sums the gradient of such a tensor with atomic operations.
    """
    if site.original is None or target.device != "cuda" or kernel is reference.REFERENCE:
        return False
    spec = site.original.spec
    read = {
        site.original.operands[slot] for mod in spec.scores for slot in mod.slots() if isinstance(mod, Bias)
    }
    if target.training and not read <= set(site.operands):
        return False
    if kernel is sdpa.SDPA:
        return torch_flash.window(spec, target, spec.dtype) is not None
    if costs.sees_all(kernel.name, kind_of(spec)):
        return False
    sizes = sizes_of(site)
    copied = sizes["b"] * sizes["g"] * sizes["j"] * (sizes["d"] + sizes["e"])
    return not kernel.name.startswith("flex") or copied >= COPIED


def by_rule(spec: Attention, sizes: dict[str, float], kernels: Sequence[Kernel]) -> list[Kernel]:
    """The order without measurements.

    For SDPA a sink means a dense mask with one more column, and copies of keys and values with one more row.
    FlexAttention computes functions of scores faster than flash-attn 4's formulas do.
    """
    if any(isinstance(m, Function) for m in spec.scores):
        return sorted(kernels, key=lambda kernel: kernel.name != "flex")
    dense = bool(spec.added) and not spec.is_causal() and sizes["i"] * sizes["j"] >= LARGE
    if not dense and spec.sink is None:
        return list(kernels)
    native = not isinstance(flash.describe(spec, "flash4"), str)
    hidden = all(map(spec.hides, spec.masks))
    hidden = hidden and all(isinstance(a, (Band, KeyPadding, Document)) for a in spec.atoms)
    windows = native and spec.sink is None  # with a sink, SDPA's own kernels need a dense mask

    def place(kernel: Kernel) -> int:
        if native and kernel.name.startswith("flash"):
            return 0
        if windows:
            return 1 if kernel is sdpa.SDPA else 2
        return 1 if kernel.name == "flex" and hidden and bool(spec.masks) else 2

    return sorted(kernels, key=place)


__all__ = [
    "LARGE",
    "MARGIN",
    "Measure",
    "Ranked",
    "by_rule",
    "candidates",
    "rank",
    "predicted",
    "skips_copies",
]
