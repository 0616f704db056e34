"""Scalar formulas of masks and biases as text, evaluated element by element or block by block.

A formula gives one number (or truth value) for batch ``b``, query head ``h``, query ``i`` and key ``j``.
It is written as nested lists, from the expressions of :mod:`fusepass.rules.formulas`:

    ["const", x]                      a number
    ["index", c, [[n, letter, stride, size], ...]]
                                      c + sum of n * ((letter // stride) % size); size 0: no remainder
    ["load", slot, [index, ...]]      one element of a tensor
    [operation, formula, ...]         arithmetic, comparisons, logic, "where"
    ["cast", formula, dtype]

The same text is evaluated in a ``mask_mod`` or ``score_mod`` of FlexAttention (:func:`evaluate`) and, on
intervals instead of numbers, for whole blocks of queries and keys (:mod:`fusepass.kernels.blocks`).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusepass.expressions.index import Affine, Size, prod
from fusepass.expressions.ir import DTYPE_NAMES, DTYPES, Expr
from fusepass.rules.engine import Term
from fusepass.rules.formulas import Formulas
from fusepass.rules.site import Site

Formula = Any  # nested tuples, as `read` gives them

POINTWISE: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
    "floordiv": torch.floor_divide, "mod": torch.remainder, "neg": torch.neg, "abs": torch.abs,
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "max": torch.maximum, "min": torch.minimum,
    "le": torch.le, "lt": torch.lt, "ge": torch.ge, "gt": torch.gt, "eq": torch.eq, "ne": torch.ne,
    "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor, "not": torch.logical_not,
    "where": torch.where,
}  # fmt: skip


class Unwritable(Exception):
    """A formula that has no text: it contains an unknown size, or an operation without a name here."""


@dataclass
class Writer:
    """Writes one site's formulas; ``tensors`` collects what they load, in the order of their slots."""

    site: Site
    tensors: list[Expr] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.formulas = Formulas(self.site.scope)
        r = self.site.roles
        self.letters = {"b": r.batch, "h": r.heads, "i": r.query, "j": r.key}

    def term(self, term: Term) -> list[Any]:
        """The formula of a tensor's element."""
        return self.write(self.formulas.lift(term))

    def write(self, node: Expr) -> list[Any]:
        """A formula as nested lists.

        Raises:
            Unwritable: the formula has no text.
        """
        if node.op == "const":
            return ["const", node.attrs[0]]
        if node.op == "affine":
            return ["index", *self.index(node.attrs[0])]
        if node.op == "load":
            tensor = node.args[0]
            if tensor not in self.tensors:
                self.tensors.append(tensor)
            return ["load", self.tensors.index(tensor), [self.index(i) for i in node.attrs]]
        if node.op == "cast":
            return ["cast", self.write(node.args[0]), DTYPE_NAMES[node.dtype]]
        if node.op not in POINTWISE or node.attrs:
            raise Unwritable(node.op)
        return [node.op, *map(self.write, node.args)]

    def index(self, index: Affine) -> list[Any]:
        """An index expression over axes as one over the letters."""
        index = self.site.space.resolve(index)
        terms = [[self._int(c), *self._digit(axis)] for axis, c in index.terms]
        return [self._int(index.const), _joined(terms)]

    def _digit(self, axis: str) -> tuple[str, int, int]:
        for letter, axes in self.letters.items():
            fine = [a for x in axes for a in self._parts(x)]
            if axis in fine:
                at = fine.index(axis)
                sizes = [self.site.space.sizes[a] for a in fine]
                stride = self._int(prod(sizes[at + 1 :]))
                return letter, stride, self._int(sizes[at]) if at > 0 else 0
        raise Unwritable(f"axis {axis}")

    def _parts(self, axis: str) -> list[str]:
        index = self.site.space.resolve(Affine(((axis, 1),)))
        return [a for a, _ in sorted(index.terms, key=lambda t: -self._int(t[1]))]

    def _int(self, size: Size) -> int:
        if not isinstance(size, int):
            raise Unwritable(f"size {size}")
        return size


def _joined(terms: list[list[Any]]) -> list[list[Any]]:
    """Neighbouring digits of a letter joined: ``4 * (h // 4) + h % 4`` is ``h``."""
    joined = list(terms)
    for high, low in itertools.permutations(terms, 2):
        if high not in joined or low not in joined or high[1] != low[1] or not low[3]:
            continue
        if high[0] == low[0] * low[3] and high[2] == low[2] * low[3]:
            joined[joined.index(low)] = [low[0], low[1], low[2], high[3] * low[3]]
            joined.remove(high)
            return _joined(joined)
    return joined


def text(formula: Any) -> str:
    """A formula, or several, as text."""
    return json.dumps(formula, separators=(",", ":"))


@functools.lru_cache(maxsize=512)
def read(written: str) -> Formula:
    """What :func:`text` wrote, as nested tuples."""
    return _frozen(json.loads(written))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def letters(formula: Formula) -> set[str]:
    """The letters that a formula depends on."""
    if not isinstance(formula, (tuple, list)):
        return set()
    if formula[:1] in (("index",), ["index"]):
        return {t[1] for t in formula[2]}
    if formula[:1] in (("load",), ["load"]):
        return {t[1] for index in formula[2] for t in index[1]}
    return set().union(*(letters(f) for f in formula))


