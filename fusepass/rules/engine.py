"""The rule engine: it peels one layer at a time, and says why it stopped.

A *term* is a tensor expression together with the index of one of its elements, so a rule speaks about
elements and never about layouts.  A rule looks at a term and returns None ("not my concern") or the ways to
peel it, or raises :class:`Refuse` ("my concern, but not allowed").  Rules carry no state; their order is the
order of their list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fusepass.expressions.contents import Contents
from fusepass.expressions.index import Affine, AxisSpace, Facts
from fusepass.expressions.ir import POINTWISE, Expr
from fusepass.specification.attention import Bias, Mask, ScoreModifier, WeightModifier

STEP_LIMIT = 200


def always(_: Expr) -> bool:
    """True of every expression: the default for ``Scope.readable``, where no tensor is overwritten."""
    return True


@dataclass(frozen=True)
class Term:
    """The element ``expr[index]``; ``index`` has one affine expression per dimension."""

    expr: Expr
    index: tuple[Affine, ...]

    def argument(self, position: int) -> Term:
        """The same element of an argument of a pointwise expression: broadcast dimensions are dropped."""
        return self.of(self.expr.args[position])

    def of(self, arg: Expr) -> Term:
        """The element of ``arg`` that broadcasts to this one."""
        kept = self.index[len(self.index) - arg.rank :] if arg.rank else ()
        return Term(arg, tuple(Affine() if n == 1 else i for n, i in zip(arg.shape, kept, strict=True)))


class Refuse(Exception):
    """A layer that a rule knows but may not peel, with a reason for the user."""

    def __init__(self, reason: str, at: Expr | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


@dataclass(frozen=True)
class Peel:
    """One layer taken off: the term below it and what the layer does (None: only layout)."""

    inner: Term
    modifier: ScoreModifier | WeightModifier | None = None


#: How a softmax is written: see :class:`Core`.
Form = Literal["softmax", "bare", "late", "relative", "shifted", "gated"]


@dataclass(frozen=True)
class Core:
    """A softmax that was reached: its scores, the position of its axis in their index, the dtype it computes
    in.

    Attributes:
        sink: one more logit in every row, or None.
        form: the weights of a row in which every score is a low fill.
            ``"softmax"``: the same weight for all keys;
            ``"bare"``: NaN, since no maximum was subtracted, so that all exponentials are zero;
            ``"late"``: something else where a mask hides the key with the maximum, since the mask was applied
            after the maximum was subtracted;
            ``"relative"``: something else, since a logsumexp, or the maximum of more scores, was subtracted;
            ``"shifted"``: the same for another shift, beside which exponentials may overflow in any row;
            ``"gated"``: zero, or NaN where the fill is infinite, although there is a sink.
    """

    scores: Term
    dim: int
    dtype: torch.dtype
    sink: Term | None = None
    form: Form = "softmax"


@dataclass(frozen=True)
class Product:
    """``sum over axes of left * right``."""

    left: Term
    right: Term
    axes: tuple[Affine, ...]


#: The outermost layer of a term, as a rule reads it.
Layer = Peel | Core | Product
Apply = Callable[[Term, "Scope"], "Sequence[Layer] | Layer | None"]
Example = Callable[[], Expr]


@dataclass(frozen=True)
class Rule:
    """A named identity.  ``example`` builds an expression on which it applies, for the law tests."""

    name: str
    law: str
    apply: Apply
    example: Example


def rule(law: str, example: Example) -> Callable[[Apply], Rule]:
    """Make a rule of a function; ``law`` is the identity in one line."""
    return lambda function: Rule(function.__name__, law, function, example)


@dataclass
class Scope:
    """What the rules of one site share: its axes, the tensors its modifiers name, the trace."""

    space: AxisSpace
    keys: Affine = field(default_factory=Affine)
    operands: list[Term] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    views: Sequence[Rule] = ()
    contents: Contents = field(default_factory=Contents)
    readable: Callable[[Expr], bool] = always  # whether a kernel can still be given an expression's value
    sunk: bool = False  # the softmax has a sink, or exponentials without a maximum subtracted
    above: Sequence[ScoreModifier] = ()  # what has been peeled off the scores so far
    shifted: set[int] = field(default_factory=set)  # slots of what is added to scores after a dropped shift

    @property
    def facts(self) -> Facts:
        """What is known of sizes."""
        return self.space.facts

    def slot(self, term: Term) -> int:
        """Register a tensor that a modifier needs."""
        if term in self.operands:
            return self.operands.index(term)
        self.operands.append(term)
        return len(self.operands) - 1

    def axes(self, term: Term) -> frozenset[str]:
        """The axes a term really varies over, seen through views and element-wise operations."""
        varied: set[str] = set()
        todo, seen = [term], {term}
        while todo:
            at = todo.pop()
            if at.expr.op in POINTWISE:
                below = [at.of(a) for a in at.expr.args]
            else:
                inner = self.step(at)
                below = [] if inner is None else [inner]
                if inner is None:
                    varied.update(a for i in at.index for a in self.space.resolve(i).axes)
            unseen = [t for t in dict.fromkeys(below) if t not in seen]
            seen.update(unseen)
            todo.extend(reversed(unseen))
        return self.finest(frozenset(varied))

    def finest(self, axes: frozenset[str]) -> frozenset[str]:
        """The given axes in their finest form: looking into a tensor may have split some of them."""
        return frozenset().union(*(self.space.resolve(Affine(((a, 1),))).axes for a in axes))

    def step(self, term: Term) -> Term | None:
        """The term below one view, or None."""
        for view in self.views:
            peeled = view.apply(term, self)
            if isinstance(peeled, Peel):
                return peeled.inner
        return None

    def shifts_cancel(self) -> bool:
        """Does a shift of whole rows, below what has been peeled so far, cancel in the softmax?

        Modifiers that keep it say so (``keeps_shift``).  With a sink a shift does not cancel.
        """
        return not self.sunk and all(m.keeps_shift for m in self.above)

    def note_shift(self, later: Sequence[ScoreModifier]) -> None:
        """A shift is dropped, and these modifiers follow it: they are now added to other numbers."""
        self.shifted.update(m.slot for m in later if isinstance(m, (Bias, Mask)))

    def varies_over_keys(self, term: Term) -> bool:
        """Does the term depend on the key position?"""
        over = self.axes(term)  # first, because it may split the key axis
        return bool(self.space.resolve(self.keys).axes & over)


def apply_first(rules: Sequence[Rule], term: Term, scope: Scope) -> list[Layer]:
    """The result of the first rule that applies to a term; empty where none does."""
    for candidate in rules:
        peeled = candidate.apply(term, scope)
        if peeled is not None:
            scope.trace.append(f"{candidate.name}: {term.expr.op} {list(map(str, term.expr.shape))}")
            return list(peeled) if isinstance(peeled, (list, tuple)) else [peeled]  # type: ignore[list-item]
    return []
