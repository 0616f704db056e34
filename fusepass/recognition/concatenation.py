"""Several products over the same pairs as one: the features of their operands are concatenated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusepass.expressions.index import Affine, Size, prod, simplify_size
from fusepass.expressions.ir import Expr, Shape, const, expr, opmath, pointwise
from fusepass.recognition.operands import chain_of
from fusepass.rules.engine import Product, Scope, Term

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: Factors may differ by this much: a smaller one would make features vanish.
SMALLEST = 2.0**-16


@dataclass(frozen=True)
class Part:
    """``factor`` times the product of a query and a key, summed over some axes; ``node`` is the product."""

    query: Term
    key: Term
    axes: tuple[Affine, ...]
    node: Expr
    factor: float


@dataclass(frozen=True)
class Joint:
    """``scale`` times one product.

    ``copied``: how many elements are copied for it.  ``spared``: how many elements the other products have.
    """

    product: Product
    node: Expr
    scale: float
    copied: Size
    spared: Size


@dataclass(frozen=True)
class _Operands:
    """The tensors that may serve as the operands of a part, and the factor that is not in them."""

    query: list[Term]
    key: list[Term]
    factor: float


def joined_product(scope: Scope, parts: Sequence[Part], low: torch.dtype) -> Joint | None:
    """The sum of the parts as one product, or None where their operands do not fit together.

    Args:
        scope: the site's axes and tensors.
        parts: the products.
        low: the dtype of the result.
    """
    for scales in (True, False):
        operands = [_operands(scope, part, low, scales) for part in parts]
        largest = max(abs(o.factor) for o in operands)
        factors = [o.factor / largest for o in operands]
        tensors = [t for o in operands for t in (o.query[0], o.key[0])]
        dtypes = {t.expr.dtype for t in tensors}
        if len(dtypes) > 1 or not all(scope.readable(t.expr) for t in tensors):
            continue
        if all(_is_exact(f, *dtypes) for f in factors):
            return _joined(scope, parts, operands, factors, largest)
    return None


def _operands(scope: Scope, part: Part, low: torch.dtype, scales: bool) -> _Operands:
    """The operands of a part; with ``scales``, constants that were multiplied into them are a factor."""
    (fq, query), (fk, key) = (chain_of(scope, t, low, scales) for t in (part.query, part.key))
    return _Operands(query, key, part.factor * math.prod(fq) * math.prod(fk))


def _is_exact(factor: float, dtype: torch.dtype) -> bool:
    """May a factor of at most one be multiplied into features?

    In half precision only a power of two may: any other would round the features, and the original rounds
    the scores instead.
    """
    wide = dtype.itemsize >= 4
    return abs(factor) >= SMALLEST and (wide or abs(math.frexp(factor)[0]) == 0.5)


def _joined(
    scope: Scope, parts: Sequence[Part], operands: Sequence[_Operands], factors: Sequence[float], scale: float
) -> Joint | None:
    for term in [t for o in operands for t in (*o.query, *o.key)]:
        scope.axes(term)  # looking into operands may split axes, so everything is laid out after that
    features = [_axes(scope, part.axes) for part in parts]
    size = simplify_size(sum((_size(scope, f) for f in features[1:]), _size(scope, features[0])))
    feature = scope.space.new_axis("d", size)
    query = _side(scope, [o.query for o in operands], features, feature, factors)
    key = _side(scope, [o.key for o in operands], features, feature, None)
    if query is None or key is None:
        return None
    product = Product(query.term, key.term, (feature,))
    spared: Size = 0
    for part in parts[1:]:
        outer = scope.axes(part.query) | scope.axes(part.key)
        spared += _size(scope, sorted(outer - set(_axes(scope, part.axes))))
    node = _as_node(scope, product, parts[0].node.dtype)
    return Joint(product, node, scale, query.copied + key.copied, spared)


@dataclass(frozen=True)
class _Side:
    """Queries or keys with the features of all parts, and how many elements are copied."""

    term: Term
    copied: Size


def _side(
    scope: Scope,
    chains: Sequence[Sequence[Term]],
    features: Sequence[Sequence[str]],
    feature: Affine,
    factors: Sequence[float] | None,
) -> _Side | None:
    plain = factors is None or all(f == 1.0 for f in factors)
    if plain and (slices := _adjacent(scope, chains, features, feature)) is not None:
        return _Side(slices, 0)
    picked = [_pick(scope, chain, inner) for chain, inner in zip(chains, features, strict=True)]
    outer: list[str] = []
    for one in sorted((p for p in picked if p is not None), key=lambda p: -len(p[1])):
        outer += [a for a in one[1] if a not in outer]
    laid = []
    for n, (choice, inner) in enumerate(zip(picked, features, strict=True)):
        if choice is None:
            return None
        node = _laid_out(scope, choice[0], outer, inner)
        laid.append(node if factors is None else _multiplied(node, factors[n]))
    shape = (*(scope.space.sizes[a] for a in outer), scope.space.sizes[feature.terms[0][0]])
    whole = expr("cat", tuple(laid), (len(outer),), shape, laid[0].dtype)
    return _Side(Term(whole, (*(Affine(((a, 1),)) for a in outer), feature)), prod(shape))


def _pick(scope: Scope, chain: Sequence[Term], inner: Sequence[str]) -> tuple[Term, list[str]] | None:
    """The first tensor of a chain that names its elements once, and its axes except the features.

    A tensor without axes over which it only repeats itself is preferred.
    """
    best: tuple[Term, list[str]] | None = None
    for term in chain:
        digits = scope.space.named_once(term.index, term.expr.shape)
        flat = [a for d in digits or () for a in d]
        if digits is None or not set(inner) <= set(flat):
            continue
        if scope.readable(term.expr) and (best is None or len(flat) < len(best[1]) + len(inner)):
            best = term, [a for a in flat if a not in inner]
    return best


def _laid_out(scope: Scope, term: Term, outer: Sequence[str], inner: Sequence[str]) -> Expr:
    """A tensor with a dimension for each of the outer axes, and one for the features."""
    sizes = scope.space.sizes
    flat = [a for d in scope.space.named_once(term.index, term.expr.shape) or () for a in d]
    order = [*(a for a in outer if a in flat), *inner]
    node = _reshaped(term.expr, tuple(sizes[a] for a in flat))
    if order != flat:
        dims = tuple(flat.index(a) for a in order)
        node = expr("permute", (node,), (dims,), tuple(node.shape[d] for d in dims), node.dtype)
    width = prod(sizes[a] for a in inner)
    node = _reshaped(node, (*(sizes[a] if a in flat else 1 for a in outer), width))
    wanted = (*(sizes[a] for a in outer), width)
    return node if node.shape == wanted else expr("expand", (node,), (), wanted, node.dtype)


def _reshaped(node: Expr, shape: Shape) -> Expr:
    return node if node.shape == shape else expr("reshape", (node,), (), shape, node.dtype)


def _multiplied(node: Expr, factor: float) -> Expr:
    if factor == 1.0:
        return node
    if factor == -1.0:
        return pointwise("neg", node, dtype=node.dtype)
    return pointwise("mul", node, const(factor, opmath(node.dtype)), dtype=node.dtype)


def _adjacent(
    scope: Scope, chains: Sequence[Sequence[Term]], features: Sequence[Sequence[str]], feature: Affine
) -> Term | None:
    """The tensor in which the features of the parts already lie side by side, in order: nothing is copied."""
    for first in chains[0]:
        place, start = _slice(scope, first, features[0]), None
        if place is None:
            continue
        dim, start = place
        end = start + _size(scope, features[0])
        for chain, inner in zip(chains[1:], features[1:], strict=True):
            if not any(_continues(scope, first, t, dim, inner, end) for t in chain):
                break
            end = simplify_size(end + _size(scope, inner))
        else:
            index = (*first.index[:dim], feature + start, *first.index[dim + 1 :])
            return Term(first.expr, index)
    return None


def _slice(scope: Scope, term: Term, inner: Sequence[str]) -> tuple[int, Size] | None:
    """The dimension of a tensor that runs over the features, and where they start."""
    for dim, index in enumerate(term.index):
        index = scope.space.resolve(index)
        if index.axes & set(inner):
            digits = scope.space.digits(Affine(index.terms), prod(scope.space.sizes[a] for a in inner))
            return (dim, index.const) if digits == tuple(inner) else None
    return None


def _continues(scope: Scope, first: Term, term: Term, dim: int, inner: Sequence[str], start: Size) -> bool:
    """Are a part's features in the tensor of the first part, from ``start`` on?"""
    if term.expr is not first.expr or _slice(scope, term, inner) != (dim, start):
        return False
    resolve = scope.space.resolve
    return all(
        resolve(i) == resolve(j)
        for d, (i, j) in enumerate(zip(term.index, first.index, strict=True))
        if d != dim
    )


