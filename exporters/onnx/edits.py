"""Edits of an ONNX graph, and the queries they need: names, inner graphs, live nodes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def all_names(graph: ir.Graph) -> set[str | None]:
    """The names of a graph's nodes and values, and of those in its inner graphs."""
    names: set[str | None] = {v.name for v in graph.inputs} | set(graph.initializers)
    for node in graph:
        names |= {node.name, *(v.name for v in node.outputs)}
        for inner in inner_graphs(node):
            names |= all_names(inner)
    return names


def inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside a node: branches, bodies of loops."""
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type is ir.AttributeType.GRAPH:
            yield attribute.value
        elif isinstance(attribute, ir.Attr) and attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.value


def live(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that an output depends on."""
    nodes: set[ir.Node] = set()
    for node in reversed(list(graph)):
        used = any(
            v.is_graph_output() or any(u in nodes or u.graph is not graph for u in v.consumers())
            for v in node.outputs
        )
        if used:
            nodes.add(node)
    return nodes


def erase_dead(graph: ir.Graph, start: ir.Node) -> None:
    """Remove a node whose results are not read, and everything that only it needed."""
    todo = [start]
    while todo:
        node = todo.pop()
        if node.graph is not graph or any(v.is_graph_output() or v.uses() for v in node.outputs):
            continue
        if any(True for _ in inner_graphs(node)):
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
