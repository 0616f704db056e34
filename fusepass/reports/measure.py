"""Time and memory of a call: the median of some runs, and the most bytes allocated at once in one run."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """What a call costs."""

    milliseconds: float
    """Median of the measured runs."""
    peak_bytes: int | None
    """The most memory allocated at once during the call, minus what was allocated before; None if unknown."""


Prepare = Callable[[], Callable[[], object]]
"""Prepares one call; the preparation, such as copying arguments, is not measured."""


def cost(prepare: Prepare, device: torch.device, repeats: int = 5) -> Cost:
    """The cost of a call. It must have run once before, or compilation is measured too."""
    peak = _peak_cuda(prepare(), device) if device.type == "cuda" else _peak_cpu(prepare())
    times = []
    for _ in range(repeats):
        call = prepare()
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return Cost(median(times), peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_cuda(call: Callable[[], object], device: torch.device) -> int:
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu(call: Callable[[], object]) -> int | None:
    """The peak from the allocator's own events in the profiler, which count compiled code like eager code."""
    profile = torch.autograd.profiler.profile(profile_memory=True)
    with _quiet():
        profile.__enter__()
    try:
        result = call()
        del result
    finally:
        with _quiet():
            profile.__exit__(None, None, None)
    if profile.kineto_results is None:
        return None
    recorded: list[Any] = profile.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the two lines that the profiler's C++ side writes to stderr when it starts and stops."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
