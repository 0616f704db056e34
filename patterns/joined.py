"""Keys in several tensors: scores and weights that are concatenated over the keys.

Global and local keys (Zaheer et al., Big Bird, arXiv 2007.14062; Phang et al., PEGASUS-X, arXiv
2208.04347), or memories and the sequence, are scored separately, normalised together, and multiplied
separately with their values::

    softmax(cat(q.k1, q.k2))[:m] . v1 + softmax(cat(q.k1, q.k2))[m:] . v2
        = softmax(q . cat(k1, k2)) . cat(v1, v2)

Before that, the scales, masks and biases of each part are moved out of the concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusepass.expressions.index import Size, simplify_size
from fusepass.expressions.ir import Expr, cast, const, expr, pointwise, scalar_of, under_casts
from fusepass.patterns import examples as eg
from fusepass.patterns.terms import holds_product, number
from fusepass.patterns.weights import holds_softmax
from fusepass.rules.engine import Peel, Rule, Scope, Term, rule

Label = int | str
"""A position in the product's result, or the name of a contracted axis."""

#: The most parts that are joined; nobody concatenates more.
MOST_PARTS = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class _Side:
    """An operand of a product; each of its dimensions is labelled with its place in the result."""

    node: Expr
    labels: tuple[Label, ...]


# ---------------------------------------------------------------------------------------- the weights


def joined(node: Expr) -> Expr | None:
    """``w[:m] . v1 + w[m:] . v2 = w . cat(v1, v2)``: one product in place of a sum, or None."""
    parts = _summands(node) if node.op == "add" else []
    if len(parts) < 2:
        return None
    whole, dim, first = parts[0].whole, parts[0].dim, parts[0].weights
    if any(p.whole is not whole or p.dim != dim or p.weights != first for p in parts):
        return None
    parts.sort(key=lambda p: float(p.start) if isinstance(p.start, int) else math.inf)
    ends: list[Size] = [0]
    for part in parts:
        if part.start != ends[-1]:
            return None
        ends.append(simplify_size(part.start + part.length))
    if ends[-1] != simplify_size(whole.shape[dim]):
        return None
    weights = cast(whole, parts[0].dtype)
    values = _concatenated([p.values for p in parts], "d0")
    return None if values is None else _product(_Side(weights, first), values, node)


@dataclass(frozen=True)
class _Part:
    """A product of a slice of weights with values."""

    whole: Expr
    dim: int
    start: Size
    length: Size
    dtype: torch.dtype
    weights: tuple[Label, ...]
    values: _Side


def _summands(node: Expr) -> list[_Part]:
    """The products with slices of weights that ``node`` sums; none where it sums anything else."""
    parts: list[_Part] = []
    todo = [node]
    while todo and len(parts) < MOST_PARTS:
        at = todo.pop()
        sums = [a for a in at.args if a.op == "add"]
        for summand in at.args:
            part = _slice_times_values(summand)
            if summand.shape != node.shape or (summand not in sums and part is None):
                return []
            parts += [part] if part is not None else []
        todo += sums
    return [] if todo else parts


def _slice_times_values(node: Expr) -> _Part | None:
    if node.op != "dot":
        return None
    for position in (0, 1):
        weights, values = _sides(node, position)
        cut = under_casts(weights.node)
        if cut.op != "slice" or cut.attrs[2] != 1 or not holds_softmax(cut):
            continue
        dim, start = int(cut.attrs[0]), cut.attrs[1]
        contracted = [n for n in weights.labels if isinstance(n, str)]
        if contracted != ["d0"] or weights.labels[dim] != "d0" or _length(values) != cut.shape[dim]:
            continue  # an einsum repeats a single value for all keys
        whole = under_casts(cut.args[0]) if cut.args[0].op == "cast" else cut.args[0]
        return _Part(whole, dim, start, cut.shape[dim], weights.node.dtype, weights.labels, values)
    return None


def _length(values: _Side) -> Size | None:
    """How many values are summed."""
    return values.node.shape[values.labels.index("d0")] if "d0" in values.labels else None


def split_softmaxes(product: Expr) -> list[Expr]:
    """``cat(w1, w2) . v = w1 . v[:m] + w2 . v[m:]``: separate softmaxes, such as that of a prompt with a gate
    (Zhang et al., LLaMA-Adapter, arXiv 2303.16199); the product itself where its weights are one tensor."""
    for position in (0, 1):
        weights, values = _sides(product, position)
        whole = under_casts(weights.node)
        if whole.op != "cat" or not all(holds_softmax(a) for a in whole.args):
            continue
        dim = int(whole.attrs[0])
        if weights.labels[dim] != "d0" or "d1" in weights.labels or _length(values) != whole.shape[dim]:
            continue
        axis, products = values.labels.index("d0"), []
        start: Size = 0
        for part in whole.args:
            length = part.shape[dim]
            shape = (*values.node.shape[:axis], length, *values.node.shape[axis + 1 :])
            cut = expr("slice", (values.node,), (axis, start, 1), shape, values.node.dtype)
            pair = (cast(part, weights.node.dtype), cut)
            products.append(
                expr(
                    "dot", pair if position == 0 else pair[::-1], product.attrs, product.shape, product.dtype
                )
            )
            start = simplify_size(start + length)
        return products
    return [product]