def _axes(scope: Scope, indices: Sequence[Affine]) -> list[str]:
    """The finest axes of some indices, outermost first."""
    groups = [(scope.space.digits(i, _extent(scope, i)) or ()) for i in indices]
    return [a for names in groups for a in names]


def _extent(scope: Scope, index: Affine) -> Size:
    return prod(scope.space.sizes[a] for a in scope.space.resolve(index).axes)


def _size(scope: Scope, axes: Sequence[str]) -> Size:
    return prod(scope.space.sizes[a] for a in axes)


def _as_node(scope: Scope, product: Product, dtype: torch.dtype) -> Expr:
    """The product as an expression."""
    terms = (product.left, product.right)
    names = [[a for i in t.index for a in sorted(scope.space.resolve(i).axes)] for t in terms]
    summed = set(product.axes[0].axes)
    letters = {a: _LETTERS[n] for n, a in enumerate(dict.fromkeys([*names[0], *names[1]]))}
    out = [a for a in letters if a not in summed]
    texts = tuple("".join(letters[a] for a in group) for group in (*names, out))
    shape = tuple(scope.space.sizes[a] for a in out)
    return expr("dot", (product.left.expr, product.right.expr), texts, shape, dtype)


__all__ = ["Joint", "Part", "joined_product"]
