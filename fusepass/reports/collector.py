"""Reports of graphs, collected while they are compiled, and shown as a table and a summary line."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console

from fusepass.reports.report import GraphReport, SiteReport
from fusepass.reports.tables import site_table


@dataclass
class Collector:
    """The graphs that were compiled inside a `collect` block, in order. Prints as a table of their sites."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteReport]:
        """The attention sites of all graphs, fused or not."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def fused(self) -> list[SiteReport]:
        """The sites that run on one kernel."""
        return [site for site in self.sites if site.fused]

    @property
    def left(self) -> list[SiteReport]:
        """The sites that stay as they were written; each has a `reason`."""
        return [site for site in self.sites if not site.fused]

    @property
    def notes(self) -> list[str]:
        """The notes of all graphs, each once."""
        return list(dict.fromkeys(note for graph in self.graphs for note in graph.notes))

    @property
    def seconds(self) -> float:
        """The time that the pass took for all graphs."""
        return sum(graph.seconds for graph in self.graphs)

    def summary(self) -> str:
        """One line: the number of sites, how many are fused, and by which kernels."""
        return summary(self)

    def __str__(self) -> str:
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
    """Gather the reports of all graphs that this thread compiles inside the block. Blocks may be nested."""
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
    """One line: the number of sites, how many are fused, and by which kernels."""
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


def render(collector: Collector, console: Console | None = None) -> None:
    """Prints the table of sites and the one-line summary."""
    console = console or Console()
    if collector.sites:
        console.print(site_table(collector.sites))
    console.print(summary(collector), highlight=False, markup=False)
    for note in collector.notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
