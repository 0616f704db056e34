"""`fusepass bench`: attention of many kinds and sizes, eager, compiled, fused, and by hand on one library.

One measurement is one row: the median time of some runs on random data, and the most memory allocated on
top of the inputs.  Work is spread over processes, so that compiling overlaps; a lock lets one of them
measure at a time.  `--profile` fits the cost model of :mod:`fusepass.select` to the rows.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fusepass.bench_cases import VARIANTS, Inputs, Shape, Variant

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
NAMED = ("sdpa", "cudnn", "flash2", "flash3", "flash4", "flex", "flex_flash")
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
    """One measurement.  Times in milliseconds, memory in bytes on top of the inputs."""

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
    compile_seconds: float | None
    problem: str = ""


def jobs(
    variants: Iterable[str], lengths: Iterable[int], head_dims: Iterable[int], modes: Iterable[str],
    contenders: Sequence[str], **settings: Any,
) -> list[Job]:  # fmt: skip
    """Every combination that makes sense; "hand" stands for all hand-written calls of a variant."""
    found = []
    for head_dim, mode, length, name in itertools.product(head_dims, modes, lengths, variants):
        variant = VARIANTS[name]
        if mode == "training" and not variant.backward:
            continue
        for contender in contenders:
            if contender in NAMED and contender not in variant.kernels.split():
                continue
            names = list(variant.hand) if contender == "hand" else [contender]
            found += [Job(name, length, head_dim, mode, n, **settings) for n in names]
    return found


def run(
    work: Sequence[Job],
    workers: int = 1,
    on_row: Callable[[Row], None] = lambda row: None,
    limit: float | None = None,
) -> list[Row]:
    """Measure; ``limit`` seconds after the start no further measurement begins."""
    rows: list[Row] = []
    end = None if limit is None else time.time() + limit
    if workers <= 1:
        for job in work:
            if end is None or time.time() < end:
                rows.append(measured(job))
                on_row(rows[-1])
        return rows
    left, deaths = list(work), dict.fromkeys(work, 0)
    while left:
        done = set()
        try:
            with _pool(workers) as pool:
                pending = {pool.submit(_guarded, job, end): job for job in left}
                for future in as_completed(pending):
                    row = future.result()
                    done.add(pending[future])
                    if row is not None:
                        rows.append(row)
                        on_row(row)
        except BrokenProcessPool:
            left = [job for job in left if job not in done]
            for job in left[:workers]:  # those that were running, one of which ended the process
                deaths[job] += 1
            for job in [j for j in left if deaths[j] > 1]:
                rows.append(replace(_row(job), problem="the measuring process died"))
                on_row(rows[-1])
            left = [j for j in left if deaths[j] <= 1]
        else:
            left = []
    return rows


def _pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes, each of which compiles with one thread: together they fill the machine."""
    import multiprocessing

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when a process imports torch
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _guarded(job: Job, end: float | None) -> Row | None:
    """In a worker process: a measurement, or its problem as a row."""
    if end is not None and time.time() > end:
        return None
    torch.set_num_threads(1)
    return measured(job)


def _row(job: Job) -> Row:
    """A job's row before it is measured."""
    variant = VARIANTS[job.variant]
    shape = variant.shape(job.length, job.head_dim, job.tokens, job.width)
    pairs = variant.pairs(shape) * shape.batch * shape.heads
    return Row(
        job.variant, job.mode, job.length, job.head_dim, shape.batch, shape.heads, shape.kv_heads,
        shape.queries, shape.keys, pairs, job.contender, "", None, None, None, None,
    )  # fmt: skip


def measured(job: Job) -> Row:
    """The row of a job; whatever goes wrong stands in its last column."""
    variant, row = VARIANTS[job.variant], _row(job)
    shape = variant.shape(job.length, job.head_dim, job.tokens, job.width)
    try:
        return _measure(job, variant, shape, row)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return replace(row, problem=text[:200])
    finally:
        torch._dynamo.reset()
        if job.device == "cuda":
            torch.cuda.empty_cache()


