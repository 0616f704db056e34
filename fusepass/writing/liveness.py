"""Other readers of a site's scores and weights, and the nodes that are dead once a site is replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import fx

from fusepass.dialects.torch.graph import Reader
from fusepass.dialects.torch.memory import Memory, is_type_check, live_nodes
from fusepass.dialects.torch.nodes import operation, value_of
from fusepass.expressions.ir import POINTWISE, VIEWS, Expr, under_casts

_LIGHT = (
    POINTWISE
    | VIEWS
    | {"softmax", "log_softmax", "sum", "amax", "logsumexp", "dropout", "cumsum", "index", "cat", "const"}
)
#: Views that are leaves in expressions.  They do not count as readers of scores; their own readers do.
_OPAQUE_VIEWS = frozenset({"detach", "diagonal"})


def outside_reader(
    reader: Reader,
    live: set[fx.Node],
    product: Expr,
    anchor: fx.Node,
    shared: Callable[[fx.Node], Collection[Expr]] = lambda user: (),
) -> fx.Node | None:
    """A live node, not on a path to ``anchor``, for which the scores or weights must still be computed.

    If ``anchor`` only normalises a product with the values, or sums several, those products are on the path.
    ``shared`` gives the scores that a reader will no longer need either, because it is replaced as well.
    """
    inner = inner_products(reader, anchor)
    for node in _computing(reader, product, anchor, inner):
        outside = _reader_of(reader, live, node, anchor, inner, product, shared)
        if outside is not None:
            return outside
    return None


def inner_products(reader: Reader, anchor: fx.Node) -> set[fx.Node]:
    """The products, and their sums, that ``anchor`` normalises or sums."""
    if _op(reader, anchor) in ("mul", "div"):
        return {n for n in anchor.all_input_nodes if _is_product(reader, n)}
    products: set[fx.Node] = set()
    todo = [anchor]
    while todo:
        node = todo.pop()
        if _op(reader, node) == "add":
            unseen = [n for n in node.all_input_nodes if n not in products]
            products.update(n for n in unseen if _op(reader, n) == "add" or _is_product(reader, n))
            todo.extend(unseen)
    return products


def _op(reader: Reader, node: fx.Node) -> str:
    meaning = reader.defined.get(node)
    return meaning.op if isinstance(meaning, Expr) else ""


def _is_product(reader: Reader, node: fx.Node) -> bool:
    meaning = reader.defined.get(node)
    return isinstance(meaning, Expr) and under_casts(meaning).op == "dot"


def _computing(
    reader: Reader, product: Expr, anchor: fx.Node, inner: set[fx.Node], limit: int = 400
) -> list[fx.Node]:
    """The nodes behind ``anchor`` that compute ``product``."""
    computing, seen, todo = [], {anchor}, [anchor]
    while todo and len(seen) < limit:
        node = todo.pop()
        for source in node.all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            meaning = reader.defined.get(source)
            if meaning is product:
                computing.append(source)
            if _passes_on(reader, source, product) or source in inner or _is_light(reader, source, meaning):
                todo.append(source)
    return computing


def _passes_on(reader: Reader, node: fx.Node, product: Expr) -> bool:
    """Does a node only return an operand that equals ``product`` (``s[:]``, ``s.view(s.shape)``)?"""
    return reader.defined.get(node) is product and any(
        reader.defined.get(source) is product for source in node.all_input_nodes
    )


def _is_light(reader: Reader, node: fx.Node, meaning: object) -> bool:
    """May a node lie between the two products of a site: is it element-wise, a view, reduction or write?"""
    if isinstance(meaning, tuple) or reader.memory.written(node) or operation(node)[0] in _OPAQUE_VIEWS:
        return True
    return isinstance(meaning, Expr) and meaning.op in _LIGHT


def _reader_of(
    reader: Reader,
    live: set[fx.Node],
    start: fx.Node,
    anchor: fx.Node,
    inner: set[fx.Node],
    product: Expr,
    shared: Callable[[fx.Node], Collection[Expr]],
    limit: int = 400,
) -> fx.Node | None:
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        if node in live and not reader.memory.external.isdisjoint(reader.memory.written(node)):
            return node  # it writes to an argument or attribute, which the caller of the graph sees
        for user in _readers(reader, node):
            if user is anchor or user in seen or user not in live or _reads_type(user):
                continue
            light = (
                user in inner
                or _passes_on(reader, user, product)
                or _is_light(reader, user, reader.defined.get(user))
            )
            if not light and product in shared(user):
                seen.add(user)
                continue
            if not light or len(seen) > limit:
                return user
            seen.add(user)
            todo.append(user)
    return None


def _readers(reader: Reader, node: fx.Node) -> Iterator[fx.Node]:
    """The readers of a node: its users and, if it writes, later nodes that get a tensor on that memory."""
    yield from node.users
    if reader.memory.written(node):
        yield from reader.later_readers(node)


def _reads_type(user: fx.Node) -> bool:
    """Does a node read only the shape, dtype or device of a tensor?"""
    kinds = (torch.dtype, torch.device, torch.Size, torch.SymInt, int)
    return is_type_check(user) or (isinstance(value_of(user), kinds) and operation(user)[0] != "item")


def erase_dead(graph: fx.Graph, memory: Memory, before: set[fx.Node], replaced: Collection[fx.Node]) -> None:
    """Remove nodes that are no longer needed, and dead nodes that read them.

    Args:
        graph: the graph, after sites were replaced.
        memory: its storages.
        before: the nodes that were live before; nodes that were already dead are left alone.
        replaced: the nodes that have been replaced.
    """
    live = live_nodes(graph, memory, replaced)
    gone: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in live and (node in before or any(n in gone for n in node.all_input_nodes)):
            gone.add(node)
    for node in reversed(list(graph.nodes)):
        if node in gone:
            graph.erase_node(node)
