"""The command `python -m fusepass bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from fusepass.kernels.registry import registered
from fusepass.selection import costs
from fusepass.selection.machine import machine
from fusepass.tools.bench import measuring as bench
from fusepass.tools.bench import plot as bench_plot
from fusepass.tools.bench import report as bench_report
from fusepass.tools.bench.cases import VARIANTS
from fusepass.tools.targets import UsageError


def command(arguments: argparse.Namespace) -> int:
    """Measure, or read results; then show them, plot them or make a profile."""
    console = Console(width=None if Console().is_terminal else 150)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.read:
        results = _read(arguments.read)
    else:
        about = machine(arguments.device) | {"dtype": arguments.dtype}
        results = [(_measure(arguments, console, about), about)]
        console.print(f"{len(results[0][0])} measurements in {arguments.out}", highlight=False)
    rows, about = [row for measured, _ in results for row in measured], results[-1][1]
    if arguments.profile or arguments.profile_to:
        profile = bench_report.profile_of(rows, about)
        place = arguments.profile_to or costs.place_of(about["device"])
        profile.save(place)
        console.print(bench_report.curves_table(profile))
        console.print(f"profile in {place}", highlight=False)
    else:
        bench_report.show(rows, console)
    if arguments.markdown:
        source = " ".join(map(str, arguments.read or [arguments.out]))
        arguments.markdown.write_text(bench_report.markdown(rows, about, source))
    if arguments.plot:
        made_plots = bench_plot.plot(results, arguments.plot)
        console.print(f"{len(made_plots)} pictures in {arguments.plot}", highlight=False)
    return 0


def _read(places: list[Path]) -> list[tuple[list[bench.Row], dict[str, str]]]:
    """The rows of each file, and the machine that they were measured on."""
    for place in places:
        if not place.is_file():
            raise UsageError(f"cannot read {str(place)!r}: there is no such file; expected results of bench")
    return [bench.read_csv(place) for place in places]


def _measure(arguments: argparse.Namespace, console: Console, about: dict[str, str]) -> list[bench.Row]:
    variants = _chosen(arguments.variants, list(VARIANTS), "variant")
    modes = _chosen(arguments.modes, list(bench.MODES), "mode")
    named = (
        ["compile", *bench.by_name()]
        if arguments.profile
        else ["eager", "compile", "auto", "hand", *registered()]
    )
    contenders = arguments.contenders.split(",") if arguments.contenders else named
    settings = {name: getattr(arguments, name) for name in ("device", "dtype", "tokens", "width", "repeats")}
    work = bench.jobs(
        variants, _numbers(arguments.lengths), _numbers(arguments.head_dims), modes, contenders, **settings
    )
    workers = arguments.workers or 1  # several processes that compile at once disturb each other's times
    with Progress(console=console, transient=True) as progress:
        task, rows = progress.add_task("measuring", total=len(work)), list[bench.Row]()

        def keep(row: bench.Row) -> None:
            rows.append(row)
            progress.advance(task)
            if len(rows) % 5 == 0:
                bench.write_csv(rows, arguments.out, about)

        try:
            return bench.run(work, workers, keep, arguments.limit)
        finally:
            bench.write_csv(rows, arguments.out, about)


def _chosen(text: str, accepted: list[str], noun: str) -> list[str]:
    chosen = accepted if text == "all" else text.split(",")
    for name in chosen:
        if name not in accepted:
            raise UsageError(f"unknown {noun} {name!r}; accepted are {', '.join(accepted)}")
    return chosen


def _numbers(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError as error:
        raise UsageError(f"expected integers separated by commas, got {text!r}") from error


__all__ = ["command"]
