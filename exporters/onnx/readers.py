"""Other readers of a site's scores or weights, which can be removed only if there are none."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.exporters.onnx.operators import Operator, Target
from fusepass.expressions.ir import POINTWISE, VIEWS, Expr
from fusepass.recognition.recognize import recognise_sum
from fusepass.recognition.resemblance import products_behind
from fusepass.rules.site import Site

#: Operations that may lie between the two products of a site.
_LIGHT = (
    POINTWISE
    | VIEWS
    | {"softmax", "log_softmax", "sum", "amax", "logsumexp", "index", "cat", "cumsum", "dropout"}
)


class Readers:
    """The nodes that read the scores and weights of sites, in one graph.

    Args:
        reader: knows the meanings of the graph's nodes.
        live: the nodes that an output depends on.
        operators, target: the operators that may replace sites.
    """

    def __init__(
        self, reader: OnnxReader, live: set[ir.Node], operators: Sequence[Operator], target: Target
    ) -> None:
        self.reader, self.live, self.operators, self.target = reader, live, operators, target
        self.graph = reader.graph
        self._sharing: dict[ir.Node, Expr | None] = {}

    def outside(self, site: Site, anchor: ir.Node, meaning: Expr) -> ir.Node | None:
        """A live node, not on a path to the anchor, for which scores or weights must be computed."""
        found = (self._of_product(site, product, anchor) for product in self._scores(site, meaning))
        return next(filter(None, found), None)

    def _scores(self, site: Site, anchor: Expr) -> list[Expr]:
        """The products of queries and keys: several, if the keys are in several tensors."""
        if site.product in self.reader.home:
            return [site.product]
        return products_behind(anchor)

    def _of_product(self, site: Site, product: Expr, anchor: ir.Node) -> ir.Node | None:
        """A live node, not on a path to the anchor, for which the scores or weights must be computed."""
        held = self.reader.home.get(product)
        todo = [] if held is None else [held]
        result = self.reader.meaning[anchor.outputs[0]]
        within = self.products_of(anchor)
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
                if meaning is result or self._shares(user, site):
                    continue  # it has the same meaning, or is fused as well
                light = meaning is not None and (meaning.op in _LIGHT or user in within)
                if user.graph is not self.graph or not light:
                    return user
                todo.extend(user.outputs)
        return None

    def _shares(self, user: ir.Node, site: Site) -> bool:
        """Is a node the product of a site's weights with other values, which an operator can compute too?

        Exporters compute equal weights once even if the model computes them for every product.
        """
        meaning = self.reader.meaning.get(user.outputs[0])
        if meaning is None or meaning.op != "dot" or user.graph is not self.graph:
            return False
        if user not in self._sharing:
            found = recognise_sum(meaning, self.reader.facts_of(meaning), contents=self.reader.contents)
            self._sharing[user] = None
            if isinstance(found, list) and len(found) == 1:
                refused = (o.refuse(found[0][1].spec, self.target) for o in self.operators)
                self._sharing[user] = found[0][1].product if None in refused else None
        return self._sharing[user] is site.product

    def products_of(self, anchor: ir.Node) -> set[ir.Node]:
        """The products, and their sums, that an anchor normalises or sums, if it is not a product itself."""
        start = self.reader.meaning[anchor.outputs[0]]
        found: set[ir.Node] = set()
        todo = [] if start is None or start.op == "dot" else [anchor]
        summed = start is not None and start.op == "add"
        while todo:
            for value in todo.pop().inputs:
                producer = None if value is None else value.producer()
                inner = None if value is None else self.reader.meaning.get(value)
                if producer is None or inner is None:
                    continue
                adds = summed and inner.op == "add"
                if inner.op == "dot" or adds:
                    found.add(producer)
                if adds or (inner.op != "dot" and producer.op_type == "Cast"):
                    todo.append(producer)
        return found
