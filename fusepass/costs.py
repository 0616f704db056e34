"""A cost model of kernels, fitted to measurements, and the profiles that hold it.

A call costs ``fixed + traffic * a + work * b`` milliseconds: ``traffic`` is the elements of queries, keys,
values and results, ``work`` the multiplications over visible pairs.  The three numbers are fitted, by least
squares on relative errors and never negative, for each kernel, kind of attention, head size and pass that
was measured; nothing is extrapolated to kinds that were not.
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
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "profiles"
TRAINING, FORWARD = "training", "forward"


@dataclass(frozen=True)
class Sample:
    """One measured call of a kernel."""

    kernel: str
    kind: str
    head_dim: int
    mode: str
    traffic: float
    work: float
    milliseconds: float


@dataclass(frozen=True)
class Fit:
    """The fitted costs of one kernel for one kind of attention; ``error`` is the largest relative one."""

    kernel: str
    kind: str
    head_dim: int
    mode: str
    fixed: float
    traffic: float
    work: float
    samples: int
    error: float

    def milliseconds(self, traffic: float, work: float) -> float:
        """The predicted time of a call."""
        return self.fixed + self.traffic * traffic + self.work * work


@dataclass(frozen=True)
class Profile:
    """The fits of one kind of GPU.

    devices: names as ``torch.cuda.get_device_name`` gives them.
    machine: where the measurements were made.
    """

    devices: tuple[str, ...]
    machine: dict[str, str]
    fits: tuple[Fit, ...]

    def find(self, kernel: str, kind: str, head_dim: int, mode: str) -> Fit | None:
        """The fit of the nearest head size that was measured."""
        near = [f for f in self.fits if (f.kernel, f.kind, f.mode) == (kernel, kind, mode)]
        return min(near, key=lambda f: abs(math.log(f.head_dim / head_dim)), default=None)

    def save(self, place: Path) -> None:
        """Write the profile as JSON."""
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load(place: Path) -> Profile:
    """Read what :meth:`Profile.save` wrote.

    Raises:
        ValueError: the file is no profile.
    """
    try:
        table: dict[str, Any] = json.loads(place.read_text())
        return Profile(tuple(table["devices"]), table["machine"], tuple(Fit(**f) for f in table["fits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is no profile of fusepass ({error}); make one with `python -m fusepass bench --profile`"
        ) from error


def fit(samples: Iterable[Sample]) -> tuple[Fit, ...]:
    """Fit every group of samples that share kernel, kind, head size and pass."""

    def group(s: Sample) -> tuple[str, str, int, str]:
        return s.kernel, s.kind, s.head_dim, s.mode

    ordered = sorted(samples, key=group)
    return tuple(_fit(key, list(found)) for key, found in itertools.groupby(ordered, group))


def _fit(key: tuple[str, str, int, str], samples: Sequence[Sample]) -> Fit:
    """Least squares of ``predicted / measured - 1`` with coefficients that are not negative.

    There are three of them, so every subset is tried, and the best admissible one taken.
    """
    terms = torch.tensor([[1.0, s.traffic, s.work] for s in samples], dtype=torch.float64)
    times = torch.tensor([s.milliseconds for s in samples], dtype=torch.float64)
    size = terms.amax(0).clamp(min=1e-30)
    scaled = terms / size / times[:, None]
    best: tuple[float, torch.Tensor] | None = None
    for count in range(1, min(3, len(samples)) + 1):
        for chosen in itertools.combinations(range(3), count):
            part = scaled[:, chosen]
            solved = torch.linalg.lstsq(part, torch.ones(len(samples), 1, dtype=torch.float64)).solution[:, 0]
            loss = float((part @ solved - 1).square().sum())
            if bool((solved >= 0).all()) and (best is None or loss < best[0] * 0.999):
                values = torch.zeros(3, dtype=torch.float64)
                values[list(chosen)] = solved
                best = (loss, values)
    assert best is not None, "a single positive term always fits"
    values = best[1]
    error = float((scaled @ values - 1).abs().max())
    fixed, traffic, work = (values / size).tolist()
    return Fit(*key, fixed, traffic, work, len(samples), round(error, 4))


# ---------------------------------------------------------------------------------------- which profile


_BANDS = ("full", "causal", "window")


def sees_all(kernel: str, kind: str) -> bool:
    """Does a kernel's time grow with all pairs of queries and keys, hidden or not?"""
    return kernel == "unfused" or (kernel in ("sdpa", "cudnn") and kind not in _BANDS)


def cache_folder() -> Path:
    """Where the user's profiles are: ``$FUSEPASS_CACHE``, or ``fusepass`` in the user's cache folder."""
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
    """The profile for a GPU: the user's own before a shipped one; None where nobody has measured."""
    return None if device is None else _profile(device, str(cache_folder()))


@functools.cache
def _profile(device: str, cache: str) -> Profile | None:
    own = place_of(device)
    if own.is_file():
        return load(own)
    for place in sorted(SHIPPED.glob("*.json")):
        found = load(place)
        if device in found.devices:
            return found
    return None


__all__ = [
    "FORWARD", "TRAINING", "Fit", "Profile", "Sample", "cache_folder", "device_name", "fit", "load",
    "place_of", "profile", "sees_all",
]  # fmt: skip
