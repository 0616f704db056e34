"""Who else reads the scores or weights of a site: they can be removed only if nobody does."""

from __future__ import annotations

import onnx_ir as ir

from fusepass.compilation.site_pass import Shared
from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.expressions.ir import POINTWISE, VIEWS, Expr
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
    """

    def __init__(self, reader: OnnxReader, live: set[ir.Node]) -> None:
        self.reader, self.live, self.graph = reader, live, reader.graph

    def outside(self, site: Site, anchor: ir.Node, shared: Shared[ir.Node]) -> ir.Node | None:
        """A live node, not on a path to the anchor, for which scores or weights must be computed.

        A node that multiplies the same weights by other values does not count if it is replaced by an
        operator too, as ``shared`` says.  Exporters compute equal weights once, even if the model computes
        them for every product.
        """
        meaning, products = self.reader.meaning[anchor.outputs[0]], list(site.products)
        if meaning is not None and not all(p in self.reader.home for p in products):
            products = products_behind(meaning)  # keys in several tensors
        outsiders = (self._of_product(site, product, anchor, shared) for product in products)
        return next(filter(None, outsiders), None)

    def _of_product(
        self, site: Site, product: Expr, anchor: ir.Node, shared: Shared[ir.Node]
    ) -> ir.Node | None:
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
                if meaning is result or product in shared(user):
                    continue  # it has the same meaning, or is fused as well
                light = meaning is not None and (meaning.op in _LIGHT or user in within)
                if user.graph is not self.graph or not light:
                    return user
                todo.extend(user.outputs)
        return None

    def products_of(self, anchor: ir.Node) -> set[ir.Node]:
        """The products, and their sums, that an anchor normalises or sums, if it is not a product itself."""
        start = self.reader.meaning[anchor.outputs[0]]
        products: set[ir.Node] = set()
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
                    products.add(producer)
                if adds or (inner.op != "dot" and producer.op_type == "Cast"):
                    todo.append(producer)
        return products
