"""What resembles attention: the softmaxes that a report must account for, fused or not.

Sites share many of the expressions behind them, so the answer for an expression is cached for as long as the
expression lives: all questions about a graph together look at each of its nodes once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

from fusepass.expressions.ir import POINTWISE, VIEWS, Expr
from fusepass.patterns.terms import holds_product

T = TypeVar("T")

_SOFTMAXES = frozenset({"softmax", "log_softmax"})
_ENDS = frozenset({"input", "dot"})

#: For an expression, the nearest softmaxes and exponentials below it, down to the next products.
_behind: WeakKeyDictionary[Expr, tuple[Expr, ...]] = WeakKeyDictionary()
#: Is one of the next products below an expression a product of two tensors of rank 3 or more?
_active: WeakKeyDictionary[Expr, bool] = WeakKeyDictionary()
#: Is one of those products a product of queries and keys, as far as its factors tell?
_scored: WeakKeyDictionary[Expr, bool] = WeakKeyDictionary()


def _upwards(
    root: Expr,
    known: MutableMapping[Expr, T],
    ends: frozenset[str],
    combine: Callable[[Expr, Sequence[Expr]], T],
) -> T:
    """The answer of ``combine`` for an expression; everything below that has no answer yet gets one first.

    Args:
        known: the answers so far, to which new ones are added.
        ends: the operations at which the search stops; their arguments are not looked at.
        combine: gets an expression, and the arguments of it that are looked at; their answers are known.
    """
    todo = [root]
    while todo:
        node = todo[-1]
        below = () if node.op in ends else node.args
        unknown = [] if node in known else [a for a in below if a not in known]
        if unknown:
            todo.extend(unknown)
            continue
        todo.pop()
        if node not in known:
            known[node] = combine(node, below)
    return known[root]


def _at_or_behind(node: Expr) -> tuple[Expr, ...]:
    """The softmaxes and exponentials at an expression, or the nearest ones behind it."""
    if node.op in _SOFTMAXES:
        return (node,)
    nearest = _upwards(node, _behind, _ENDS | _SOFTMAXES, _joined)
    return (node, *nearest) if node.op == "exp" else nearest


def _joined(node: Expr, below: Sequence[Expr]) -> tuple[Expr, ...]:
    parts = [p for p in dict.fromkeys(map(_at_or_behind, below)) if p]
    if len(parts) < 2:
        return parts[0] if parts else ()
    return tuple(dict.fromkeys(e for p in parts for e in p))


def softmaxes_behind(anchor: Expr) -> set[Expr]:
    """The nearest softmaxes and exponentials behind a product, whatever layers lie between."""
    return {e for a in anchor.args for e in _at_or_behind(a)}


def products_behind(anchor: Expr) -> list[Expr]:
    """The score products behind the softmaxes of a sum of products."""
    products: dict[Expr, None] = {}
    behind = dict.fromkeys(s for part in anchor.args for a in part.args for s in _at_or_behind(a))
    todo = list(dict.fromkeys(s.args[0] for s in behind))
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "dot":
            products[node] = None
        elif node.op != "input":
            unseen = [a for a in dict.fromkeys(node.args) if a not in seen]
            seen.update(unseen)
            todo.extend(unseen)
    return list(products)


def of_activations(scores: Expr) -> bool:
    """Do the scores come from a product of two tensors of rank 3 or more?"""
    return holds_product(scores) and _upwards(scores, _active, _ENDS, _of_rank_three)


def _of_rank_three(node: Expr, below: Sequence[Expr]) -> bool:
    if node.op == "dot":
        return min(a.rank for a in node.args) >= 3
    return any(_active[a] for a in below)


def are_scores(node: Expr) -> bool:
    """Does an expression come from a product of two tensors of rank 3 or more that no softmax is behind?"""
    return node.op not in _SOFTMAXES and _upwards(node, _scored, _ENDS | _SOFTMAXES, _holds_scores)


def _holds_scores(node: Expr, below: Sequence[Expr]) -> bool:
    if node.op == "dot":
        return _of_rank_three(node, ()) and not softmaxes_behind(node)
    return any(_scored[a] for a in below)


def unpeeled(scores: Expr) -> str | None:
    """The outermost operation between scores and their product that is neither element-wise nor a view."""
    todo, seen = [scores], {scores}
    while todo:
        node = todo.pop(0)
        if node.op not in POINTWISE and node.op not in VIEWS and node.op not in _ENDS:
            return node.op
        unseen = [a for a in node.args if a not in seen and are_scores(a)] if node.op != "dot" else []
        seen.update(unseen)
        todo.extend(unseen)
    return None


def leaves_behind(root: Expr) -> list[Expr]:
    """The leaves below an expression, up to the next products and softmaxes."""
    todo, seen, leaves = [root], {root}, []
    while todo:
        node = todo.pop()
        if node.op == "input":
            leaves.append(node)
        elif node.op not in _ENDS | _SOFTMAXES:
            unseen = [a for a in node.args if a not in seen]
            seen.update(unseen)
            todo.extend(unseen)
    return leaves


def were_scores(softmax: Expr, before: Mapping[Expr, Expr]) -> bool:
    """Does a leaf behind the softmax hold scores after a write that no rule follows?

    Args:
        softmax: the softmax.
        before: for leaves that stand for tensors after a write, what the tensors held before it.
    """
    todo, seen = list(softmax.args[:1]), set(softmax.args[:1])
    while todo and before:
        node = todo.pop()
        if node in before and of_activations(before[node]):
            return True
        if node.op != "dot":
            unseen = [a for a in node.args if a not in seen]
            seen.update(unseen)
            todo.extend(unseen)
    return False
