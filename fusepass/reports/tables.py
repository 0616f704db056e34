"""Reports as tables for people: from plain data to rich tables."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from fusepass.reports.check import Check
from fusepass.reports.measure import Cost
from fusepass.reports.report import SiteReport, merged


def site_table(sites: Sequence[SiteReport]) -> Table:
    """A table with one row for all sites that read the same, in order of appearance."""
    table = Table(title="Attention sites", title_justify="left", header_style="bold", expand=False)
    table.add_column("sites", justify="right")
    table.add_column("recognised as", ratio=3, overflow="fold")
    table.add_column("kernel, or why it stays", ratio=3, overflow="fold")
    table.add_column("source", ratio=3, overflow="fold", style="dim")
    for site, count in Counter(map(merged, sites)).items():
        table.add_row(str(count), _recognised(site), _outcome(site), escape(site.source or "unknown"))
    return table


def _recognised(site: SiteReport) -> str:
    if not site.spec and not site.kind:
        return "[yellow]not recognised[/yellow]"
    kind = f"[bold]{escape(site.kind)}[/bold]" if site.kind else ""
    return "\n".join(part for part in (kind, escape(site.spec)) if part)


def _outcome(site: SiteReport) -> str:
    if not site.fused:
        return f"[yellow]stays:[/yellow] {escape(site.reason or 'no reason was recorded')}"
    reason = f"\n{escape(site.reason)}" if site.reason else ""
    passed_over = "".join(f"\n[dim]not {escape(name)}: {escape(why)}[/dim]" for name, why in site.rejected)
    return f"[green]{escape(site.kernel or '?')}[/green]{reason}{passed_over}"


def check_table(outputs: Sequence[Check], gradients: Sequence[Check], exact: str) -> Table:
    """A table of the errors of every output, and of the worst gradient."""
    title = f"Errors against {exact}, relative to the largest value"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("result", overflow="fold")
    for head in ("eager", "fused", "ratio", "allowed"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    rows = [(check.name, check) for check in outputs]
    if gradients:
        worst = max(gradients, key=lambda check: check.fused_error - check.allowed)
        rows.append((f"{len(gradients)} gradients, worst: {worst.name}", worst))
    for name, check in rows:
        errors = (f"{check.eager_error:.1e}", f"{check.fused_error:.1e}", f"{check.ratio:.2f}")
        verdict = "[green]ok[/green]" if check.ok else "[bold red]wrong[/bold red]"
        table.add_row(escape(name), *errors, f"{check.allowed:.1e}", verdict)
    return table


def cost_table(costs: Mapping[str, Cost], inner: str) -> Table:
    """A table of time and memory for every way of running."""
    names = {"eager": "eager", "inner": f"{inner} alone", "fused": f"{inner} with fusepass"}
    table = Table(title="Time and memory of one call", title_justify="left", header_style="bold")
    table.add_column("run as")
    table.add_column("median time", justify="right")
    table.add_column("peak memory", justify="right")
    for way, cost in costs.items():
        table.add_row(escape(names.get(way, way)), f"{cost.milliseconds:.2f} ms", size(cost.peak_bytes))
    return table


def size(count: float | None) -> str:
    """A number of bytes in readable units."""
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
