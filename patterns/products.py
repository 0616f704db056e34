"""Contractions: what counts as a matrix product."""

from __future__ import annotations

from fusepass.index import Affine
from fusepass.ir import Expr, expr
from fusepass.patterns import examples as eg
from fusepass.rule import Product, Rule, Scope, Term, rule


def _dot_example() -> Expr:
    a = expr("reshape", (eg.scores("a"),), (), (eg.B, eg.H, eg.Q, eg.K), eg.scores().dtype)
    b = eg.leaf("b", (eg.B, eg.H, eg.K, eg.D), a.dtype)
    return expr("dot", (a, b), ("abmk", "abkn", "abmn"), (eg.B, eg.H, eg.Q, eg.D), a.dtype)


@rule("dot(a, b)[o] = sum_k a[o, k] * b[o, k]", _dot_example)
def dot(term: Term, scope: Scope) -> Product | None:
    """An einsum of two operands; a batch dimension of size 1 is broadcast."""
    if term.expr.op != "dot":
        return None
    a, b = term.expr.args
    la, lb, lo = (str(x) for x in term.expr.attrs)
    where: dict[str, Affine] = dict(zip(lo, term.index, strict=True))
    summed = []
    for position, label in enumerate(la):
        if label not in where:
            where[label] = scope.space.fresh("d", a.shape[position])
            summed.append(where[label])
    left = Term(a, tuple(Affine() if n == 1 else where[c] for c, n in zip(la, a.shape, strict=True)))
    right = Term(b, tuple(Affine() if n == 1 else where[c] for c, n in zip(lb, b.shape, strict=True)))
    return Product(left, right, tuple(summed))


def _sum_example() -> Expr:
    a = expr(
        "reshape",
        (eg.leaf("a", (eg.B, eg.Q, eg.D), eg.scores().dtype),),
        (),
        (eg.B, eg.Q, 1, eg.D),
        eg.scores().dtype,
    )
    b = expr("reshape", (eg.leaf("b", (eg.B, eg.K, eg.D), a.dtype),), (), (eg.B, 1, eg.K, eg.D), a.dtype)
    total = eg.reduced("sum", eg.binary("mul", a, b))
    return expr("reshape", (total,), (), (eg.B, eg.Q, eg.K), a.dtype)


@rule("sum_d (a * b)[o, d] is a contraction of a and b", _sum_example)
def multiply_and_sum(term: Term, scope: Scope) -> Product | None:
    """A product written element by element and summed."""
    inner = scope.step(term) if term.expr.op == "reshape" else term
    if inner is None or inner.expr.op != "sum" or inner.expr.args[0].op != "mul":
        return None
    dims: tuple[int, ...] = inner.expr.attrs[0]
    body, index, summed = inner.expr.args[0], list(inner.index), []
    for dim in dims:
        index[dim] = scope.space.fresh("d", body.shape[dim])
        summed.append(index[dim])
    element = Term(body, tuple(index))
    return Product(element.argument(0), element.argument(1), tuple(summed))


PRODUCTS: tuple[Rule, ...] = (dot, multiply_and_sum)
