"""Reports as one HTML page without other files or scripts, for light and dark themes and any width."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from fusepass import __version__
from fusepass.reports.collector import Collector, summary
from fusepass.reports.report import SiteReport, merged


@dataclass(frozen=True)
class RangeTime:
    """What a profiler saw of one range: how often it ran, and its total milliseconds on CPU and GPU."""

    calls: int
    cpu: float
    device: float


def range_times(events: Iterable[Any]) -> dict[str, RangeTime]:
    """The ranges of fused sites among a profiler's averages (`profile.key_averages()`), by label."""
    ranges: dict[str, RangeTime] = {}
    for event in events:
        if event.key.startswith("fusepass "):
            device = getattr(event, "device_time_total", 0.0)
            before = ranges.get(event.key, RangeTime(0, 0.0, 0.0))
            on_cpu = str(getattr(event, "device_type", "")).endswith("CPU")
            ranges[event.key] = RangeTime(
                before.calls + (event.count if on_cpu else 0),
                before.cpu + event.cpu_time_total / 1e3,
                max(before.device, device / 1e3),
            )
    return ranges


def page(
    collector: Collector,
    title: str,
    seconds: float | None = None,
    times: Mapping[str, RangeTime] | None = None,
) -> str:
    """The page as HTML.

    Args:
        collector: the graphs that were compiled.
        title: what was run.
        seconds: how long the whole run took.
        times: what a profiler saw, by the `label` of each site.
    """
    groups: dict[SiteReport, list[SiteReport]] = {}
    for site in collector.sites:
        groups.setdefault(merged(site), []).append(site)
    fused = [(site, all_of) for site, all_of in groups.items() if site.fused]
    left = [(site, all_of) for site, all_of in groups.items() if not site.fused]
    body = [
        f"<header><p class=eyebrow>fusepass report</p><h1>{escape(title)}</h1>"
        f"<p class=lead>{escape(summary(collector))}</p></header>",
        _tiles(collector, seconds),
        _section("Fused", "Attention that runs on one kernel.", fused, times or {}),
        _section(
            "Left as it was",
            "Sites that resemble attention and stay as they were written, with the reason.",
            left,
            {},
        ),
        _notes(collector.notes),
        _graphs(collector),
        f"<footer>{escape(_versions())}</footer>",
    ]
    return _FRAME.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, body)))


_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · fusepass</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


def _tiles(collector: Collector, seconds: float | None) -> str:
    """The main numbers, at the head of the page."""
    sites, fused = len(collector.sites), len(collector.fused)
    share = f"{100 * fused / sites:.0f}" if sites else "0"
    bar = f'<span class=bar role=img aria-label="{share}% fused"><i style="width:{share}%"></i></span>'
    tiles = [
        ("sites fused", f"{fused}<small> of {sites}</small>{bar}"),
        ("graphs", str(len(collector.graphs))),
        ("time of the pass", _time(collector.seconds * 1e3)),
    ]
    if seconds is not None:
        tiles.append(("whole run", _time(seconds * 1e3)))
    return (
        "<dl class=tiles>"
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
        + "</dl>"
    )


def _section(
    title: str,
    about: str,
    groups: Sequence[tuple[SiteReport, list[SiteReport]]],
    times: Mapping[str, RangeTime],
) -> str:
    """The sites that were fused, or those that stay; empty if there are none."""
    if not groups:
        return ""
    count = sum(len(all_of) for _, all_of in groups)
    cards = "\n".join(_card(site, all_of, times) for site, all_of in groups)
    head = f"<h2>{title} <span class=count>{count}</span></h2><p class=about>{about}</p>"
    return f"<section>{head}\n{cards}</section>"


def _card(site: SiteReport, all_of: Sequence[SiteReport], times: Mapping[str, RangeTime]) -> str:
    """One card for all sites that read the same."""
    many = f"<span class=times>× {len(all_of)}</span>" if len(all_of) > 1 else ""
    kind = escape(site.kind) if site.kind else "not recognised"
    badge = f"<b class=kernel>{escape(site.kernel or '?')}</b>" if site.fused else "<b class=stays>stays</b>"
    parts = [f"<h3>{kind} {many}{badge}</h3>", _source(site.source)]
    if site.reason or not site.fused:
        parts.append(f"<p class=reason>{escape(site.reason or 'no reason was recorded')}</p>")
    if spent := [time for one in all_of for time in _of(one, times)]:
        parts.append(_spent(spent))
    if site.spec:
        parts.append(f"<p class=spec><code>{escape(site.spec)}</code></p>")
    errors = [one.max_error for one in all_of if one.max_error is not None]
    if errors:
        parts.append(f"<p class=spec>largest error: {max(errors):.2g} times what is allowed</p>")
    if site.rejected and site.fused:
        rows = "".join(f"<li><b>{escape(name)}</b> {escape(why)}</li>" for name, why in site.rejected)
        parts.append(f"<details><summary>why not another kernel</summary><ul>{rows}</ul></details>")
    labels = [one.label for one in all_of if one.label]
    if labels:
        rows = "".join(f"<li><code>{escape(label)}</code></li>" for label in labels)
        parts.append(f"<details><summary>names in profiler traces</summary><ul>{rows}</ul></details>")
    return f"<article class={'fused' if site.fused else 'left'}>{''.join(parts)}</article>"


def _of(site: SiteReport, times: Mapping[str, RangeTime]) -> list[RangeTime]:
    """The forward and backward ranges of a site."""
    names = (site.label, f"{site.label}, backward") if site.label else ()
    return [times[name] for name in names if name in times]


