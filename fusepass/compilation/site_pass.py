"""The pass over any graph: it finds sites, settles each, writes all its summands or none, and reports.

The graph knows what a node means and how a new one is written: it answers the questions of
:class:`SiteGraph`.  The alternative was an abstract class that the passes over both kinds of graphs extend,
with fewer lines here and as many in them.  But then all steps would share one ``self``, and the pass could
not be tested without a graph of PyTorch's or ONNX's, as tests/compilation/test_site_pass.py does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fusepass.expressions.ir import Expr
from fusepass.recognition.dense import dense_terms
from fusepass.recognition.recognize import Miss, as_product, factors
from fusepass.recognition.resemblance import softmaxes_behind
from fusepass.reports.report import DenseTerm, SiteReport
from fusepass.rules.site import Site
from fusepass.selection.forms import forms
from fusepass.writing.layouts import Layouts

log = logging.getLogger("fusepass")

N = TypeVar("N")  # a node
V = TypeVar("V")  # a tensor: in some graphs a node
B = TypeVar("B", bound=Layouts[Any])  # what writes nodes

Summands = list[tuple[int, Site]]  # signs and sites: one, mostly
Rejected = list[tuple[str, str]]  # kernels that do not serve a site, and the reasons
Shared = Callable[[N], Collection[Expr]]  # the score products of a node that a kernel serves


class Withdrawn(Exception):
    """What was written cannot be used: the site stays or, if it is ``wrong``, the next kernel is tried."""

    def __init__(self, reason: str, wrong: bool = False) -> None:
        super().__init__(reason)
        self.wrong = wrong


@dataclass
class Replacement(Generic[V, B]):
    """A kernel's result, the builder that wrote it, and what else the report of the fused site says."""

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

        Of nodes with the same meaning: the first one, and all others that :meth:`reuse` can replace.
        """

    def name_and_source(self, node: N) -> tuple[str, str | None]:
        """A node's name in reports, and its line in the model."""

    def recognised(self, node: N, product: Expr | None = None) -> Summands | Miss | None:
        """The sites whose last step is a node, or ``product``, the same value written as a product.

        Returns a Miss, with the reason, for what resembles attention and is not a site; None for the rest.
        """

    def inner(self, node: N) -> set[str]:
        """The names of the products, and of their sums, that a node normalises or adds up."""

    def settled(self, node: N, sites: Sequence[Site], shared: Shared[N]) -> tuple[str | None, str] | None:
        """Why no kernel is asked for a node: the kernel that it already calls, if any, and the reason."""

    def serves(self, node: N, site: Site) -> bool:
        """Is there a kernel that takes the site, as far as its specification tells?"""

    def write(self, node: N, site: Site, rejected: Rejected) -> Replacement[V, B] | None:
        """Write the first kernel that serves and is not in ``rejected``; add those that do not serve."""

    def place(self, node: N, sites: Sequence[Site], written: Sequence[Replacement[V, B]], out: V) -> None:
        """Let ``out``, the sum of the replacements of the sites, stand for a node, or raise Withdrawn."""

    def left_over(self, settled: set[Expr]) -> Iterator[tuple[N, str]]:
        """The softmaxes of products that became no site, and why; adds them to ``settled``."""

    def reuse(self, node: N, meaning: Expr) -> None:
        """Let the result of a fused site stand for a later node of the same meaning."""
        return

    def stays(self, site: Site, rejected: Rejected) -> str | None:
        """Called for a site that no kernel serves; a reason to report instead of the kernels', if any."""
        return None


