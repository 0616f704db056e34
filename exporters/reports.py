"""What an exporter did, as data and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.table import Table

from fusepass.reports.report import GraphReport
from fusepass.reports.tables import site_table


@dataclass(frozen=True)
class Check:
    """One output of the exported model, compared with the original's.

    Attributes:
        inputs: the shapes it was run with.
        output: the name of the output.
        error: the largest difference, in units of the original's largest value.
        allowed: the largest error that passes.
    """

    inputs: str
    output: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Does the output agree?"""
        return self.error <= self.allowed


@dataclass
class ExportReport:
    """A model that was written.

    Attributes:
        path: the file.
        target: the runtime it was written for, or "pt2" or "aoti".
        graph: every attention site, fused or not.
        operators: how many of each fused operator (in ONNX) or kernel (in a package) the file has.
        softmaxes: the number of softmaxes left.
        checks: the outputs of the file, compared with the original's; empty if it was not run.
        versions: the operator sets of an ONNX file by domain, and its IR version.
        notes: remarks for the user.
        seconds: how long the export took, checks included.
    """

    path: str
    target: str
    graph: GraphReport
    operators: dict[str, int] = field(default_factory=dict)
    softmaxes: int = 0
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fused(self) -> int:
        """The number of sites that became a fused operator."""
        return sum(site.fused for site in self.graph.sites)

    @property
    def sites(self) -> int:
        """The number of attention sites."""
        return len(self.graph.sites)

    @property
    def max_error(self) -> float:
        """The largest error of all checks; NaN if nothing was checked."""
        return max((c.error for c in self.checks), default=float("nan"))

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {**asdict(self), "fused": self.fused, "sites": self.sites}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.graph.sites:
            yield site_table(self.graph.sites)
        if self.checks:
            yield _check_table(self.checks)
        written = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        yield escape(
            f"{self.fused} of {self.sites} attention sites fused ({written or 'no fused operator'}), "
            f"{self.softmaxes} softmaxes left"
        )
        for note in dict.fromkeys((*self.graph.notes, *self.notes)):
            yield f"[dim]note: {escape(note)}[/dim]"
        yield self._summary()

    def _summary(self) -> Table:
        """What was written, in one line."""
        table = Table(title="Written", title_justify="left", header_style="bold", expand=False)
        for name in ("file", "sites fused", "operators", "softmaxes left", "largest error", "versions", "s"):
            table.add_column(name, overflow="fold")
        versions = ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in self.versions.items())
        written = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        table.add_row(
            escape(self.path),
            f"{self.fused} of {self.sites}",
            escape(written) or "none",
            str(self.softmaxes),
            f"{self.max_error:.2g}" if self.checks else "not checked",
            versions or self.target,
            f"{self.seconds:.1f}",
        )
        return table


def _check_table(checks: list[Check]) -> Table:
    table = Table(title="Checked by running it", title_justify="left", header_style="bold", expand=False)
    table.add_column("inputs", overflow="fold")
    table.add_column("output", overflow="fold")
    table.add_column("largest error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for check in checks:
        mark = "[green]ok[/green]" if check.ok else "[bold red]differs[/bold red]"
        table.add_row(
            escape(check.inputs), escape(check.output), f"{check.error:.2g}", f"{check.allowed:.2g}", mark
        )
    return table
