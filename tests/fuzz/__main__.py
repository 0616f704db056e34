"""Sends random attention programs through the pass, compares with eager PyTorch, and shrinks failures."""

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.fuzz.draw import INNERS, KERNELS, Choices
from tests.fuzz.judge import FAILED, RIGHT, SKIPPED, TORCHS_OWN, WRONG
from tests.fuzz.workers import Examiner, Result, Task, results

DEFAULT_PROGRAMS = 1000


@dataclass
class Tally:
    """The outcomes of the programs so far."""

    counts: Counter[str] = field(default_factory=Counter)
    fused: int = 0

    def add(self, result: Result) -> None:
        self.counts[result.verdict.kind] += 1
        self.fused += bool(result.verdict.fused)

    @property
    def bad(self) -> int:
        return self.counts[WRONG] + self.counts[FAILED]

    @property
    def text(self) -> str:
        kinds = (RIGHT, WRONG, FAILED, SKIPPED, TORCHS_OWN)
        counts = [f"{self.counts[kind]} {kind}" for kind in kinds if self.counts[kind] or kind != TORCHS_OWN]
        return ", ".join([*counts, f"{self.fused} fused"])

    def summary(self, seed: int) -> str:
        """The last line."""
        return (
            f"{self.counts.total()} programs ({self.fused} with a fused site, seed {seed}): "
            f"{self.counts[WRONG]} wrong, {self.counts[FAILED]} failed"
        )


def main(arguments: list[str] | None = None) -> int:
    """Fuzz. The exit status is 1 if a program was wrong or failed."""
    args = _parse(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    end = time.time() + args.seconds if args.seconds is not None else math.inf
    last = args.first + args.programs if args.programs is not None else sys.maxsize
    choices = Choices(args.kernel, args.inner, args.operands_not_finite)
    task = Task(args.seed, args.first, last, choices, args.shrink_seconds, end)
    if args.only is not None:
        return _one(Examiner(task), args.only, args.folder, console)
    tally = Tally()
    began = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=args.programs)
        for result in results(task, args.jobs):
            tally.add(result)
            if result.verdict.bad:
                _show(result, args.folder, console)
            progress.update(bar, advance=1, description=tally.text)
    speed = tally.counts.total() / (time.monotonic() - began)
    console.print(f"{tally.text}; {speed:.1f} programs a second")
    console.print(tally.summary(args.seed))
    return int(tally.bad > 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--programs", type=int, help=f"how many ({DEFAULT_PROGRAMS}, unless seconds are given)"
    )
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one program, printed as it was drawn")
    parser.add_argument(
        "--kernel", choices=(*KERNELS, "all"), default="all", help="all: each program draws one"
    )
    parser.add_argument(
        "--inner", choices=(*INNERS, "inductor", "all"), default="all", help="all: any except inductor"
    )
    parser.add_argument("--operands-not-finite", action="store_true", help="NaN and inf in q, k and v too")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--shrink-seconds", type=float, default=30.0, help="time to shrink a failing program; 0: never"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("fuzz-failures"), help="where failing programs are saved"
    )
    args = parser.parse_args(arguments)
    if args.programs is None and args.seconds is None:
        args.programs = DEFAULT_PROGRAMS
    return args


def _one(examiner: Examiner, number: int, folder: Path, console: Console) -> int:
    """Handle the outcome of one program."""
    result = examiner.examine(number)
    console.print(result.program.script)
    console.print(result.verdict.kind, *result.verdict.reasons, *result.verdict.fused, sep="\n  ")
    if result.verdict.bad:
        _show(result, folder, console)
    return int(result.verdict.bad)


def _show(result: Result, folder: Path, console: Console) -> None:
    """Save a failing program, and print it if it was shrunk; one that looks like others is not shrunk."""
    folder.mkdir(parents=True, exist_ok=True)
    program, verdict = result.program, result.verdict
    path = folder / f"seed{program.seed}_{program.number}.py"
    shown = result.small or program
    path.write_text(shown.script)
    fused = f" ({'; '.join(verdict.fused)})" if verdict.fused else ""
    console.print(f"{verdict.kind}: {program}{fused}, saved as {path}", style="bold red")
    for reason in verdict.reasons[:3]:
        console.print(f"  {reason}")
    if result.small is not None:
        console.print(shown.script)


if __name__ == "__main__":
    sys.exit(main())
