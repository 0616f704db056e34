"""The output of `fusepass bench`: a table, a page, and a profile for the cost model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from fusepass.host.kernel_names import LIBRARIES
from fusepass.selection import costs
from fusepass.selection.work import UNFUSED
from fusepass.tools.bench import measuring as bench
from fusepass.tools.bench.cases import VARIANTS
from fusepass.tools.bench.measuring import Row

Key = tuple[str, str, int, int]


def by_case(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """Rows by variant, mode, head size and length, then by contender; failed rows are left out."""
    table: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row.milliseconds is not None:
            table.setdefault((row.variant, row.mode, row.head_dim, row.length), {})[row.contender] = row
    return table


def best_by_hand(contenders: dict[str, Row], gpu: bool = True) -> Row | None:
    """The fastest hand-written call that computes the same: a repaired one, if there are any.

    ``gpu``: compare the GPU's times, where known, and not those of calls back to back.
    """
    return _fastest(contenders, "repaired ", gpu) or _fastest(contenders, "hand ", gpu)


def _fastest(contenders: dict[str, Row], kind: str, gpu: bool) -> Row | None:
    named = [row for name, row in contenders.items() if name.startswith(kind)]
    return min(named, key=lambda r: _spent(r, gpu) or 0.0, default=None)


def _spent(row: Row, gpu: bool) -> float | None:
    return row.best_known if gpu else row.milliseconds


HEAD = (
    "variant", "pass", "D", "S", "eager", "compile", "best by hand", "auto", "kernel", "× compile",
    "× by hand", "calls × by hand",
)  # fmt: skip


def lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line per case: the choice of `auto`, and how many times as fast as the others it is.

    Times are the GPU's if they are known; the last column compares calls back to back.
    """
    table: list[tuple[str, ...]] = []
    rows = list(rows)
    others = of_packages(rows)
    for (variant, mode, head_dim, length), contenders in sorted(by_case(rows).items()):
        hand, auto, plain = best_by_hand(contenders), contenders.get("auto"), contenders.get("compile")
        table.append((
            variant, mode, str(head_dim), str(length), _time(contenders.get("eager")), _time(plain),
            "" if hand is None else f"{_time(hand)} {hand.contender.split()[1]}", _time(auto),
            "" if auto is None else auto.kernel, _ratio(plain, auto), _ratio(hand, auto),
            _ratio(best_by_hand(contenders, gpu=False), auto, gpu=False),
            *(_time(contenders.get(name)) for name in others),
        ))  # fmt: skip
    return table


def of_packages(rows: Sequence[Row]) -> list[str]:
    """The contenders that are kernels of other packages: each has a column of its own."""
    known = ("eager", "compile", "auto", *LIBRARIES)
    return [
        name for name in dict.fromkeys(r.contender for r in rows) if name not in known and " " not in name
    ]


