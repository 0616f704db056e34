"""Contractions: what counts as a matrix product."""

from __future__ import annotations

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import VIEWS, Expr, expr, pointwise, under_casts
from fusepass.patterns import examples as eg
from fusepass.rules.engine import Product, Rule, Scope, Term, rule


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
            where[label] = scope.space.new_axis("d", a.shape[position])
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
        index[dim] = scope.space.new_axis("d", body.shape[dim])
        summed.append(index[dim])
    element = Term(body, tuple(index))
    return Product(element.argument(0), element.argument(1), tuple(summed))


def factors(node: Expr) -> tuple[Expr, ...]:
    """The two operands of a product, however it is written; none for other expressions."""
    if node.op == "dot":
        return node.args
    if node.op == "reshape" and node.args[0].op == "sum":
        node = node.args[0]
    return node.args[0].args if node.op == "sum" and node.args[0].op == "mul" else ()


def normalised_late(node: Expr) -> Expr | None:
    """``(w . v) * t = (w * t) . v`` for a ``t`` with one number per row; likewise for a division by ``t``.

    Only a ``t`` made from a row sum or a logsumexp is moved, since it normalises the weights of its row.
    """
    if node.op not in ("mul", "div"):
        return None
    for position in (0, 1) if node.op == "mul" else (0,):
        product, t = under_casts(node.args[position]), node.args[1 - position]
        if product.op != "dot" or product.shape != node.shape or not t.shape or t.shape[-1] != 1:
            continue
        left, right, out = (str(x) for x in product.attrs)
        if left[:-1] != out[:-1] or not _of_rows(t):
            continue
        weights = pointwise(node.op, product.args[0], t, dtype=product.args[0].dtype)
        return expr("dot", (weights, product.args[1]), (left, right, out), node.shape, node.dtype)
    return None


def _of_rows(node: Expr) -> bool:
    """Is it made from a row sum or a logsumexp by element-wise operations and views?"""
    for _ in range(12):
        if node.op in ("sum", "logsumexp"):
            return True
        if node.op in VIEWS or node.op in ("cast", "sigmoid", "neg", "exp", "log", "pow"):
            node = node.args[0]
        elif node.op in ("add", "sub", "div", "mul", "max"):
            return any(_of_rows(a) for a in node.args)
        else:
            return False
    return False


PRODUCTS: tuple[Rule, ...] = (dot, multiply_and_sum)
