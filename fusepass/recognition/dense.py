"""The masks and biases of a site that vary over queries and keys, each with its formula, for reports.

Bands and paddings are not among them: they are described by a few numbers, or by one tensor over the keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fusepass.expressions.index import Affine
from fusepass.expressions.ir import Expr
from fusepass.rules.formulas import Formulas
from fusepass.rules.site import Site
from fusepass.specification.atoms import Dense
from fusepass.specification.attention import Bias, Mask

#: Operations that are written between their operands.
_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**", "le": "<=",
    "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!=", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
#: How deep a formula is written out.
_DEPTH = 6


def dense_terms(site: Site) -> Iterator[tuple[str, str, bool]]:
    """The masks and biases over queries and keys, in the order of computation.

    Yields:
        For each: its name in the specification, its formula, and whether it reads a tensor over queries and
        keys.
    """
    formulas, letters = Formulas(site.scope), site.roles.letters()
    for mod in site.spec.scores:
        if not isinstance(mod, (Mask, Bias)):
            continue
        named = [mod] if isinstance(mod, Bias) else [a for a in mod.atoms if isinstance(a, Dense)]
        names = [str(n) for n in named if {"i", "j"} <= set(n.axes)]
        if names:
            formula = formulas.lift(site.operands[mod.slot])
            loaded = any({"i", "j"} <= _letters_of(e, letters) for e in _loads(formula))
            yield ", ".join(names), _text(formula, letters, _DEPTH), loaded


def _loads(formula: Expr) -> Iterator[Expr]:
    todo, seen = [formula], {formula}
    while todo:
        node = todo.pop()
        if node.op == "load":
            yield node
            continue
        unseen = [a for a in node.args if a not in seen]
        seen.update(unseen)
        todo.extend(unseen)


def _letters_of(load: Expr, letters: dict[str, str]) -> set[str]:
    """The roles that an element's position depends on."""
    return {letters[axis] for index in load.attrs for axis in _axes(index) if axis in letters}


def _axes(index: object) -> list[str]:
    return list(index.axes) if isinstance(index, Affine) else []


def _text(node: Expr, letters: dict[str, str], depth: int) -> str:
    """A formula on one line; what is deeper than ``depth`` operations is left out."""
    if node.op == "const":
        return f"{node.attrs[0]:g}" if isinstance(node.attrs[0], float) else str(node.attrs[0])
    if node.op == "affine":
        return _index(node.attrs[0], letters)
    if node.op == "load":
        name = node.args[0].attrs[0] if node.args[0].op == "input" else node.args[0].op
        return f"{name}[{', '.join(_index(i, letters) for i in node.attrs)}]"
    if node.op == "cast":
        return _text(node.args[0], letters, depth)
    if depth == 0:
        return "…"
    args = [_text(a, letters, depth - 1) for a in node.args]
    if node.op in _SIGNS and len(args) == 2:
        return f"({args[0]} {_SIGNS[node.op]} {args[1]})"
    return f"{node.op}({', '.join(args)})"


def _index(index: object, letters: dict[str, str]) -> str:
    if not isinstance(index, Affine):
        return str(index)
    parts = [(letters.get(axis, axis), factor) for axis, factor in index.terms]
    several = Counter(name for name, _ in parts)  # query heads are groups of heads, and heads of a group
    whole = dict.fromkeys(name for name, _ in parts if several[name] > 1)
    single = [(name, factor) for name, factor in parts if name not in whole]
    texts = [*whole, *(name if factor == 1 else f"{factor}*{name}" for name, factor in single)]
    if index.const != 0 or not texts:
        texts.append(str(index.const))
    return " + ".join(texts)


__all__ = ["dense_terms"]
