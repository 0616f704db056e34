"""Reports: collecting, counting, printing, and finding the user's source line."""

import json
import threading
from io import StringIO

import pytest
import torch
from rich.console import Console

from fusepass.reports.collector import Collector, collect, publish, render, summary
from fusepass.reports.report import GraphReport, SiteReport, source_of
from fusepass.reports.tables import size
from tests import engines
from tests.capture import dynamo_graph

LEFT = SiteReport("softmax_2", False, "", "", None, "softmax over [queries]", "model.py:9 f: x.softmax(1)")


def fused(node: str, kernel: str = "sdpa") -> SiteReport:
    return SiteReport(node, True, "q·k causal", "causal", kernel, None, "model.py:7 f: x.softmax(-1)")


def graph(*sites: SiteReport) -> GraphReport:
    return GraphReport(list(sites), seconds=0.5, nodes=10)


def test_collectors_nest() -> None:
    with collect() as outer:
        publish(graph(fused("a")))
        with collect() as inner:
            publish(graph(LEFT))
        publish(graph())
    publish(graph(fused("late")))
    assert [len(outer.graphs), len(inner.graphs)] == [3, 1]
    assert [site.node for site in outer.fused] == ["a"]
    assert inner.left == [LEFT]


def test_a_collector_sees_only_its_own_thread() -> None:
    with collect() as collector:
        thread = threading.Thread(target=publish, args=(graph(LEFT),))
        thread.start()
        thread.join()
    assert collector.graphs == []


def test_json_is_plain_data() -> None:
    collector = Collector([graph(fused("a"), LEFT), graph()])
    data = json.loads(json.dumps(collector.to_json()))
    assert {name: data[name] for name in ("sites", "fused", "left", "seconds")} == {
        "sites": 2,
        "fused": 1,
        "left": 1,
        "seconds": 1.0,
    }
    assert data["graphs"][0]["sites"][1]["reason"] == "softmax over [queries]"


def test_a_table_shows_equal_sites_once() -> None:
    collector = Collector([graph(fused("a"), fused("b"), fused("c", "flex"), LEFT)])
    text = StringIO()
    render(collector, Console(file=text, width=150))
    rows = [line for line in text.getvalue().splitlines() if "model.py" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "1", "1"]
    assert "softmax over [queries]" in text.getvalue()
    assert "3 of 4 attention sites fused (sdpa, flex), 1 left as it was; 1 graph, 0.50 s" in text.getvalue()


def test_notes_are_printed_once() -> None:
    collector = Collector([GraphReport(notes=["a [note]"]), GraphReport(notes=["a [note]"])])
    text = StringIO()
    render(collector, Console(file=text, width=100))
    assert text.getvalue().count("note: a [note]") == 1
    assert summary(collector) == "no attention found in 2 graphs"


def test_source_is_the_innermost_line_of_the_model() -> None:
    nodes = dynamo_graph(engines.Attention(), torch.randn(2, 8, 16)).graph.nodes
    (site,) = (node for node in nodes if "softmax" in str(node.target))
    source = source_of(site)
    assert source is not None
    assert source.startswith("engines.py:")
    assert source.endswith("forward: weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)")


def test_source_leaves_torch_aside() -> None:
    node = torch.fx.Graph().placeholder("x")
    inside = f'  File "{torch.nn.__file__}", line 3, in forward\n    return F.softmax(input)\n'
    node.meta["stack_trace"] = '  File "/home/a/net.py", line 7, in f\n    self.soft(x)\n    ^^^^\n' + inside
    assert source_of(node) == "net.py:7 f: self.soft(x)"
    node.meta["stack_trace"] = inside
    assert source_of(node) == "__init__.py:3 forward: return F.softmax(input)"


def test_source_of_a_node_without_a_trace() -> None:
    node = torch.fx.Graph().placeholder("x")
    assert source_of(node) is None
    node.meta["stack_trace"] = "nothing like a trace"
    assert source_of(node) is None
    node.meta["stack_trace"] = '  File "/home/a/net.py", line 3, in f\n  File "/home/a/b.py", line 4, in g'
    assert source_of(node) == "b.py:4 g"


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (12, "12 B"), (53256, "53.3 KB"), (4.2e9, "4.2 GB"), (7e12, "7e+03 GB")]
)
def test_sizes(count: float | None, text: str) -> None:
    assert size(count) == text
