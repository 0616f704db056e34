"""Spellings of the softmax itself."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import Expr, const, expr, opmath, pointwise, scalar_of, under_casts
from fusepass.patterns import examples as eg
from fusepass.patterns.masks import visibility_factor
from fusepass.patterns.terms import holds_product
from fusepass.rules.engine import Core, Form, Refuse, Rule, Scope, Term, rule
from fusepass.rules.formulas import Formulas


def _exponential(node: Expr) -> Expr | None:
    """The ``x`` of ``exp(x)``, and of ``exp2(x)`` written in base e."""
    if node.op == "exp":
        return node.args[0]
    if node.op == "exp2":
        return pointwise("mul", node.args[0], const(math.log(2.0), opmath(node.dtype)), dtype=node.dtype)
    return None


def _row_sum_of(node: Expr, summand: Expr) -> int | None:
    """The dimension, where ``node`` is ``sum(summand)`` over one dimension kept with size 1."""
    node = under_casts(node)
    while node.op in ("expand", "reshape") and node.op == "expand":
        node = node.args[0]
    if node.op != "sum" or under_casts(node.args[0]) is not under_casts(summand):
        return None
    dims: tuple[int, ...] = node.attrs[0]
    return dims[0] if len(dims) == 1 else None


def _core(term: Term, scores: Expr, dim: int) -> Core:
    return Core(Term(scores, term.index), dim, term.expr.dtype)


@rule("softmax(x)", lambda: eg.softmax(eg.scores()))
def softmax(term: Term, scope: Scope) -> Core | None:
    """The operation itself."""
    if term.expr.op != "softmax":
        return None
    return _core(term, term.expr.args[0], int(term.expr.attrs[0]))


def _divided() -> Expr:
    e = pointwise("exp", eg.scores())
    return eg.binary("div", e, eg.reduced("sum", e))


@rule("exp(x) / sum(exp(x)) = softmax(x)", _divided)
def quotient(term: Term, scope: Scope) -> Core | None:
    """Written out: exponential over its row sum, by division or by the sum's reciprocal."""
    pair = _numerator_and_sum(term.expr)
    if pair is None:
        return None
    numerator, denominator = pair
    scores = _logits(under_casts(numerator), scope)
    if scores is None:
        return None
    if (dim := _row_sum_of(_unclamped(denominator, numerator, scores), numerator)) is not None:
        return replace(_core(term, scores, dim), form=_form(scores, dim, scope))
    sunk = _with_sink(term, scores, denominator, numerator)
    if sunk is None and holds_product(scores):
        op = under_casts(denominator).op
        raise Refuse(f"exponentials are divided by {op!r}, which is not provably their row sum", term.expr)
    return sunk


def _form(scores: Expr, dim: int, scope: Scope) -> Form:
    """The ``form`` of a softmax by what was subtracted from its logits before the exponential."""
    node, masked = under_casts(scores), False
    while True:
        if node.op == "where" and scalar_of(node.args[2]) == -math.inf:
            node, masked = under_casts(node.args[1]), True
        elif node.op == "where" and scalar_of(node.args[1]) == -math.inf:
            node, masked = under_casts(node.args[2]), True
        elif node.op == "mul" and (scalar_of(node.args[1]) or 0) > 0:
            node = under_casts(node.args[0])
        else:
            break
    if node.op != "sub" or not holds_product(node.args[0]):
        return "bare"
    shift = node.args[1]
    while shift.op in ("cast", "expand") or shift in scope.contents.values:
        shift = scope.contents.values.get(shift) or shift.args[0]
    if not _is_maximum(shift, node.args[0], dim):
        return "relative" if shift.op in ("amax", "logsumexp") else "shifted"
    return "late" if masked else "softmax"


def _is_maximum(shift: Expr, x: Expr, dim: int, casts: bool = True) -> bool:
    """Is ``shift`` the maximum of ``x`` over one dimension, possibly rounded by casts on the way?

    A maximum over more dimensions does not count: it may come from another row, and then the exponentials of
    a hidden row may all be zero.
    """
    if shift.op != "amax" or shift.attrs[0] != (dim,):
        return False
    return shift.args[0] is x or (casts and under_casts(shift.args[0]) is under_casts(x))


def _logits(node: Expr, scope: Scope) -> Expr | None:
    """The ``x`` of ``exp(x)``; of ``exp(x) * m`` and ``where(m, exp(x), 0)`` it is ``where(m, x, -inf)``."""
    exponent = _exponential(node)
    if exponent is not None:
        return exponent
    if node.op == "where":
        condition, yes, no = node.args
        if scalar_of(no) == 0 and (x := _logits(under_casts(yes), scope)) is not None:
            return pointwise("where", condition, x, const(-math.inf, x.dtype), dtype=x.dtype)
        if scalar_of(yes) == 0 and (x := _logits(under_casts(no), scope)) is not None:
            return pointwise("where", condition, const(-math.inf, x.dtype), x, dtype=x.dtype)
    if node.op == "mul":
        for e, m in (node.args, node.args[::-1]):
            x = _logits(under_casts(e), scope)
            bits = None if x is None else _zero_or_one(m, scope)
            if x is not None and bits is not None:
                return pointwise("where", bits, x, const(-math.inf, x.dtype), dtype=x.dtype)
    return None


