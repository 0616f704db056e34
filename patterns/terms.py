"""What rules ask about a term: whether it leads to the product, and which number it is."""

from __future__ import annotations

from fusepass.expressions.contents import Uniform
from fusepass.expressions.ir import POINTWISE, VIEWS, Expr, Number, number_of
from fusepass.rules.engine import Scope, Term


def holds_product(node: Expr) -> bool:
    """Is there a matrix product below, through views, casts and element-wise operations only?

    In a concatenation every part has to hold one.
    """
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at.op == "dot" or (at.op == "sum" and at.args[0].op == "mul"):
            return True
        if at.op in POINTWISE or at.op in VIEWS:
            unseen = [a for a in at.args if a not in seen]
            seen.update(unseen)
            todo.extend(unseen)
        elif at.op == "cat" and all(holds_product(a) for a in at.args):
            return True
    return False


def score_sides(term: Term) -> list[int]:
    """The arguments of a binary layer that may lead to the product, the likelier first."""
    sides = [i for i, a in enumerate(term.expr.args) if holds_product(a)]
    return sorted(sides, key=lambda i: -term.expr.args[i].rank)


def number(node: Expr, scope: Scope) -> float | None:
    """A constant as a float, in its dtype; a buffer that holds a single number counts as one."""

    def uniform(leaf: Expr) -> Number | None:
        form = scope.contents.form(leaf)
        return form.value if isinstance(form, Uniform) else None

    value = number_of(node, uniform)
    return None if value is None or isinstance(value, complex) else float(value)
