"""Masks by meaning: the visibility that a formula describes, its atoms, and their names.

``conjuncts`` splits a visibility into atoms, ``classify`` names them, and ``every_row_sees`` proves that no
row is left without a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusepass.expressions.contents import Contents
from fusepass.expressions.index import Affine, AxisSpace, Facts, Size, simplify_size
from fusepass.expressions.intervals import is_ordinary
from fusepass.expressions.ir import Expr, affine, expr, scalar_of
from fusepass.rules.engine import Scope
from fusepass.rules.formulas import TRUE, Formulas, against_zero, terms_of
from fusepass.specification.attention import (
    Atom,
    Band,
    Chunk,
    Dense,
    Document,
    KeyPadding,
    Prefix,
    intersect,
)

__all__ = ["Positions", "classify", "conjuncts", "every_row_sees", "intersect", "put_axes"]


def may_hide(bias: Expr, contents: Contents, facts: Facts) -> bool:
    """May an added tensor hold fills?  Learned numbers, positions and small constants do not."""
    dtype = bias.dtype if bias.is_float else torch.float32
    return not is_ordinary(bias, dtype, contents, facts)


def conjuncts(formula: Expr) -> list[Expr]:
    """The terms of a conjunction; none for true."""
    return [] if formula is TRUE else terms_of(formula, "and")


def visibility_factor(formulas: Formulas, factor: Expr) -> Expr | None:
    """The ``c`` of a factor ``where(c, 1, 0)``, which is 1 where a score counts and 0 elsewhere."""
    if factor.op == "cast" and factor.is_float:
        return visibility_factor(formulas, factor.args[0])
    if factor.op != "where":
        return None
    values = tuple(map(scalar_of, factor.args[1:]))
    if values == (1, 0):
        return factor.args[0]
    return formulas.make("not", factor.args[:1], torch.bool) if values == (0, 1) else None


@dataclass(frozen=True)
class Positions:
    """The axes of the query and key positions, as index expressions."""

    query: Affine
    key: Affine
    letters: dict[str, str]


def classify(part: Expr, at: Positions, space: AxisSpace) -> Atom:
    """The name of one conjunct of a visibility."""
    band = _band(part, at, space)
    if band is not None:
        return band
    used = letters(part, at, space)
    if used <= {"b", "j"} and _loads(part):
        return KeyPadding()
    diagonal = _diagonal(part, at, space)
    if diagonal is not None:
        return diagonal
    if part.op == "eq":
        return _same_label(part, at, space)
    if part.op == "or" and any(isinstance(classify(x, at, space), Band) for x in part.args) and "i" in used:
        others = [x for x in part.args if not isinstance(classify(x, at, space), Band)]
        if len(others) == 1 and "i" not in letters(others[0], at, space):
            return Prefix()
    return Dense("".join(sorted(used)))


def _band(part: Expr, at: Positions, space: AxisSpace) -> Band | None:
    """``j - i <= c`` or ``i - j <= c``."""
    left = against_zero(part, "le")
    if left is None:
        return None
    e = space.resolve(left)
    gap = space.resolve(at.key) - space.resolve(at.query)
    for sign in (1, -1):
        rest = e - gap * sign
        if rest.is_const and not gap.is_const:
            bound = simplify_size(-1 * rest.const)
            return Band(None, bound) if sign == 1 else Band(bound, None)
    return None


def _diagonal(part: Expr, at: Positions, space: AxisSpace) -> Band | None:
    """``j - i == c``."""
    if against_zero(part, "eq") is None:
        return None
    below = _band(expr("le", part.args, (), (), torch.bool), at, space)
    if below is None:
        return None
    bound = below.right if below.left is None else -1 * below.left
    return Band(simplify_size(-1 * bound), bound)  # type: ignore[operator]


def letters(part: Expr, at: Positions, space: AxisSpace) -> set[str]:
    """The letters among b, h, i, j that a formula varies over."""
    varied: set[str] = set()
    todo = [part]
    while todo:
        node = todo.pop()
        for value in node.attrs:
            if isinstance(value, Affine):
                varied |= {at.letters.get(a, "b") for a in space.resolve(value).axes}
        if node.op != "load":
            todo.extend(node.args)
    return varied


def _loads(part: Expr) -> bool:
    return part.op == "load" or any(_loads(a) for a in part.args)


def _same_label(part: Expr, at: Positions, space: AxisSpace) -> Atom:
    """``label[i] == label[j]``, or equal block numbers."""
    a, b = part.args
    if a.op == b.op == "load" and a.args[0] is b.args[0]:
        return Document()
    if (
        a.op == b.op == "floordiv"
        and a.args[1] is b.args[1]
        and isinstance(size := scalar_of(a.args[1]), int)
    ):
        return Chunk(size)
    return Dense("".join(sorted(letters(part, at, space))))


def every_row_sees(parts: list[Atom], queries: Size, keys: Size, scope: Scope) -> bool:
    """Does every query see at least one key, whatever the values of tensors?"""
    at_most = scope.facts.at_most
    low: list[Size] = []
    high: list[Size] = []
    for part in parts:
        if not isinstance(part, Band):
            return False
        low += [] if part.left is None else [part.left]
        high += [] if part.right is None else [part.right]
    # Row i sees the keys max(0, i - left) .. min(keys - 1, i + right).
    if not all(at_most(0, r) for r in high) or not all(at_most(queries - 1 - left, keys - 1) for left in low):
        return False
    return all(at_most(0, simplify_size(left + r)) for left in low for r in high)


def every_row_sees_itself(
    parts: list[Expr], at: Positions, queries: Size, keys: Size, formulas: Formulas
) -> bool:
    """Does every query see the key at its own position, under all of the given visibilities at once?

    Chunks, documents, prefixes and most bands contain their diagonal.  Positions are counted from the first
    key, or so that the last query is at the last key.
    """
    facts, space = formulas.scope.facts, formulas.space
    query, key = space.resolve(at.query), space.resolve(at.key)
    for shift in dict.fromkeys((0, simplify_size(keys - queries))):
        place = _solved(key, query + shift)
        inside = facts.at_most(0, shift) and facts.at_most(simplify_size(queries + shift), keys)
        if place is not None and inside and all(put_axes(p, place, formulas) is TRUE for p in parts):
            return True
    return False


def _solved(key: Affine, value: Affine) -> dict[str, Affine] | None:
    """What the axes of ``key`` have to be for it to equal ``value``."""
    if key.is_const:
        return {} if key == value else None
    if len(key.terms) == 1 and key.terms[0][1] == 1 and key.const == 0:
        return {key.terms[0][0]: value}
    mine, other = (sorted(e.terms, key=lambda t: str(t[1])) for e in (key, value))
    if key.const != value.const or [c for _, c in mine] != [c for _, c in other]:
        return None
    return {a: Affine(((b, 1),)) for (a, _), (b, _) in zip(mine, other, strict=True)}


def put_axes(node: Expr, place: dict[str, Affine], formulas: Formulas) -> Expr:
    """A formula with index expressions in place of axes."""

    def moved(index: Affine) -> Affine:
        out = Affine((), index.const)
        for axis, c in formulas.space.resolve(index).terms:
            out = out + place.get(axis, Affine(((axis, 1),))) * c
        return out

    if node.op == "affine":
        return affine(moved(node.attrs[0]))
    if node.op == "load":
        return expr("load", node.args, tuple(map(moved, node.attrs)), (), node.dtype)
    args = tuple(put_axes(a, place, formulas) for a in node.args)
    return formulas.make(node.op, args, node.dtype, node.attrs) if args else node
