"""Writes the measured numbers of README.md from the files that the measurements were written to.

    python -m benchmarks.readme            rewrites the marked parts of README.md
    python -m benchmarks.readme --check    changes nothing; fails if a part is out of date

A part stands between `<!-- NAME: from SOURCES -->` and `<!-- end -->`. No number in it is typed by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import models

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = {
    "H100": ROOT / "benchmarks/results/models-nvidia-h100-80gb-hbm3.csv",
    "H200": ROOT / "benchmarks/results/models-nvidia-h200.csv",
}
MODES = {"forward": "inference", "training": "training"}


def census() -> str:
    """How many sites of `transformers` are fused, from the census and the numbers behind the picture."""
    text = (ROOT / "benchmarks/census.md").read_text(encoding="utf-8")
    match = re.search(
        r"(\d+) families: (\d+) could be judged, .*; (\d+) wrong, (\d+) failed.*?fused (\d+) of (\d+) sites"
        r".*?alone fused (\d+) of \6",
        text,
        re.DOTALL,
    )
    assert match, "the head of benchmarks/census.md has another form"
    families, judged, wrong, failed, fused, sites, alone = match.groups()
    pictured = json.loads((ROOT / "docs/fusion.json").read_text(encoding="utf-8"))["sites"]
    counts = [sum(row[place] for row in pictured) for place in (1, 2, 3)]
    lines = (
        f"The picture shows {len(pictured)} model families of `transformers` with {counts[0]} sites: "
        f"TorchInductor alone fuses {counts[1]}, fusepass {counts[2]}. Of all",
        f"{families} names in the [census](benchmarks/census.md), {judged} could be built small and judged "
        f"(and {failed} ran into the time limit):",
        f"TorchInductor alone fuses {alone} of their {sites} sites, fusepass {fused}, "
        f"and {wrong if int(wrong) else 'no'} result was wrong. Every site that stays has its reason there.",
    )
    return "\n".join(lines)


def speedups() -> str:
    """How many times as fast whole models run, one line per model."""
    measured = {gpu: _ratios(place) for gpu, place in RESULTS.items()}
    columns = [(gpu, mode) for gpu in RESULTS for mode in MODES]
    names = dict.fromkeys(name for ratios in measured.values() for name, _ in ratios)
    head = ["model", *(f"{gpu}, {MODES[mode]}" for gpu, mode in columns)]
    lines = [head, ["---"] + ["--:"] * len(columns)]
    lines += [
        [name, *(measured[gpu].get((name, mode), "not measured") for gpu, mode in columns)] for name in names
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratios(place: Path) -> dict[tuple[str, str], str]:
    """By model and pass: how many times as fast it is as the compiled eager model / the best call by hand."""
    rows, _ = models.read(place)
    spent: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.milliseconds is not None:
            spent.setdefault((row.model, row.mode), {})[row.contender] = row.milliseconds
    return {case: _cell(times) for case, times in spent.items() if "fusepass" in times}


def _cell(times: dict[str, float]) -> str:
    mine = times["fusepass"]
    by_hand = [times[name] for name in ("sdpa", "flash_attention_2") if name in times]
    others = (times.get("eager"), min(by_hand, default=None))
    return " / ".join("–" if other is None else f"{other / mine:.2f}" for other in others)


PARTS: dict[str, Callable[[], str]] = {"census": census, "speedups": speedups}


def written(text: str) -> str:
    """The page with all marked parts rewritten."""
    for name, part in PARTS.items():
        marked = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- end -->)"
        text, count = re.subn(marked, lambda m, p=part: f"{m[1]}\n{p()}\n\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, f"{name}: marked {count} times"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a part is out of date")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = written(before)
    if options.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
