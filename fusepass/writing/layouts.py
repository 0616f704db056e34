"""The choice of a tensor for an operand, and the change of its layout: the same for all kinds of graphs.

Of the tensors that hold each element of an operand once, the one closest to the wanted layout is chosen.  It
gets one dimension per role by ``reshape``, ``permute`` and ``expand``.  The subclass defines what a node is,
and how to write one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from fusepass.expressions.index import Affine, AxisSpace, Size, prod
from fusepass.expressions.ir import Expr
from fusepass.rules.engine import Scope, Term

N = TypeVar("N")
Groups = Sequence[Sequence[str]]


class CannotEmit(Exception):
    """Raised for a tensor that cannot be made from those of the graph, with a reason for the user."""


class Layouts(ABC, Generic[N]):
    """Lays operands out over the axes of one site; ``N`` is the graph's kind of node."""

    space: AxisSpace

    @abstractmethod
    def op(self, name: str, *args: Any, **kwargs: Any) -> N:
        """Write a named operation."""

    @abstractmethod
    def discard(self) -> None:
        """Remove everything that was written."""

    @abstractmethod
    def size(self, size: Size) -> Any:
        """An integer, or the graph's representation of a symbolic size."""

    @abstractmethod
    def home(self, node: Expr) -> N | None:
        """The node of the graph that holds an expression's value and can be read here."""

    @abstractmethod
    def as_tensor(self, node: Expr) -> N:
        """A node that holds an expression's value."""

    def shape(self, sizes: Sequence[Size]) -> list[Any]:
        """A shape as arguments; a single symbolic size becomes -1."""
        if sum(not isinstance(s, int) for s in sizes) == 1:
            return [s if isinstance(s, int) else -1 for s in sizes]
        return [self.size(s) for s in sizes]

    def sizes(self, axes: Sequence[str]) -> Size:
        """The product of the sizes of some axes."""
        return prod(self.space.sizes[a] for a in axes)

    def digits(self, term: Term) -> list[tuple[str, ...]] | None:
        """The axes of each dimension, if the index names every element of the tensor exactly once."""
        return self.space.named_once(term.index, term.expr.shape)

    def finest(self, groups: Groups) -> list[list[str]]:
        """Groups in the finest axes: axes may have been split since, because an operand was read."""
        return [[b for a in g for b in self._parts(a)] for g in groups]

    def _parts(self, axis: str) -> list[str]:
        if axis not in self.space.splits:
            return [axis]
        terms = self.space.splits[axis].terms
        inner = next(a for a, c in terms if c == 1)
        return [b for a in (*(a for a, _ in terms if a != inner), inner) for b in self._parts(a)]

    def choose(self, chain: Sequence[Term], groups: Groups) -> Term:
        """The tensor of a chain that holds each element once and is closest to the wanted layout.

        Of several that are equally close, the deepest in the chain is chosen, because then the views above it
        are not needed.  If there is none, it is the first of the chain.
        """
        groups = self.finest(groups)
        wanted = [a for g in groups for a in g]
        best: tuple[tuple[int, int, int], Term] | None = None
        for depth, term in enumerate(chain):
            digits = self.digits(term)
            if digits is None or self.home(term.expr) is None:
                continue
            flat = [a for f in digits for a in f]
            cost = (len(flat), self._work(digits, groups, wanted), -depth)
            if best is None or cost < best[0]:
                best = (cost, term)
        return best[1] if best is not None else chain[0]

    def reach(self, term: Term, scope: Scope) -> Term:
        """The first tensor below ``term``'s views in which the index names every element exactly once.

        If there is none, ``term``.
        """
        at: Term | None = term
        while at is not None:
            if self.digits(at) is not None:
                return at
            at = scope.step(at)
        return term

    def _work(self, digits: list[tuple[str, ...]], groups: Groups, wanted: list[str]) -> int:
        """The number of operations that change the layout: a reshape, a permutation, another reshape."""
        flat = [a for f in digits for a in f]
        present = [tuple(a for a in g if a in flat) for g in groups]
        dims = [f for f in digits if f]
        if flat == [a for a in wanted if a in flat]:
            return int(dims != [p for p in present if p] or len(digits) != len(groups))
        last = [[a] for p in present for a in p] != [list(p) for p in present]
        return 1 + int(any(len(f) > 1 for f in digits)) + int(last)

    def layout(self, term: Term, groups: Groups, full: bool) -> N:
        """``term``'s tensor with one dimension per group; absent groups have size 1 unless ``full``."""
        node, shape, digits = self._read(term)
        return self.relayout(node, [a for f in digits for a in f], shape, self.finest(groups), full, digits)

    def _read(self, term: Term) -> tuple[N, list[Size], list[tuple[str, ...]]]:
        """A tensor in which each element is named exactly once, its shape, and the axes of its dimensions."""
        digits = self.digits(term)
        if digits is not None:
            return self.as_tensor(term.expr), list(term.expr.shape), digits
        cuts = [self._cut(i, n) for i, n in zip(term.index, term.expr.shape, strict=True)]
        axes = [a for cut in cuts if cut is not None for a in cut[3]]
        if None in cuts or len(set(axes)) < len(axes):
            raise CannotEmit("an operand selects or repeats parts of its tensor in a way that no view can")
        node, shape = self.as_tensor(term.expr), []
        for dim, cut in enumerate(cuts):
            assert cut is not None
            start, step, length, _ = cut
            if (start, step, length) != (0, 1, term.expr.shape[dim]):
                node = self.op("slice", node, dim, start, start + step * (length - 1) + 1, step)
            shape.append(length)
        return node, shape, [cut[3] for cut in cuts if cut is not None]

    def _cut(self, index: Affine, size: Size) -> tuple[int, int, Any, tuple[str, ...]] | None:
        """``index`` as a slice of a dimension: its start, step, length and axes."""
        whole = self.space.digits(index, size)
        if whole is not None:
            return 0, 1, size, tuple(whole)
        index = self.space.resolve(index)
        numbers = [index.const, *(c for _, c in index.terms), *(self.space.sizes[a] for a, _ in index.terms)]
        if not all(isinstance(n, int) for n in numbers) or any(c <= 0 for _, c in index.terms):
            return None
        step = math.gcd(*(int(c) for _, c in index.terms)) if index.terms else 1
        inner = Affine(tuple((a, c // step) for a, c in index.terms))
        length = 1 + sum(int(c) * (int(self.space.sizes[a]) - 1) for a, c in inner.terms)
        axes = self.space.digits(inner, length)
        return None if axes is None else (int(index.const), step, length, tuple(axes))

    def relayout(
        self,
        node: N,
        flat: list[str],
        shape: list[Size],
        groups: Groups,
        full: bool,
        dims: Sequence[Sequence[str]],
    ) -> N:
        """A tensor whose elements run over the axes ``flat``, with one dimension for each group."""
        extra = [a for a in flat if a not in {x for g in groups for x in g}]
        if extra:
            raise CannotEmit("an operand varies over an axis that the kernel does not have")
        order = [a for g in groups for a in g if a in flat]
        thin: list[Size] = []
        wide: list[Size] = []
        final: list[Size] = []
        for group in groups:
            partly = full or any(a in flat for a in group)
            thin += [self.space.sizes[a] if a in flat else 1 for a in group]
            wide += [self.space.sizes[a] if a in flat or partly else 1 for a in group]
            final.append(self.sizes(group) if partly else 1)
        if order == flat and thin == wide:
            return self._reshaped(node, shape, final)
        if order != flat and [list(d) for d in dims] != [[a] for a in flat]:
            node = self._reshaped(node, shape, [self.space.sizes[a] for a in flat])
            shape = [self.space.sizes[a] for a in flat]
        if order != flat:
            node = self.op("permute", node, [flat.index(a) for a in order])
            shape = [self.space.sizes[a] for a in order]
        if thin != wide:
            node = self._reshaped(node, shape, thin)
            node = self.op("expand", node, [self.size(s) for s in wide])
            shape = wide
        return self._reshaped(node, shape, final)

    def _reshaped(self, node: N, old: Sequence[Size], new: Sequence[Size]) -> N:
        return node if list(old) == list(new) else self.op("reshape", node, self.shape(new))

    def restore(self, node: N, groups: Groups, out: Term) -> N:
        """Lay out a kernel's result (one dimension per group) like the tensor that it replaces."""
        dims, groups = self.digits(out), self.finest(groups)
        flat = [a for g in groups for a in g]
        if dims is None:
            raise CannotEmit("the result's layout is not a permutation of the kernel's")
        wanted = [a for d in dims for a in d]
        sizes = [self.sizes(g) for g in groups]
        if wanted != flat:
            fine = [self.space.sizes[a] for a in flat]
            node = self.op("permute", self._reshaped(node, sizes, fine), [flat.index(a) for a in wanted])
            sizes = [self.space.sizes[a] for a in wanted]
        return self._reshaped(node, sizes, list(out.expr.shape))
