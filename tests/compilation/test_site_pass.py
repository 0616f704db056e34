"""The pass alone, over a graph that is a table of names: neither PyTorch's graphs nor ONNX's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fusepass.compilation.site_pass import (
    Rejected,
    Replacement,
    Shared,
    SiteGraph,
    SitePass,
    Summands,
    Withdrawn,
)
from fusepass.expressions.index import Facts, Size
from fusepass.expressions.ir import Expr, leaf
from fusepass.patterns import examples as eg
from fusepass.recognition.recognize import Miss, recognise_sum
from fusepass.rules.site import Site
from fusepass.writing.layouts import Layouts


class Notebook(Layouts[str]):
    """Writes operations as text; what is discarded is crossed out."""

    def __init__(self, book: list[str], kernel: str) -> None:
        self.book, self.new_nodes = book, [f"{kernel}{len(book)}"]
        book += self.new_nodes

    def op(self, name: str, *args: Any, **kwargs: Any) -> str:
        self.new_nodes.append(f"{name}({', '.join(args)})")
        self.book.append(self.new_nodes[-1])
        return self.new_nodes[-1]

    def discard(self) -> None:
        for text in self.new_nodes:
            self.book.remove(text)

    def size(self, size: Size) -> Size:
        return size

    def home(self, node: Expr) -> str | None:
        return None

    def as_tensor(self, node: Expr) -> str:
        raise NotImplementedError


def anything(*args: Any) -> None:
    """The answer None: every kernel serves, and computes what it should."""


class Table(SiteGraph[str, str, Notebook]):
    """Names and their meanings, in order; ``refuse`` is asked by kernel and site, ``judge`` by kernel."""

    def __init__(
        self,
        meanings: dict[str, Expr],
        refuse: Callable[[str, Site], str | None] = anything,
        judge: Callable[[str], Withdrawn | None] = anything,
    ) -> None:
        self.meanings, self.kernel_refuses, self.judge = meanings, refuse, judge
        self.book: list[str] = []
        self.stands: dict[str, str] = {}
        self.readers: list[str] = []

    def read(self) -> Iterator[tuple[str, Expr]]:
        yield from self.meanings.items()

    def name_and_source(self, node: str) -> tuple[str, str | None]:
        return node, f"line {[*self.meanings].index(node)}"

    def recognised(self, node: str, product: Expr | None = None) -> Summands | Miss | None:
        return recognise_sum(product or self.meanings[node], Facts())

    def inner(self, node: str) -> set[str]:
        return {name for name, meaning in self.meanings.items() if meaning in self.meanings[node].args}

    def settled(self, node: str, sites: Sequence[Site], shared: Shared[str]) -> tuple[None, str] | None:
        products = {p for s in sites for p in s.products}
        others = [r for r in self.readers if r != node and not products.intersection(shared(r))]
        return (None, f"read by {others[0]}") if others else None

    def serves(self, node: str, site: Site) -> bool:
        return self.kernel_refuses("first", site) is None

    def write(self, node: str, site: Site, rejected: Rejected) -> Replacement[str, Notebook] | None:
        for kernel in ("first", "second"):
            if kernel in dict(rejected):
                continue
            if (reason := self.kernel_refuses(kernel, site)) is None:
                build = Notebook(self.book, kernel)
                return Replacement(build.new_nodes[0], build, kernel)
            rejected.append((kernel, reason))
        return None

    def place(
        self, node: str, sites: Sequence[Site], written: Sequence[Replacement[str, Notebook]], out: str
    ) -> None:
        if withdrawn := self.judge(written[0].kernel):
            raise withdrawn
        self.stands[node] = out

    def reuse(self, node: str, meaning: Expr) -> None:
        first = next(name for name, other in self.meanings.items() if other is meaning)
        self.stands[node] = self.stands[first]

    def left_over(self, settled: set[Expr]) -> Iterator[tuple[str, str]]:
        for name, meaning in self.meanings.items():
            if meaning.op == "softmax" and meaning not in settled:
                yield name, "alone"


def times_values(weights: Expr, values: str = "v") -> Expr:
    v = leaf(values, (eg.B, eg.H, eg.K, eg.D), torch.float64)
    shape = (eg.B, eg.H, eg.Q, eg.D)
    return eg.expr("dot", (weights, v), ("abmk", "abkn", "abmn"), shape, torch.float64)


WEIGHTS, OTHERS = eg.softmax(eg.scores("s")), eg.softmax(eg.scores("t"))
OUT = times_values(WEIGHTS)
DIFFERENCE = times_values(eg.binary("sub", WEIGHTS, eg.binary("mul", OTHERS, eg.number(0.5))))


def scaled(kernel: str, site: Site) -> str | None:
    return "it scales no weights" if site.spec.weights else None


def test_a_site_is_fused_and_a_repetition_takes_its_result() -> None:
    table = Table({"out": OUT, "more": times_values(WEIGHTS, "u"), "alone": OTHERS})
    repeated = [*table.read(), ("repeated", OUT)]
    table.meanings["repeated"] = OUT
    table.read = lambda: iter(repeated)  # type: ignore[method-assign]
    reports = SitePass(table).run()
    assert [(r.node, r.kernel, r.reason) for r in reports] == [
        ("out", "first", None),
        ("more", "first", None),
        ("repeated", "first", None),
        ("alone", None, "alone"),
    ]
    assert reports[0].spec.startswith("attention(") and reports[0].source == "line 0"
    assert table.stands == {"out": "first0", "more": "first1", "repeated": "first0"}


def test_a_sum_is_written_whole() -> None:
    table = Table({"out": DIFFERENCE})
    assert [r.kernel for r in SitePass(table).run()] == ["first", "first"]
    assert table.stands == {"out": "sub(first0, first1)"} and table.book[-1] == table.stands["out"]


def test_or_not_at_all() -> None:
    table = Table({"out": DIFFERENCE}, refuse=scaled)
    first, second = SitePass(table).run()
    assert first.reason == "another of the summands stays" and not first.rejected
    assert second.reason == "first: it scales no weights; second: it scales no weights"
    assert not table.book and not table.stands


def test_what_is_wrong_is_taken_back_and_the_next_kernel_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    def judge(kernel: str) -> Withdrawn | None:
        return Withdrawn("off by 1", wrong=True) if kernel == "first" else None

    table = Table({"out": OUT}, judge=judge)
    with caplog.at_level(logging.WARNING, "fusepass"):
        (report,) = SitePass(table).run()
    assert report.kernel == "second" and report.rejected == (("first", "off by 1"),)
    assert table.book == ["second0"] and "'out' stays: off by 1" in caplog.text


def test_what_is_unsafe_is_taken_back_and_nothing_else_is_asked() -> None:
    table = Table({"out": OUT}, judge=lambda kernel: Withdrawn("unsafe"))
    (report,) = SitePass(table).run()
    assert (report.fused, report.reason, report.rejected) == (False, "unsafe", ())
    assert not table.book and not table.stands


@pytest.mark.parametrize("fuses", [True, False])
def test_readers_that_are_fused_as_well_need_no_scores(fuses: bool) -> None:
    def refuse(kernel: str, site: Site) -> str | None:
        return None if fuses or site.values[0].expr.args or "u" not in str(site.values[0].expr) else "no u"

    table = Table({"out": OUT, "more": times_values(WEIGHTS, "u")}, refuse=refuse)
    table.readers = ["more"]
    assert SitePass(table).run()[0].reason == (None if fuses else "read by more")