def _zero_or_one(factor: Expr, scope: Scope) -> Expr | None:
    """A factor that is provably 0 or 1 everywhere, as booleans."""
    if factor.op == "cast" and factor.args[0].dtype is torch.bool:
        return factor.args[0]
    if factor.dtype is torch.bool:
        return factor
    formulas = Formulas(scope)
    element = Term(factor, tuple(scope.space.new_axis("m", n) for n in factor.shape))
    if visibility_factor(formulas, formulas.lift(element)) is None:
        return None
    return expr("cast", (factor,), (torch.bool,), factor.shape, torch.bool)


def _unclamped(denominator: Expr, numerator: Expr, scores: Expr) -> Expr:
    """``max(sum(exp(x - amax(x))), c)`` with ``c <= 1`` is the sum: its largest summand is 1."""
    node = under_casts(denominator)
    if node.op != "max":
        return denominator
    for total, bound in (node.args, node.args[::-1]):
        known, dim = scalar_of(bound), _row_sum_of(total, numerator)
        if known is not None and known <= 1 and dim is not None and _is_shifted(scores, dim):
            return total
    return denominator


def _is_shifted(scores: Expr, dim: int) -> bool:
    """Is the maximum over a dimension subtracted, so that the largest exponential over it is exactly 1?"""
    node = under_casts(scores)
    return node.op == "sub" and _is_maximum(node.args[1], node.args[0], dim, casts=False)


def _with_sink(term: Term, scores: Expr, denominator: Expr, numerator: Expr) -> Core | None:
    """``exp(x) / (sum(exp(x)) + exp(u))``: a softmax with a sink ``u``; a number ``c`` is ``exp(log(c))``."""
    if denominator.op != "add":
        return None
    for total, extra in (denominator.args, denominator.args[::-1]):
        dim = _row_sum_of(total, numerator)
        if dim is None:
            continue
        if scalar_of(extra) is not None and _is_shifted(scores, dim):
            raise Refuse(
                f"{scalar_of(extra)} is added to a sum of exponentials shifted by their maximum: "
                "that is not a softmax, and it is not needed, because the sum is at least 1",
                term.expr,
            )
        split = _extra_logit(scores, extra)
        if split is None:
            raise Refuse("the denominator adds a tensor to the row sum: not a softmax", term.expr)
        rest, sink = split
        from_end = rest.rank - dim
        if sink.rank >= from_end and sink.shape[sink.rank - from_end] != 1:
            raise Refuse("the denominator adds a tensor that varies over the keys", term.expr)
        row = tuple(Affine() if d == dim else i for d, i in enumerate(term.index))
        form: Form = "softmax" if rest is not scores else "bare"
        return Core(Term(rest, term.index), dim, term.expr.dtype, Term(rest, row).of(sink), form)
    return None


def _extra_logit(scores: Expr, extra: Expr) -> tuple[Expr, Expr] | None:
    """The scores, and the logit whose exponential is ``extra``; a shift that both share cancels."""
    constant, logit = scalar_of(extra), _exponential(under_casts(extra))
    if constant is not None:
        return (scores, const(math.log(constant), opmath(scores.dtype))) if constant > 0 else None
    if logit is None:
        return None
    if scores.op == "sub" and logit.op == "sub" and scores.args[1] is logit.args[1]:
        return scores.args[0], logit.args[0]
    if scores.op == "sub" and logit.op == "neg" and scores.args[1] is logit.args[0]:
        return scores.args[0], const(0.0, scores.dtype)
    return scores, logit


def _numerator_and_sum(node: Expr) -> tuple[Expr, Expr] | None:
    if node.op == "div":
        return node.args[0], node.args[1]
    if node.op == "mul":
        for a, b in (node.args, node.args[::-1]):
            if b.op == "div" and scalar_of(b.args[0]) == 1:
                return a, b.args[1]
            if b.op == "pow" and scalar_of(b.args[1]) == -1:
                return a, b.args[0]
    return None


def _sink_form() -> Expr:
    s, sink = eg.scores(), eg.leaf("sink", (eg.B, eg.H, eg.Q, 1), torch.float64)
    wide = (eg.B, eg.H, eg.Q, eg.K + 1)
    weights = eg.softmax(expr("cat", (s, sink), (3,), wide, s.dtype))
    return expr("slice", (weights,), (3, 0, 1), s.shape, s.dtype)