def slots_of(formula: Formula) -> set[int]:
    """The slots of the tensors that a formula loads."""
    if not isinstance(formula, (tuple, list)):
        return set()
    if formula[:1] in (("load",), ["load"]):
        return {formula[1]}
    return set().union(*(slots_of(f) for f in formula))


def is_dense(formula: Formula) -> bool:
    """Does a formula read a tensor with one dimension for queries and another for keys?

    A tensor that is read at the distance between them has neither.
    """
    if not isinstance(formula, (tuple, list)):
        return False
    if formula[:1] in (("load",), ["load"]):
        of = [{term[1] for term in index[1]} & {"i", "j"} for index in formula[2]]
        return {"i"} in of and {"j"} in of
    return any(is_dense(f) for f in formula)


def may_hide(formula: Formula, lowest: float) -> bool:
    """May a bias hide scores: has it a low constant, or a tensor that is not multiplied by a distance?"""
    kind = formula[0]
    if kind in ("index", "const"):
        return bool(kind == "const" and formula[1] < lowest)
    if kind == "load":
        return True
    parts = (formula[1],) if kind == "cast" else formula[1:]
    if kind == "mul" and any(_without_casts(part)[0] == "index" for part in parts):
        return False
    return any(may_hide(part, lowest) for part in parts)


def _without_casts(formula: Formula) -> Formula:
    return _without_casts(formula[1]) if formula[0] == "cast" else formula


def evaluate(formula: Formula, at: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """A formula's value; ``at`` holds integer tensors ``b``, ``h``, ``i``, ``j`` of one broadcast shape.

    Kernels compute this for every score, so comparisons of indices use as few operations as possible.
    """
    operation = formula[0]
    result: Tensor
    if operation == "const":
        kind = {bool: torch.bool, int: torch.int64}.get(type(formula[1]), torch.float32)
        return torch.full_like(at["j"], formula[1], dtype=kind)
    if operation == "index":
        return _index(formula[1], formula[2], at)
    if operation == "load":
        tensor: Tensor = tensors[formula[1]]
        if tensor.dim() == 0:
            return tensor
        where = (_index(constant, terms, at) for constant, terms in formula[2])
        pairs = zip(where, formula[2], range(tensor.dim()), strict=True)
        result = tensor[tuple(_inside(i, tensor.shape[d]) if may_leave(f) else i for i, f, d in pairs)]
        return result
    if operation == "cast":
        result = evaluate(formula[1], at, tensors).to(DTYPES[formula[2]])
        return result
    if (compared := _compared(formula)) is not None:
        comparison, (constant, terms) = compared
        up, down = _sums(terms, at)
        if up is not None and down is not None:
            result = POINTWISE[comparison](up, down - constant if constant else down)
            return result
    result = POINTWISE[operation](*(evaluate(f, at, tensors) for f in formula[1:]))
    return result


def may_leave(index: Any) -> bool:
    """May an index leave its tensor, where the position that it is computed for is hidden?

    Windows over original keys read biases by the distance between query and key.
    """
    constant, terms = index
    return bool(constant < 0 or any(factor < 0 for factor, *_ in terms))


def _inside(index: Tensor, size: int) -> Tensor:
    return index.clamp(0, size - 1)


_OPPOSITE = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}
_STRICTER = {("gt", 1): "ge", ("lt", -1): "le", ("le", 1): "lt", ("ge", -1): "gt"}
"""For integers, ``x + 1 > 0`` is ``x >= 0``."""


def _compared(formula: Formula) -> tuple[str, tuple[int, Any]] | None:
    """A comparison of an index expression with an integer, or its negation, as a comparison with zero."""
    if formula[0] == "not":
        inner = _compared(formula[1])
        if inner is None:
            return None
        operation, (constant, terms) = inner
        operation = _OPPOSITE[operation]
    elif formula[0] in _OPPOSITE and formula[1][0] == "index" and formula[2][0] == "const":
        if type(formula[2][1]) is not int:
            return None
        operation, constant, terms = formula[0], formula[1][1] - formula[2][1], formula[1][2]
    else:
        return None
    if (operation, constant) in _STRICTER:
        operation, constant = _STRICTER[operation, constant], 0
    return operation, (constant, terms)


def _index(constant: int, terms: Any, at: Mapping[str, Tensor]) -> Tensor:
    up, down = _sums(terms, at)
    if down is None:
        total = up
    else:
        total = -down if up is None else up - down
    if total is None:
        return torch.full_like(at["j"], constant)
    return total if constant == 0 else total + constant


def _sums(terms: Any, at: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Two sums: of the index terms with positive factors, and of those with negative factors, negated."""
    sums: dict[bool, Tensor] = {}
    for factor, letter, stride, size in terms:
        digit: Tensor = at[letter] if stride == 1 else at[letter] // stride
        digit = digit % size if size else digit
        digit = digit if abs(factor) == 1 else digit * abs(factor)
        side = factor > 0
        sums[side] = sums[side] + digit if side in sums else digit
    return sums.get(True), sums.get(False)


__all__ = [
    "Formula", "Unwritable", "Writer", "evaluate", "is_dense", "letters", "may_hide", "may_leave", "read",
    "slots_of", "text",
]  # fmt: skip