# ---------------------------------------------------------------------------------------- the scores


def _two() -> Expr:
    s, t = eg.scores(), eg.scores("t")
    k = t.args[1]
    t = expr("dot", (s.args[0], k), t.attrs, t.shape, t.dtype)
    t = eg.binary("add", t, eg.leaf("m", (eg.Q, eg.K), torch.float64))
    return expr("cat", (s, t), (3,), (*s.shape[:3], 2 * eg.K), s.dtype)


@rule("cat(q . k1, q . k2 + m) = q . cat(k1, k2) + cat(0, m)", _two)
def join(term: Term, scope: Scope) -> Peel | None:
    """Moves one layer out of a concatenation over the keys, or joins products with the same queries."""
    node = term.expr
    if node.op != "cat" or not all(holds_product(a) for a in node.args):
        return None
    dim = int(node.attrs[0])
    if scope.space.resolve(term.index[dim]) != scope.space.resolve(scope.keys):
        return None
    rewritten = _joined_products(node, dim) or _common_layer(node, scope) or _own_layer(node, dim)
    return None if rewritten is None else Peel(Term(rewritten, term.index))


def _joined_products(node: Expr, dim: int) -> Expr | None:
    """``cat(q . k1, q . k2) = q . cat(k1, k2)``."""
    if any(a.op != "dot" or a.dtype is not node.dtype for a in node.args):
        return None
    queries: list[_Side] = []
    keys: list[_Side] = []
    for part in node.args:
        sides = [_sides(part, n)[0] for n in (0, 1)]
        over = [n for n in (0, 1) if dim in sides[n].labels]
        if len(over) != 1:
            return None
        query, key = _sides(part, 1 - over[0])
        queries.append(query)
        keys.append(key)
    if any(q != queries[0] for q in queries):
        return None
    whole = _concatenated(keys, dim)
    return None if whole is None else _product(queries[0], whole, node)


def _common_layer(node: Expr, scope: Scope) -> Expr | None:
    """``cat(c * x, c * y) = c * cat(x, y)``, and likewise for casts and signs."""
    first = node.args[0]
    if any(a.op != first.op or a.dtype is not first.dtype for a in node.args):
        return None
    if first.op == "neg" or (first.op == "cast" and first.is_float):
        inner = [a.args[0] for a in node.args]
        if not all(i.is_float for i in inner) or any(i.dtype is not inner[0].dtype for i in inner):
            return None
        return expr(first.op, (_cat(inner, node),), first.attrs, node.shape, node.dtype)
    if first.op not in ("mul", "div"):
        return None
    for position in (0, 1) if first.op == "mul" else (0,):
        inner = [a.args[position] for a in node.args]
        factors = {number(a.args[1 - position], scope) for a in node.args}
        if len(factors) == 1 and None not in factors and _alike(inner, node):
            pair = [_cat(inner, node), first.args[1 - position]]
            return pointwise(first.op, *(pair if position == 0 else pair[::-1]), dtype=node.dtype)
    return None


def _own_layer(node: Expr, dim: int) -> Expr | None:
    """A bias or mask of one part alone: ``cat(x + m, y) = cat(x, y) + cat(m, 0)``."""
    for at, part in enumerate(node.args):
        if part.op == "add":
            for position in (0, 1):
                inner, term = part.args[position], part.args[1 - position]
                if holds_product(inner) and inner.is_float and inner.shape == part.shape:
                    below = _with(node, at, inner)
                    zero = const(0.0, term.dtype)
                    spread = _spread(term, zero, at, node, dim)
                    return pointwise("add", below, spread, dtype=node.dtype)
        if part.op == "where":
            condition, yes, no = part.args
            for attends, inner, filler in ((True, yes, no), (False, no, yes)):
                if scalar_of(filler) is None or not holds_product(inner) or inner.shape != part.shape:
                    continue
                below = _with(node, at, inner)
                bits = _spread(condition, const(attends, torch.bool), at, node, dim)
                args = (bits, below, filler) if attends else (bits, filler, below)
                return pointwise("where", *args, dtype=node.dtype)
    return None


