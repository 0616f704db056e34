"""Layers between the softmax and the values."""

from __future__ import annotations

import math

import torch

from fusepass.expressions.ir import VIEWS, Expr, expr, pointwise
from fusepass.expressions.ir import cast as as_dtype
from fusepass.patterns import examples as eg
from fusepass.patterns.terms import number
from fusepass.rules.engine import Peel, Refuse, Rule, Scope, Term, rule
from fusepass.specification.weight_modifiers import Dropout, Keep, WeightScale, ZeroEmptyRows

_weighty: set[str] = {"softmax", "log_softmax", "exp", "exp2"}


def holds_softmax(node: Expr) -> bool:
    """Is there a softmax or an exponential below, through the layers that this file peels?"""
    for _ in range(24):
        if node.op in _weighty:
            return True
        if node.op in (
            "cast",
            "dropout",
            "nan_to_num",
            "permute",
            "reshape",
            "expand",
            "slice",
            "select",
            "flip",
        ):
            node = node.args[0]
        elif node.op in ("mul", "div", "where", "add", "sub", "neg"):
            return any(holds_softmax(a) for a in node.args)
        else:
            return False
    return False


def weight_sides(node: Expr) -> list[int]:
    """The arguments that may be the weights: of several with exponentials, those as large as the node.

    A factor may be made of exponentials too, as in the differential transformer (arXiv 2410.05258), but it is
    smaller.
    """
    sides = [n for n, a in enumerate(node.args) if holds_softmax(a)]
    return [n for n in sides if node.args[n].shape == node.shape] or sides


@rule(
    "cast(w) changes only the precision",
    lambda: eg.cast(eg.softmax(eg.scores())),
)
def cast(term: Term, scope: Scope) -> Peel | None:
    """Back from the softmax's dtype."""
    if term.expr.op != "cast" or not term.expr.args[0].is_float or not term.expr.is_float:
        return None
    return Peel(term.argument(0))


def _dropped() -> Expr:
    w = eg.softmax(eg.scores())
    return expr("dropout", (w,), (0.0, "d"), w.shape, w.dtype)


@rule("dropout(w)", _dropped)
def dropout(term: Term, scope: Scope) -> Peel | None:
    """Dropout of the weights: the same distribution from another stream of random numbers."""
    if term.expr.op != "dropout":
        return None
    return Peel(term.argument(0), Dropout(float(term.expr.attrs[0])))


def _cleaned() -> Expr:
    w = eg.softmax(eg.scores())
    return expr("nan_to_num", (w,), (0.0, -1e300, 1e300), w.shape, w.dtype)


@rule("nan_to_num(w): rows that see no key become zero", _cleaned)
def zero_empty_rows(term: Term, scope: Scope) -> Peel | None:
    """The guard of a safe softmax."""
    if term.expr.op != "nan_to_num":
        return None
    if term.expr.attrs[0] != 0.0:
        raise Refuse(f"NaN weights become {term.expr.attrs[0]}, not zero", term.expr)
    return Peel(term.argument(0), ZeroEmptyRows(term.expr.attrs[1:] != (-math.inf, math.inf)))


@rule(
    "keep: where(m, w, 0)",
    lambda: pointwise("where", eg.bits(), eg.softmax(eg.scores()), eg.number(0.0)),
)
def keep(term: Term, scope: Scope) -> Peel | None:
    """Weights hidden after the softmax, without renormalising."""
    if term.expr.op != "where":
        return None
    condition = term.argument(0)
    weights = weight_sides(term.expr)
    for attends, kept, other in ((True, 1, 2), (False, 2, 1)):
        if kept in weights:
            if number(term.expr.args[other], scope) != 0.0:
                raise Refuse("where() after the softmax sets weights to something other than zero", term.expr)
            return Peel(term.argument(kept), Keep(scope.slot(condition), attends))
    return None


@rule(
    "w * t, where t does not vary over both queries and keys",
    lambda: eg.binary("mul", eg.softmax(eg.scores()), eg.leaf("t", (eg.H, 1, 1), torch.float64)),
)
def weight_scale(term: Term, scope: Scope) -> Peel | None:
    """Head masks, and gates of queries or of keys; a boolean factor is a :class:`Keep`."""
    node = term.expr
    if node.op == "div" and holds_softmax(node.args[0]) and (divisor := number(node.args[1], scope)):
        return Peel(term.argument(0), WeightScale(1.0 / divisor))
    if node.op != "mul":
        return None
    for position in weight_sides(node):
        factor, other = number(node.args[1 - position], scope), term.argument(1 - position)
        if factor is not None:
            return Peel(term.argument(position), WeightScale(factor))
        is_cast = other.expr.op == "cast" and other.expr.dtype is not torch.bool
        bits = other.argument(0) if is_cast else other
        if bits.expr.dtype is torch.bool:
            return Peel(term.argument(position), Keep(scope.slot(bits), True, product=True))
        return Peel(term.argument(position), WeightScale(1.0, scope.slot(other)))
    return None


def parts(weights: Expr) -> list[tuple[int, Expr]]:
    """The softmaxes whose signed sum the weights are: ``(w1 - t*w2) . v = w1 . v - (t*w2) . v``.

    Raises:
        Refuse: one dropout is applied to a sum of softmaxes; two kernels cannot draw the same numbers.
    """
    carriers = weight_sides(weights)
    if weights.op in ("add", "sub") and len(carriers) == 2:
        sign = -1 if weights.op == "sub" else 1
        left, right = ([(s, _as_wide(w, weights)) for s, w in parts(a)] for a in weights.args)
        return [*left, *((s * sign, w) for s, w in right)]
    linear = weights.op in LINEAR and carriers and not (weights.op == "div" and carriers != [0])
    position = carriers[0] if linear else None
    if position is not None and len(inner := parts(weights.args[position])) > 1:
        if weights.op == "dropout":
            raise Refuse("dropout is applied to a sum of several softmaxes", weights)
        rest = [list(weights.args) for _ in inner]
        for args, (_, w) in zip(rest, inner, strict=True):
            args[position] = w
        return [
            (s, expr(weights.op, tuple(args), weights.attrs, weights.shape, weights.dtype))
            for args, (s, _) in zip(rest, inner, strict=True)
        ]
    return [(1, weights)]


#: Layers that a sum goes through.
LINEAR = VIEWS - {"repeat"} | {"cast", "mul", "div", "neg", "dropout"}


def _as_wide(part: Expr, whole: Expr) -> Expr:
    """A summand as wide as its sum."""
    part = as_dtype(part, whole.dtype)
    return part if part.shape == whole.shape else expr("expand", (part,), (), whole.shape, whole.dtype)


WEIGHTS: tuple[Rule, ...] = (cast, dropout, zero_empty_rows, keep, weight_scale)
