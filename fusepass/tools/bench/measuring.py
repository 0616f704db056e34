"""`fusepass bench`: times attention of many kinds and sizes: eager, compiled, fused, and hand-written.

One measurement is one row: the median time of several runs on random data, and the peak of memory allocated
on top of the inputs.  There are two times.  ``milliseconds`` is the time of calls back to back, as a program
makes them.  If launching a call takes longer than the GPU's work, this is the time of the launch, and a
compiled function takes longer to launch than a plain call.  ``gpu_milliseconds`` is the time of the same call
recorded as a CUDA graph and replayed: only the GPU's work, under equal conditions.  The contenders of a case
are prepared in one process and timed in turns, round after round, because a GPU's clock follows its
temperature and power: measurements that are minutes apart differ by more than the contenders do.

The work is distributed over processes (:mod:`fusepass.tools.bench.pool`).  `--profile` turns the rows into
the cost model of :mod:`fusepass.selection.costs`.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusepass.host.kernel_names import LIBRARIES
from fusepass.kernels.registry import registered
from fusepass.reports.collector import Collector, collect
from fusepass.selection.clock import first_line, in_turn, peak, recorded
from fusepass.tools.bench.cases import VARIANTS, Inputs, Variant
from fusepass.tools.bench.pool import Exclusive, alone, spread

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
MODES = ("forward", "training")


@dataclass(frozen=True)
class Job:
    """One measurement to make."""

    variant: str
    length: int
    head_dim: int
    mode: str
    contender: str
    device: str = "cuda"
    dtype: str = "bfloat16"
    tokens: int = 16384
    width: int = 2048
    repeats: int = 20


@dataclass(frozen=True)
class Row:
    """One measurement.

    ``pairs`` counts the visible query-key pairs of all heads and sequences; ``peak_bytes`` is memory on top
    of the inputs; ``problem`` says what went wrong.
    """

    variant: str
    mode: str
    length: int
    head_dim: int
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    pairs: float
    contender: str
    kernel: str
    milliseconds: float | None
    tflops: float | None
    peak_bytes: int | None
    compile_seconds: float | None = None
    problem: str = ""
    gpu_milliseconds: float | None = None

    @property
    def best_known(self) -> float | None:
        """The GPU's time if it is known, else the time of calls back to back."""
        return self.milliseconds if self.gpu_milliseconds is None else self.gpu_milliseconds


def by_name() -> tuple[str, ...]:
    """The kernels that are measured by name: those of fusepass, and those of other packages."""
    return (*LIBRARIES, *registered())


def jobs(
    variants: Iterable[str], lengths: Iterable[int], head_dims: Iterable[int], modes: Iterable[str],
    contenders: Sequence[str], **settings: Any,
) -> list[Job]:  # fmt: skip
    """Every combination that can be measured; "hand" stands for all hand-written calls of a variant."""
    work = []
    for head_dim, mode, length, name in itertools.product(head_dims, modes, lengths, variants):
        variant = VARIANTS[name]
        if not (variant.backward if mode == "training" else variant.forward):
            continue
        for contender in contenders:
            if contender in LIBRARIES and contender not in variant.kernels.split():
                continue
            if contender.startswith(("hand ", "repaired ", "prepared ")) and contender not in variant.hand:
                continue
            names = list(variant.hand) if contender == "hand" else [contender]
            work += [Job(name, length, head_dim, mode, n, **settings) for n in names]
    return work


def run(
    work: Sequence[Job],
    workers: int = 1,
    on_row: Callable[[Row], None] = lambda row: None,
    limit: float | None = None,
) -> list[Row]:
    """Measure all of ``work``; after ``limit`` seconds no new measurement begins."""
    end = None if limit is None else time.monotonic() + limit
    rows: list[Row] = []
    lost: list[tuple[Job, Row]] = []

    def keep(results: list[tuple[Job, Row]]) -> None:
        broken = len(results) > 1 and any(row.problem.startswith(_LOST) for _, row in results)
        for job, row in results:
            if broken and row.milliseconds is None:
                lost.append((job, row))  # another contender may have broken the process
            else:
                rows.append(row)
                on_row(row)

    _spread(together(work), workers, keep, end)
    _spread([[job] for job, _ in lost], workers, keep, end)
    for _, row in lost:
        if all(key_of(row) != key_of(r) for r in rows):  # there was no time left to measure it again
            rows.append(row)
            on_row(row)
    return rows


