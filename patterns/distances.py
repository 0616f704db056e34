"""Squared distances as scores: ``|q - k|^2 = |q|^2 + |k|^2 - 2 q.k``, kept from rounding below zero.

Only distances that the graph computes by products are read (``torch.cdist`` with many points, and the formula
written out).  Differences that are squared and summed are more exact than products, and stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import Expr, expr, number_of, pointwise, under_casts
from fusepass.patterns import examples as eg
from fusepass.patterns.scores import number
from fusepass.patterns.sums import product_below, square_below, summands
from fusepass.rules.engine import STEP_LIMIT, Peel, Rule, Scope, Term, rule


def _squared() -> Expr:
    """``|q|^2 + |k|^2 - 2 q.k`` for ``q [B, H, Q, D]`` and ``k [B, H, K, D]``."""
    product = eg.scores()
    q, k = product.args
    two = eg.number(2.0)
    rows, columns = (eg.reduced("sum", pointwise("pow", x, two)) for x in (q, k))
    columns = expr("reshape", (columns,), (), (eg.B, eg.H, 1, eg.K), columns.dtype)
    return eg.binary("sub", eg.binary("add", rows, columns), eg.binary("mul", product, two))


def _root() -> Expr:
    return pointwise("sqrt", pointwise("max", _squared(), eg.number(0.0)))


@rule("sqrt(max(|q - k|^2, 0))^2 = |q - k|^2", lambda: pointwise("pow", _root(), eg.number(2.0)))
def squared_root(term: Term, scope: Scope) -> Peel | None:
    """The square of a distance.

    Its gradient is that of the squared distance.  Where two points are equal, that is zero, as that of
    ``torch.cdist``; the derivative of a root that is written out is not a number there.
    """
    root = term.argument(0) if _squares(term.expr) else None
    return None if root is None or root.expr.op != "sqrt" else distance.apply(root.argument(0), scope)  # type: ignore[return-value]


def _squares(node: Expr) -> bool:
    """Is it ``x * x`` or ``x ** 2``?"""
    twice = node.op == "mul" and node.args[0] is node.args[1]
    return twice or (node.op == "pow" and number_of(node.args[1]) == 2)


@rule("max(|q - k|^2, 0) = |q - k|^2", lambda: pointwise("max", _squared(), eg.number(0.0)))
def distance(term: Term, scope: Scope) -> Peel | None:
    """A squared distance is negative only by rounding, where it is nearly zero."""
    inner = _not_negative(term, scope)
    return Peel(inner) if inner is not None and _is_squared_distance(inner, scope) else None


def _not_negative(term: Term, scope: Scope) -> Term | None:
    """The ``x`` of ``max(x, 0)``."""
    if term.expr.op == "relu":
        return term.argument(0)
    if term.expr.op == "max":
        for position in (0, 1):
            if number(term.expr.args[1 - position], scope) == 0:
                return term.argument(position)
    return None


@dataclass(frozen=True)
class _Operand:
    """A tensor whose multiple is multiplied or squared: its element, and the axis that is summed."""

    factor: float
    term: Term
    axis: str


def _is_squared_distance(term: Term, scope: Scope) -> bool:
    """Is it a positive multiple of ``|q|^2 + |k|^2 - 2 q.k``, of the same ``q`` and ``k`` throughout?"""
    found = summands(term.expr, scope)
    if len(found) != 3:
        return False
    squares: list[tuple[float, _Operand]] = []
    products: list[tuple[float, _Operand, _Operand]] = []
    for factor, leaf in found:
        at = term.of(leaf)
        if (square := square_below(at, scope)) is not None:
            operand = _operand(square[0], square[1], scope)
            if operand is None:
                return False
            squares.append((factor * operand.factor**2, operand))
        elif (product := product_below(at, scope)) is not None:
            pair = [_operand(t, product[0].axes, scope) for t in (product[0].left, product[0].right)]
            if pair[0] is None or pair[1] is None:
                return False
            products.append((factor * pair[0].factor * pair[1].factor, pair[0], pair[1]))
    if len(squares) != 2 or len(products) != 1:
        return False
    weight, *sides = products[0]
    if weight >= 0 or any(c != -weight / 2 for c, _ in squares):
        return False
    (_, a), (_, b) = squares
    q, k = sides
    alike = _same(a, q, scope) and _same(b, k, scope)
    return alike or (_same(a, k, scope) and _same(b, q, scope))


def _operand(term: Term, axes: tuple[Affine, ...], scope: Scope) -> _Operand | None:
    """The tensor at the bottom of an operand's views, casts and constant factors."""
    factor = 1.0
    for _ in range(STEP_LIMIT):
        below = scope.step(term)
        if below is None and term.expr.op == "cast" and term.expr.args[0].is_float:
            below = term.argument(0)
        if below is None and (found := summands(term.expr, scope)) and len(found) == 1:
            below = term.of(found[0][1]) if found[0][1] is not term.expr else None
            factor *= found[0][0]
        if below is None:
            break
        term = below
    names = [a for axis in axes for a in scope.space.resolve(axis).axes]
    return _Operand(factor, term, names[0]) if len(names) == 1 else None


def _same(a: _Operand, b: _Operand, scope: Scope) -> bool:
    """Are both the same tensor, summed over the same dimension?"""
    renamed = {a.axis: b.axis}

    def index(term: Term) -> list[Affine]:
        found = (scope.space.resolve(i) for i in term.index)
        return [Affine.of({renamed.get(n, n): c for n, c in i.terms}, i.const) for i in found]

    return a.term.expr is b.term.expr and index(a.term) == index(b.term)


def squares_differences(scores: Expr) -> bool:
    """Are the scores made from differences of two tensors, squared and summed over their features?"""
    todo, seen = [scores], {scores}
    while todo:
        node = todo.pop()
        if node.op == "sum" and _is_squared_difference(under_casts(node.args[0])):
            return True
        if node.op not in ("dot", "input"):
            fresh = [a for a in node.args if a not in seen]
            seen.update(fresh)
            todo.extend(fresh)
    return False


def _is_squared_difference(body: Expr) -> bool:
    inner = under_casts(body.args[0]) if _squares(body) else body
    return inner.op == "sub" and all(a.is_float and a.shape != inner.shape for a in inner.args)


DISTANCES: tuple[Rule, ...] = (squared_root, distance)

__all__ = ["DISTANCES", "squares_differences"]
