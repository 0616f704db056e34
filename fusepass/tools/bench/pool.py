"""Distributes measurements over processes: compiling overlaps; while one process is timed, all others pause.

A process that a measurement has broken is replaced, because it cannot recover from a CUDA error, and the
measurement gets a result that says so.  Results are passed on as they arrive, so that none is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")

Exclusive = Callable[[], AbstractContextManager[None]]
"""Makes the context that a measurement enters for each timed section."""

Measure = Callable[[J, Exclusive], tuple[R, bool]]
"""Measures a job; the second part of the result says whether the process must be replaced."""

#: A process is replaced after this many jobs, because compilers' caches grow.
_JOBS = 40
#: Seconds to wait for the GPU work of a stopped process to end.
_SETTLE = 0.06
#: Seconds for which running jobs may continue after the limit.
_GRACE = 45.0
#: Seconds for which a process waits for others to be timed with it, since each pause costs time.
_GATHER = 1.0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The context of timed sections in a process that has the machine to itself."""
    yield


def spread(
    work: Sequence[J],
    measure: Measure[J, R],
    failed: Callable[[J, str], R],
    workers: int,
    on_result: Callable[[R], None] = lambda result: None,
    limit: float | None = None,
    patience: float = 180.0,
) -> list[R]:
    """Measure all of ``work``, in any order.

    Args:
        measure: a function that other processes can import.
        failed: makes the result of a job whose process died or took too long.
        limit: seconds after the start; no job begins later.
        patience: seconds that a job may take, pauses not included.
    """
    pool: Pool[J, R] = Pool(work, measure, failed, on_result, limit, patience)
    try:
        pool.run(workers)
    finally:
        pool.end()
    return pool.results


class _Worker(Generic[J]):
    """A process, its current job, and when the job began."""

    def __init__(self, measure: Any) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when the process imports torch
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, measure), daemon=True)
        self.process.start()
        there.close()
        self.job: J | None = None
        self.state, self.since, self.jobs = "starts", time.monotonic(), 0

    def send(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(OSError):
            if self.state == "starts":
                os.kill(self.process.pid or 0, number)
            else:
                os.killpg(self.process.pid or 0, number)

    def end(self) -> None:
        """Kill the process."""
        self.send(signal.SIGKILL)
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


class Pool(Generic[J, R]):
    """The state of :func:`spread`."""

    def __init__(
        self,
        work: Sequence[J],
        measure: Measure[J, R],
        failed: Callable[[J, str], R],
        on_result: Callable[[R], None],
        limit: float | None,
        patience: float,
    ) -> None:
        self.left, self.measure, self.failed, self.on_result = list(work), measure, failed, on_result
        self.limit = None if limit is None else time.monotonic() + limit
        self.patience, self.results, self.workers = patience, list[R](), list[_Worker[J]]()

    def run(self, count: int) -> None:
        """Measure until nothing is left."""
        while self.left or any(w.job is not None for w in self.workers):
            if self.limit is not None and time.monotonic() > self.limit:
                self.left.clear()
            self._start_workers(count)
            self._assign()
            for pipe in wait([w.pipe for w in self.workers], timeout=0.2):
                worker = next((w for w in self.workers if w.pipe is pipe), None)
                if worker is not None:
                    self._handle_message(worker)
            self._time(count)

    def end(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.end()
        self.workers.clear()

    def _start_workers(self, count: int) -> None:
        timed_out = self.limit is not None and time.monotonic() > self.limit + _GRACE
        for worker in list(self.workers):
            if timed_out and worker.job is not None:
                self._end_worker(worker, "cut off by the limit")
            elif worker.state == "works" and time.monotonic() - worker.since > self.patience:
                self._end_worker(worker, f"took more than {self.patience:.0f} s to compile or run")
            elif worker.state == "idle" and (not self.left or worker.jobs >= _JOBS):
                self._end_worker(worker)
        while len(self.workers) < min(count, len(self.left) + sum(w.job is not None for w in self.workers)):
            self.workers.append(_Worker(self.measure))

    def _assign(self) -> None:
        for worker in self.workers:
            if worker.state == "idle" and self.left:
                worker.job, worker.state, worker.since = self.left.pop(0), "works", time.monotonic()
                worker.jobs += 1
                with contextlib.suppress(OSError):
                    worker.pipe.send(worker.job)

    def _handle_message(self, worker: _Worker[J]) -> None:
        """Handle one message of a process."""
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            self._end_worker(worker, "the measuring process died")
            return
        worker.since = time.monotonic()
        worker.state = "waits" if kind == "wants" else "idle"
        if kind == "result":
            worker.job = None
            result, broken = content
            self._keep(result)
            if broken:
                self._end_worker(worker)

    def _time(self, count: int) -> None:
        """Let the waiting processes be timed one by one, while the others pause."""
        waiting = [w for w in self.workers if w.state == "waits"]
        others = [w for w in self.workers if w.state in ("works", "starts")]
        began = time.monotonic()
        longest = max((began - w.since for w in waiting), default=0.0)
        if not waiting or (others and len(waiting) < count // 4 and longest < _GATHER):
            return
        for worker in others:
            worker.send(signal.SIGSTOP)
        time.sleep(_SETTLE)
        for worker in waiting:
            worker.state, worker.since = "times", time.monotonic()
            with contextlib.suppress(OSError):
                worker.pipe.send(True)
            while worker.state == "times":
                if not worker.pipe.poll(self.patience / 2):
                    self._end_worker(worker, "took too long to time")
                    break
                self._handle_message(worker)
                if worker.state == "waits":  # a second timed section of the same job
                    worker.state = "times"
                    worker.pipe.send(True)
        for worker in others:
            worker.send(signal.SIGCONT)
            worker.since += time.monotonic() - began

    def _end_worker(self, worker: _Worker[J], why: str = "") -> None:
        """Kill a process; ``why`` says why its job, if it has one, has failed."""
        job = worker.job
        worker.job = None
        self.workers.remove(worker)
        worker.end()
        worker.state = "ended"
        if job is not None and why:
            self._keep(self.failed(job, why))

    def _keep(self, result: R) -> None:
        self.results.append(result)
        self.on_result(result)


def _serve(pipe: Connection, measure: Any) -> None:
    """The main function of a process: get jobs, send results, and wait for its turn before timed sections."""
    os.setsid()  # so that the compilers it starts pause with it
    _end_with_parent()

    @contextlib.contextmanager
    def exclusive() -> Iterator[None]:
        pipe.send(("wants", None))
        pipe.recv()
        yield

    pipe.send(("ready", None))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        result, broken = measure(job, exclusive)
        pipe.send(("result", (result, broken)))


def _end_with_parent() -> None:
    """On Linux, have this process killed when its parent dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


__all__ = ["Exclusive", "Measure", "alone", "spread"]
