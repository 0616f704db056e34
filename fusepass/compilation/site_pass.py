"""The pass over any graph: find its sites, settle each, write all summands of one or none, report.

What a node is and how one is written, the graph knows: it answers the questions of :class:`SiteGraph`.  The
other design was an abstract class that the passes over both kinds of graphs extend: as many lines in them,
and fewer here.  But its steps and theirs would share one ``self``, and no test could run it without a graph
of PyTorch's or ONNX's; tests/compilation/test_site_pass.py does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fusepass.expressions.ir import Expr
from fusepass.recognition.recognize import Miss, as_product, factors
from fusepass.recognition.resemblance import softmaxes_behind
from fusepass.reports.report import SiteReport
from fusepass.rules.site import Site
from fusepass.writing.layouts import Layouts

log = logging.getLogger("fusepass")

N = TypeVar("N")  # a node
V = TypeVar("V")  # a tensor: in some graphs a node
B = TypeVar("B", bound=Layouts[Any])  # what writes nodes

Summands = list[tuple[int, Site]]  # signs and sites: one, mostly
Rejected = list[tuple[str, str]]  # kernels that do not serve a site, and the reasons
Shared = Callable[[N], Expr | None]  # the score product of the site that a node is, if a kernel serves that


class Withdrawn(Exception):
    """What was written may not stand there: the site stays, or, if it is ``wrong``, others may serve."""

    def __init__(self, reason: str, wrong: bool = False) -> None:
        super().__init__(reason)
        self.wrong = wrong


@dataclass
class Made(Generic[V, B]):
    """A kernel's result, what wrote it, and what the report of the fused site says besides."""

    out: V
    build: B
    kernel: str
    note: str | None = None
    error: float | None = None
    label: str | None = None


class SiteGraph(Protocol[N, V, B]):
    """A graph that was read, as the pass sees it."""

    def read(self) -> Iterator[tuple[N, Expr]]:
        """The live nodes and their meanings, in program order, as long as they are in the graph.

        Of those with one meaning the first, and others if they may be replaced like it (:meth:`again`).
        """

    def name_and_source(self, node: N) -> tuple[str, str | None]:
        """A node's name in reports, and its line in the model."""

    def recognised(self, node: N, product: Expr | None = None) -> Summands | Miss | None:
        """Is a node, or the product that it is in other words, the last step of attention?"""

    def inner(self, node: N) -> set[str]:
        """The names of the products, and their sums, that a node normalises or adds up."""

    def settled(self, node: N, sites: Sequence[Site], shared: Shared[N]) -> tuple[str | None, str] | None:
        """Why no kernel is asked for a node: the one that it calls already, or None, and the reason."""

    def serves(self, node: N, site: Site) -> bool:
        """Is there a kernel that takes the site, as far as its specification tells?"""

    def write(self, node: N, site: Site, rejected: Rejected) -> Made[V, B] | None:
        """Write the first kernel that serves and is not among the rejected; add those that do not serve."""

    def place(self, node: N, sites: Sequence[Site], made: Sequence[Made[V, B]], out: V) -> None:
        """Let ``out``, the sum of what was made for the sites, stand for a node, or raise Withdrawn."""

    def left_over(self, settled: set[Expr]) -> Iterator[tuple[N, str]]:
        """Softmaxes of products that no site came of, and why; they are added to those that are settled."""

    def again(self, node: N, meaning: Expr) -> None:
        """Let the result of a fused site stand for a later node of the same meaning."""
        return

    def stays(self, site: Site, rejected: Rejected) -> str | None:
        """Told of a site that no kernel serves; a reason that goes before those of the rejected."""
        return None


