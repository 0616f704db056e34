"""What modifiers mean once every axis has its role: named axes, the atoms of masks, rows that see a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fusepass.expressions import intervals
from fusepass.expressions.index import Affine, Size, prod
from fusepass.expressions.ir import DTYPES, Expr, const, opmath, pointwise
from fusepass.patterns import heads, masks
from fusepass.rules import formulas, visibility
from fusepass.rules.engine import Refuse, Scope, Term
from fusepass.rules.site import Roles
from fusepass.specification.attention import (
    USUAL_SCORES,
    Atom,
    Attention,
    Band,
    Bias,
    Dense,
    Function,
    Keep,
    KeyGate,
    Mask,
    ScaleBy,
    ScoreModifier,
    WeightModifier,
    WeightScale,
    is_hiding,
    is_less_precise,
    rounds_scores,
)


class Meanings:
    """Says what the modifiers of one site mean.

    Args:
        scope: the site's axes and tensors.
        roles: the role of each axis.
        computed: the dtype of the product of queries and keys.
    """

    def __init__(self, scope: Scope, roles: Roles, computed: torch.dtype) -> None:
        self.scope, self.roles, self.computed = scope, roles, computed
        self.formulas = formulas.Formulas(scope)
        settle(scope, roles)

    def understood(self, mod: ScoreModifier) -> ScoreModifier:
        """A modifier with its axes named; a bias whose elements are all zero or a fill becomes a mask."""
        scope = self.scope
        if isinstance(mod, (ScaleBy, Function)) and mod.slot is not None:
            return replace(mod, axes=self.letters(scope.operands[mod.slot]))
        if isinstance(mod, Bias):
            return self._understood_bias(mod)
        if isinstance(mod, Mask):
            formula = self.formulas.lift(scope.operands[mod.slot])
            attends = formula if mod.attends else self.formulas.make("not", (formula,), torch.bool)
            return replace(mod, atoms=self._atoms(attends), dtype=self._dtype_of_fill(mod))
        return mod

    def _dtype_of_fill(self, mod: Mask) -> str:
        """The dtype of the scores that a mask fills, where the product's dtype does not hold the fill."""
        if not mod.dtype or not is_less_precise(self.computed, DTYPES[mod.dtype]):
            return ""
        return "" if float(const(mod.fill, self.computed).attrs[0]) == mod.fill else mod.dtype

    def _understood_bias(self, mod: Bias) -> Bias | Mask:
        scope = self.scope
        term = scope.operands[mod.slot]
        scaled = term
        if mod.factor != 1:
            dtype = term.expr.dtype if term.expr.is_float else torch.float32
            factor = const(mod.factor, opmath(dtype))  # neither truncated to integers nor rounded to half
            scaled = Term(pointwise("mul", term.expr, factor, dtype=dtype), term.index)
        hidden = visibility.additive_mask(self.formulas, self.formulas.lift(scaled), term.expr.dtype)
        wide = mod.dtype if mod.dtype and is_less_precise(self.computed, DTYPES[mod.dtype]) else ""
        if hidden is None:
            if intervals.absorbs_from_above(scaled.expr, scope.contents, scope.facts):
                raise Refuse("a bias raises scores so far that others are absorbed", term.expr)
            hides = masks.may_hide(term.expr, scope.contents, scope.facts)
            constants = self.constants(mod)
            rounds = constants > USUAL_SCORES or rounds_scores(constants, self.computed)
            return replace(mod, axes=self.letters(term), hides=hides, dtype=wide if hides or rounds else "")
        atoms = self._atoms(hidden.attends)
        return Mask(self.scope.slot(scaled), hidden.fill, True, True, atoms, wide)

    def constants(self, mod: Bias) -> float:
        """The size that the constants of a bias give it, whatever its inputs are; 0 if not known."""
        operand = self.scope.operands[mod.slot].expr
        return intervals.least_size(operand, self.scope.contents, self.scope.facts) * abs(mod.factor)

    def letters(self, term: Term) -> str:
        """The letters of the roles that an operand varies over, in order."""
        settle(self.scope, self.roles)
        axes = {b for a in self.scope.axes(term) for b in self.scope.space.resolve(Affine(((a, 1),))).axes}
        table = self.roles.letters()
        return "".join(sorted({table.get(a, "b") for a in axes}))

    def positions(self) -> masks.Positions:
        """The positions of queries and keys as index expressions in their axes."""
        return masks.Positions(
            _position(self.scope, self.roles.query),
            _position(self.scope, self.roles.key),
            self.roles.letters(),
        )

    def _atoms(self, attends: Expr) -> tuple[Atom, ...]:
        """The parts of a visibility, named."""
        settle(self.scope, self.roles)
        space, at = self.scope.space, self.positions()
        atoms = [masks.classify(part, at, space) for part in masks.conjuncts(attends)]
        bands = [a for a in atoms if isinstance(a, Band)]
        if len(bands) > 1:
            whole = masks.intersect(bands, self.scope.facts)
            if whole is not None:
                atoms = [whole, *(a for a in atoms if not isinstance(a, Band))]
        return tuple(dict.fromkeys(atoms))

    def weight(self, mod: WeightModifier, spec: Attention) -> WeightModifier | None:
        """A modifier of the weights with its axes named; None if it does nothing.

        Raises:
            Refuse: the weights are multiplied by a tensor over queries and keys.
        """
        if isinstance(mod, WeightScale) and mod.slot is not None:
            axes = self.letters(self.scope.operands[mod.slot])
            if {"i", "j"} <= set(axes):
                raise Refuse("the weights are multiplied by a tensor that varies over queries and keys")
            return KeyGate(mod.slot, axes) if "j" in axes else replace(mod, axes=axes)
        if not isinstance(mod, Keep):
            return mod
        axes = self.letters(self.scope.operands[mod.slot])
        kept = set(masks.conjuncts(self._visible(mod.slot, mod.attends)))
        if not kept:
            return None  # it hides nothing
        visible = [masks.conjuncts(self.mask_visible(m)) for m in spec.masks if spec.hides(m)]
        hidden = {c for parts in visible for c in parts}
        covers = hidden <= kept and all(visible)
        # If a bias hides all visible keys of a row, the row's weights go to keys with a finite fill.
        levels = any(map(is_hiding, spec.scores)) and not spec.fills_are_infinite
        return replace(mod, axes=axes, implied=kept <= hidden and not levels, covers=covers)

    def _visible(self, slot: int, attends: bool) -> Expr:
        formula = self.formulas.lift(self.scope.operands[slot])
        return formula if attends else self.formulas.make("not", (formula,), torch.bool)

    def mask_visible(self, mod: Mask) -> Expr:
        """The formula of the pairs that a mask leaves visible."""
        if not mod.additive:
            return self._visible(mod.slot, mod.attends)
        term = self.scope.operands[mod.slot]
        hidden = visibility.additive_mask(self.formulas, self.formulas.lift(term), term.expr.dtype)
        return hidden.attends if hidden is not None else formulas.TRUE

    def sizes(self) -> dict[str, Size]:
        """The size of every role."""
        names = ("batch", "heads", "kv_heads", "query", "key", "head_dim", "value_dim")
        space = self.scope.space
        return {name: prod(space.sizes[a] for a in getattr(self.roles, name)) for name in names}

    def rows_seen(self, scores: Sequence[ScoreModifier]) -> bool:
        """Is it proved that every query sees a key?"""
        sizes = self.sizes()
        queries, keys = sizes["query"], sizes["key"]
        atoms = [a for m in scores if isinstance(m, Mask) for a in m.atoms]
        if masks.every_row_sees(atoms, queries, keys, self.scope):
            return True
        parts = [c for m in scores if isinstance(m, Mask) for c in masks.conjuncts(self.mask_visible(m))]
        at = self.positions()
        return masks.every_row_sees_itself(parts, at, queries, keys, self.formulas)


