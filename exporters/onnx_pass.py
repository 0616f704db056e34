"""The pass over an ONNX graph: read it, recognise its sites, choose an operator for each, write it in.

The graph outside a fused site is not touched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from fusepass.dialects.onnx_graph import OnnxReader
from fusepass.exporters import onnx_rotary
from fusepass.exporters.onnx_builder import OnnxBuilder, Written
from fusepass.exporters.onnx_operands import Refused
from fusepass.exporters.onnx_operators import Operator, Target
from fusepass.index import AxisSpace
from fusepass.ir import POINTWISE, VIEWS, Expr
from fusepass.layouts import CannotEmit
from fusepass.recognize import Miss, Site, recognise
from fusepass.report import GraphReport, SiteReport
from fusepass.resemblance import of_activations, softmaxes_behind

#: What lies between the two products of a site.
_LIGHT = POINTWISE | VIEWS | {"softmax", "log_softmax", "sum", "amax", "logsumexp", "index", "cat", "cumsum"}


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
    names = _names(model.graph)
    _fuse_graph(model.graph, model.opset_imports, target, operators, shapes or {}, None, names, report)
    report.seconds = time.perf_counter() - start
    return report


def _fuse_graph(
    graph: ir.Graph,
    opsets: dict[str, int],
    target: Target,
    operators: Sequence[Operator],
    shapes: Mapping[str, Sequence[Any]],
    parent: OnnxReader | None,
    names: set[str | None],
    report: GraphReport,
) -> None:
    reader = OnnxReader(graph, opsets, shapes, parent)
    report.nodes += len(reader.order)
    report.sites.extend(_Pass(reader, opsets, target, operators, names).run())
    for node in list(graph):
        for inner in _inner_graphs(node):
            _fuse_graph(inner, opsets, target, operators, shapes, reader, names, report)


def _names(graph: ir.Graph) -> set[str | None]:
    """The names of a graph's nodes and values, and of those within it."""
    found: set[str | None] = {v.name for v in graph.inputs} | set(graph.initializers)
    for node in graph:
        found |= {node.name, *(v.name for v in node.outputs)}
        for inner in _inner_graphs(node):
            found |= _names(inner)
    return found


def _inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type is ir.AttributeType.GRAPH:
            yield attribute.value
        elif isinstance(attribute, ir.Attr) and attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.value


