"""The pass over an ONNX graph: read it, recognise its sites, choose an operator for each, write it in.

The graph outside a fused site is not touched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.exporters.onnx import rotary as onnx_rotary
from fusepass.exporters.onnx.builder import OnnxBuilder, Written
from fusepass.exporters.onnx.edits import all_names, erase_dead, inner_graphs, live
from fusepass.exporters.onnx.leftover import left_over
from fusepass.exporters.onnx.operands import Refused
from fusepass.exporters.onnx.operators import Operator, Target
from fusepass.exporters.onnx.readers import Readers
from fusepass.expressions.index import AxisSpace
from fusepass.expressions.ir import Expr
from fusepass.recognition.recognize import Miss, as_product, recognise_sum
from fusepass.recognition.resemblance import of_activations, softmaxes_behind
from fusepass.reports.report import GraphReport, SiteReport
from fusepass.rules.site import Site
from fusepass.writing.layouts import CannotEmit


def fuse_model(
    model: ir.Model,
    target: Target,
    operators: Sequence[Operator],
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> GraphReport:
    """Fuse the attention sites of a model in place, those of its inner graphs included.

    Args:
        model: the model; its nodes are in topological order.
        target: the runtime to write for.
        operators: the target's operators in order of preference.
        shapes: what shape inference found out, by the name of the value.
    """
    start = time.perf_counter()
    report = GraphReport(nodes=0)
    names = all_names(model.graph)
    setting = _Setting(model.opset_imports, target, operators, shapes or {}, names, report)
    _fuse_graph(model.graph, setting, None, None)
    report.seconds = time.perf_counter() - start
    return report


@dataclass(frozen=True)
class _Setting:
    """What all graphs of a model share; ``names`` are those that are taken."""

    opsets: dict[str, int]
    target: Target
    operators: Sequence[Operator]
    shapes: Mapping[str, Sequence[Any]]
    names: set[str | None]
    report: GraphReport


def _fuse_graph(
    graph: ir.Graph, setting: _Setting, parent: OnnxReader | None, holder: ir.Node | None
) -> None:
    """One graph, and those within it; ``holder`` is the node of the parent's graph that holds it."""
    reader = OnnxReader(graph, setting.opsets, setting.shapes, parent, holder)
    setting.report.nodes += len(reader.order)
    setting.report.notes.extend(n for n in reader.faults.notes if n not in setting.report.notes)
    setting.report.sites.extend(_Pass(reader, setting).run())
    for node in list(graph):
        for inner in inner_graphs(node):
            _fuse_graph(inner, setting, reader, node)