def settle(scope: Scope, roles: Roles) -> None:
    """Replace every listed axis that was split after it was listed by its parts."""
    for name in ("batch", "kv_heads", "group", "query", "key", "head_dim", "value_dim"):
        axes = getattr(roles, name)
        setattr(roles, name, heads.ordered(scope, [Affine(((a, 1),)) for a in axes]))


def told_by_masks(scope: Scope, roles: Roles, scores: Term, mods: Sequence[ScoreModifier]) -> Roles:
    """The roles under which most parts of the masks have names, and fewest parts vary over heads.

    A mask tells which axis is the query, since it relates queries to keys; a padding tells which axis is the
    batch.  Between roles that are equally good, the places of the axes decide.
    """
    known = formulas.Formulas(scope)
    parts = [p for m in mods if isinstance(m, (Mask, Bias)) for p in _parts(known, scope, m)]
    if not parts:
        return roles

    def unnamed(choice: Roles) -> tuple[int, int]:
        at = masks.Positions(_position(scope, choice.query), _position(scope, choice.key), choice.letters())
        named = [masks.classify(p, at, scope.space) for p in parts]
        over = sum("h" in masks.letters(p, at, scope.space) for p in parts)
        return sum(isinstance(a, Dense) for a in named), over

    return min(heads.alternatives(scope, roles, scores), key=unnamed)


def _parts(known: formulas.Formulas, scope: Scope, mod: Mask | Bias) -> list[Expr]:
    """The parts of what a mask, or a bias that is one, leaves visible."""
    term = scope.operands[mod.slot]
    formula = known.lift(term)
    if isinstance(mod, Mask):
        return masks.conjuncts(formula if mod.attends else known.make("not", (formula,), torch.bool))
    hidden = visibility.additive_mask(known, formula, term.expr.dtype)
    return [] if hidden is None else masks.conjuncts(hidden.attends)


def _position(scope: Scope, axes: list[str]) -> Affine:
    """The position that some axes, outermost first, count together."""
    index = Affine()
    for axis in axes:
        index = index * scope.space.sizes[axis] + Affine(((axis, 1),))
    return index


__all__ = ["Meanings", "told_by_masks"]