def _measure(job: Job, variant: Variant, shape: Shape, row: Row) -> Row:
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    inputs = variant.inputs(shape, device, dtype)
    training = job.mode == "training"
    if training:
        for name in "qkv":
            inputs[name].requires_grad_()
    call, kernel = _contender(job, variant)
    large = row.pairs * 2 > 2**32  # an unfused score tensor of several GiB: one process at a time
    with _exclusive(large), torch.set_grad_enabled(training):
        start = time.perf_counter()
        step = _step(call, inputs, training)
        step()
        _wait(device)
        seconds = time.perf_counter() - start
    chosen = kernel()
    if chosen.startswith("stays"):
        return replace(row, kernel="", problem=chosen, compile_seconds=seconds)
    with _exclusive(True), torch.set_grad_enabled(training):
        peak = _peak(step, device)
        milliseconds = timed(step, device, job.repeats)
    flops = 4 * row.pairs * shape.head_dim * (3.5 if training else 1)
    return replace(
        row, kernel=chosen, milliseconds=milliseconds, tflops=flops / milliseconds / 1e9,
        peak_bytes=peak, compile_seconds=round(seconds, 2),
    )  # fmt: skip


def _step(call: Callable[..., Tensor], inputs: Inputs, training: bool) -> Callable[[], object]:
    if not training:
        return lambda: call(**inputs)
    wanted = [inputs[n] for n in "qkv"]
    grad: list[Tensor] = []

    def step() -> object:
        out = call(**inputs)
        if not grad:
            grad.append(torch.randn_like(out))
        return torch.autograd.grad(out, wanted, grad[0])

    return step


def _contender(job: Job, variant: Variant) -> tuple[Callable[..., Tensor], Callable[[], str]]:
    """What to call, and the name of the kernel that it runs once it has been called."""
    if job.contender in variant.hand:
        return variant.hand[job.contender], lambda: job.contender
    if job.contender == "eager":
        return variant.program, lambda: "eager"
    if job.contender == "compile":
        return torch.compile(variant.program, dynamic=False), lambda: "compile"
    from fusepass.report import Collector

    seen = Collector()
    compiled = torch.compile(
        variant.program, backend="fusepass", dynamic=False, options={"kernel": job.contender}
    )

    def call(**inputs: Tensor) -> Tensor:
        if seen.graphs:
            out: Tensor = compiled(**inputs)
            return out
        from fusepass.report import collect

        with collect() as found:
            out = compiled(**inputs)
        seen.graphs.extend(found.graphs)
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


def timed(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of single runs, in milliseconds; at most about a second in all."""
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            found.append(1e3 * (time.perf_counter() - start))
        return median(found)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    first = _events(step, 1)[0]
    count = max(5, min(repeats, int(1000 / max(first, 1e-3))))
    return median(_events(step, count))


def _events(step: Callable[[], object], count: int) -> list[float]:
    """Run back to back: where the host is slower than the GPU, its time counts, as it does for a user."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _peak(step: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _exclusive(wanted: bool) -> Iterator[None]:
    """One process at a time, where wanted."""
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


def machine(device: str = "cuda") -> dict[str, str]:
    """The machine and the versions that the numbers are of."""
    from importlib import metadata

    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda or "",
            "cudnn": str(torch.backends.cudnn.version()),
        }
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-frontend"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_csv(rows: Sequence[Row], place: Path, about: dict[str, str]) -> None:
    """Rows with the machine's description above them, in lines that begin with ``#``."""
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
    """What :func:`write_csv` wrote."""
    lines = place.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    kinds = {"length": int, "head_dim": int, "batch": int, "heads": int, "kv_heads": int, "queries": int,
             "keys": int, "pairs": float, "milliseconds": float, "tflops": float, "peak_bytes": int,
             "compile_seconds": float}  # fmt: skip
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
    "NAMED",
    "Job",
    "Row",
    "jobs",
    "machine",
    "measured",
    "read_csv",
    "run",
    "write_csv",
]
