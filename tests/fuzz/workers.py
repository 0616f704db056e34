"""Draws, judges and shrinks programs, in this process or in several."""

import gc
import multiprocessing
import queue
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from tests.fuzz.draw import Choices, draw
from tests.fuzz.judge import FAILED, Verdict, judge
from tests.fuzz.programs import Program
from tests.fuzz.shrink import shrink

ALIKE = 2
"""How many failures that look alike are shrunk."""


@dataclass(frozen=True)
class Task:
    """Which programs to run, and for how long."""

    seed: int
    first: int
    last: int
    choices: Choices
    shrink_seconds: float
    end: float
    """In seconds since the epoch."""
    step: int = 1


@dataclass(frozen=True)
class Result:
    """The outcome of one program."""

    program: Program
    verdict: Verdict
    small: Program | None = None
    """A smaller program that is bad in the same way; None where it was not looked for."""


@dataclass
class Examiner:
    """Judges one program after another."""

    task: Task
    alike: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        gc.freeze()  # most of the heap belongs to PyTorch and is permanent
        gc.set_threshold(50_000, 20, 50)

    def results(self) -> Iterator[Result]:
        for number in range(self.task.first, self.task.last, self.task.step):
            if time.time() > self.task.end:
                return
            yield self.examine(number)

    def examine(self, number: int) -> Result:
        """One program, shrunk if it is bad."""
        program = draw(self.task.seed, number, self.task.choices)
        verdict = judge(program)
        if not verdict.bad:
            return Result(program, verdict)
        look = looks(verdict)
        self.alike[look] += 1
        if self.alike[look] > ALIKE or self.task.shrink_seconds == 0:
            return Result(program, verdict)

        def as_bad(candidate: Program) -> bool:
            other = judge(candidate)
            return other.kind == verdict.kind and bool(symptoms(other) & symptoms(verdict))

        return Result(program, verdict, shrink(program, as_bad, self.task.shrink_seconds))


def symptoms(verdict: Verdict) -> set[str]:
    """The reasons without their numbers, and without the name of what differs."""
    if verdict.kind == FAILED:
        return {re.sub(r"[\d.]+", "", reason).split("[")[0] for reason in verdict.reasons}
    return {re.sub(r"\(.*?\)|\d[\d.e+-]*", "", reason.split(": ", 1)[1]) for reason in verdict.reasons}


def looks(verdict: Verdict) -> str:
    """The properties that failures of one cause are likely to share."""
    reasons = {re.sub(r"^call \d+, |\d[\d.e+-]*", "", reason) for reason in verdict.reasons}
    kinds = {re.sub(r"\d+", "", kind) for kind in verdict.fused}
    return f"{verdict.kind} {sorted(reasons)} {sorted(kinds)}"


def results(task: Task, jobs: int) -> Iterator[Result]:
    """The outcomes of all programs, in order of completion."""
    if jobs == 1:
        yield from Examiner(task).results()
        return
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    tasks = [
        Task(task.seed, task.first + n, task.last, task.choices, task.shrink_seconds, task.end, jobs)
        for n in range(jobs)
    ]
    processes = [context.Process(target=_work, args=(one, done), daemon=True) for one in tasks]
    for process in processes:
        process.start()
    yield from _gathered(done, list(processes))


def _work(task: Task, done: Any) -> None:
    """The main function of a process: it sends its results, then None."""
    for result in Examiner(task).results():
        done.put(result)
    done.put(None)


def _gathered(done: Any, processes: list[BaseProcess]) -> Iterator[Result]:
    """The results of all processes. One that dies is an error."""
    working = len(processes)
    while working:
        try:
            result = done.get(timeout=5)
        except queue.Empty:
            dead = [process.name for process in processes if process.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"{', '.join(dead)} died; run without --jobs to see where") from None
            continue
        if result is None:
            working -= 1
        else:
            yield result