class SitePass(Generic[N, V, B]):
    """The pass over one graph."""

    def __init__(self, graph: SiteGraph[N, V, B]) -> None:
        self.graph = graph
        self._settled: set[Expr] = set()
        self._fused: dict[Expr, tuple[Site, str]] = {}
        self._shared: dict[N, Expr | None] = {}

    def run(self) -> list[SiteReport]:
        """Every site's report, in program order; then the softmaxes that nothing came of."""
        reports: list[SiteReport] = []
        for node, meaning in self.graph.read():
            late = as_product(meaning)
            if late is None and not factors(meaning):
                continue
            if meaning in self._fused:
                self.graph.again(node, meaning)
                reports.append(self.report(node, *self._fused[meaning]))
                continue
            found = self.graph.recognised(node, late)
            if found is None or (late is not None and isinstance(found, Miss)):
                continue
            if late is not None:
                inner = self.graph.inner(node)
                reports = [r for r in reports if r.node not in inner or (r.fused and meaning.op != "add")]
            reports += self._settle(node, meaning, found)
        left = self.graph.left_over(self._settled)
        return reports + [self.report(node, None, reason=reason) for node, reason in left]

    def report(
        self, node: N, site: Site | None, kernel: str | None = None, reason: str | None = None,
        rejected: Sequence[tuple[str, str]] = (), error: float | None = None, label: str | None = None,
    ) -> SiteReport:  # fmt: skip
        """What became of a site; without a kernel it stays."""
        spec, kind = ("", "") if site is None else (str(site.meaning), site.meaning.kind())
        name, source = self.graph.name_and_source(node)
        fused, others = kernel is not None, tuple(rejected)
        return SiteReport(name, fused, spec, kind, kernel, reason, source, others, error, label)

    def _settle(self, node: N, meaning: Expr, found: Summands | Miss) -> list[SiteReport]:
        self._settled |= softmaxes_behind(meaning)
        if isinstance(found, Miss):
            return [self.report(node, None, reason=found.reason)]
        sites = [site for _, site in found]
        if said := self.graph.settled(node, sites, self._score_product):
            return [self.report(node, site, *said) for site in sites]
        return self._fuse(node, meaning, found)

    def _score_product(self, node: N) -> Expr | None:
        """The score product of the site that a node computes, if a kernel serves it; looked for once."""
        if node not in self._shared:
            found = self.graph.recognised(node)
            self._shared[node] = None
            if isinstance(found, list) and len(found) == 1 and self.graph.serves(node, found[0][1]):
                self._shared[node] = found[0][1].product
        return self._shared[node]

    def _fuse(self, node: N, meaning: Expr, parts: Summands) -> list[SiteReport]:
        """Write the first kernel that serves, for every summand; all of them or none."""
        sites, rejected = [site for _, site in parts], [Rejected() for _ in parts]
        while made := self._made(node, sites, rejected):
            try:
                self.graph.place(node, sites, made, _summed([sign for sign, _ in parts], made))
            except Withdrawn as withdrawn:
                _discard(made)
                if not withdrawn.wrong:
                    return [self.report(node, site, reason=str(withdrawn)) for site in sites]
                for site, one, tried in zip(sites, made, rejected, strict=True):
                    tried.append((one.kernel, str(withdrawn)))
                    name = self.graph.name_and_source(node)[0]
                    log.warning("fusepass: site '%s' stays: %s (%s)", name, withdrawn, site.spec)
                continue
            self._fused[meaning] = sites[0], made[0].kernel
            return [self._fused_report(node, *each) for each in zip(sites, made, rejected, strict=True)]
        return [self._stays(node, site, tried) for site, tried in zip(sites, rejected, strict=True)]

    def _fused_report(self, node: N, site: Site, made: Made[V, B], tried: Rejected) -> SiteReport:
        others = [(name, why) for name, why in tried if name != made.kernel]
        return self.report(node, site, made.kernel, made.note, others, made.error, made.label)

    def _made(self, node: N, sites: list[Site], rejected: list[Rejected]) -> list[Made[V, B]]:
        """A result for every summand; none, and nothing is left of them, where one stays."""
        made: list[Made[V, B]] = []
        for site, tried in zip(sites, rejected, strict=True):
            one = self.graph.write(node, site, tried)
            if one is None:
                _discard(made)
                return []
            made.append(one)
        return made

    def _stays(self, node: N, site: Site, rejected: Rejected) -> SiteReport:
        own = self.graph.stays(site, rejected)
        reason = own or "; ".join(f"{name}: {why}" for name, why in dict(rejected).items())
        return self.report(node, site, reason=reason or "another of the summands stays", rejected=rejected)


def _discard(made: Sequence[Made[V, B]]) -> None:
    for one in reversed(made):
        one.build.discard()


def _summed(signs: Sequence[int], made: Sequence[Made[V, B]]) -> V:
    """The signed sum of several results; its nodes belong to the last builder."""
    op, total = made[-1].build.op, made[0].out
    if signs[0] < 0:
        total = op("neg", total)
    for sign, one in zip(signs[1:], made[1:], strict=True):
        total = op("add" if sign > 0 else "sub", total, one.out)
    return total


__all__ = ["Made", "Rejected", "SiteGraph", "SitePass", "Summands", "Withdrawn"]