def by_name(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """For results without ``auto``: a head, and a line per case with every contender's time.

    The cell of a kernel also tells how many times as fast it is as ``compile``.
    """
    named = list(dict.fromkeys(row.contender for row in rows))
    table: list[tuple[str, ...]] = []
    for (variant, mode, head_dim, length), contenders in sorted(by_case(rows).items()):
        cells = [_time(contenders.get(name)) for name in named]
        for place, name in enumerate(named):
            ratio = _ratio(contenders.get("compile"), contenders.get(name))
            if ratio and name not in ("eager", "compile"):
                cells[place] += f" ({ratio}×)"
        table.append((variant, mode, str(head_dim), str(length), *cells))
    return (*HEAD[:4], *named), table


def _head_and_lines(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    if not any(r.contender == "auto" for r in rows):
        return by_name(rows)
    return (*HEAD, *of_packages(rows)), lines(rows)


def summary(rows: Iterable[Row]) -> Table:
    """The lines as a table for a terminal."""
    table = Table(title="Attention, median milliseconds", title_justify="left", header_style="bold")
    head, body = _head_and_lines(list(rows))
    for name in head:
        left = name in ("variant", "pass", "best by hand", "kernel")
        table.add_column(name, justify="left" if left else "right")
    for line in body:
        table.add_row(*line)
    return table


ABOUT = """\
Median milliseconds of the GPU, measured by replaying a CUDA graph of the call, on random data with 16384
tokens and 2048 features unless the rows say otherwise. The contenders of a case take turns.

- `compile` is `torch.compile` of attention as it is written, and `auto` is fusepass on the same.
- The best call by hand is the fastest library call that computes the same from the same inputs. Only
  FlexAttention is compiled there.
- The × columns say how many times as fast `auto` is. The last one compares calls back to back, where a
  compiled function of a short problem waits for its own launch."""


ABOUT_NAMED = """\
Median milliseconds on random data. `compile` is `torch.compile` of attention as it is written. The column of
a kernel is fusepass with that kernel; in brackets stands how many times as fast as `compile` it is."""


def markdown(rows: Sequence[Row], machine: dict[str, str], source: str) -> str:
    """The lines as a page."""
    head, table = _head_and_lines(rows)
    automatic = head[: len(HEAD)] == HEAD
    about = ABOUT if automatic else ABOUT_NAMED
    device = f" on {machine['device']}" if "device" in machine else ""
    text = [f"# Attention, measured{device}", "",
            f"Made by `python -m fusepass bench --read {source} --markdown FILE`,"
            " from measurements with:", "",
            *(f"- {k}: {v}" for k, v in machine.items()), "", about, ""]  # fmt: skip
    text += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    text += [f"| {' | '.join(line)} |" for line in table]
    if not automatic:
        return "\n".join([*text, ""])
    return "\n".join([*text, "", *_behind(table), *_unrepaired(rows)])


def _behind(table: Sequence[tuple[str, ...]]) -> list[str]:
    """The cases in which the best call by hand is more than 3% faster than `auto`."""
    compared = [line for line in table if line[10]]
    lost = [line for line in compared if float(line[10]) < 0.97]
    kept = f"{len(compared) - len(lost)} of {len(compared)}"
    text = f"In {kept} cases `auto` is at least 0.97 times as fast as the best call by hand."
    if not lost:
        return [text, ""]
    cases: dict[str, list[str]] = {}
    for variant, mode, head_dim, length, *_, by_hand, _ in (line[:12] for line in lost):
        cases.setdefault(variant, []).append(f"{mode} {head_dim} × {length} ({by_hand})")
    listed = [f"- {variant}: {', '.join(places)}" for variant, places in cases.items()]
    slower = "It is slower than that in (head size × length, its speed relative to that call):"
    return [f"{text} {slower}", "", *listed, ""]


ABOUT_UNREPAIRED = """\
In rows that see no key, calls of the libraries give zero or NaN, where these programs give the mean of all
values. When the call is compiled, nothing proves that the data has no such rows. So `auto` and the best call
by hand above repair them. Here is the fastest call that does not."""


def _unrepaired(rows: Sequence[Row]) -> list[str]:
    """The cases in which a faster hand-written call computes something else."""
    text = []
    for (variant, mode, head_dim, length), contenders in sorted(by_case(rows).items()):
        auto, best = contenders.get("auto"), _fastest(contenders, "hand ", gpu=True)
        if auto is not None and best is not None and _fastest(contenders, "repaired ", gpu=True) is not None:
            cells = (
                variant,
                mode,
                str(head_dim),
                str(length),
                _time(best),
                best.contender.split()[1],
                _time(auto),
            )
            text.append(f"| {' | '.join(cells)} | {_ratio(best, auto)} |")
    if not text:
        return []
    head = ("variant", "pass", "D", "S", "not repaired", "kernel", "auto", "× not repaired")
    return ["## Rows that see no key", "", ABOUT_UNREPAIRED, "", f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}", *text, ""]  # fmt: skip


def _time(row: Row | None) -> str:
    return "" if row is None or row.best_known is None else f"{row.best_known:.4g}"


def _ratio(other: Row | None, mine: Row | None, gpu: bool = True) -> str:
    ratio = times_as_fast(other, mine, gpu)
    return "" if ratio is None else f"{ratio:.2f}"


def times_as_fast(other: Row | None, mine: Row | None, gpu: bool = True) -> float | None:
    """How many times as fast ``mine`` is as ``other``; GPU times are compared only with GPU times."""
    if other is None or mine is None:
        return None
    gpu = gpu and other.gpu_milliseconds is not None and mine.gpu_milliseconds is not None
    theirs, ours = _spent(other, gpu), _spent(mine, gpu)
    return theirs / ours if theirs and ours else None


def problems(rows: Iterable[Row]) -> dict[str, int]:
    """The problems, each with the number of rows that have it."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.problem:
            text = f"{row.contender}, {row.variant}: {row.problem[:110]}"
            counts[text] = counts.get(text, 0) + 1
    return counts


def samples(rows: Iterable[Row]) -> list[costs.Sample]:
    """The rows that the cost model learns from: kernels by name, and plain `torch.compile`."""
    chosen, known = [], bench.by_name()
    for row in rows:
        kernel = UNFUSED if row.contender == "compile" else row.contender
        if row.milliseconds is None or kernel not in (UNFUSED, *known):
            continue
        kind = VARIANTS[row.variant].kind
        rows_of_queries = row.batch * row.heads * row.queries
        keys = row.keys if costs.sees_all(kernel, kind) else row.pairs / rows_of_queries
        size = rows_of_queries * 2 * row.head_dim
        spent = row.best_known or row.milliseconds
        launch = max(spent, row.milliseconds)
        chosen.append(costs.Sample(kernel, kind, row.head_dim, row.mode, size, keys, spent, launch))
    return chosen


#: Devices that share a profile: the same chip with different memory.
_SAME_CHIP = {
    "NVIDIA H200": (
        "NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H100",
    ),
}  # fmt: skip


def profile_of(rows: Iterable[Row], machine: dict[str, str]) -> costs.Profile:
    """The cost model of the machine that the rows were measured on."""
    name = machine["device"]
    return costs.Profile(_SAME_CHIP.get(name, (name,)), dict(machine), costs.curves(samples(rows)))


def curves_table(profile: costs.Profile) -> Table:
    """The cost model as a readable table."""
    table = Table(title=f"Cost model of {profile.devices[0]}", title_justify="left", header_style="bold")
    for name in ("kernel", "kind", "D", "pass", "launch ms", "points", "keys", "TFLOP/s there"):
        table.add_column(name, justify="left" if name in ("kernel", "kind", "pass") else "right")
    for c in profile.curves:
        keys, rate = c.points[-1]
        flops = 2 * keys * (3.5 if c.mode == costs.TRAINING else 1)
        table.add_row(
            c.kernel, c.kind, str(c.head_dim), c.mode, f"{c.launch:.3f}", str(len(c.points)), f"{keys:.0f}",
            f"{flops / rate / 1e3:.0f}",
        )  # fmt: skip
    return table


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table and the problems."""
    console.print(summary(rows))
    for text, count in problems(rows).items():
        console.print(f"{count} × {text}", style="dim", highlight=False, markup=False)


__all__ = [
    "best_by_hand",
    "by_case",
    "curves_table",
    "lines",
    "markdown",
    "problems",
    "profile_of",
    "samples",
    "show",
    "summary",
    "times_as_fast",
]
