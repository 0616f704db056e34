"""Layers of the score, from the softmax inwards to the product of queries and keys."""

from __future__ import annotations

import math

import torch

from fusepass.expressions.intervals import is_ordinary, least_size, magnitude, range_of
from fusepass.expressions.ir import (
    DTYPE_NAMES,
    Expr,
    const,
    expr,
    opmath,
    pointwise,
    under_casts,
)
from fusepass.patterns import examples as eg
from fusepass.patterns.functions import function
from fusepass.patterns.terms import holds_product, number, score_sides
from fusepass.rules.engine import Peel, Refuse, Rule, Scope, Term, rule
from fusepass.specification.atoms import negligible, rounds_scores
from fusepass.specification.score_modifiers import (
    Absolute,
    Bias,
    Cast,
    Clamp,
    Finite,
    Floor,
    LeakyReLU,
    Mask,
    Scale,
    ScaleBy,
    SoftCap,
)


@rule("cast(x) changes only the precision", lambda: eg.cast(eg.scores()))
def cast(term: Term, scope: Scope) -> Peel | None:
    """A change of floating dtype; the softmax records the dtype it computes in.

    The change matters only where scores are rounded to less precision than the product of queries and keys
    has.
    """
    if term.expr.op != "cast" or not (term.expr.is_float and term.expr.args[0].is_float):
        return None
    to, since = torch.finfo(term.expr.dtype), torch.finfo(term.expr.args[0].dtype)
    narrow = to.max < since.max or to.eps > since.eps
    return Peel(term.argument(0), Cast(DTYPE_NAMES[term.expr.dtype], narrow))


@rule(
    "softcap: c * tanh(y) = SoftCap_c(c * y)",
    lambda: eg.binary("mul", pointwise("tanh", eg.scores()), eg.number(3.0)),
)
def softcap(term: Term, scope: Scope) -> Peel | None:
    """Holds for every ``c > 0``, even if the division inside the tanh was folded into another factor."""
    if term.expr.op == "mul":
        for position in (0, 1):
            cap = number(term.expr.args[1 - position], scope)
            tanh = _tanh_below(term.argument(position), scope)
            if cap is not None and cap > 0 and tanh is not None:
                return _capped(tanh, cap)
    if term.expr.op == "div":
        divisor, tanh = number(term.expr.args[1], scope), _tanh_below(term.argument(0), scope)
        if divisor is not None and divisor > 0 and tanh is not None:
            return _capped(tanh, 1.0 / divisor)
    return _capped(term, 1.0) if term.expr.op == "tanh" else None


def _capped(tanh: Term, cap: float) -> Peel:
    inner = tanh.argument(0)
    if cap == 1.0:
        return Peel(inner, SoftCap(1.0))
    scaled = pointwise("mul", inner.expr, const(cap, opmath(inner.expr.dtype)), dtype=inner.expr.dtype)
    return Peel(Term(scaled, inner.index), SoftCap(cap))


def _tanh_below(term: Term, scope: Scope) -> Term | None:
    """The tanh below casts and views."""
    for _ in range(8):
        if term.expr.op == "tanh":
            return term
        if term.expr.op == "cast" and term.expr.args[0].is_float:
            term = term.argument(0)
            continue
        below = scope.step(term)
        if below is None:
            return None
        term = below
    return None


@rule("scale: x * c, x / c, -x", lambda: eg.binary("div", eg.scores(), eg.number(8.0)))
def scale(term: Term, scope: Scope) -> Peel | None:
    """A constant factor of any sign."""
    node = term.expr
    if node.op == "neg":
        return Peel(term.argument(0), Scale(-1.0))
    if node.op == "mul":
        for position in (0, 1):
            factor = number(node.args[1 - position], scope)
            if factor is not None:
                return Peel(term.argument(position), _scale(factor, node))
    if node.op == "div" and (divisor := number(node.args[1], scope)) is not None and divisor != 0:
        return Peel(term.argument(0), _scale(1.0 / divisor, node))
    return None


def _scale(factor: float, node: Expr) -> Scale:
    large = holds_product(node) and abs(factor) > torch.finfo(node.dtype).max
    if large or not math.isfinite(factor):
        raise Refuse(f"the scores are multiplied by {factor:g}", node)
    return Scale(factor)


@rule(
    "scale by a tensor: x * t, x / t",
    lambda: eg.binary("mul", eg.leaf("t", (eg.H, 1, 1), torch.float64), eg.scores()),
)
def scale_by(term: Term, scope: Scope) -> list[Peel] | None:
    """A factor that is a tensor: a learned temperature, or a mask that multiplies."""
    if term.expr.op == "mul":
        return [
            Peel(term.argument(i), ScaleBy(scope.slot(term.argument(1 - i)))) for i in score_sides(term)
        ] or None
    if term.expr.op == "div" and term.expr.args[1].is_float and holds_product(term.expr.args[0]):
        divisor = term.argument(1)
        one = const(1.0, divisor.expr.dtype)
        inverse = Term(pointwise("div", one, divisor.expr, dtype=divisor.expr.dtype), divisor.index)
        return [Peel(term.argument(0), ScaleBy(scope.slot(inverse)))]
    return None


