"""Pictures of what `fusepass bench` measured, one per kind of attention; the title says what it shows.

A line is one length on one machine. Its dots are the times of `torch.compile`, of the best hand-written call
and of `auto`; the number above them says how many times as fast `auto` is as `torch.compile`. The numbers are
those of the tables: the GPU's time if it is known, else the time of calls back to back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusepass.tools.bench.measuring import Row
from fusepass.tools.bench.report import best_by_hand, by_case, times_as_fast

INK, PALE, GREY, ORANGE, BLUE = "#24292f", "#e4e7eb", "#6e7781", "#d9822b", "#1f6feb"
#: Settings of matplotlib: all pictures look alike, and the same numbers give the same file.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "fusepass",
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_PASSES = {"forward": "Forward pass", "training": "Forward and backward pass"}
_KINDS = {
    "full": "attention without a mask",
    "causal": "causal attention",
    "gqa": "causal attention with grouped heads",
    "mqa": "causal attention with one key/value head",
    "window": "sliding windows",
    "softcap": "softcaps",
    "alibi": "ALiBi",
    "sink": "attention sinks",
    "bias": "attention with a bias",
    "learned": "attention with a learned bias",
    "padding": "key padding under a causal mask",
    "dropout": "attention with dropout",
    "cross": "cross attention",
    "decode": "decoding one token",
}
#: The head size in the pictures, if it was measured.
_HEAD_DIM = 128

Results = Sequence[tuple[Sequence[Row], dict[str, str]]]
"""The results of each machine, and its description."""


@dataclass(frozen=True)
class Line:
    """One length on one machine: measurements by contender."""

    machine: str
    length: int
    rows: dict[str, Row]

    def spent(self, contender: str) -> float:
        """The milliseconds of a contender."""
        milliseconds = self.rows[contender].best_known
        assert milliseconds is not None, "by_case leaves out what failed"
        return milliseconds

    def times_as_fast(self, other: str) -> float | None:
        """How many times as fast `auto` is as another contender."""
        return times_as_fast(self.rows.get(other), self.rows["auto"])


@dataclass(frozen=True)
class Mark:
    """How the dots of a contender look."""

    contender: str
    label: str
    look: dict[str, Any]


_MARKS = (
    Mark("compile", "torch.compile", {"s": 55, "color": ORANGE}),
    Mark(
        "by hand",
        "best call by hand",
        {"s": 120, "facecolors": "none", "edgecolors": GREY, "linewidths": 1.6},
    ),
    Mark("auto", "torch.compile with fusepass", {"s": 45, "color": BLUE}),
)


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw one picture for each kind of attention, and return the files.

    Raises:
        ModuleNotFoundError: matplotlib is missing (`pip install fusepass[docs]`).
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with pyplot.rc_context(STYLE):
        for variant in sorted({row.variant for rows, _ in results for row in rows}):
            head_dim = _head_dim(results, variant)
            panels = {mode: list(lines_of(results, variant, mode, head_dim)) for mode in _PASSES}
            panels = {mode: lines for mode, lines in panels.items() if lines}
            if panels:
                files.append(folder / f"{variant}.svg")
                figure = _picture(pyplot, variant, panels, _setting(results, head_dim))
                figure.savefig(files[-1], metadata={"Date": None}, facecolor="white")
                pyplot.close(figure)
    return files


def _head_dim(results: Results, variant: str) -> int:
    """The usual head size, or the one that was measured most."""
    measured = [row.head_dim for rows, _ in results for row in rows if row.variant == variant]
    return _HEAD_DIM if _HEAD_DIM in measured else max(sorted(set(measured)), key=measured.count)


def lines_of(results: Results, variant: str, mode: str, head_dim: int) -> Iterator[Line]:
    """The lines of a panel, by machine and length."""
    for rows, about in results:
        for (kind, passes, size, length), rows_by_name in sorted(by_case(rows).items()):
            if (kind, passes, size) != (variant, mode, head_dim) or "auto" not in rows_by_name:
                continue
            known = {
                "compile": rows_by_name.get("compile"),
                "auto": rows_by_name["auto"],
                "by hand": best_by_hand(rows_by_name),
            }
            there = {name: row for name, row in known.items() if row is not None}
            yield Line(_short(about.get("device", "")), length, there)


def _short(device: str) -> str:
    """A GPU's usual name, such as "H100"."""
    match = re.search(r"\b[A-Z]+\d+\w*", device)
    return match[0] if match else device