def _spread(
    groups: Sequence[list[Job]],
    workers: int,
    keep: Callable[[list[tuple[Job, Row]]], None],
    end: float | None,
) -> None:
    if workers > 1 and groups:
        limit = None if end is None else end - time.monotonic()
        patience = PATIENCE * max(map(len, groups))
        spread(groups, apart, _failed_with, workers, keep, limit, patience)
        return
    for group in groups:
        if end is None or time.monotonic() < end:
            keep(list(zip(group, measured(group), strict=True)))


def together(work: Sequence[Job]) -> list[list[Job]]:
    """Groups of jobs that differ only in the contender; unfused attention is slow, and measured apart."""
    groups: dict[Job, list[Job]] = {}
    for job in work:
        apart = job.contender if job.contender in ("eager", "compile") else ""
        groups.setdefault(replace(job, contender=apart), []).append(job)
    return list(groups.values())


#: Time limit in seconds to prepare and time a contender.
PATIENCE = 180.0
_LOST = "not measured: "


def _failed_with(group: list[Job], why: str) -> list[tuple[Job, Row]]:
    return [(job, replace(_row(job), problem=f"{_LOST}{why}")) for job in group]


#: Texts of errors after which a process can no longer use its GPU.
_BROKEN = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")


def apart(group: list[Job], exclusive: Exclusive) -> tuple[list[tuple[Job, Row]], bool]:
    """Measure in a separate process; returns the rows, and whether the process must be replaced."""
    torch.set_num_threads(1)
    rows = measured(group, exclusive)
    broken = any(text in row.problem for text in _BROKEN for row in rows)
    if broken and len(group) > 1:
        rows = [r if r.milliseconds is not None else replace(r, problem=f"{_LOST}{r.problem}") for r in rows]
    return list(zip(group, rows, strict=True)), broken


def _row(job: Job) -> Row:
    """A job's row before it is measured."""
    variant = VARIANTS[job.variant]
    shape = variant.shape(job.length, job.head_dim, job.tokens, job.width)
    pairs = variant.pairs(shape) * shape.batch * shape.heads
    return Row(
        job.variant, job.mode, job.length, job.head_dim, shape.batch, shape.heads, shape.kv_heads,
        shape.queries, shape.keys, pairs, job.contender, "", None, None, None, None,
    )  # fmt: skip


@dataclass
class _Ready:
    """A contender that has been compiled and recorded; one replay runs ``times`` steps."""

    row: Row
    step: Callable[[], object] | None = None
    replay: Callable[[], object] | None = None
    times: int = 1


def measured(group: Sequence[Job], exclusive: Exclusive = alone) -> list[Row]:
    """The rows for the jobs of one case; ``problem`` tells what went wrong with a job."""
    rows = _measured(group, exclusive)
    try:  # nothing holds the group's tensors and recordings any longer
        torch._dynamo.reset()
        gc.collect()
        if group[0].device == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:  # CUDA reports an error of the measurement only at a later call
        rows = [replace(row, problem=row.problem or first_line(error)) for row in rows]
    return rows


def _measured(group: Sequence[Job], exclusive: Exclusive) -> list[Row]:
    job = group[0]
    ready = [_Ready(_row(j)) for j in group]
    try:
        variant, device = VARIANTS[job.variant], torch.device(job.device)
        shape = variant.shape(job.length, job.head_dim, job.tokens, job.width)
        inputs = variant.inputs(shape, device, getattr(torch, job.dtype))
        training = job.mode == "training"
        if training:
            for name in (*"qkv", *variant.learns):
                inputs[name].requires_grad_()
        with torch.set_grad_enabled(training):
            for j, one in zip(group, ready, strict=True):
                try:
                    _prepare(j, variant, inputs, one)
                except Exception as error:
                    one.row = replace(one.row, problem=first_line(error))
            running = [one for one in ready if one.step is not None]
            if running:
                with exclusive():
                    _time(running, device, job)
    except Exception as error:
        for one in ready:
            one.row = replace(one.row, problem=one.row.problem or first_line(error))
    return [one.row for one in ready]


def _prepare(job: Job, variant: Variant, inputs: Inputs, one: _Ready) -> None:
    """Compile, run, and record."""
    device = torch.device(job.device)
    call, kernel = _contender(job, variant)
    large = one.row.pairs * 2 > 2**32  # an unfused score tensor of several GiB: one process at a time
    with _locked(large):
        start = time.perf_counter()
        step = _step(call, inputs)
        step()
        _wait(device)
        seconds = time.perf_counter() - start
    chosen = kernel()
    if chosen.startswith("stays"):
        one.row = replace(one.row, kernel="", problem=chosen, compile_seconds=seconds)
        return
    one.replay, one.times, problem = recorded(step, device)
    one.step = step
    one.row = replace(one.row, kernel=chosen, compile_seconds=round(seconds, 2), problem=problem)


