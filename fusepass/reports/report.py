"""What the pass did to a graph, as data: sites and graphs, gathered by collectors. Tables are in `tables`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console


@dataclass(frozen=True)
class SiteReport:
    """One attention site of one graph."""

    node: str
    """Name of the node whose value the site computes."""
    fused: bool
    spec: str
    """The recognised attention as one line of text; empty if it was not recognised."""
    kind: str
    """A short label for people, such as "causal, grouped heads 4:2"; empty if unknown."""
    kernel: str | None
    reason: str | None
    """Why the site stays as it was; for a fused site, anything worth knowing."""
    source: str | None
    """Where the model says it, such as "modeling_llama.py:123 attention: w = q @ k"."""
    rejected: tuple[tuple[str, str], ...] = ()
    """(kernel, why not) for every kernel that was asked before the chosen one."""
    max_error: float | None = None
    """Largest error seen by validation, if it ran."""
    label: str | None = None
    """Its name in profiler traces and generated code, if it is fused."""


def merged(site: SiteReport) -> SiteReport:
    """What two sites must share to be shown as one: all but their names and the measured error."""
    return replace(site, node="", max_error=None, label=None)


@dataclass
class GraphReport:
    """One graph that went through the pass."""

    sites: list[SiteReport] = field(default_factory=list)
    seconds: float = 0.0
    """The pass's own time."""
    nodes: int = 0
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    """Buffers whose elements the fused sites rely on, under a guard."""
    apart: list[list[str]] = field(default_factory=list)
    """Arguments of different lists must share no memory: one is read after another was written to."""
    written: list[str] = field(default_factory=list)
    """Buffers that the graph itself writes to, whose elements nothing relies on."""


@dataclass
class Collector:
    """The graphs that were compiled while it was active, in order. Prints as a table of their sites."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def fused(self) -> list[SiteReport]:
        return [site for site in self.sites if site.fused]

    @property
    def left(self) -> list[SiteReport]:
        return [site for site in self.sites if not site.fused]

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for graph in self.graphs for note in graph.notes))

    @property
    def seconds(self) -> float:
        return sum(graph.seconds for graph in self.graphs)

    def summary(self) -> str:
        """One line: how many sites, how many fused, by which kernels."""
        return summary(self)

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        render(self, Console(file=text, width=120))
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        counts = {"sites": len(self.sites), "fused": len(self.fused), "left": len(self.left)}
        return {**counts, "seconds": self.seconds, "graphs": [asdict(graph) for graph in self.graphs]}


_active: ContextVar[tuple[Collector, ...]] = ContextVar("fusepass_collectors", default=())


@contextmanager
def collect() -> Iterator[Collector]:
    """Gathers the report of every graph compiled by this thread inside the block; blocks may nest."""
    collector = Collector()
    token = _active.set((*_active.get(), collector))
    try:
        yield collector
    finally:
        _active.reset(token)


def publish(report: GraphReport) -> None:
    """Hands a graph's report to every active collector."""
    for collector in _active.get():
        collector.graphs.append(report)


def summary(collector: Collector) -> str:
    """One line: how many sites, how many fused, by which kernels."""
    sites, fused, left = len(collector.sites), len(collector.fused), len(collector.left)
    if not sites:
        return f"no attention found in {_count(len(collector.graphs), 'graph')}"
    kernels = dict.fromkeys(site.kernel or "?" for site in collector.fused)
    by = f" ({', '.join(kernels)})" if kernels else ""
    stay = f", {left} left as it was" if left else ""
    graphs = _count(len(collector.graphs), "graph")
    return (
        f"{fused} of {_count(sites, 'attention site')} fused{by}{stay}; {graphs}, {collector.seconds:.2f} s"
    )


def render(collector: Collector, console: "Console | None" = None) -> None:
    """Prints the table of sites and the one-line summary."""
    from rich.console import Console

    from fusepass.reports.tables import site_table

    console = console or Console()
    if collector.sites:
        console.print(site_table(collector))
    console.print(summary(collector), highlight=False, markup=False)
    for note in collector.notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)


_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$')


def label_for(number: int, kind: str, kernel: str, source: str | None) -> str:
    """The name of a fused site: `fusepass 3: causal, sdpa, model.py:12`."""
    place = f", {source.partition(' ')[0]}" if source else ""
    return f"fusepass {number}: {kind}, {kernel}{place}"


def source_of(node: "torch.fx.Node") -> str | None:
    """The innermost line of the user's code that made a node: file, line, function, code; None if unknown."""
    trace = node.meta.get("stack_trace") or getattr(node, "stack_trace", None)
    if not trace:
        return None
    frames = _frames(trace)
    if not frames:
        return None
    own = [frame for frame in frames if not frame[0].startswith(_torch_folder())]
    file, line, function, code = (own or frames)[-1]
    return f"{Path(file).name}:{line} {function}" + (f": {code}" if code else "")


def _frames(trace: str) -> list[tuple[str, str, str, str]]:
    """(file, line, function, code) of a formatted stack trace, outermost first."""
    lines = trace.splitlines()
    frames = []
    for number, text in enumerate(lines):
        if match := _FRAME.match(text):
            after = lines[number + 1] if number + 1 < len(lines) else ""
            code = "" if _FRAME.match(after) else after.strip()
            frames.append((match["file"], match["line"], match["function"], code))
    return frames


@cache
def _torch_folder() -> str:
    import torch

    return str(Path(torch.__file__).parent) + "/"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
