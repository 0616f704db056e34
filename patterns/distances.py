"""Squared distances as scores: ``|q - k|^2 = |q|^2 + |k|^2 - 2 q.k``, kept from rounding below zero.

Only distances that the graph computes by products are read (``torch.cdist`` with many points, and the formula
written out).  Differences that are squared and summed are more exact than products, and stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import Expr, expr, number_of, pointwise, under_casts
from fusepass.patterns import examples as eg
from fusepass.patterns.sums import product_below, square_below, summands
from fusepass.patterns.terms import number
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

    Its gradient is that of the squared distance.  Where two points are equal, this gradient is zero, as is
    that of ``torch.cdist``; the derivative of a root that is written out is NaN there.
    """
    root = term.argument(0) if _squares(term.expr) else None
    while root is not None and root.expr.op != "sqrt":
        root = scope.step(root)
    bounded = None if root is None else root.argument(0)
    inner = None if bounded is None else _distance(bounded, scope)
    if bounded is None or inner is None:
        return None
    return Peel(bounded if inner.alone else inner.term)


def _squares(node: Expr) -> bool:
    """Is it ``x * x`` or ``x ** 2``?"""
    twice = node.op == "mul" and node.args[0] is node.args[1]
    return twice or (node.op == "pow" and number_of(node.args[1]) == 2)


@rule("max(|q - k|^2, 0) = |q - k|^2", lambda: pointwise("max", _squared(), eg.number(0.0)))
def distance(term: Term, scope: Scope) -> Peel | None:
    """A squared distance is negative only by rounding, where it is nearly zero.

    If queries and keys are one tensor, every point has the distance zero from itself.  There the bound keeps
    rounding errors out of gradients, so it stays.
    """
    inner = _distance(term, scope)
    return None if inner is None or inner.alone else Peel(inner.term)


@dataclass(frozen=True)
class _Distance:
    """A squared distance, and whether it is between the points of a single tensor."""

    term: Term
    alone: bool


def _distance(term: Term, scope: Scope) -> _Distance | None:
    """The ``d`` of ``max(d, 0)``, if it is a squared distance."""
    inner = _not_negative(term, scope)
    if inner is None:
        return None
    whole = _apart(inner.expr, scope)
    inner = inner if whole is None else Term(whole, inner.index)
    alone = _is_squared_distance(inner, scope)
    return None if alone is None else _Distance(inner, alone)


def _not_negative(term: Term, scope: Scope) -> Term | None:
    """The ``x`` of ``max(x, 0)``."""
    if term.expr.op == "relu":
        return term.argument(0)
    if term.expr.op == "max":
        for position in (0, 1):
            if number(term.expr.args[1 - position], scope) == 0:
                return term.argument(position)
    return None


def _apart(node: Expr, scope: Scope) -> Expr | None:
    """``[a, x, 1] . [b, 1, y] = a . b + x + y``: a product of concatenated features as the sum of its parts,
    where a part that is multiplied by ones is added as it is.

    PyTorch decomposes ``cdist`` into such a product.
    """
    first, second = (_parts(node, n) if node.op == "dot" else None for n in (0, 1))
    if first is None or second is None or len(first[0]) != len(second[0]):
        return None
    (left, la), (right, lb) = first, second
    out, total = str(node.attrs[2]), None
    for a, b in zip(left, right, strict=True):
        if number(b, scope) == 1:
            part = _spread(a, la, out)
        elif number(a, scope) == 1:
            part = _spread(b, lb, out)
        else:
            same = all(m == n for m, n in zip(_sizes(a, la, lb, out), _sizes(b, lb, la, out), strict=True))
            part = expr("dot", (a, b), (la, lb, out), node.shape, node.dtype) if same else None
        if part is None:
            return None
        total = part if total is None else pointwise("add", total, part, dtype=node.dtype)
    return total


def _parts(product: Expr, position: int) -> tuple[tuple[Expr, ...], str] | None:
    """The parts of an operand that is concatenated over the only axis that is summed, and their labels."""
    node, labels = product.args[position], str(product.attrs[position])
    summed = set(labels) - set(str(product.attrs[2]))
    if node.op == "permute":
        dims: tuple[int, ...] = node.attrs[0]
        labels = "".join(labels[dims.index(d)] for d in range(len(dims)))
        node = node.args[0]
    if node.op != "cat" or len(summed) != 1 or labels[int(node.attrs[0])] not in summed:
        return None
    return node.args, labels