@rule("softmax(cat(x, sink)) without its last column", _sink_form)
def extra_column(term: Term, scope: Scope) -> Core | None:
    """A logit that takes weight and contributes no value, dropped after the softmax."""
    node = term.expr
    if node.op != "slice" or node.attrs[2] != 1:
        return None
    inner = under_casts(node.args[0])
    if inner.op != "softmax" or inner.attrs[0] != node.attrs[0]:
        return None
    dim, start = int(inner.attrs[0]), node.attrs[1]
    joined = _unshifted(inner.args[0], dim)
    if joined.op != "cat" or joined.attrs[0] != dim or len(joined.args) != 2:
        return None
    first, second = joined.args
    scores, sink, at = (first, second, 0) if start == 0 else (second, first, first.shape[dim])
    if start != at or scores.shape != node.shape or sink.shape[dim] != 1:
        return None
    index = tuple(Affine() if d == dim else i for d, i in enumerate(term.index))
    return Core(Term(scores, term.index), dim, inner.dtype, Term(sink, index))


def _unshifted(node: Expr, dim: int) -> Expr:
    """The operand below casts and subtractions of its own row maximum, which cancel in the softmax."""
    while True:
        node = under_casts(node)
        if node.op != "sub":
            return node
        if not _is_maximum(under_casts(node.args[1]), node.args[0], dim):
            return node
        node = node.args[0]


def _log_form() -> Expr:
    x = eg.scores()
    return pointwise("exp", eg.expr("log_softmax", (x,), (3,), x.shape, x.dtype))


@rule("exp(log_softmax(x)) = softmax(x)", _log_form)
def exp_of_log_softmax(term: Term, scope: Scope) -> Core | None:
    """The softmax behind an exponential of ``log_softmax``."""
    if term.expr.op != "exp":
        return None
    inner = under_casts(term.expr.args[0])
    return _core(term, inner.args[0], int(inner.attrs[0])) if inner.op == "log_softmax" else None


def _logsumexp_form() -> Expr:
    x = eg.scores()
    return pointwise("exp", eg.binary("sub", x, eg.reduced("logsumexp", x)))


@rule("exp(x - logsumexp(x)) = softmax(x)", _logsumexp_form)
def exp_minus_logsumexp(term: Term, scope: Scope) -> Core | None:
    """Normalised inside the exponential."""
    if term.expr.op != "exp" or term.expr.args[0].op != "sub":
        return None
    scores, norm = term.expr.args[0].args
    if norm.op == "logsumexp" and norm.args[0] is scores and len(norm.attrs[0]) == 1:
        return replace(_core(term, scores, norm.attrs[0][0]), form="relative")
    if (
        norm.op == "log"
        and (dim := _row_sum_of(norm.args[0], pointwise("exp", scores, dtype=scores.dtype))) is not None
    ):
        return replace(_core(term, scores, dim), form="relative")
    return None


def _gated_form() -> Expr:
    x, sink = eg.scores(), eg.leaf("sink", (eg.B, eg.H, eg.Q, 1), torch.float64)
    gate = pointwise("sigmoid", eg.binary("sub", eg.reduced("logsumexp", x), sink))
    return eg.binary("mul", eg.softmax(x), gate)


@rule("softmax(x) * sigmoid(logsumexp(x) - u) is a softmax with a sink u", _gated_form)
def gated_by_logsumexp(term: Term, scope: Scope) -> Core | None:
    """A sink applied after the softmax: ``sigmoid(L - u) = exp(L) / (exp(L) + exp(u))``."""
    if term.expr.op != "mul":
        return None
    for position in (0, 1):
        weights = term.argument(position)
        while weights.expr.op == "cast" and weights.expr.is_float:
            weights = weights.argument(0)
        if weights.expr.op != "softmax":
            continue
        gate = _below(term.argument(1 - position), scope)
        inner = _below(gate.argument(0), scope) if gate.expr.op == "sigmoid" else gate
        if gate.expr.op == "sigmoid" and inner.expr.op == "sub":
            dim = int(weights.expr.attrs[0])
            norm = _below(inner.argument(0), scope)
            if _is_norm_of(norm, weights, dim, scope) and not scope.varies_over_keys(inner.argument(1)):
                scores = Term(weights.expr.args[0], weights.index)
                return Core(scores, dim, weights.expr.dtype, inner.argument(1), "gated")
    return None


def _below(term: Term, scope: Scope) -> Term:
    """The term below casts and views."""
    while True:
        node = term.expr
        below = term.argument(0) if node.op == "cast" and node.is_float else scope.step(term)
        if below is None:
            return term
        term = below


def _is_norm_of(norm: Term, weights: Term, dim: int, scope: Scope) -> bool:
    """Is it the logsumexp, row by row, of the same logits that these weights come from?"""
    if norm.expr.op != "logsumexp" or norm.expr.attrs[0] != (dim,):
        return False
    if under_casts(norm.expr.args[0]) is not under_casts(weights.expr.args[0]):
        return False
    pairs = zip(norm.index, weights.index, strict=True)
    return all(d == dim or scope.space.resolve(a) == scope.space.resolve(b) for d, (a, b) in enumerate(pairs))


SOFTMAX: tuple[Rule, ...] = (
    softmax, extra_column, quotient, exp_of_log_softmax, exp_minus_logsumexp, gated_by_logsumexp,
)  # fmt: skip