class _Pass:
    """One graph."""

    def __init__(
        self,
        reader: OnnxReader,
        opsets: dict[str, int],
        target: Target,
        operators: Sequence[Operator],
        names: set[str | None],
    ) -> None:
        self.reader, self.opsets, self.target, self.operators = reader, opsets, target, operators
        self.graph = reader.graph
        self.written = Written(reader, opsets.get("", 1), names)
        self.settled: set[Expr] = set()
        self.live = _live(self.graph)

    def run(self) -> list[SiteReport]:
        """Every site's report, in topological order."""
        if self.target.opset >= 23 and self.target.name != "tensorrt":
            self._rotate()
        reports: list[SiteReport] = []
        for node in list(self.reader.order):
            if node not in self.live or not node.outputs:
                continue
            meaning = self.reader.meaning.get(node.outputs[0])
            if meaning is None or meaning.op != "dot" or self.reader.home[meaning] is not node.outputs[0]:
                continue
            found = recognise(meaning, self.reader.facts_of(meaning))
            if found is not None:
                reports.append(self._settle(node, found))
        return [*reports, *self._left_over()]

    def _rotate(self) -> None:
        """Rotary embeddings become one operator each."""
        for node in list(self.reader.order):
            meaning = self.reader.meaning.get(node.outputs[0]) if node in self.live else None
            found = None if meaning is None else onnx_rotary.rotated(meaning)
            if meaning is None or found is None or self.reader.home[meaning] is not node.outputs[0]:
                continue
            build = OnnxBuilder(self.written, node, AxisSpace(self.reader.facts))
            try:
                out = onnx_rotary.write(build, found)
            except CannotEmit:
                out = None
            if out is None:
                build.discard()
            else:
                self._replace(node, out)

    # -- one site ----------------------------------------------------------------------------

    def _settle(self, node: ir.Node, found: Site | Miss) -> SiteReport:
        meaning = self.reader.meaning[node.outputs[0]]
        assert meaning is not None
        self.settled.update(softmaxes_behind(meaning))
        if isinstance(found, Miss):
            return self._report(node, None, reason=found.reason)
        other = self._outside_reader(found, node)
        if other is not None:
            return self._report(
                node, found, reason=f"its scores or weights are also used by '{other.op_type}' ({other.name})"
            )
        rejected: list[tuple[str, str]] = []
        for operator in self.operators:
            reason = operator.refuse(found.spec, self.target) or self._emitted(operator, node, found)
            if reason is None:
                return self._report(node, found, operator.name, rejected=rejected)
            rejected.append((operator.name, reason))
        reasons = "; ".join(dict.fromkeys(f"{name}: {reason}" for name, reason in rejected))
        return self._report(node, found, reason=reasons, rejected=rejected)

    def _emitted(self, operator: Operator, node: ir.Node, site: Site) -> str | None:
        """Write a site with one operator; why that is not possible, or None."""
        build = OnnxBuilder(self.written, node, site.space)
        try:
            out = operator.emit(site, build, self.target)
        except (Refused, CannotEmit) as refusal:
            build.discard()
            return str(refusal)
        self._replace(node, out)
        for old, new in build.presents:
            self._take_present(node, old, new)
        for made in build.made:
            if made.domain:
                self.opsets.setdefault(made.domain, 1)
        return None

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

    # -- who else reads it -------------------------------------------------------------------

    def _outside_reader(self, site: Site, anchor: ir.Node) -> ir.Node | None:
        """A live node, not on the way to the anchor, for which the scores or weights must be computed."""
        held = self.reader.home.get(site.product)
        todo = [] if held is None else [held]
        seen: set[ir.Node] = set()
        while todo:
            value = todo.pop()
            if value.is_graph_output():
                return anchor if value is anchor.outputs[0] else value.producer()
            for user in value.consumers():
                if user is anchor or user in seen or user not in self.live or user.op_type == "Shape":
                    continue
                seen.add(user)
                meaning = self.reader.meaning.get(user.outputs[0])
                if user.graph is not self.graph or meaning is None or meaning.op not in _LIGHT:
                    return user
                todo.extend(user.outputs)
        return None

    def _left_over(self) -> list[SiteReport]:
        """Softmaxes of products that no product with values was found for."""
        reports = []
        for node in list(self.graph):
            meaning = self.reader.meaning.get(node.outputs[0]) if node.outputs else None
            if meaning is None or meaning.op != "softmax" or meaning in self.settled or node not in self.live:
                continue
            self.settled.add(meaning)
            if of_activations(meaning):
                reports.append(
                    self._report(node, None, reason="no product with values that could be read uses it")
                )
        return reports

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


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_of(node: ir.Node) -> str | None:
    """Where the model says it, from what PyTorch's exporter noted, or the node's name."""
    frames = list(_FRAME.finditer(node.metadata_props.get("pkg.torch.onnx.stack_trace", "")))
    if frames:
        last = frames[-1]
        return f"{last['file'].rsplit('/', 1)[-1]}:{last['line']} {last['function']}"
    return node.name or None


def _live(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that an output depends on."""
    live: set[ir.Node] = set()
    for node in reversed(list(graph)):
        used = any(
            v.is_graph_output() or any(u in live or u.graph is not graph for u in v.consumers())
            for v in node.outputs
        )
        if used:
            live.add(node)
    return live


def erase_dead(graph: ir.Graph, start: ir.Node) -> None:
    """Remove a node whose results nobody reads, and what only it needed."""
    todo = [start]
    while todo:
        node = todo.pop()
        if node.graph is not graph or any(v.is_graph_output() or v.uses() for v in node.outputs):
            continue
        if any(True for _ in _inner_graphs(node)):
            continue
        inputs = [v for v in node.inputs if v is not None]
        graph.remove(node, safe=True)
        for value in inputs:
            producer = value.producer()
            if producer is not None:
                todo.append(producer)
            elif value.is_initializer() and not value.uses() and not value.is_graph_input():
                owner = value.graph
                if owner is not None and not value.is_graph_output():
                    owner.initializers.pop(value.name or "", None)


def softmaxes(graph: ir.Graph) -> int:
    """How many softmaxes a graph still has."""
    return sum(n.op_type in ("Softmax", "LogSoftmax") for n in graph.all_nodes())


__all__ = ["erase_dead", "fuse_model", "softmaxes", "source_of"]
