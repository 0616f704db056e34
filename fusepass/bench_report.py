"""What `fusepass bench` makes of its rows: a table, plots, and a profile for the cost model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusepass import costs
from fusepass.bench import Row
from fusepass.bench_cases import VARIANTS
from fusepass.select import UNFUSED

Key = tuple[str, str, int, int]


def by_case(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """Rows by variant, mode, head size and length, then by contender; failed ones are left out."""
    table: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row.milliseconds is not None:
            table.setdefault((row.variant, row.mode, row.head_dim, row.length), {})[row.contender] = row
    return table


def best_by_hand(found: dict[str, Row]) -> Row | None:
    """The fastest of the hand-written calls."""
    hands = [r for name, r in found.items() if name.startswith("hand ")]
    return min(hands, key=lambda r: r.milliseconds or 0.0, default=None)


def summary(rows: Iterable[Row]) -> Table:
    """One line a case: what `auto` chose, and how fast it is beside the others."""
    table = Table(title="Attention, median milliseconds", title_justify="left", header_style="bold")
    for name in ("variant", "pass", "D", "S", "eager", "compile", "best by hand", "auto", "kernel"):
        table.add_column(name, justify="right" if name in ("D", "S", "eager", "compile", "auto") else "left")
    table.add_column("× compile", justify="right")
    table.add_column("× by hand", justify="right")
    for (variant, mode, head_dim, length), found in sorted(by_case(rows).items()):
        hand, auto = best_by_hand(found), found.get("auto")
        table.add_row(
            variant, mode, str(head_dim), str(length), _time(found.get("eager")), _time(found.get("compile")),
            "" if hand is None else f"{_time(hand)} {hand.contender.removeprefix('hand ')}", _time(auto),
            "" if auto is None else auto.kernel, _ratio(found.get("compile"), auto), _ratio(hand, auto),
        )  # fmt: skip
    return table


def _time(row: Row | None) -> str:
    return "" if row is None or row.milliseconds is None else f"{row.milliseconds:.4g}"


def _ratio(other: Row | None, mine: Row | None) -> str:
    if other is None or mine is None or not other.milliseconds or not mine.milliseconds:
        return ""
    return f"{other.milliseconds / mine.milliseconds:.2f}"


def problems(rows: Iterable[Row]) -> dict[str, int]:
    """What went wrong, and how often."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.problem:
            text = f"{row.contender}, {row.variant}: {row.problem[:110]}"
            counts[text] = counts.get(text, 0) + 1
    return counts


def samples(rows: Iterable[Row]) -> list[costs.Sample]:
    """The rows that the cost model learns from: kernels by name, and plain `torch.compile`."""
    made = []
    for row in rows:
        kernel = UNFUSED if row.contender == "compile" else row.contender
        if row.milliseconds is None or kernel in ("auto", "eager") or kernel.startswith("hand"):
            continue
        kind, width = VARIANTS[row.variant].kind, 2 * row.head_dim
        traffic = row.batch * (row.heads * row.queries + row.kv_heads * row.keys) * width
        pairs = row.pairs
        if costs.sees_all(kernel, kind):
            pairs = row.batch * row.heads * row.queries * row.keys
        made.append(
            costs.Sample(kernel, kind, row.head_dim, row.mode, traffic, pairs * width, row.milliseconds)
        )
    return made


#: Devices that share a profile: the same chip with other memory.
_SAME_CHIP = {
    "NVIDIA H200": (
        "NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H100",
    ),
}  # fmt: skip


def profile_of(rows: Iterable[Row], machine: dict[str, str]) -> costs.Profile:
    """The cost model of the machine that the rows were measured on."""
    name = machine["device"]
    return costs.Profile(_SAME_CHIP.get(name, (name,)), dict(machine), costs.fit(samples(rows)))


def fits_table(profile: costs.Profile) -> Table:
    """The fitted costs, for people."""
    table = Table(title=f"Cost model of {profile.devices[0]}", title_justify="left", header_style="bold")
    for name in ("kernel", "kind", "D", "pass", "fixed ms", "TFLOP/s", "samples", "largest error"):
        table.add_column(name, justify="left" if name in ("kernel", "kind", "pass") else "right")
    for f in profile.fits:
        rate = "" if f.work == 0 else f"{2 / f.work / 1e9 * (3.5 if f.mode == costs.TRAINING else 1):.0f}"
        table.add_row(
            f.kernel,
            f.kind,
            str(f.head_dim),
            f.mode,
            f"{f.fixed:.3f}",
            rate,
            str(f.samples),
            f"{f.error:.0%}",
        )
    return table


_COLOURS = {"eager": "0.6", "compile": "0.3", "auto": "tab:red", "best by hand": "tab:blue"}


def plot(rows: Sequence[Row], folder: Path, machine: dict[str, str]) -> list[Path]:
    """One picture a variant: TFLOP/s over length, a panel each head size and pass.

    Raises:
        ModuleNotFoundError: matplotlib is missing (`pip install fusepass[docs]`).
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    cases, made = by_case(rows), []
    for variant in dict.fromkeys(k[0] for k in sorted(cases)):
        panels = sorted({(k[1], k[2]) for k in cases if k[0] == variant})
        figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), squeeze=False)
        for (mode, head_dim), axis in zip(panels, axes[0], strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            for key in sorted(k for k in cases if (k[0], k[1], k[2]) == (variant, mode, head_dim)):
                found = cases[key]
                for name in _COLOURS:
                    row = best_by_hand(found) if name == "best by hand" else found.get(name)
                    if row is not None and row.tflops is not None:
                        lines.setdefault(name, []).append((key[3], row.tflops))
            for name, points in lines.items():
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=name, color=_COLOURS[name])
            axis.set_xscale("log", base=2)
            axis.set_title(f"{variant}, {mode}, D={head_dim}", fontsize=8)
            axis.set_xlabel("length", fontsize=8)
        axes[0][0].set_ylabel("TFLOP/s", fontsize=8)
        axes[0][0].legend(fontsize=7)
        figure.text(0.01, 0.005, f"{machine.get('device', '')}, torch {machine.get('torch', '')}", fontsize=6)
        figure.tight_layout()
        made.append(folder / f"{variant}.svg")
        figure.savefig(made[-1], metadata={"Date": None})
        pyplot.close(figure)
    return made


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table and the problems."""
    console.print(summary(rows))
    for text, count in problems(rows).items():
        console.print(f"{count} × {text}", style="dim", highlight=False, markup=False)


__all__ = [
    "best_by_hand",
    "by_case",
    "fits_table",
    "plot",
    "problems",
    "profile_of",
    "samples",
    "show",
    "summary",
]