def _setting(results: Results, head_dim: int) -> str:
    """The software that the numbers were measured with."""
    versions = dict.fromkeys(about.get("torch", "") for _, about in results)
    return f"Head size {head_dim}, torch {', '.join(versions)}"


def message(variant: str, lines: Sequence[Line]) -> str:
    """The title of a picture: how many times as fast as the others `auto` is."""
    name = _KINDS.get(variant, variant)
    text = f"{name[0].upper()}{name[1:]}"
    if ratios := [r for line in lines if (r := line.times_as_fast("compile")) is not None]:
        text += f": {_range(ratios)} times as fast as torch.compile"
    if ratios := [r for line in lines if (r := line.times_as_fast("by hand")) is not None]:
        text += f"\nand {_range(ratios)} times as fast as the best call by hand"
    return text


def _range(ratios: Sequence[float]) -> str:
    low, high = _figure(min(ratios)), _figure(max(ratios))
    return low if low == high else f"{low} to {high}"


def _figure(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def _picture(pyplot: Any, variant: str, panels: dict[str, list[Line]], setting: str) -> Any:
    """Draw the title, one panel per pass, and the legend."""
    lines = [line for panel in panels.values() for line in panel]
    places = _places(lines)
    size = (7.8, 2.1 + 0.34 * max(places.values()))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(message(variant, lines), x=0.01, ha="left", weight="bold", size=11)
    for (mode, panel), axis in zip(panels.items(), axes[0], strict=True):
        _draw(axis, panel, places)
        _scales(axis, places)
        axis.set_title(_PASSES[mode], loc="left", size=10)
        axis.set_xlabel("milliseconds (logarithmic)")
    axes[0][0].set_ylabel("length")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=3, frameon=False, handletextpad=0.1,
        title=setting, alignment="left",
    )  # fmt: skip
    return figure


def _places(lines: Sequence[Line]) -> dict[tuple[str, int], float]:
    """The vertical position of each line, with room above each machine for its name."""
    machines = dict.fromkeys(line.machine for line in lines)
    places: dict[tuple[str, int], float] = {}
    for machine in machines:
        start = max(places.values(), default=-1.0) + 2.0
        lengths = sorted({line.length for line in lines if line.machine == machine})
        places |= {(machine, length): start + number for number, length in enumerate(lengths)}
    return places


def _draw(axis: Any, lines: Sequence[Line], places: dict[tuple[str, int], float]) -> None:
    """Draw the dots of a panel, and the numbers above them."""
    for line in lines:
        place, spent = places[line.machine, line.length], [line.spent(name) for name in line.rows]
        axis.plot([min(spent), max(spent)], [place, place], color=PALE, linewidth=3, zorder=1)
        if (ratio := line.times_as_fast("compile")) is not None:
            above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "size": 8}
            axis.annotate(f"{_figure(ratio)}×", (line.spent("auto"), place), color=BLUE, **above)
    for mark in _MARKS:
        shown = [line for line in lines if mark.contender in line.rows]
        spent = [line.spent(mark.contender) for line in shown]
        heights = [places[line.machine, line.length] for line in shown]
        axis.scatter(spent, heights, label=mark.label, zorder=2, **mark.look)


def _scales(axis: Any, places: dict[tuple[str, int], float]) -> None:
    """Label the axes: lengths by machine on the left, milliseconds below."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for machine in dict.fromkeys(machine for machine, _ in places):
        top = min(place for (other, _), place in places.items() if other == machine)
        axis.text(0, top - 0.85, machine, weight="bold", va="center", transform=axis.get_yaxis_transform())
        axis.axhline(top - 1.3, color=PALE, linewidth=0.8)
    axis.set_yticks(list(places.values()), [str(length) for _, length in places])
    axis.set_ylim(max(places.values()) + 0.6, min(places.values()) - 1.4)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.08)
    axis.grid(axis="x", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)


__all__ = ["STYLE", "Results", "lines_of", "message", "plot"]
