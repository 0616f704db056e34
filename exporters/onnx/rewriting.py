"""The pass over ONNX graphs, inner graphs included: it answers what :class:`.site_pass.SitePass` asks.

The graph outside a fused site is not touched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fusepass.compilation.site_pass import Rejected, Replacement, Shared, SiteGraph, SitePass, Summands
from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.exporters.onnx import rotary as onnx_rotary
from fusepass.exporters.onnx.builder import OnnxBuilder, Written
from fusepass.exporters.onnx.edits import all_names, erase_dead, inner_graphs, live
from fusepass.exporters.onnx.leftover import left_over
from fusepass.exporters.onnx.operands import Refused
from fusepass.exporters.onnx.operators import Target
from fusepass.exporters.onnx.readers import Readers
from fusepass.expressions.index import AxisSpace
from fusepass.expressions.ir import Expr
from fusepass.recognition.recognize import Miss, recognise_sum
from fusepass.recognition.resemblance import of_activations, softmaxes_behind
from fusepass.reports.report import GraphReport
from fusepass.rules.site import Site
from fusepass.writing.layouts import CannotEmit


def fuse_model(
    model: ir.Model,
    target: Target,
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> GraphReport:
    """Fuse the attention sites of a model in place, those of its inner graphs included.

    Args:
        model: the model; its nodes are in topological order.
        target: the runtime to write for.
        shapes: the shapes that inference found, by the name of the value.
    """
    start = time.perf_counter()
    report = GraphReport(nodes=0)
    names = all_names(model.graph)
    setting = _Setting(model.opset_imports, target, shapes or {}, names, report)
    _fuse_graph(model.graph, setting, None, None)
    report.seconds = time.perf_counter() - start
    return report


@dataclass(frozen=True)
class _Setting:
    """What all graphs of a model share; ``names`` are those already in use."""

    opsets: dict[str, int]
    target: Target
    shapes: Mapping[str, Sequence[Any]]
    names: set[str | None]
    report: GraphReport


def _fuse_graph(
    graph: ir.Graph, setting: _Setting, parent: OnnxReader | None, holder: ir.Node | None
) -> None:
    """Fuse one graph and those within it; ``holder`` is the node of the parent's graph that holds it."""
    reader = OnnxReader(graph, setting.opsets, setting.shapes, parent, holder)
    setting.report.nodes += len(reader.order)
    setting.report.notes.extend(n for n in reader.faults.notes if n not in setting.report.notes)
    setting.report.sites.extend(SitePass(_OnnxGraph(reader, setting)).run())
    for node in list(graph):
        for inner in inner_graphs(node):
            _fuse_graph(inner, setting, reader, node)


_Replacement = Replacement[ir.Value, OnnxBuilder]


