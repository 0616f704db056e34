"""Which nodes of a graph matter, and what else looks at a site's scores and weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fusepass.dialects.fx_graph import Reader
from fusepass.dialects.fx_nodes import ALIASES, first_operand, operation, value_of, writes_in_place
from fusepass.ir import POINTWISE, VIEWS, Expr, under_casts

_LIGHT = (
    POINTWISE
    | VIEWS
    | {"softmax", "log_softmax", "sum", "amax", "logsumexp", "dropout", "cumsum", "index", "cat"}
)
#: Views that mean nothing by themselves: who reads them is what matters.
_OPAQUE_VIEWS = frozenset({"detach", "diagonal"})


def live_nodes(graph: fx.Graph, reader: Reader) -> set[fx.Node]:
    """The nodes that the output, or a write that somebody can see, depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or any(u in live for u in node.users):
            live.add(node)
        elif writes_in_place(node):
            root = reader.root(node)
            sharing = [root, *reader.members(root)]
            if root.op in ("placeholder", "get_attr") or any(u in live for m in sharing for u in m.users):
                live.add(node)
    return live


def outside_reader(
    reader: Reader,
    live: set[fx.Node],
    product: Expr,
    anchor: fx.Node,
    shares: Callable[[fx.Node], bool] = lambda user: False,
) -> fx.Node | None:
    """A live node, not on the way to ``anchor``, for which the scores or weights must still be computed.

    Where ``anchor`` only normalises a product with the values, or adds up several, they are on the way.
    ``shares`` tells readers that will need them no more either.
    """
    inner = inner_products(reader, anchor)
    for node in _computing(reader, product, anchor, inner):
        found = _reader_of(reader, live, node, anchor, inner, product, shares)
        if found is not None:
            return found
    return None


def inner_products(reader: Reader, anchor: fx.Node) -> set[fx.Node]:
    """The products, and their sums, that ``anchor`` normalises or adds up."""
    if _op(reader, anchor) in ("mul", "div"):
        return {n for n in anchor.all_input_nodes if _is_product(reader, n)}
    found: set[fx.Node] = set()
    todo = [anchor]
    while todo:
        node = todo.pop()
        if _op(reader, node) == "add":
            fresh = [n for n in node.all_input_nodes if n not in found]
            found.update(n for n in fresh if _op(reader, n) == "add" or _is_product(reader, n))
            todo.extend(fresh)
    return found


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
    found, seen, todo = [], {anchor}, [anchor]
    while todo and len(seen) < limit:
        node = todo.pop()
        for source in node.all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            meaning = reader.defined.get(source)
            if meaning is product:
                found.append(source)
            if _passes_on(reader, source, product) or source in inner or _is_light(source, meaning):
                todo.append(source)
    return found


def _passes_on(reader: Reader, node: fx.Node, product: Expr) -> bool:
    """Is it ``product`` only because it returns an operand that is (``s[:]``, ``s.view(s.shape)``)?"""
    return reader.defined.get(node) is product and any(
        reader.defined.get(source) is product for source in node.all_input_nodes
    )


def _is_light(node: fx.Node, meaning: object) -> bool:
    """Element-wise operations, views, reductions, writes: what lies between the two products of a site."""
    if isinstance(meaning, tuple) or writes_in_place(node) or operation(node)[0] in _OPAQUE_VIEWS:
        return True
    return isinstance(meaning, Expr) and meaning.op in _LIGHT


def _reader_of(
    reader: Reader,
    live: set[fx.Node],
    start: fx.Node,
    anchor: fx.Node,
    inner: set[fx.Node],
    product: Expr,
    shares: Callable[[fx.Node], bool],
    limit: int = 400,
) -> fx.Node | None:
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user is anchor or user in seen or user not in live or _reads_type(user):
                continue
            light = (
                user in inner
                or _passes_on(reader, user, product)
                or _is_light(user, reader.defined.get(user))
            )
            if not light and shares(user):
                seen.add(user)
                continue
            if not light or len(seen) > limit:
                return user
            seen.add(user)
            todo.append(user)
    return None


def _writes_into(user: fx.Node, node: fx.Node) -> bool:
    return writes_in_place(user) and bool(user.args) and user.args[0] is node


def _reads_type(user: fx.Node) -> bool:
    """Does it read the shape, dtype or device of a tensor, and not its elements?"""
    kinds = (torch.dtype, torch.device, torch.Size, torch.SymInt, int)
    return _asserts(user) or (isinstance(value_of(user), kinds) and operation(user)[0] != "item")


def _asserts(user: fx.Node) -> bool:
    """An assertion on the type of a value, which says nothing once nobody computes the value."""
    return operation(user)[0] == "_assert_tensor_metadata"


def erase_dead(graph: fx.Graph, start: fx.Node) -> None:
    """Remove ``start`` and what only it needed; writes into tensors that nobody reads any more go too."""
    todo = [start]
    while todo:
        node = todo.pop()
        if node._erased or node.op not in ("call_function", "call_method"):
            continue
        writers = _only_writers(node)
        if writers is None or (writes_in_place(node) and node.users):
            continue
        inputs = [i for n in (node, *writers) for i in n.all_input_nodes]
        for writer in writers:
            graph.erase_node(writer)
        if writes_in_place(node):
            continue  # it may still be seen through its target; its target decides
        graph.erase_node(node)
        todo.extend(i for i in inputs if i is not node)


def _only_writers(node: fx.Node) -> list[fx.Node] | None:
    """The users of a node and of its views, last first, if all they do is write into it; else None."""
    found: list[fx.Node] = []
    for user in node.users:
        if not user.users and (_asserts(user) or _writes_into(user, node)):
            found.append(user)
        elif operation(user)[0] in ALIASES and first_operand(user) is node and not writes_in_place(user):
            below = _only_writers(user)
            if below is None:
                return None
            found += [*below, user]
        else:
            return None
    return found
