"""A cost model of kernels, made from measurements, and the profiles that hold it.

The GPU's time grows in proportion to the number of queries.  How it grows with the number of keys that each
query sees depends on the kernel: tiles fill up, blocks are skipped.  So a curve gives the time per million
elements of queries and results for several numbers of visible keys, and is interpolated on logarithmic axes.
A measured size is thereby predicted exactly, and other batches in proportion.  A call takes at
least the time of its launch, minus two parts: the time to call any compiled function, and the time for which
the GPU is busy with the layer that the call is part of.  There is one curve for each kernel, kind of
attention, head size and pass that was measured; nothing is extrapolated to other kinds.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "profiles"
TRAINING, FORWARD = "training", "forward"
_MILLION = 1e6


@dataclass(frozen=True)
class Sample:
    """One measured call of a kernel.

    size: the number of elements in its queries and results.
    keys: how many keys a query sees, on average.
    milliseconds: the GPU's time.
    launch: milliseconds per call of calls back to back, which is at least the time of a launch.
    """

    kernel: str
    kind: str
    head_dim: int
    mode: str
    size: float
    keys: float
    milliseconds: float
    launch: float


@dataclass(frozen=True)
class Curve:
    """The costs of one kernel for one kind of attention.

    launch: the least milliseconds of a call, with all overhead (:meth:`milliseconds`).
    points: pairs of a number of visible keys, ascending, and the milliseconds per million elements.
    """

    kernel: str
    kind: str
    head_dim: int
    mode: str
    launch: float
    points: tuple[tuple[float, float], ...]

    def milliseconds(self, size: float, keys: float, overhead: float = 0.0) -> float:
        """The predicted time of a call.

        ``overhead`` is the part of its launch that is not the kernel's, or that runs while the GPU is busy
        (:meth:`Profile.overhead`, :meth:`Profile.layer`).
        """
        return max(self.launch - overhead, size / _MILLION * self.rate(keys))

    def rate(self, keys: float) -> float:
        """Milliseconds per million elements if a query sees this many keys.

        Above the largest number that was measured, the time is proportional to the keys; below the smallest,
        it is constant.
        """
        first, last = self.points[0], self.points[-1]
        if keys <= first[0]:
            return first[1]
        if keys >= last[0]:
            return last[1] * keys / last[0]
        (x, a), (y, b) = next(p for p in itertools.pairwise(self.points) if p[1][0] > keys)
        return math.exp(math.log(a) + math.log(b / a) * math.log(keys / x) / math.log(y / x))


@dataclass(frozen=True)
class Profile:
    """The curves of one kind of GPU.

    devices: names as ``torch.cuda.get_device_name`` gives them.
    machine: where the measurements were made.
    """

    devices: tuple[str, ...]
    machine: dict[str, str]
    curves: tuple[Curve, ...]

    def find(self, kernel: str, kind: str, head_dim: int, mode: str) -> Curve | None:
        """The curve for the nearest head size that was measured."""
        near = [c for c in self.curves if (c.kernel, c.kind, c.mode) == (kernel, kind, mode)]
        return min(near, key=lambda c: abs(math.log(c.head_dim / head_dim)), default=None)

    def measured(self, kernel: str) -> bool:
        """Is there a curve for a kernel?"""
        return any(c.kernel == kernel for c in self.curves)

    def overhead(self, mode: str) -> float:
        """The cost of calling any compiled function: the shortest launch in a pass.

        A model pays it once, not for each of its sites.
        """
        return min((c.launch for c in self.curves if c.mode == mode), default=0.0)

    def layer(self, tokens: float, width: float, mode: str) -> float:
        """Milliseconds that the GPU needs for the products of a transformer layer.

        While the GPU is busy with these products, the host launches what follows.  A layer has about
        ``12 width**2`` weights (Kaplan et al., arXiv 2001.08361, table 1), and its products are assumed to be
        as fast as those of the fastest attention that was measured.
        """
        rates = [2 * keys / spent for c in self.curves for keys, spent in c.points if c.mode == FORWARD]
        work = 24 * tokens * width * width * (3 if mode == TRAINING else 1)
        return work / _MILLION / max(rates) if rates else 0.0

    def save(self, place: Path) -> None:
        """Write the profile as JSON."""
        place.parent.mkdir(parents=True, exist_ok=True)
        table = asdict(self)
        curves = table.pop("curves")
        head = json.dumps(table, indent=1)[:-2]
        lines = ",\n".join(f"  {json.dumps(curve)}" for curve in curves)
        place.write_text(f'{head},\n "curves": [\n{lines}\n ]\n}}\n')


def load(place: Path) -> Profile:
    """Read what :meth:`Profile.save` wrote.

    Raises:
        ValueError: the file is not a profile.
    """
    try:
        table: dict[str, Any] = json.loads(place.read_text())
        curves = tuple(Curve(**c | {"points": tuple(map(tuple, c["points"]))}) for c in table["curves"])
        return Profile(tuple(table["devices"]), table["machine"], curves)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is not a fusepass profile ({error}); make one with `python -m fusepass bench --profile`"
        ) from error


def curves(samples: Iterable[Sample]) -> tuple[Curve, ...]:
    """A curve for every group of samples that share kernel, kind, head size and pass."""

    def group(s: Sample) -> tuple[str, str, int, str]:
        return s.kernel, s.kind, s.head_dim, s.mode

    ordered = sorted(samples, key=group)
    return tuple(_curve(key, list(measured)) for key, measured in itertools.groupby(ordered, group))


def _curve(key: tuple[str, str, int, str], samples: Sequence[Sample]) -> Curve:
    """Of samples with about the same number of keys the fastest counts: disturbances only add time."""
    at: dict[int, list[Sample]] = {}
    for s in samples:
        at.setdefault(round(16 * math.log2(s.keys)), []).append(s)
    points = tuple(
        (
            _rounded(fmean(s.keys for s in times)),
            _rounded(min(s.milliseconds / s.size * _MILLION for s in times)),
        )
        for _, times in sorted(at.items())
    )
    return Curve(*key, _rounded(min(s.launch for s in samples)), points)


def _rounded(number: float) -> float:
    return float(f"{number:.5g}")


# ---------------------------------------------------------------------------------------- which profile


_BANDS = ("full", "causal", "window")


def sees_all(kernel: str, kind: str) -> bool:
    """Does a kernel's time grow with all pairs of queries and keys, including hidden ones?"""
    return kernel == "unfused" or (kernel in ("sdpa", "cudnn") and kind not in _BANDS)


def cache_folder() -> Path:
    """The folder of the user's profiles: ``$FUSEPASS_CACHE``, or ``fusepass`` in the user's cache folder."""
    if place := os.environ.get("FUSEPASS_CACHE"):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusepass"


def place_of(device: str) -> Path:
    """The file of the user's profile for a GPU."""
    name = "".join(c if c.isalnum() else "-" for c in device.lower())
    return cache_folder() / f"profile-{name}.json"


def device_name() -> str | None:
    """The name of the current GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def profile(device: str | None) -> Profile | None:
    """The profile for a GPU: the user's own if there is one, else a shipped one, else None."""
    return None if device is None else _profile(device, str(cache_folder()))


@functools.cache
def _profile(device: str, cache: str) -> Profile | None:
    own = place_of(device)
    if own.is_file():
        return load(own)
    for place in sorted(SHIPPED.glob("*.json")):
        loaded = load(place)
        if device in loaded.devices:
            return loaded
    return None


__all__ = [
    "FORWARD", "TRAINING", "Curve", "Profile", "Sample", "cache_folder", "curves", "device_name", "load",
    "place_of", "profile", "sees_all",
]  # fmt: skip