def _sizes(node: Expr, labels: str, others: str, out: str) -> list[object]:
    """The sizes of an operand's summed axes."""
    return [n for n, label in zip(node.shape, labels, strict=True) if label in others and label not in out]


def _spread(node: Expr, labels: str, out: str) -> Expr | None:
    """A tensor with a single feature, laid out like the product."""
    if any(n != 1 for n, label in zip(node.shape, labels, strict=True) if label not in out):
        return None
    order = tuple(labels.index(label) for label in out if label in labels)
    order += tuple(d for d, label in enumerate(labels) if label not in out)
    shape = tuple(node.shape[labels.index(label)] if label in labels else 1 for label in out)
    if order != tuple(range(node.rank)):
        node = expr("permute", (node,), (order,), tuple(node.shape[d] for d in order), node.dtype)
    return expr("reshape", (node,), (), shape, node.dtype)


@dataclass(frozen=True)
class _Operand:
    """An operand of a product or a square: ``factor`` times an element of a tensor, and the summed axis."""

    factor: float
    term: Term
    axis: str


def _is_squared_distance(term: Term, scope: Scope) -> bool | None:
    """Is it a positive multiple of ``|q|^2 + |k|^2 - 2 q.k``, of the same ``q`` and ``k`` throughout?

    None where it is not; otherwise, whether ``q`` and ``k`` are one tensor.
    """
    terms = summands(term.expr, scope)
    if len(terms) != 3:
        return None
    squares: list[tuple[float, _Operand]] = []
    products: list[tuple[float, _Operand, _Operand]] = []
    for factor, leaf in terms:
        at = term.of(leaf)
        if (square := square_below(at, scope)) is not None:
            operand = _operand(square[0], square[1], scope)
            if operand is None:
                return None
            squares.append((factor * operand.factor**2, operand))
        elif (product := product_below(at, scope)) is not None:
            pair = [_operand(t, product[0].axes, scope) for t in (product[0].left, product[0].right)]
            if pair[0] is None or pair[1] is None:
                return None
            products.append((factor * pair[0].factor * pair[1].factor, pair[0], pair[1]))
    if len(squares) != 2 or len(products) != 1:
        return None
    weight, *sides = products[0]
    if weight >= 0 or any(c != -weight / 2 for c, _ in squares):
        return None
    (_, a), (_, b) = squares
    q, k = sides
    alike = _same(a, q, scope) and _same(b, k, scope)
    if not alike and not (_same(a, k, scope) and _same(b, q, scope)):
        return None
    return q.term.expr is k.term.expr


def _operand(term: Term, axes: tuple[Affine, ...], scope: Scope) -> _Operand | None:
    """The tensor at the bottom of an operand's views, casts and constant factors."""
    factor = 1.0
    for _ in range(STEP_LIMIT):
        below = scope.step(term)
        if below is None and term.expr.op == "cast" and term.expr.args[0].is_float:
            below = term.argument(0)
        if below is None and (multiples := summands(term.expr, scope)) and len(multiples) == 1:
            below = term.of(multiples[0][1]) if multiples[0][1] is not term.expr else None
            factor *= multiples[0][0]
        if below is None:
            break
        term = below
    names = [a for axis in axes for a in scope.space.resolve(axis).axes]
    return _Operand(factor, term, names[0]) if len(names) == 1 else None


def _same(a: _Operand, b: _Operand, scope: Scope) -> bool:
    """Are both the same tensor, summed over the same dimension?"""
    renamed = {a.axis: b.axis}

    def index(term: Term) -> list[Affine]:
        indices = (scope.space.resolve(i) for i in term.index)
        return [Affine.of({renamed.get(n, n): c for n, c in i.terms}, i.const) for i in indices]

    return a.term.expr is b.term.expr and index(a.term) == index(b.term)


def squares_differences(scores: Expr) -> bool:
    """Are the scores made from differences of two tensors, squared and summed over their features?"""
    todo, seen = [scores], {scores}
    while todo:
        node = todo.pop()
        if node.op == "sum" and _is_squared_difference(under_casts(node.args[0])):
            return True
        if node.op not in ("dot", "input"):
            unseen = [a for a in node.args if a not in seen]
            seen.update(unseen)
            todo.extend(unseen)
    return False


def _is_squared_difference(body: Expr) -> bool:
    inner = under_casts(body.args[0]) if _squares(body) else body
    return inner.op == "sub" and all(a.is_float and a.shape != inner.shape for a in inner.args)


DISTANCES: tuple[Rule, ...] = (squared_root, distance)

__all__ = ["DISTANCES", "squares_differences"]