def _time(running: Sequence[_Ready], device: torch.device, job: Job) -> None:
    """Time the contenders in turns, and fill in the times."""
    steps = [one.step for one in running if one.step is not None]
    peaks, called = [peak(step, device) for step in steps], in_turn(steps, device, job.repeats)
    recordings = [one for one in running if one.replay is not None]
    replayed = in_turn([one.replay for one in recordings if one.replay is not None], device, job.repeats)
    of_gpu = {id(one): spent / one.times for one, spent in zip(recordings, replayed, strict=True)}
    for one, used, milliseconds in zip(running, peaks, called, strict=True):
        gpu = of_gpu.get(id(one))
        flops = 4 * one.row.pairs * job.head_dim * (3.5 if job.mode == "training" else 1)
        best = milliseconds if gpu is None else gpu
        one.row = replace(
            one.row, milliseconds=milliseconds, tflops=flops / best / 1e9, peak_bytes=used,
            gpu_milliseconds=gpu,
        )  # fmt: skip


def _step(call: Callable[..., Tensor], inputs: Inputs) -> Callable[[], object]:
    """One call, and the gradients of the inputs that need one."""
    wanted = [t for t in inputs.values() if t.requires_grad]
    if not wanted:
        return lambda: call(**inputs)
    grad: list[Tensor] = []

    def step() -> object:
        out = call(**inputs)
        if not grad:
            grad.append(torch.randn_like(out))
        return torch.autograd.grad(out, wanted, grad[0])

    return step


def _contender(job: Job, variant: Variant) -> tuple[Callable[..., Tensor], Callable[[], str]]:
    """A function to call, and one that returns the name of its kernel after the first call."""
    if job.contender in variant.hand:
        return variant.hand[job.contender], lambda: job.contender
    if job.contender == "eager":
        return variant.program, lambda: "eager"
    if job.contender == "compile":
        return torch.compile(variant.program, dynamic=False), lambda: "compile"
    seen = Collector()
    compiled = torch.compile(
        variant.program, backend="fusepass", dynamic=False, options={"kernel": job.contender}
    )

    def call(**inputs: Tensor) -> Tensor:
        if seen.graphs:
            out: Tensor = compiled(**inputs)
            return out
        with collect() as reports:
            out = compiled(**inputs)
        seen.graphs.extend(reports.graphs)
        return out

    def kernel() -> str:
        problems = [n for n in seen.notes if "failed" in n]
        if problems:
            return f"stays: {problems[0]}"
        site = seen.sites[0] if seen.sites else None
        if site is None:
            return "stays: no attention found"
        if not site.fused:
            return "unfused" if job.contender == "auto" else f"stays: {site.reason}"
        return site.kernel or ""

    return call, kernel


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _locked(wanted: bool) -> Iterator[None]:
    """If ``wanted``, let only one process at a time into the block."""
    if not wanted:
        yield
        return
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"fusepass-bench-{os.getuid()}.lock"
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


# ---------------------------------------------------------------------------------------- results


def key_of(row: Row) -> tuple[object, ...]:
    """What two rows have in common if they measure the same."""
    return (
        row.variant, row.mode, row.length, row.head_dim, row.batch, row.heads, row.kv_heads, row.contender
    )  # fmt: skip


def write_csv(rows: Sequence[Row], place: Path, about: dict[str, str]) -> None:
    """Write rows below the machine's description, which is in lines that begin with ``#``."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file)
        names = [f.name for f in fields(Row)]
        writer.writerow(names)
        for row in sorted(rows, key=lambda r: (r.variant, r.mode, r.head_dim, r.length, r.contender)):
            writer.writerow(["" if v is None else v for v in asdict(row).values()])


def read_csv(place: Path) -> tuple[list[Row], dict[str, str]]:
    """Read what :func:`write_csv` wrote."""
    lines = place.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    kinds = {"length": int, "head_dim": int, "batch": int, "heads": int, "kv_heads": int, "queries": int,
             "keys": int, "pairs": float, "milliseconds": float, "tflops": float, "peak_bytes": int,
             "compile_seconds": float, "gpu_milliseconds": float}  # fmt: skip
    rows = []
    for entry in csv.DictReader(line for line in lines if not line.startswith("#")):
        values: dict[str, Any] = {
            n: (kinds[n](t) if t else None) if n in kinds else t for n, t in entry.items()
        }
        rows.append(Row(**values))
    return rows, about


__all__ = [
    "HEAD_DIMS",
    "LENGTHS",
    "MODES",
    "Job",
    "Row",
    "jobs",
    "key_of",
    "apart",
    "by_name",
    "measured",
    "read_csv",
    "run",
    "write_csv",
]
