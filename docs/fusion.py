"""Draws docs/fusion.svg: which sites are fused, and the memory that a call takes.

    python examples/demo.py --json --inner inductor > demo.json
    python benchmarks/census.py gpt2 bert llama --rows rows.jsonl
    python docs/fusion.py --demo demo.json --rows rows.jsonl      keeps the numbers in docs/fusion.json
    python docs/fusion.py                                         draws the kept numbers again

Needs matplotlib: pip install "fusepass[docs]".
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fusepass.tools.bench.plot import BLUE, GREY, ORANGE, PALE, STYLE

HERE = Path(__file__).parent


def kept(demo: Path, rows: Path) -> dict[str, Any]:
    """The numbers of the picture, out of what the two commands wrote."""
    memory = {
        title: {way: cost["peak_bytes"] for way, cost in case["costs"].items()}
        for title, case in json.loads(demo.read_text()).items()
    }
    measured = [json.loads(line) for line in rows.read_text().splitlines()]
    if failed := [row["family"] for row in measured if "failed" in row]:
        raise SystemExit(f"failed, and must not be left out of the picture: {', '.join(failed)}")
    sites = [
        [row["family"], row["sites"], row["inductor"], row["sites"] - row["left"]]
        for row in measured
        if row.get("sites") and row["inductor"] is not None
    ]
    return {"memory": memory, "sites": sites}


def draw_sites(axes: Axes, sites: list[list[Any]]) -> None:
    """One square a site, filled where it is fused; a line a family, a column a compiler."""
    widest = max(count for _, count, _, _ in sites)
    columns = (("TorchInductor\nalone", 2, ORANGE, 0.0), ("with\nfusepass", 3, BLUE, widest + 2.0))
    for line, row in enumerate(sites):
        axes.text(-0.8, line, row[0], ha="right", va="center")
        for _, place, colour, left in columns:
            for n in range(row[1]):
                face = colour if n < row[place] else PALE
                axes.add_patch(Rectangle((left + n, line - 0.4), 0.8, 0.8, facecolor=face, linewidth=0))
    total = sum(row[1] for row in sites)
    for title, place, colour, left in columns:
        done = sum(row[place] for row in sites)
        axes.text(left, -1.0, f"{title}\n{done} of {total}", color=colour, weight="bold", va="bottom")
    axes.set_xlim(-7.5, 2 * widest + 3.5)
    axes.set_ylim(len(sites) - 0.3, -2.6)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")
    title = f"Attention sites fused in {len(sites)} models"
    axes.set_title(title, loc="left", weight="bold", size=11, pad=34)


def draw_memory(axes: Axes, memory: dict[str, dict[str, int]]) -> None:
    """A line a model: a grey dot for eager, orange for Inductor, blue for Inductor with the pass."""
    ways = (
        ("eager", GREY, "eager"),
        ("inner", ORANGE, "torch.compile"),
        ("fused", BLUE, "with fusepass"),
    )
    for line, costs in enumerate(memory.values()):
        places = [costs[way] / 1e6 for way, _, _ in ways]
        axes.plot([min(places), max(places)], [line, line], color=PALE, linewidth=3, zorder=1)
        for (_, colour, label), place in zip(ways, places, strict=True):
            axes.scatter(place, line, s=70, color=colour, zorder=2, label=label if line == 0 else None)
        axes.annotate(
            f"{places[2]:.0f}", (places[2], line), (0, 8), textcoords="offset points", ha="center", color=BLUE
        )
    axes.set_yticks(range(len(memory)), list(memory))
    axes.set_ylim(len(memory) - 0.4, -0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("MB allocated at most (two layers, length 1024, float32 on a CPU)", size=9)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title("Peak memory of a forward pass", loc="left", weight="bold", size=11, pad=34)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, handletextpad=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="what `examples/demo.py --json --inner inductor` printed")
    parser.add_argument("--rows", type=Path, help="what `benchmarks/census.py --rows` wrote")
    parser.add_argument("--png", type=Path, help="a second file, to look at")
    options = parser.parse_args()
    store = HERE / "fusion.json"
    if options.demo and options.rows:
        store.write_text(json.dumps(kept(options.demo, options.rows), indent=1) + "\n")
    numbers = json.loads(store.read_text())
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9.6, 5.2), width_ratios=[1.1, 1], layout="constrained"
        )
        draw_sites(left, numbers["sites"])
        draw_memory(right, numbers["memory"])
        figure.savefig(HERE / "fusion.svg", metadata={"Date": None}, facecolor="white")
        if options.png:
            figure.savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
