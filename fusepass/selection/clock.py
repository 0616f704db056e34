"""Median times of steps on a GPU or a CPU, for contenders that take turns, and recording of CUDA graphs.

A GPU's clock follows its temperature and its power.  So steps that are compared take turns there, in
a different order in each round: no step always comes after one that draws more power.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message, at most 200 characters."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip(" =")]
    return lines[0][:200]


def timed(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of single runs, in milliseconds; on a GPU the smallest of several medians."""
    return in_turn([step], device, repeats)[0]


def in_turn(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """For each step, the median time of single runs in milliseconds.

    In every round each step has a turn.  On a GPU a turn is many runs, the order of the steps differs from
    round to round, and the result is the median of the rounds' medians; for a single step it is the smallest
    median.
    """
    if device.type != "cuda":
        return [
            median(rounds)
            for rounds in zip(*([_clocked(s) for s in steps] for _ in range(repeats)), strict=True)
        ]
    counts = []
    for step in steps:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        first = max(_events(step, 1)[0], 1e-3)
        _events(step, min(2000, int(_WARM / first)))  # an idle GPU starts at a lower clock
        turns = 1 if len(steps) == 1 else _ROUNDS
        enough = max(repeats / turns, _SHORT / first)
        counts.append(max(3, int(min(enough, _LONG / turns / first))))
    if len(steps) == 1:
        return [_settled(steps[0], counts[0])]
    rounds: list[list[float]] = [[] for _ in steps]
    for turn in range(_ROUNDS):
        order = list(range(len(steps)))
        random.Random(turn).shuffle(order)  # the step before determines how warm the GPU is
        for n in order:
            rounds[n].append(median(_events(steps[n], counts[n])))
    return [median(times) for times in rounds]


def _clocked(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _settled(step: Callable[[], object], count: int) -> float:
    """The smallest median.  Measures until two medians in a row agree, because queued work may still run."""
    medians = [median(_events(step, count))]
    while len(medians) < _BATCHES and (len(medians) == 1 or abs(medians[-1] / medians[-2] - 1) > _AGREES):
        medians.append(median(_events(step, count)))
    return min(medians)


#: The maximum number of medians, and how closely two in a row must agree.
_BATCHES, _AGREES = 6, 0.02
#: How many turns each of the compared steps has.
_ROUNDS = 7
#: Milliseconds of work before measuring starts; in a batch of short steps, at least; in all batches of a long
#: step together, at most.
_WARM, _SHORT, _LONG = 30.0, 10.0, 300.0


def _events(step: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of runs back to back: if the host is slower than the GPU, the host's time counts, as for a
    user."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def recorded(
    step: Callable[[], object], device: torch.device
) -> tuple[Callable[[], object] | None, int, str]:
    """A function that replays a CUDA graph of ``step``, the number of steps in it, and why there is no graph.

    Short steps are recorded several times, equally often for all contenders, because starting a graph takes
    as long as such a step.
    """
    if device.type != "cuda":
        return None, 1, ""
    collecting = gc.isenabled()
    try:
        torch.cuda.synchronize()
        replay, times = _capture(step, 1), 1
        if min(_events(replay, 5)) < _TINY:
            replay, times = _capture(step, _COPIES), _COPIES
        return replay, times, ""
    except Exception as error:
        torch.cuda.synchronize()
        return None, 1, f"not recorded as a CUDA graph: {first_line(error)}"
    finally:
        if collecting:
            gc.enable()


#: A step that takes fewer milliseconds is recorded this many times.
_TINY, _COPIES = 0.2, 20


def _capture(step: Callable[[], object], times: int) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # garbage must not be freed while a graph is recorded
        graph.capture_begin()
        try:
            for _ in range(times):
                step()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph.replay


def peak(step: Callable[[], object], device: torch.device) -> int | None:
    """The bytes of GPU memory that a step takes at its peak, beyond those taken before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


__all__ = ["first_line", "in_turn", "peak", "recorded", "timed"]
