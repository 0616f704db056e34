"""What resembles attention: the softmaxes that a report must account for, fused or not."""

from __future__ import annotations

from collections.abc import Mapping

from fusepass.ir import Expr
from fusepass.patterns.scores import holds_product


def softmaxes_behind(anchor: Expr) -> set[Expr]:
    """The softmax nodes directly behind a product, whatever was made of them."""
    found: set[Expr] = set()
    todo = list(anchor.args)
    for _ in range(64):
        if not todo:
            break
        node = todo.pop()
        if node.op in ("softmax", "exp", "log_softmax"):
            found.add(node)
        elif node.op not in ("input", "dot"):
            todo.extend(node.args)
    return found


def products_behind(anchor: Expr) -> list[Expr]:
    """The score products behind the softmaxes that a sum of products is made of."""
    found: dict[Expr, None] = {}
    todo = [s.args[0] for part in anchor.args for s in softmaxes_behind(part)]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "dot":
            found[node] = None
        elif node.op != "input":
            fresh = [a for a in node.args if a not in seen]
            seen.update(fresh)
            todo.extend(fresh)
    return list(found)


def of_activations(scores: Expr) -> bool:
    """Do the scores come from a product of two tensors of rank 3 or more?"""
    if not holds_product(scores):
        return False
    todo = [scores]
    for _ in range(200):
        if not todo:
            return False
        node = todo.pop()
        if node.op == "dot":
            if min(a.rank for a in node.args) >= 3:
                return True
        elif node.op != "input":
            todo.extend(node.args)
    return False


def were_scores(softmax: Expr, before: Mapping[Expr, Expr]) -> bool:
    """Is a leaf behind the softmax what became of scores in a write that nobody followed?

    Args:
        softmax: the softmax.
        before: what leaves that were written to stood for.
    """
    todo, seen = [softmax.args[0]], set[Expr]()
    while todo:
        node = todo.pop()
        if node in before and of_activations(before[node]):
            return True
        if node not in seen and node.op != "dot":
            seen.add(node)
            todo.extend(node.args)
    return False