def _alike(inner: Sequence[Expr], node: Expr) -> bool:
    """Can the layers' operands be concatenated: do they have the layers' shapes and the result's dtype?"""
    return all(i.shape == o.shape and i.dtype is node.dtype for i, o in zip(inner, node.args, strict=True))


def _with(node: Expr, at: int, inner: Expr) -> Expr:
    """The concatenation with one of its parts replaced."""
    return _cat([*node.args[:at], cast(inner, node.dtype), *node.args[at + 1 :]], node)


def _spread(term: Expr, neutral: Expr, at: int, node: Expr, dim: int) -> Expr:
    """A term of one part as a term of the whole, with a neutral element for the other parts."""
    shape = (*(1,) * (node.rank - term.rank), *term.shape)
    if term.rank < node.rank:
        term = expr("reshape", (term,), (), shape, term.dtype)
    parts = []
    for n, part in enumerate(node.args):
        wanted = (*shape[:dim], part.shape[dim], *shape[dim + 1 :])
        source = term if n == at else neutral
        if source.shape != wanted:
            source = expr("expand", (source,), (), wanted, source.dtype)
        parts.append(source)
    whole = (*shape[:dim], node.shape[dim], *shape[dim + 1 :])
    return expr("cat", tuple(parts), (dim,), whole, term.dtype)


def _cat(parts: Sequence[Expr], like: Expr) -> Expr:
    return expr("cat", tuple(parts), like.attrs, like.shape, parts[0].dtype)


# ---------------------------------------------------------------------------------------- products


def _sides(product: Expr, position: int) -> tuple[_Side, _Side]:
    """An operand and the other one, labelled; contracted axes are named in the first one's order."""
    out = {label: n for n, label in enumerate(str(product.attrs[2]))}
    texts = [str(product.attrs[position]), str(product.attrs[1 - position])]
    summed = [label for label in texts[0] if label not in out]
    names: dict[str, Label] = out | {label: f"d{n}" for n, label in enumerate(summed)}
    first, second = (tuple(names.get(label, "?") for label in text) for text in texts)
    return _Side(product.args[position], first), _Side(product.args[1 - position], second)


def _concatenated(sides: Sequence[_Side], along: Label) -> _Side | None:
    """Operands concatenated along one axis, with the same layout, and broadcast to the largest."""
    if any(along not in s.labels or s.node.dtype is not sides[0].node.dtype for s in sides):
        return None
    summed = {n for n in sides[0].labels if isinstance(n, str)}
    if any({n for n in s.labels if isinstance(n, str)} != summed or "?" in s.labels for s in sides):
        return None
    positions = sorted({n for s in sides for n in s.labels if isinstance(n, int) and n != along})
    labels: list[Label] = [*positions, along, *sorted(summed - {along})]
    sizes: dict[Label, Size] = {}
    for label in labels:
        for side in sides:
            if label in side.labels and label != along:
                size = side.node.shape[side.labels.index(label)]
                if sizes.get(label, 1) not in (1, size) and size != 1:
                    return None
                sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    laid = [_laid_out(side, labels, along, sizes) for side in sides]
    total = simplify_size(
        sum((x.shape[labels.index(along)] for x in laid[1:]), laid[0].shape[labels.index(along)])
    )
    whole = tuple(total if n == along else sizes[n] for n in labels)
    axis = labels.index(along)
    return _Side(expr("cat", tuple(laid), (axis,), whole, laid[0].dtype), tuple(labels))


def _laid_out(side: _Side, labels: Sequence[Label], along: Label, sizes: dict[Label, Size]) -> Expr:
    node = side.node
    order = tuple(side.labels.index(n) for n in labels if n in side.labels)
    if order != tuple(range(node.rank)):
        node = expr("permute", (node,), (order,), tuple(node.shape[d] for d in order), node.dtype)
    extents = iter(node.shape)
    full = tuple(next(extents) if n in side.labels else 1 for n in labels)
    if full != node.shape:
        node = expr("reshape", (node,), (), full, node.dtype)
    wanted = tuple(have if n == along else sizes[n] for n, have in zip(labels, full, strict=True))
    return node if wanted == full else expr("expand", (node,), (), wanted, node.dtype)


def _product(left: _Side, right: _Side, like: Expr) -> Expr:
    names = list(dict.fromkeys([*range(like.rank), *left.labels, *right.labels]))
    letter = {name: _LETTERS[n] for n, name in enumerate(names)}
    texts = ("".join(letter[n] for n in group) for group in (left.labels, right.labels, range(like.rank)))
    return expr("dot", (left.node, right.node), tuple(texts), like.shape, like.dtype)


JOINED: tuple[Rule, ...] = (join,)