def _spent(times: Sequence[RangeTime]) -> str:
    """The time spent in the kernels of some sites."""
    calls, cpu, device = (
        sum(values) for values in zip(*((t.calls, t.cpu, t.device) for t in times), strict=True)
    )
    gpu = f", {_time(device)} on the GPU" if device else ""
    return f"<p class=spent>{_time(cpu)} in {calls} calls{gpu}</p>"


def _source(source: str | None) -> str:
    """The line of the user's code."""
    if not source:
        return "<p class=source>source unknown</p>"
    place, _, rest = source.partition(" ")
    function, _, code = rest.partition(": ")
    shown = f"<pre tabindex=0><code>{escape(code)}</code></pre>" if code else ""
    return f"<p class=source>{escape(place)} <span>in {escape(function)}</span></p>{shown}"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return (
        "<section><h2>Notes</h2><ul>"
        + "".join(f"<li>{escape(note)}</li>" for note in notes)
        + "</ul></section>"
    )


def _graphs(collector: Collector) -> str:
    """A table of graphs: their sizes, the time of the pass, and what they rely on."""
    rows = []
    for number, graph in enumerate(collector.graphs):
        fused = sum(site.fused for site in graph.sites)
        cells = (str(number), str(graph.nodes), f"{fused} of {len(graph.sites)}", _time(graph.seconds * 1e3))
        rows.append(
            "<tr>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f"<td>{escape(', '.join(graph.assumed))}</td></tr>"
        )
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("graph", "nodes", "fused", "pass", "guarded buffers"))
    table = (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f"<section><h2>Graphs <span class=count>{len(rows)}</span></h2>{table}</section>"


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    return f"{milliseconds:.3g} ms"


def _versions() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return (
        f"fusepass {__version__} · torch {torch.__version__} · Python {platform.python_version()} · {device}"
    )


_STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1d2330;--soft:#5b6474;--line:#e3e0d8;--code:#f3f1eb;--good:#0f6b4f;
--good-soft:#dff2ea;--wait:#8a5a00;--wait-soft:#fbeed3;font:16px/1.55 system-ui,sans-serif}
@media(prefers-color-scheme:dark){:root{--paper:#13161c;--card:#1b1f27;--ink:#e8e9ec;--soft:#a0a8b6;--line:#2d333e;
--code:#12151b;--good:#6fd6ac;--good-soft:#16352b;--wait:#f0c069;--wait-soft:#3a2d12}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink)}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 3rem}
.eyebrow{margin:0;color:var(--good);font-weight:600;font-size:.85rem}
h1{margin:.1rem 0 .4rem;font-size:1.9rem;line-height:1.2;overflow-wrap:anywhere}
.lead,.about{color:var(--soft);margin:0}h2{margin:2.5rem 0 .1rem;font-size:1.25rem}
.count{color:var(--soft);font-weight:400}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem;margin:1.75rem 0 0}
.tiles div,article{background:var(--card);border:1px solid var(--line);border-radius:.6rem}
.tiles div{padding:.8rem 1rem}dt{color:var(--soft);font-size:.85rem}
dd{margin:.1rem 0 0;font-size:1.55rem;font-weight:600;font-variant-numeric:tabular-nums}
dd small{font-size:1rem;font-weight:400;color:var(--soft)}
.bar{display:block;height:.35rem;margin-top:.45rem;border-radius:1rem;background:var(--line);overflow:hidden}
.bar i{display:block;height:100%;background:var(--good)}
article{padding:1rem 1.15rem;margin-top:.75rem;border-left:.3rem solid var(--good)}
article.left{border-left-color:var(--wait)}
h3{display:flex;flex-wrap:wrap;align-items:baseline;gap:.35rem .6rem;margin:0;font-size:1.08rem}
h3 b{margin-left:auto;padding:.1rem .6rem;border-radius:1rem;font-size:.85rem;font-weight:600}
.kernel{background:var(--good-soft);color:var(--good)}.stays{background:var(--wait-soft);color:var(--wait)}
.times{color:var(--soft);font-weight:400;font-size:.95rem}
p.source,p.spec,p.reason,p.spent{margin:.45rem 0 0;overflow-wrap:anywhere}
p.source{font-weight:600;font-size:.92rem}p.source span{font-weight:400;color:var(--soft)}
p.spent{font-variant-numeric:tabular-nums}p.spec{color:var(--soft);font-size:.88rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86rem}
pre{margin:.35rem 0 0;padding:.55rem .75rem;background:var(--code);border-radius:.4rem;overflow-x:auto}
details{margin-top:.5rem;font-size:.9rem;color:var(--soft)}summary{cursor:pointer}
ul{margin:.35rem 0 0;padding-left:1.2rem}li{margin-top:.2rem;overflow-wrap:anywhere}li b{color:var(--ink)}
.scroll{overflow-x:auto;margin-top:.75rem}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.4rem .75rem .4rem 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500}td{font-variant-numeric:tabular-nums}
footer{margin-top:2.5rem;color:var(--soft);font-size:.85rem}
@media(max-width:34rem){main{padding-top:1.5rem}h1{font-size:1.5rem}.tiles{grid-template-columns:1fr 1fr}}
@media print{body{background:none}article{break-inside:avoid}}
""".replace("\n", "")


__all__ = ["RangeTime", "page", "range_times"]