@rule(
    "softmax(x + t) = softmax(x) where t is of ordinary size and does not vary over the keys",
    lambda: eg.binary("sub", eg.scores(), eg.reduced("amax", eg.scores())),
)
def shift(term: Term, scope: Scope) -> list[Peel] | None:
    """A shift of whole rows cancels in the softmax: the usual subtraction of the maximum.

    A shift that is infinite, NaN, or so large that it absorbs the scores does not cancel.
    """
    if term.expr.op not in ("add", "sub") or not scope.shifts_cancel():
        return None
    sides = [i for i in score_sides(term) if _cancels(term, i, scope)]
    free = [Peel(term.argument(i)) for i in sides if term.expr.op == "add" or i == 0]
    if term.expr.op == "sub" and 1 in sides:
        free.append(Peel(Term(pointwise("neg", term.expr.args[1]), term.argument(1).index)))
    if free:
        scope.note_shift(scope.above)
    return free or None


def _cancels(term: Term, side: int, scope: Scope) -> bool:
    """Does the other side of a sum, whose ``side`` holds the scores, cancel in the softmax?"""
    x, t = term.argument(side), term.argument(1 - side)
    if scope.varies_over_keys(t):
        return False
    if _is_row_maximum(t, x, scope):
        return True
    return cancels(t.expr, term.expr.dtype, scope) and not _overflows_later(t, term.expr.dtype, scope)


def cancels(t: Expr, dtype: torch.dtype, scope: Scope) -> bool:
    """Does a tensor that does not vary over the keys cancel in the softmax, if it is added in a dtype?

    It is of ordinary size, and none of its constants is so large that scores lose digits by the addition.
    """
    known = scope.contents, scope.facts
    return is_ordinary(t, dtype, *known) and not rounds_scores(least_size(t, *known), dtype)


def _overflows_later(t: Term, dtype: torch.dtype, scope: Scope) -> bool:
    """Is a shift so large that the known scales after it make it overflow?"""
    bounds = range_of(t.expr, scope.contents, scope.facts)
    if bounds is None:
        return False
    size = magnitude(bounds) * math.prod(abs(m.factor) for m in scope.above if isinstance(m, Scale))
    for factor in (scope.operands[m.slot].expr for m in scope.above if isinstance(m, ScaleBy)):
        known = range_of(factor, scope.contents, scope.facts)
        size *= 1.0 if known is None else magnitude(known)
    return size > torch.finfo(dtype).max / 2


def _is_row_maximum(t: Term, x: Term, scope: Scope) -> bool:
    """Is ``t`` the maximum of the same row of ``x``, or of several rows of which it is one?

    A row's maximum is infinite or NaN only where the softmax of the row is NaN without the shift.
    """
    while t.expr.op != "amax":
        below = t.argument(0) if t.expr.op == "cast" and t.expr.is_float else scope.step(t)
        if below is None and (value := scope.contents.values.get(t.expr)) is not None:
            below = Term(value, t.index)
        if below is None:
            return False
        t = below
    if under_casts(t.expr.args[0]) is not under_casts(x.expr):
        return False
    resolve, kept = scope.space.resolve, [d for d in range(x.expr.rank) if d not in t.expr.attrs[0]]
    over_keys = any(resolve(x.index[d]) == resolve(scope.keys) for d in t.expr.attrs[0])
    return over_keys and all(resolve(t.index[d]) == resolve(x.index[d]) for d in kept)


@rule(
    "bias: x + t, x - t",
    lambda: eg.binary("add", eg.leaf("t", (eg.H, eg.Q, eg.K), torch.float64), eg.scores()),
)
def bias(term: Term, scope: Scope) -> list[Peel] | None:
    """An added tensor.  Whether it is a mask is decided later, by what it means."""
    node = term.expr
    if node.op not in ("add", "sub"):
        return None
    peels = []
    for side in score_sides(term):
        scores, factor = term.argument(side), 1.0
        if node.op == "sub" and side == 0:
            factor = -1.0
        elif node.op == "sub":
            scores = Term(pointwise("neg", scores.expr), scores.index)
        added = Bias(scope.slot(term.argument(1 - side)), factor=factor, dtype=DTYPE_NAMES[node.dtype])
        peels.append(Peel(scores, added))
    return peels or None


