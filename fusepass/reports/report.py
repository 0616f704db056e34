"""What the pass did to a graph, as data: its sites, with their names and source lines."""

import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import fx


@dataclass(frozen=True)
class DenseTerm:
    """A mask or bias over queries and keys that is neither a band of positions nor a padding."""

    name: str
    """What the specification calls it, such as "mask[ij]"."""
    formula: str
    """How one element of it is computed, with `b`, `h`, `i`, `j` for batch, head, query and key."""
    stored: bool
    """Is a tensor over queries and keys read? If not, FlexAttention computes it from smaller ones."""


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
    """The kernel that computes it; None if the site stays."""
    reason: str | None
    """Why the site stays as it was; for a fused site, anything worth knowing."""
    source: str | None
    """The line of the model that computes it, such as "modeling_llama.py:123 attention: w = q @ k"."""
    rejected: tuple[tuple[str, str], ...] = ()
    """(kernel, why not) for every kernel that was asked before the chosen one."""
    max_error: float | None = None
    """The error that validation measured, as a multiple of what is allowed; None if it did not run."""
    label: str | None = None
    """The name of a fused site in profiler traces and generated code."""
    dense: tuple[DenseTerm, ...] = ()
    """Its masks and biases over queries and keys that are neither bands nor paddings."""


def merged(site: SiteReport) -> SiteReport:
    """The site without its names and measured error: sites that are equal then are shown as one."""
    return replace(site, node="", max_error=None, label=None)


@dataclass
class GraphReport:
    """One graph that went through the pass."""

    sites: list[SiteReport] = field(default_factory=list)
    seconds: float = 0.0
    """The time that the pass itself took."""
    nodes: int = 0
    """The number of its nodes, those of subgraphs included."""
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    """Buffers whose elements the fused sites rely on: a guard checks that they have not changed."""
    apart: list[list[str]] = field(default_factory=list)
    """Groups of arguments. Those in different groups must not share memory, because the graph writes to one
    and reads another afterwards; a guard checks this."""
    written: list[str] = field(default_factory=list)
    """Buffers that the graph itself writes to; no fused site relies on their elements."""


_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$')


def label_for(number: int, kind: str, kernel: str, source: str | None) -> str:
    """The name of a fused site: `fusepass 3: causal, sdpa, model.py:12`."""
    place = f", {source.partition(' ')[0]}" if source else ""
    return f"fusepass {number}: {kind}, {kernel}{place}"


def source_of(node: fx.Node) -> str | None:
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
    return str(Path(torch.__file__).parent) + "/"
