"""`fusepass bench`: attention of many kinds and sizes, eager, compiled, fused, and by hand on one library.

One measurement is one row: the median time of some runs on random data, and the most memory allocated on
top of the inputs.  There are two times.  ``milliseconds`` is of calls back to back, as a program makes them:
where launching takes longer than the GPU, launching is what it shows, and a compiled function launches
later than a bare call.  ``gpu_milliseconds`` is of the same call recorded as a CUDA graph and replayed,
which leaves the GPU's work alone, under equal conditions for all.

Work is spread over processes (:mod:`fusepass.bench_pool`).  `--profile` makes the cost model of
:mod:`fusepass.costs` from the rows.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import gc
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fusepass.bench_cases import VARIANTS, Inputs, Shape, Variant
from fusepass.bench_pool import Exclusive, alone, spread

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
    compile_seconds: float | None = None
    problem: str = ""
    gpu_milliseconds: float | None = None

    @property
    def best_known(self) -> float | None:
        """The GPU's time where it is known, else that of calls back to back."""
        return self.milliseconds if self.gpu_milliseconds is None else self.gpu_milliseconds


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
    if workers > 1:
        return spread(work, apart, lambda job, why: replace(_row(job), problem=why), workers, on_row, limit)
    rows: list[Row] = []
    end = None if limit is None else time.monotonic() + limit
    for job in work:
        if end is None or time.monotonic() < end:
            rows.append(measured(job))
            on_row(rows[-1])
    return rows


#: In the text of an error after which a process can use its GPU no more.
_BROKEN = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")


def apart(job: Job, exclusive: Exclusive) -> tuple[Row, bool]:
    """In a process of its own: a row, and whether the process is of no more use."""
    torch.set_num_threads(1)
    row = measured(job, exclusive)
    return row, any(text in row.problem for text in _BROKEN)


def _row(job: Job) -> Row:
    """A job's row before it is measured."""
    variant = VARIANTS[job.variant]
    shape = variant.shape(job.length, job.head_dim, job.tokens, job.width)
    pairs = variant.pairs(shape) * shape.batch * shape.heads
    return Row(
        job.variant, job.mode, job.length, job.head_dim, shape.batch, shape.heads, shape.kv_heads,
        shape.queries, shape.keys, pairs, job.contender, "", None, None, None, None,
    )  # fmt: skip


def measured(job: Job, exclusive: Exclusive = alone) -> Row:
    """The row of a job; whatever goes wrong stands in its last column."""
    variant, row = VARIANTS[job.variant], _row(job)
    shape = variant.shape(job.length, job.head_dim, job.tokens, job.width)
    try:
        row = _measure(job, variant, shape, row, exclusive)
    except Exception as error:
        row = replace(row, problem=_line(error))
    try:
        torch._dynamo.reset()
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:  # what the measurement broke shows up in the next call of CUDA
        row = replace(row, problem=row.problem or _line(error))
    return row


def _line(error: Exception) -> str:
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip(" =")]
    return lines[0][:200]


def _measure(job: Job, variant: Variant, shape: Shape, row: Row, exclusive: Exclusive) -> Row:
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    inputs = variant.inputs(shape, device, dtype)
    training = job.mode == "training"
    if training:
        for name in "qkv":
            inputs[name].requires_grad_()
    call, kernel = _contender(job, variant)
    large = row.pairs * 2 > 2**32  # an unfused score tensor of several GiB: one process at a time
    with _locked(large), torch.set_grad_enabled(training):
        start = time.perf_counter()
        step = _step(call, inputs, training)
        step()
        _wait(device)
        seconds = time.perf_counter() - start
    chosen = kernel()
    if chosen.startswith("stays"):
        return replace(row, kernel="", problem=chosen, compile_seconds=seconds)
    with torch.set_grad_enabled(training):
        replay, times, problem = recorded(step, device)
    with exclusive(), torch.set_grad_enabled(training):
        used = peak(step, device)
        milliseconds = timed(step, device, job.repeats)
        alone_on_gpu = None if replay is None else timed(replay, device, job.repeats) / times
    flops = 4 * row.pairs * shape.head_dim * (3.5 if training else 1)
    best = milliseconds if alone_on_gpu is None else alone_on_gpu
    return replace(
        row, kernel=chosen, milliseconds=milliseconds, tflops=flops / best / 1e9, peak_bytes=used,
        compile_seconds=round(seconds, 2), gpu_milliseconds=alone_on_gpu, problem=problem,
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
    """The median of single runs, in milliseconds; on a GPU the least of some medians."""
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
    first = max(_events(step, 1)[0], 1e-3)
    _events(step, min(2000, int(_WARM / first)))  # a GPU that was idle runs at a lower clock at first
    count = max(3, min(max(repeats, int(_SHORT / first)), int(300 / first)))
    found = [median(_events(step, count))]
    while len(found) < _BATCHES and (len(found) == 1 or abs(found[-1] / found[-2] - 1) > _AGREES):
        found.append(median(_events(step, count)))
    return min(found)


#: Medians are taken until two in a row agree, or so many: work that was queued before them may still run.
_BATCHES, _AGREES = 6, 0.02
#: Milliseconds of work before anything counts, and that a batch of short steps lasts at least.
_WARM, _SHORT = 30.0, 10.0


def _events(step: Callable[[], object], count: int) -> list[float]:
    """Run back to back: where the host is slower than the GPU, its time counts, as it does for a user."""
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
    """What replays a CUDA graph of ``step``, how many steps that is, and why there is none.

    Short steps are recorded several times over, so that starting a graph is not what is measured.
    """
    if device.type != "cuda":
        return None, 1, ""
    stream = torch.cuda.Stream()
    collecting = gc.isenabled()
    try:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            step()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times = max(1, min(10, int(1e-3 / (time.perf_counter() - start))))
            graph = torch.cuda.CUDAGraph()
            gc.disable()  # what it would free must not be freed while a graph is recorded
            graph.capture_begin()
            try:
                for _ in range(times):
                    step()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay, times, ""
    except Exception as error:
        torch.cuda.synchronize()
        return None, 1, f"not recorded as a CUDA graph: {_line(error)}"
    finally:
        if collecting:
            gc.enable()


def peak(step: Callable[[], object], device: torch.device) -> int | None:
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
def _locked(wanted: bool) -> Iterator[None]:
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
        from fusepass.kernels.reference import multiplies_bfloat16

        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        instructions = torch.backends.cpu.get_cpu_capability()
        found["instructions"] = f"{instructions}{' with bfloat16 products' * multiplies_bfloat16()}"
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-frontend"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def key_of(row: Row) -> tuple[object, ...]:
    """What a row is a measurement of."""
    return (
        row.variant, row.mode, row.length, row.head_dim, row.batch, row.heads, row.kv_heads, row.contender
    )  # fmt: skip


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
    "NAMED",
    "Job",
    "Row",
    "jobs",
    "key_of",
    "machine",
    "apart",
    "measured",
    "read_csv",
    "recorded",
    "run",
    "timed",
    "write_csv",
]