class SitePass(Generic[N, V, B]):
    """The pass over one graph."""

    def __init__(self, graph: SiteGraph[N, V, B]) -> None:
        self.graph = graph
        self._settled: set[Expr] = set()
        self._fused: dict[Expr, tuple[Site, str]] = {}
        self._shared: dict[N, Collection[Expr]] = {}

    def run(self) -> list[SiteReport]:
        """Reports on all sites, in program order, and then on the softmaxes that became no site."""
        reports: list[SiteReport] = []
        for node, meaning in self.graph.read():
            product = as_product(meaning)
            if product is None and not factors(meaning):
                continue
            if meaning in self._fused:
                self.graph.reuse(node, meaning)
                reports.append(self.report(node, *self._fused[meaning]))
                continue
            recognised = self.graph.recognised(node, product)
            if recognised is None or (product is not None and isinstance(recognised, Miss)):
                continue
            if product is not None:
                inner = self.graph.inner(node)
                reports = [r for r in reports if r.node not in inner or (r.fused and meaning.op != "add")]
            reports += self._settle(node, meaning, recognised)
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
        dense = () if site is None else tuple(DenseTerm(*term) for term in dense_terms(site))
        return SiteReport(name, fused, spec, kind, kernel, reason, source, others, error, label, dense)

    def _settle(self, node: N, meaning: Expr, recognised: Summands | Miss) -> list[SiteReport]:
        self._settled |= softmaxes_behind(meaning)
        if isinstance(recognised, Miss):
            return [self.report(node, None, reason=recognised.reason)]
        tried: list[list[SiteReport]] = []
        for parts in forms(recognised):
            tried.append(self._settle_as(node, meaning, parts))
            if all(r.fused for r in tried[-1]):
                return tried[-1]
        return tried[0]

    def _settle_as(self, node: N, meaning: Expr, parts: Summands) -> list[SiteReport]:
        """One form of a site: fused, or why it stays."""
        sites = [site for _, site in parts]
        if answer := self.graph.settled(node, sites, self._score_products):
            return [self.report(node, site, *answer) for site in sites]
        return self._fuse(node, meaning, parts)

    def _score_products(self, node: N) -> Collection[Expr]:
        """The score products of the site that a node computes, if a kernel serves it; looked up once."""
        if node not in self._shared:
            parts = self.graph.recognised(node)
            self._shared[node] = ()
            if isinstance(parts, list) and len(parts) == 1 and self._serves(node, parts):
                self._shared[node] = parts[0][1].products
        return self._shared[node]

    def _serves(self, node: N, summands: Summands) -> bool:
        """Is there a kernel that takes the site in one of its forms?"""
        return any(self.graph.serves(node, parts[0][1]) for parts in forms(summands))

    def _fuse(self, node: N, meaning: Expr, parts: Summands) -> list[SiteReport]:
        """For every summand, write the first kernel that serves; if one has none, write nothing."""
        sites, rejected = [site for _, site in parts], [Rejected() for _ in parts]
        while written := self._write_all(node, sites, rejected):
            try:
                self.graph.place(node, sites, written, _summed([sign for sign, _ in parts], written))
            except Withdrawn as withdrawn:
                _discard(written)
                if not withdrawn.wrong:
                    return [self.report(node, site, reason=str(withdrawn)) for site in sites]
                for site, one, tried in zip(sites, written, rejected, strict=True):
                    tried.append((one.kernel, str(withdrawn)))
                    name = self.graph.name_and_source(node)[0]
                    log.warning("fusepass: site '%s' stays: %s (%s)", name, withdrawn, site.spec)
                continue
            self._fused[meaning] = sites[0], written[0].kernel
            return [self._fused_report(node, *each) for each in zip(sites, written, rejected, strict=True)]
        return [self._stays(node, site, tried) for site, tried in zip(sites, rejected, strict=True)]

    def _fused_report(self, node: N, site: Site, one: Replacement[V, B], tried: Rejected) -> SiteReport:
        others = [(name, why) for name, why in tried if name != one.kernel]
        return self.report(node, site, one.kernel, one.note, others, one.error, one.label)

    def _write_all(self, node: N, sites: list[Site], rejected: list[Rejected]) -> list[Replacement[V, B]]:
        """A replacement for every summand; an empty list, with nothing left in the graph, if one has none."""
        written: list[Replacement[V, B]] = []
        for site, tried in zip(sites, rejected, strict=True):
            one = self.graph.write(node, site, tried)
            if one is None:
                _discard(written)
                return []
            written.append(one)
        return written

    def _stays(self, node: N, site: Site, rejected: Rejected) -> SiteReport:
        own = self.graph.stays(site, rejected)
        reason = own or "; ".join(f"{name}: {why}" for name, why in dict(rejected).items())
        return self.report(node, site, reason=reason or "another of the summands stays", rejected=rejected)


def _discard(written: Sequence[Replacement[V, B]]) -> None:
    for one in reversed(written):
        one.build.discard()


def _summed(signs: Sequence[int], written: Sequence[Replacement[V, B]]) -> V:
    """The signed sum of several results; its nodes belong to the last builder."""
    op, total = written[-1].build.op, written[0].out
    if signs[0] < 0:
        total = op("neg", total)
    for sign, one in zip(signs[1:], written[1:], strict=True):
        total = op("add" if sign > 0 else "sub", total, one.out)
    return total


__all__ = ["Replacement", "Rejected", "SiteGraph", "SitePass", "Summands", "Withdrawn"]