class _OnnxGraph(SiteGraph[ir.Node, ir.Value, OnnxBuilder]):
    """One graph, as the pass sees it."""

    def __init__(self, reader: OnnxReader, setting: _Setting) -> None:
        self.reader, self.opsets = reader, setting.opsets
        self.target = setting.target
        self.graph = reader.graph
        self.written = Written(reader, setting.opsets.get("", 1), setting.names)
        self.live = live(self.graph)
        self.readers = Readers(reader, self.live)
        if self.target.rotary:
            self._rotate()

    # -- what the pass asks -------------------------------------------------------------------

    def read(self) -> Iterator[tuple[ir.Node, Expr]]:
        for node in list(self.reader.order):
            meaning = self.reader.meaning.get(node.outputs[0]) if node.outputs else None
            if meaning is None or node not in self.live or node.graph is not self.graph:
                continue
            first = self.reader.home[meaning]
            if first is node.outputs[0] or first in self.written.replaced:
                yield node, meaning

    def name_and_source(self, node: ir.Node) -> tuple[str, str | None]:
        result = self.written.replaced.get(node.outputs[0], node.outputs[0])
        return result.name or node.name or node.op_type, source_of(node)

    def recognised(self, node: ir.Node, product: Expr | None = None) -> Summands | Miss | None:
        meaning = self.reader.meaning.get(node.outputs[0])
        if meaning is None or (product or meaning).op != "dot" or node.graph is not self.graph:
            return None
        facts = self.reader.facts_of(meaning)
        parts = recognise_sum(product or meaning, facts, contents=self.reader.contents)
        behind = softmaxes_behind(meaning) if isinstance(parts, Miss) else set()
        if behind and all(e.op == "exp" and not of_activations(e.args[0]) for e in behind):
            return None  # an activation function that is made of an exponential
        return parts

    def inner(self, node: ir.Node) -> set[str]:
        return {p.outputs[0].name for p in self.readers.products_of(node)}

    def settled(
        self, node: ir.Node, sites: Sequence[Site], shared: Shared[ir.Node]
    ) -> tuple[None, str] | None:
        for site in sites:
            other = self.readers.outside(site, node, shared)
            if other is not None:
                return None, f"its scores or weights are also used by '{other.op_type}' ({other.name})"
        return None

    def serves(self, node: ir.Node, site: Site) -> bool:
        return any(o.refuse(site.spec, self.target) is None for o in self.target.operators)

    def write(self, node: ir.Node, site: Site, rejected: Rejected) -> _Replacement | None:
        for operator in self.target.operators:
            reason = operator.refuse(site.spec, self.target)
            if reason is None:
                build = OnnxBuilder(self.written, node, site.space)
                try:
                    return Replacement(operator.emit(site, build, self.target), build, operator.name)
                except (Refused, CannotEmit) as refusal:
                    build.discard()
                    reason = str(refusal)
            rejected.append((operator.name, reason))
        return None

    def place(
        self, node: ir.Node, sites: Sequence[Site], written: Sequence[_Replacement], out: ir.Value
    ) -> None:
        self._replace(node, out)
        for one in written:
            for old, new in one.build.presents:
                self._take_present(node, old, new)
            for inserted in one.build.new_nodes:
                if inserted.domain:
                    self.opsets.setdefault(inserted.domain, 1)

    def reuse(self, node: ir.Node, meaning: Expr) -> None:
        self._replace(node, self.written.replaced[self.reader.home[meaning]])

    def left_over(self, settled: set[Expr]) -> Iterator[tuple[ir.Node, str]]:
        return left_over(self.graph, self.reader, self.live, settled)

    # -- edits -------------------------------------------------------------------------------

    def _rotate(self) -> None:
        """Rotary embeddings become one operator each, where the operator set has it."""
        for node in list(self.reader.order):
            meaning = self.reader.meaning.get(node.outputs[0]) if node in self.live else None
            rotation = None if meaning is None else onnx_rotary.rotated(meaning)
            if meaning is None or rotation is None or self.reader.home[meaning] is not node.outputs[0]:
                continue
            build = OnnxBuilder(self.written, node, AxisSpace(self.reader.facts))
            if not onnx_rotary.tabled(build, rotation):
                continue
            self.written.rotations[meaning] = rotation
            try:
                out = onnx_rotary.write(build, rotation) if self.target.opset >= 23 else None
            except CannotEmit:
                out = None
            if out is None:
                build.discard()
            else:
                self._replace(node, out)

    def _replace(self, node: ir.Node, out: ir.Value) -> None:
        """Let ``out`` stand for a node's result, under its name; erase what only the node needed."""
        old = node.outputs[0]
        producer = out.producer()
        if producer is None or producer in self.reader.order or out.is_graph_output():
            out = self._copied(node, out)
        name = old.name
        ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        old.name, out.name = self.written.name("fusepass/replaced"), name
        out.shape = old.shape if old.shape is not None else out.shape
        self.written.replaced[old] = out
        erase_dead(self.graph, node)

    def _copied(self, node: ir.Node, out: ir.Value) -> ir.Value:
        copy = ir.node("Identity", [out])
        copy.outputs[0].type, copy.outputs[0].shape = out.type, out.shape
        copy.outputs[0].name = self.written.name("fusepass/copy")
        self.graph.insert_before(node, copy)
        return copy.outputs[0]

    def _take_present(self, node: ir.Node, old: ir.Value, new: ir.Value) -> None:
        """Let a cache's present state replace the joined tensor, if all readers of that tensor come later."""
        producer = old.producer()
        after = self.reader.order[node]
        read_later = all(self.reader.order.get(u, after + 1) > after for u in old.consumers())
        if producer is None or not read_later:
            return
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = self.written.name("fusepass/replaced"), name
        new.shape = old.shape if old.shape is not None else new.shape
        self.written.replaced[old] = new
        self.written.present.add(old)
        erase_dead(self.graph, producer)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_of(node: ir.Node) -> str | None:
    """The line of the model, which PyTorch's exporter noted; otherwise the node's name."""
    frames = list(_FRAME.finditer(node.metadata_props.get("pkg.torch.onnx.stack_trace", "")))
    if frames:
        last = frames[-1]
        return f"{last['file'].rsplit('/', 1)[-1]}:{last['line']} {last['function']}"
    return node.name or None


__all__ = ["fuse_model"]
