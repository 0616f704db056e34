"""Regenerates the kernel measurements, their plots and the profile that `auto` uses on this kind of GPU.

    python benchmarks/kernels.py                             everything, on one GPU
    python benchmarks/kernels.py --workers 12 --limit 300    what fits into 300 seconds per part
    python benchmarks/kernels.py --part auto --lengths 1024,4096 --head-dims 128

The most important cases are measured first.  The results are

- ``benchmarks/results/profile-GPU.csv``: every kernel by name, and `torch.compile`;
- ``fusepass/selection/profiles/GPU.json``: the cost model made from that;
- ``benchmarks/results/auto-GPU.csv``: `torch.compile`, `auto` with that profile, and hand-written calls; with
  ``--contenders auto,hand,compile,eager`` also unfused attention without a compiler;
- ``docs/kernels/``: pictures of all files ``auto-*.csv``, if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fusepass.host.kernel_names import LIBRARIES
from fusepass.kernels.gates import runs_here
from fusepass.selection.machine import machine
from fusepass.tools.bench import measuring as bench
from fusepass.tools.bench import plot as bench_plot
from fusepass.tools.bench import report as bench_report
from fusepass.tools.bench.cases import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
LENGTHS, HEAD_DIMS = (4096, 1024, 128, 16384, 512), (128, 64, 256)
#: Beyond this length unfused attention takes tens of GiB and is always slower, so it is not measured.
UNFUSED_UP_TO = 4096


def profile_jobs(
    lengths: Sequence[int],
    head_dims: Sequence[int],
    repeats: int,
    kernels: Sequence[str],
    wanted: Sequence[str],
    unfused: bool,
) -> list[bench.Job]:
    """The jobs for a profile: kernels by name, and the baselines."""
    variants = [name for name in wanted if name not in ("causal", "mqa", "cross")]
    work = []
    for length in lengths:
        for head_dim in head_dims:
            plain = ["compile"] if unfused and length <= UNFUSED_UP_TO else []
            contenders = [*plain, *kernels]
            work += bench.jobs(variants, [length], [head_dim], bench.MODES, contenders, repeats=repeats)
    return work


def auto_jobs(
    lengths: Sequence[int], head_dims: Sequence[int], repeats: int, contenders: Sequence[str],
    wanted: Sequence[str],
) -> list[bench.Job]:  # fmt: skip
    """The jobs that compare `auto` with calls by hand."""
    work = []
    for length in lengths:
        for head_dim in head_dims:
            most = [c for c in contenders if c not in ("compile", "eager") or length <= UNFUSED_UP_TO]
            work += bench.jobs(wanted, [length], [head_dim], bench.MODES, most, repeats=repeats)
    return work


def measure(work: list[bench.Job], place: Path, arguments: argparse.Namespace) -> list[bench.Row]:
    rows: list[bench.Row] = bench.read_csv(place)[0] if arguments.add and place.exists() else []
    about = machine() | ({"load": arguments.load} if arguments.load else {})

    def keep(row: bench.Row) -> None:
        rows[:] = [r for r in rows if bench.key_of(r) != bench.key_of(row)]
        rows.append(row)
        bench.write_csv(rows, place, about)

    bench.run(work, arguments.workers, keep, arguments.limit)
    print(f"{len(rows)} of {len(work)} measurements in {place}", flush=True)
    return rows


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--part", choices=["all", "profile", "auto"], default="all")
    option("--lengths", type=numbers, default=list(LENGTHS))
    option("--head-dims", type=numbers, default=list(HEAD_DIMS))
    option("--workers", type=int, default=1)
    option("--repeats", type=int, default=20)
    option("--limit", type=float, help="start no new measurement of a part after this many seconds")
    option("--kernels", help="for the profile (all that run here)")
    option("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    option("--add", action="store_true", help="keep rows of the CSV files that are not measured again")
    option("--contenders", type=lambda text: text.split(","), default=["auto", "hand", "compile"])
    option("--load", help="what else the machine was doing, for the description in the CSV file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py measures GPUs, and there is none here", file=sys.stderr)
        return 2
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    results, grid = ROOT / "benchmarks" / "results", (arguments.lengths, arguments.head_dims)
    console = Console(width=None if Console().is_terminal else 150)
    if arguments.part in ("all", "profile"):
        here = [k for k in LIBRARIES if runs_here(k, "cuda")]
        kernels = arguments.kernels.split(",") if arguments.kernels else here
        rows = measure(
            profile_jobs(*grid, arguments.repeats, kernels, arguments.variants, not arguments.kernels),
            results / f"profile-{name}.csv",
            arguments,
        )
        profile = bench_report.profile_of(rows, machine())
        profile.save(ROOT / "fusepass" / "selection" / "profiles" / f"{name}.json")
    if arguments.part in ("all", "auto"):
        work = auto_jobs(*grid, arguments.repeats, arguments.contenders, arguments.variants)
        rows = measure(work, results / f"auto-{name}.csv", arguments)
        bench_report.show(rows, console)
        try:
            measured = [bench.read_csv(place) for place in sorted(results.glob("auto-*.csv"))]
            bench_plot.plot(measured, ROOT / "docs" / "kernels")
        except ModuleNotFoundError:
            console.print("no pictures: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