class _Pass:
    """One graph."""

    def __init__(self, reader: OnnxReader, setting: _Setting) -> None:
        self.reader, self.opsets = reader, setting.opsets
        self.target, self.operators = setting.target, setting.operators
        self.graph = reader.graph
        self.written = Written(reader, setting.opsets.get("", 1), setting.names)
        self.settled: set[Expr] = set()
        self.fused: dict[Expr, tuple[ir.Value, Site, str]] = {}
        self.live = live(self.graph)
        self.readers = Readers(reader, self.live, self.operators, self.target)

    def run(self) -> list[SiteReport]:
        """Every site's report, in topological order."""
        if self.target.name != "tensorrt":
            self._rotate()
        reports: list[SiteReport] = []
        for node in list(self.reader.order):
            meaning = self.reader.meaning.get(node.outputs[0]) if node.outputs else None
            if meaning is None or node not in self.live or node.graph is not self.graph:
                continue
            late = as_product(meaning)
            if meaning.op != "dot" and late is None:
                continue
            if self.reader.home[meaning] is not node.outputs[0]:
                reports.extend(self._again(node, meaning))
                continue
            found = recognise_sum(
                late or meaning, self.reader.facts_of(meaning), contents=self.reader.contents
            )
            if found is None or (late is not None and not isinstance(found, list)):
                continue
            if late is not None:
                inside = {p.outputs[0].name for p in self.readers.products_of(node)}
                reports = [r for r in reports if r.fused or r.node not in inside]
            reports.extend(self._settle(node, meaning, found))
        left = left_over(self.graph, self.reader, self.live, self.settled)
        return [*reports, *(self._report(node, None, reason=reason) for node, reason in left)]

    def _again(self, node: ir.Node, meaning: Expr) -> list[SiteReport]:
        """A node that says what an earlier one says: the same result serves where that one was fused."""
        if meaning not in self.fused:
            return []
        out, site, name = self.fused[meaning]
        report = self._report(node, site, name)
        self._replace(node, out)
        return [report]

    def _rotate(self) -> None:
        """Rotary embeddings become one operator each, where the operator set has it."""
        for node in list(self.reader.order):
            meaning = self.reader.meaning.get(node.outputs[0]) if node in self.live else None
            found = None if meaning is None else onnx_rotary.rotated(meaning)
            if meaning is None or found is None or self.reader.home[meaning] is not node.outputs[0]:
                continue
            build = OnnxBuilder(self.written, node, AxisSpace(self.reader.facts))
            if not onnx_rotary.tabled(build, found):
                continue
            self.written.rotations[meaning] = found
            try:
                out = onnx_rotary.write(build, found) if self.target.opset >= 23 else None
            except CannotEmit:
                out = None
            if out is None:
                build.discard()
            else:
                self._replace(node, out)

    # -- one site ----------------------------------------------------------------------------

    def _settle(self, node: ir.Node, meaning: Expr, found: list[tuple[int, Site]] | Miss) -> list[SiteReport]:
        behind = softmaxes_behind(meaning)
        self.settled.update(behind)
        if isinstance(found, Miss):
            if behind and all(e.op == "exp" and not of_activations(e.args[0]) for e in behind):
                return []  # an activation function that is made of an exponential
            return [self._report(node, None, reason=found.reason)]
        for _, site in found:
            other = self.readers.outside(site, node, meaning)
            if other is not None:
                reason = f"its scores or weights are also used by '{other.op_type}' ({other.name})"
                return [self._report(node, s, reason=reason) for _, s in found]
        return self._fuse(node, meaning, found)

    def _fuse(self, node: ir.Node, meaning: Expr, parts: list[tuple[int, Site]]) -> list[SiteReport]:
        """Write the first operator that serves, for every summand; all of them or none."""
        rejected: list[list[tuple[str, str]]] = [[] for _ in parts]
        made: list[tuple[ir.Value, OnnxBuilder, str]] = []
        for (_, site), so_far in zip(parts, rejected, strict=True):
            written = self._written(node, site, so_far)
            if written is None:
                break
            made.append(written)
        if len(made) < len(parts):
            for _, build, _ in reversed(made):
                build.discard()
            return [
                self._report(node, site, reason=_why(r) or "another of the summands stays", rejected=r)
                for (_, site), r in zip(parts, rejected, strict=True)
            ]
        reports = [
            self._report(node, site, name, rejected=[tried for tried in r if tried[0] != name])
            for (_, site), (_, _, name), r in zip(parts, made, rejected, strict=True)
        ]
        self._take(node, self._summed([sign for sign, _ in parts], made), made)
        self.fused[meaning] = (self.written.replaced[node.outputs[0]], parts[0][1], made[0][2])
        return reports

    def _written(
        self, node: ir.Node, site: Site, rejected: list[tuple[str, str]]
    ) -> tuple[ir.Value, OnnxBuilder, str] | None:
        """The result, builder and name of the first operator that serves; reasons go to ``rejected``."""
        for operator in self.operators:
            reason = operator.refuse(site.spec, self.target)
            if reason is None:
                build = OnnxBuilder(self.written, node, site.space)
                try:
                    return operator.emit(site, build, self.target), build, operator.name
                except (Refused, CannotEmit) as refusal:
                    build.discard()
                    reason = str(refusal)
            rejected.append((operator.name, reason))
        return None

    def _summed(self, signs: Sequence[int], made: Sequence[tuple[ir.Value, OnnxBuilder, str]]) -> ir.Value:
        """The signed sum of several results; its nodes belong to the last builder."""
        build, total = made[-1][1], made[0][0]
        if signs[0] < 0:
            total = build.call("Neg", [total], build.shape_of(total), build.dtype_of(total))
        for sign, (out, _, _) in zip(signs[1:], made[1:], strict=True):
            kind = "Add" if sign > 0 else "Sub"
            total = build.call(kind, [total, out], build.shape_of(total), build.dtype_of(total))
        return total

    def _take(self, node: ir.Node, out: ir.Value, made: Sequence[tuple[ir.Value, OnnxBuilder, str]]) -> None:
        """Let what was written stand for a node."""
        self._replace(node, out)
        for _, build, _ in made:
            for old, new in build.presents:
                self._take_present(node, old, new)
            for one in build.made:
                if one.domain:
                    self.opsets.setdefault(one.domain, 1)

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
        made = ir.node("Identity", [out])
        made.outputs[0].type, made.outputs[0].shape = out.type, out.shape
        made.outputs[0].name = self.written.name("fusepass/copy")
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def _take_present(self, node: ir.Node, old: ir.Value, new: ir.Value) -> None:
        """The present state of a cache stands for the joined tensor, where everything reads it later."""
        producer = old.producer()
        after = self.reader.order[node]
        late = all(self.reader.order.get(u, after + 1) > after for u in old.consumers())
        if producer is None or not late:
            return
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = self.written.name("fusepass/replaced"), name
        new.shape = old.shape if old.shape is not None else new.shape
        self.written.replaced[old] = new
        self.written.present.add(old)
        erase_dead(self.graph, producer)

    # -- reporting ---------------------------------------------------------------------------

    def _report(
        self,
        node: ir.Node,
        site: Site | None,
        kernel: str | None = None,
        reason: str | None = None,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> SiteReport:
        return SiteReport(
            node.outputs[0].name or node.name or node.op_type,
            kernel is not None,
            "" if site is None else str(site.spec),
            "" if site is None else site.spec.kind(),
            kernel,
            reason,
            source_of(node),
            tuple(rejected),
        )


def _why(rejected: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in dict(rejected).items())


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_of(node: ir.Node) -> str | None:
    """Where the model says it, from what PyTorch's exporter noted, or the node's name."""
    frames = list(_FRAME.finditer(node.metadata_props.get("pkg.torch.onnx.stack_trace", "")))
    if frames:
        last = frames[-1]
        return f"{last['file'].rsplit('/', 1)[-1]}:{last['line']} {last['function']}"
    return node.name or None


__all__ = ["fuse_model"]
