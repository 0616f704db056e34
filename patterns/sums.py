"""A tensor as a sum of multiples of others, and products that stand behind views and casts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import VIEWS, Expr, cast, const, expr, number_of, opmath, pointwise, under_casts
from fusepass.patterns.products import PRODUCTS
from fusepass.patterns.terms import number
from fusepass.rules.engine import STEP_LIMIT, Product, Scope, Term

Multiple = tuple[float, Expr]
"""A factor, and what it multiplies."""

#: Sums that are nested deeper than this are read as one tensor.
DEEPEST = 32


def summands(node: Expr, scope: Scope, depth: int = 0) -> list[Multiple]:
    """The multiples whose sum a tensor is; each broadcasts to the tensor.

    A tensor that is not a sum is its own only summand.
    """
    parts = _linear(node, scope) if depth < DEEPEST else None
    if parts is None:
        return [(1.0, node)]
    return [(c * f, leaf) for c, part in parts for f, leaf in summands(part, scope, depth + 1)]


def without(node: Expr, dropped: Collection[Expr], scope: Scope, depth: int = 0) -> Expr | None:
    """A sum without some of its summands, in the order and the dtypes in which it is computed.

    None if nothing is left.
    """
    if node in dropped:
        return None
    parts = _linear(node, scope) if depth < DEEPEST else None
    if parts is None:
        return node
    kept = [(c, without(part, dropped, scope, depth + 1)) for c, part in parts]
    if all(below is part for (_, below), (_, part) in zip(kept, parts, strict=True)):
        return node
    total: Expr | None = None
    for factor, below in kept:
        if below is None:
            continue
        if total is not None and factor == -1.0:
            total = pointwise("sub", total, below, dtype=node.dtype)
            continue
        term = _times(factor, below, node)
        total = term if total is None else pointwise("add", total, term, dtype=node.dtype)
    return total


def _times(factor: float, node: Expr, like: Expr) -> Expr:
    """A multiple of a tensor, in the dtype of ``like``."""
    if factor == 1.0:
        return cast(node, like.dtype)
    if factor == -1.0:
        return pointwise("neg", node, dtype=like.dtype)
    return pointwise("mul", node, const(factor, opmath(like.dtype)), dtype=like.dtype)


def _linear(node: Expr, scope: Scope) -> list[Multiple] | None:
    """The multiples that one operation adds up, or None if it does something else."""
    if not node.is_float or not all(a.is_float or a.op == "const" for a in node.args):
        return None
    args = node.args
    if node.op in ("add", "sub"):
        return [(1.0, args[0]), (1.0 if node.op == "add" else -1.0, args[1])]
    if node.op in ("neg", "cast"):
        return [(-1.0 if node.op == "neg" else 1.0, args[0])]
    if node.op in ("mul", "div") and (multiple := _factor(node, scope)) is not None:
        return [multiple]
    if node.op in VIEWS and args[0].op not in VIEWS:
        inner = _linear(args[0], scope)
        if inner is not None and all(part.shape == args[0].shape for _, part in inner):
            return [(c, expr(node.op, (p,), node.attrs, node.shape, p.dtype)) for c, p in inner]
    return None


def _factor(node: Expr, scope: Scope) -> Multiple | None:
    """A product with a finite constant, or a quotient by one, as the multiple of a tensor."""
    for position in (0, 1) if node.op == "mul" else (0,):
        kept, value = node.args[position], number(node.args[1 - position], scope)
        if value is None or kept.shape != node.shape or (node.op == "div" and value == 0):
            continue
        factor = value if node.op == "mul" else 1.0 / value
        return (factor, kept) if math.isfinite(factor) else None
    return None


# ---------------------------------------------------------------------------------------- products


def product_below(term: Term, scope: Scope) -> tuple[Product, Expr] | None:
    """The product of two tensors behind the views and casts of a term, and the product's expression."""
    for below in _behind_views(term, scope):
        for rule in PRODUCTS:
            if isinstance(product := rule.apply(below, scope), Product):
                return product, below.expr
    return None


def square_below(term: Term, scope: Scope) -> tuple[Term, tuple[Affine, ...]] | None:
    """For a sum of squares over some axes, behind views and casts: what is squared, and the axes."""
    product = product_below(term, scope)
    if product is not None:
        left, right, axes = product[0].left, product[0].right, product[0].axes
        return (left, axes) if left == right else None
    total = next((t for t in _behind_views(term, scope) if t.expr.op == "sum"), None)
    return None if total is None else _sum_of_powers(total, scope)


def _behind_views(term: Term, scope: Scope) -> Iterator[Term]:
    """A term, and what it is behind its views and casts, one after another."""
    at: Term | None = term
    for _ in range(STEP_LIMIT):
        if at is None:
            return
        yield at
        at = at.argument(0) if _is_float_cast(at.expr) else scope.step(at)


def _sum_of_powers(term: Term, scope: Scope) -> tuple[Term, tuple[Affine, ...]] | None:
    body = under_casts(term.expr.args[0])
    if body.op != "pow" or number_of(body.args[1]) != 2 or body.args[0].shape != body.shape:
        return None
    index, summed = list(term.index), []
    for dim in term.expr.attrs[0]:
        index[dim] = scope.space.new_axis("d", body.shape[dim])
        summed.append(index[dim])
    return Term(body.args[0], tuple(index)), tuple(summed)


def _is_float_cast(node: Expr) -> bool:
    return node.op == "cast" and node.is_float and node.args[0].is_float


__all__ = ["Multiple", "product_below", "square_below", "summands", "without"]
