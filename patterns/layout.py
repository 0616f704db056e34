"""Views: each one changes the index and leaves the value alone."""

from __future__ import annotations

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import Expr, expr
from fusepass.patterns import examples as eg
from fusepass.rules.engine import Peel, Rule, Scope, Term, rule


def _view(op: str, shape: tuple[int, ...], *attrs: object) -> Expr:
    x = eg.scores()
    return expr(op, (x,), attrs, shape, x.dtype)


@rule(
    "permute(x, p)[i] = x[i by p inverse]", lambda: _view("permute", (eg.H, eg.B, eg.K, eg.Q), (1, 0, 3, 2))
)
def permute(term: Term, scope: Scope) -> Peel | None:
    """Reorder the index."""
    if term.expr.op != "permute":
        return None
    dims: tuple[int, ...] = term.expr.attrs[0]
    index = [Affine()] * len(dims)
    for position, dim in enumerate(dims):
        index[dim] = term.index[position]
    return Peel(Term(term.expr.args[0], tuple(index)))


@rule("reshape(x)[i] = x[digits of i]", lambda: _view("reshape", (eg.B * eg.H, eg.Q, 2, eg.K // 2)))
def reshape(term: Term, scope: Scope) -> Peel | None:
    """Re-read the mixed-radix digits of the index, splitting axes where the new shape cuts them."""
    if term.expr.op != "reshape":
        return None
    inner = term.expr.args[0]
    index = scope.space.reshape(term.index, term.expr.shape, inner.shape)
    return None if index is None else Peel(Term(inner, index))


def _expanded() -> Expr:
    x = expr("reshape", (eg.scores(),), (), (eg.B, eg.H, 1, eg.Q, eg.K), eg.scores().dtype)
    return expr("expand", (x,), (), (eg.B, eg.H, 2, eg.Q, eg.K), x.dtype)


@rule("expand(x)[i] = x[i, 0 where x has size 1]", _expanded)
def expand(term: Term, scope: Scope) -> Peel | None:
    """Forget the index of a broadcast dimension."""
    return Peel(term.argument(0)) if term.expr.op == "expand" else None


@rule("x[a::s][i] = x[a + s*i]", lambda: _view("slice", (eg.B, eg.H, eg.Q, 2), 3, 1, 2))
def slice_(term: Term, scope: Scope) -> Peel | None:
    """Shift and stretch one index."""
    if term.expr.op != "slice":
        return None
    dim, start, step = term.expr.attrs
    index = list(term.index)
    index[dim] = index[dim] * step + start
    return Peel(Term(term.expr.args[0], tuple(index)))


@rule("select(x, d, a)[i] = x[i with a at d]", lambda: _view("select", (eg.B, eg.Q, eg.K), 1, 2))
def select(term: Term, scope: Scope) -> Peel | None:
    """Put a constant back into the index."""
    if term.expr.op != "select":
        return None
    dim, at = term.expr.attrs
    index = (*term.index[:dim], Affine((), at), *term.index[dim:])
    return Peel(Term(term.expr.args[0], index))


@rule("flip(x, d)[i] = x[size - 1 - i]", lambda: _view("flip", (eg.B, eg.H, eg.Q, eg.K), (2, 3)))
def flip(term: Term, scope: Scope) -> Peel | None:
    """Reverse the index."""
    if term.expr.op != "flip":
        return None
    dims: tuple[int, ...] = term.expr.attrs[0]
    index = list(term.index)
    for dim in dims:
        index[dim] = index[dim] * -1 + (term.expr.shape[dim] - 1)
    return Peel(Term(term.expr.args[0], tuple(index)))


LAYOUT: tuple[Rule, ...] = (permute, reshape, expand, slice_, select, flip)