@rule("mask: where(m, x, fill)", lambda: pointwise("where", eg.bits(), eg.scores(), eg.number(-math.inf)))
def mask(term: Term, scope: Scope) -> Peel | None:
    """Scores replaced by a constant.  The specification says whether it is low enough to hide them."""
    if term.expr.op != "where":
        return None
    _, yes, no = term.expr.args
    for attends, kept, filler in ((True, 1, no), (False, 2, yes)):
        fill = number(filler, scope)
        if fill is not None and holds_product(term.expr.args[kept]):
            if not fill < math.inf:
                raise Refuse(f"some scores are set to {fill:g}", term.expr)
            written = Mask(
                scope.slot(term.argument(0)), fill, False, attends, dtype=DTYPE_NAMES[term.expr.dtype]
            )
            return Peel(term.argument(kept), written)
    if holds_product(yes) or holds_product(no):
        raise Refuse("where() chooses between the scores and another tensor, not a constant fill", term.expr)
    return None


@rule("floor: max(x, c)", lambda: eg.binary("max", eg.scores(), eg.number(-1e300)))
def floor(term: Term, scope: Scope) -> Peel | None:
    """A clamp from below at a negligible number: it only turns -inf fills into finite ones."""
    bounded = _bounded(term, "max", scope)
    if bounded is None or not negligible(bounded[1], term.expr.dtype):
        return None
    return Peel(bounded[0], Floor(bounded[1]))


@rule("clamp: max(x, c), min(x, c)", lambda: eg.binary("min", eg.scores(), eg.number(0.5)))
def clamp(term: Term, scope: Scope) -> Peel | None:
    """A clamp within reach of the scores, from either side."""
    if (bounded := _bounded(term, "max", scope)) is not None:
        return Peel(bounded[0], Clamp(bounded[1], math.inf))
    if (bounded := _bounded(term, "min", scope)) is not None:
        return Peel(bounded[0], Clamp(-math.inf, bounded[1]))
    return None


def _bounded(term: Term, op: str, scope: Scope) -> tuple[Term, float] | None:
    """The scores and the constant that ``op``, ``max`` or ``min``, compares; None where the constant is NaN
    or there is none."""
    if term.expr.op == op:
        for position in (0, 1):
            bound = number(term.expr.args[1 - position], scope)
            if bound is not None and bound == bound and holds_product(term.expr.args[position]):
                return term.argument(position), bound
    return None


@rule("relu(x)", lambda: pointwise("relu", eg.scores()))
def rectifier(term: Term, scope: Scope) -> Peel | None:
    """Negative scores become zero."""
    return Peel(term.argument(0), LeakyReLU(0.0)) if term.expr.op == "relu" else None


def _leaky() -> Expr:
    x = eg.scores()
    slope = pointwise("mul", x, const(0.2, torch.float64), dtype=x.dtype)
    return pointwise(
        "where", pointwise("gt", x, const(0.0, x.dtype), dtype=torch.bool), x, slope, dtype=x.dtype
    )


@rule("leaky relu: where(x > 0, x, c * x)", _leaky)
def leaky_rectifier(term: Term, scope: Scope) -> Peel | None:
    """Negative scores times a constant; also as ``max(x, c * x)`` with a constant between zero and one."""
    node = term.expr
    if node.op == "where" and node.args[0].op == "gt":
        _, yes, no = node.args
        positive = node.args[0].args[0] is yes and number(node.args[0].args[1], scope) == 0
        slope = _multiple(no, yes, scope) if positive else None
        return None if slope is None else Peel(term.argument(1), LeakyReLU(slope))
    if node.op == "max":
        for position in (0, 1):
            slope = _multiple(node.args[1 - position], node.args[position], scope)
            if slope is not None and 0 < slope < 1:
                return Peel(term.argument(position), LeakyReLU(slope))
    return None


def _multiple(node: Expr, of: Expr, scope: Scope) -> float | None:
    """The finite constant ``c`` if a node is ``c * of``; else None."""
    if node.op != "mul" or not holds_product(of):
        return None
    factors = (number(node.args[1 - n], scope) for n in (0, 1) if node.args[n] is of)
    return next((f for f in factors if f is not None and math.isfinite(f)), None)


@rule("abs(x)", lambda: pointwise("abs", eg.scores()))
def absolute(term: Term, scope: Scope) -> Peel | None:
    """The absolute values of the scores."""
    return Peel(term.argument(0), Absolute()) if term.expr.op == "abs" else None


def _cleaned() -> Expr:
    x = eg.scores()
    return expr("nan_to_num", (x,), (0.0, -1e300, 1e300), x.shape, x.dtype)


@rule("finite: nan_to_num(x)", _cleaned)
def finite(term: Term, scope: Scope) -> Peel | None:
    """NaN and infinities replaced, as in the differential transformer's code (arXiv 2410.05258)."""
    if term.expr.op != "nan_to_num" or not holds_product(term.expr.args[0]):
        return None
    return Peel(term.argument(0), Finite(*map(float, term.expr.attrs)))


SCORES: tuple[Rule, ...] = (
    cast, softcap, scale, leaky_rectifier, mask, floor, clamp, rectifier, absolute, finite, function, shift,
    bias, scale_by,
)  # fmt: skip
