"""Index algebra: integer sizes, iteration axes, and affine index expressions over them.

A tensor element is named by one index expression per dimension.  Views move those expressions:
``permute`` reorders them, ``reshape`` re-reads their mixed-radix digits, ``expand`` forgets one.
An index expression is *affine*, ``c0 + c1*x1 + c2*x2 + ...`` with one term per iteration axis ``x``
(``0 <= x < size``); coefficients and sizes are integers or, for dynamic shapes, sympy expressions.
Where a reshape cuts an axis (``bh -> b, h``), the axis is *split* into two finer ones and every
expression that mentions it is re-read in terms of those: axes are refined until every view is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from fusepass.expressions.equations import Equations, is_quotient, quotients

Size = int | sympy.Expr


def simplify_size(value: Size) -> Size:
    """The integer behind a constant sympy expression, or the expression itself."""
    if isinstance(value, int):
        return value
    return int(value) if value.is_Integer else value


def prod(sizes: Iterable[Size]) -> Size:
    """Product of sizes; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = simplify_size(total * size)
    return total


def _without_ratios(claim: Any) -> Any:
    """A comparison of ratios as one of integers, which PyTorch can evaluate; None if the denominator is not
    known to be positive."""
    if not any(p.exp.is_negative for p in claim.atoms(sympy.Pow)):
        return claim
    above, below = sympy.fraction(sympy.together(claim.lhs - claim.rhs))
    return claim.func(sympy.expand(above), 0) if _is_positive(below) else None


def _is_positive(divisor: Any) -> bool:
    """Is a divisor positive?  A quotient of sizes is not negative, and nothing is divided by zero."""
    sizes = [q for q in quotients(divisor) if q.args[0].is_nonnegative and q.args[1].is_positive]
    return bool(divisor.xreplace({q: sympy.Dummy(positive=True) for q in sizes}).is_positive)


class Facts:
    """What is known about sizes.  Answers are proofs: ``False`` means "not proved", never "disproved".

    Nothing is proved from the sizes of the example that was traced.

    Args:
        shape_env: PyTorch's symbolic-shape environment when the graph has one.
        restrictable: the sizes of the example, by symbol, that the graph may be restricted to.
    """

    def __init__(self, shape_env: Any = None, restrictable: Mapping[Any, int] | None = None) -> None:
        self._env = shape_env
        self._restrictable = restrictable or {}
        self._memo: dict[tuple[str, Size, Size], bool] = {}
        self._equations = None if shape_env is None else Equations(shape_env, self._with_ratios)

    def _ask(self, kind: str, a: Size, b: Size) -> bool:
        key = (kind, a, b)
        if key not in self._memo:
            self._memo[key] = self._prove(sympy.Eq(a, b) if kind == "eq" else sympy.Le(a, b))
        return self._memo[key]

    def _prove(self, claim: Any) -> bool:
        if claim in (True, sympy.true):
            return True
        if claim in (False, sympy.false):
            return False
        if self._env is None:
            return bool(sympy.simplify(claim) is sympy.true)
        whole = _without_ratios(claim)
        return whole is not None and self._env._maybe_evaluate_static(whole) is sympy.true

    def settled(self, size: Size) -> Size:
        """A size with its divisions written as ratios where they are proved to be exact, and with its symbols
        replaced by the numbers, or other sizes, that guards equate them with.
        """
        if isinstance(size, int) or self._equations is None:
            return size
        size = self._env.replace(size)  # symbols may have become numbers since the graph was read
        return simplify_size(sympy.expand(self._equations.applied(size)))

    def _with_ratios(self, size: Any) -> Any:
        exact = {}
        for part in quotients(size):
            base, divisor = part.args
            if self._divides(part, base, divisor):
                exact[part] = self._with_ratios(base) / self._with_ratios(divisor)
        return size.xreplace(exact)

    def _divides(self, part: Any, base: Any, divisor: Any) -> bool:
        """Does a divisor divide a size exactly: directly, or because the size is divisor times quotient?"""
        if self._ask("eq", Mod(base, divisor), 0):
            return True
        return self._ask("eq", Mod(base, part), 0) and self._ask("eq", FloorDiv(base, part), divisor)

    def restrict(self, size: Size, number: Size) -> bool:
        """Restrict the graph to inputs whose ``size`` is ``number``; False, and no restriction, unless the
        example has that size and the size is restrictable.

        PyTorch guards the restriction, and compiles the program again for other inputs.
        """
        if self._env is None or self._restrictable.get(size) != number:
            return False
        self._memo.clear()
        return bool(self._env.evaluate_expr(sympy.Eq(size, number)))

    def example(self, size: Size) -> int | None:
        """The value of a size in the example that was traced; None if it has none."""
        if isinstance(size, int):
            return size
        values = getattr(self._env, "backed_var_to_val", None) or getattr(self._env, "var_to_val", {})
        number = sympy.sympify(size).xreplace(dict(values))
        return int(number) if number.is_number else None

    def stays_below(self, size: Size, most: int) -> bool:
        """Is a size at most a number: provably, or in the example?

        In the second case PyTorch guards it, if sizes are restrictable.
        """
        if isinstance(size, int):
            return size <= most
        if self.at_most(size, most):
            return True
        value = self.example(size)
        if value is not None and value > most:
            return False
        if set(sympy.sympify(size).free_symbols) <= set(self._restrictable):
            self._memo.clear()
            return bool(self._env.evaluate_expr(sympy.Le(size, most)))
        return True

    def equal(self, a: Size, b: Size) -> bool:
        """Is ``a == b`` for every input the graph may be given?"""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        if a == b or sympy.expand(sympy.sympify(a) - b) == 0:
            return True
        if sympy.expand(sympy.sympify(self.settled(a)) - self.settled(b)) == 0:
            return True
        return self._ask("eq", a, b)

    def at_most(self, a: Size, b: Size) -> bool:
        """Is ``a <= b`` for every input the graph may be given?"""
        if isinstance(a, int) and isinstance(b, int):
            return a <= b
        difference = sympy.expand(sympy.sympify(a) - b)
        settled = sympy.sympify(self.settled(difference))
        if settled.is_Integer:
            return bool(settled <= 0)
        if self._ask("le", sympy.sympify(a), sympy.sympify(b)):
            return True
        return settled != difference and self._ask("le", settled, 0)

    def without_quotients(self, size: Any) -> Any:
        """A size in which ``s // (s // c)``, as PyTorch writes the last part of a split, is ``c``, if it is
        proved to be."""
        divisors = {
            whole: inner.args[1]
            for whole in quotients(size)
            for inner in [whole.args[1]]
            if is_quotient(inner) and inner.args[0] == whole.args[0] and self._ask("eq", whole, inner.args[1])
        }
        return size.xreplace(divisors) if divisors else size

    def quotient(self, a: Size, b: Size) -> Size | None:
        """``a / b`` where the division is exact, else None."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b if b and a % b == 0 else None
        if self.equal(a, b):
            return 1
        direct = _ratio(a, b)
        return _ratio(self.settled(a), self.settled(b)) if direct is None else direct


def _ratio(a: Size, b: Size) -> Size | None:
    """``a / b`` if it is a polynomial of symbols and quotients with integer factors, else None.

    Where ``b`` is zero, so is ``a``: then there are no elements, and any ratio will do.
    """
    if b == 0:
        return None
    ratio = sympy.cancel(sympy.sympify(a) / b)
    plain = ratio.xreplace({q: sympy.Dummy(integer=True) for q in quotients(ratio)})
    if not plain.free_symbols:
        return simplify_size(ratio) if plain.is_Integer else None
    exact = plain.is_polynomial() and all(c.is_Integer for c in sympy.Poly(plain).coeffs())
    return simplify_size(ratio) if exact else None


@dataclass(frozen=True)
class Affine:
    """``const + sum(coefficient * axis)``; terms are sorted by axis name and none is zero."""

    terms: tuple[tuple[str, Size], ...] = ()
    const: Size = 0

    @staticmethod
    def of(terms: dict[str, Size], const: Size) -> Affine:
        """Normal form of a term table."""
        kept = tuple(sorted((axis, c) for axis, c in terms.items() if c != 0))
        return Affine(kept, simplify_size(const))

    @cached_property
    def axes(self) -> frozenset[str]:
        """The axes it depends on."""
        return frozenset(axis for axis, _ in self.terms)

    @property
    def is_const(self) -> bool:
        """Does it depend on no axis?"""
        return not self.terms

    def __add__(self, other: Affine | Size) -> Affine:
        if not isinstance(other, Affine):
            return Affine(self.terms, simplify_size(self.const + other))
        terms: dict[str, Size] = dict(self.terms)
        for axis, c in other.terms:
            terms[axis] = (
                simplify_size(sympy.expand(terms.get(axis, 0) + c))
                if not _ints(terms.get(axis, 0), c)
                else terms.get(axis, 0) + c
            )
        return Affine.of(terms, self.const + other.const)

    def __mul__(self, factor: Size) -> Affine:
        if factor == 1:
            return self
        return Affine.of({a: simplify_size(c * factor) for a, c in self.terms}, self.const * factor)

    def __sub__(self, other: Affine | Size) -> Affine:
        return self + (other * -1 if isinstance(other, Affine) else -other)

    def __str__(self) -> str:
        parts = [axis if c == 1 else f"{c}*{axis}" for axis, c in self.terms]
        if self.const != 0 or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)


def _ints(*values: Size) -> bool:
    return all(isinstance(v, int) for v in values)


@dataclass
class AxisSpace:
    """The iteration axes of one site: their sizes, and the splits made so far."""

    facts: Facts = field(default_factory=Facts)
    sizes: dict[str, Size] = field(default_factory=dict)
    splits: dict[str, Affine] = field(default_factory=dict)
    count: int = 0

    def new_axis(self, prefix: str, size: Size) -> Affine:
        """A new axis, or the constant 0 where its size is 1."""
        if size == 1:
            return Affine()
        name = f"{prefix}{self.count}"
        self.count += 1
        self.sizes[name] = size
        return Affine(((name, 1),))

    def resolve(self, index: Affine) -> Affine:
        """The same expression in the finest axes so far."""
        while any(axis in self.splits for axis, _ in index.terms):
            out = Affine((), index.const)
            for axis, c in index.terms:
                out = out + (self.splits[axis] if axis in self.splits else Affine(((axis, 1),))) * c
            index = out
        return index

    def split(self, axis: str, inner: Size) -> bool:
        """Replace ``axis`` by ``outer * inner + rest``; False unless ``inner`` provably divides its size."""
        outer = self.facts.quotient(self.sizes[axis], inner)
        if outer is None:
            return False
        high, low = self.new_axis(f"{axis}_", outer), self.new_axis(f"{axis}_", inner)
        self.splits[axis] = high * inner + low
        return True

    def bounds(self, index: Affine) -> tuple[Size, Size] | None:
        """Smallest and largest value, where every coefficient's sign is known."""
        low: Size = index.const
        high: Size = index.const
        for axis, c in index.terms:
            reach = simplify_size(c * (self.sizes[axis] - 1))
            if self.facts.at_most(0, c):
                high = simplify_size(high + reach)
            elif self.facts.at_most(c, 0):
                low = simplify_size(low + reach)
            else:
                return None
        return low, high

    def divmod(self, index: Affine, n: Size) -> tuple[Affine, Affine] | None:
        """Quotient and remainder by ``n``, splitting axes as needed; None where they are not affine."""
        if n == 0:
            return None  # the tensor is empty
        for _ in range(16):
            index = self.resolve(index)
            high: dict[str, Size] = {}
            low: dict[str, Size] = {}
            for axis, c in index.terms:
                quotient = self.facts.quotient(c, n)
                (low if quotient is None else high)[axis] = c if quotient is None else quotient
            const_high, const_low = divmod(index.const, n) if _ints(index.const, n) else (0, index.const)
            rest = Affine.of(low, const_low)
            reach = self.bounds(rest)
            if reach is not None and self.facts.at_most(0, reach[0]) and self.facts.at_most(reach[1], n - 1):
                return Affine.of(high, const_high), rest
            if not self._split_for(rest, n):
                return None
        return None

    def _split_for(self, rest: Affine, n: Size) -> bool:
        """Split the axis of ``rest`` that crosses multiples of ``n``."""
        for axis, c in sorted(rest.terms, key=lambda t: str(t[0])):
            inner = self.facts.quotient(n, c)
            if (
                inner is None
                or not self.facts.at_most(1, inner)
                or self.facts.at_most(self.sizes[axis], inner)
            ):
                continue
            if self.split(axis, inner):
                return True
        return False

    def reshape(
        self, index: Sequence[Affine], new: Sequence[Size], old: Sequence[Size]
    ) -> tuple[Affine, ...] | None:
        """Indices into a tensor of shape ``old`` for the element ``index`` of its reshape to ``new``.

        None where they are not affine.  Dimensions are matched in groups of equal extent, so that those that
        the reshape does not touch pass unchanged.
        """
        out: list[Affine] = []
        i = j = 0
        while i < len(new) or j < len(old):
            if i < len(new) and new[i] == 1:
                i += 1
                continue
            if j < len(old) and old[j] == 1:
                out.append(Affine())
                j += 1
                continue
            group = self._group(new[i:], old[j:])
            if group is None:
                return None
            inner = self._regroup(index[i : i + group[0]], new[i : i + group[0]], old[j : j + group[1]])
            if inner is None:
                return None
            out.extend(inner)
            i, j = i + group[0], j + group[1]
        return tuple(out)

    def _group(self, new: Sequence[Size], old: Sequence[Size]) -> tuple[int, int] | None:
        """The numbers of leading dimensions, one for each side, whose extents are equal."""
        if not new or not old:
            return None
        # Try the shortest prefixes first; symbolic extents cannot be ordered, so all pairs are tried.
        for total in range(2, len(new) + len(old) + 1):
            for a in range(max(1, total - len(old)), min(len(new), total - 1) + 1):
                if self.facts.equal(prod(new[:a]), prod(old[: total - a])):
                    return a, total - a
        return None

    def _regroup(
        self, index: Sequence[Affine], new: Sequence[Size], old: Sequence[Size]
    ) -> list[Affine] | None:
        if len(new) == len(old) == 1:
            return [self.resolve(index[0])]
        flat, stride = Affine(), 1
        for position in range(len(new) - 1, -1, -1):
            flat = flat + self.resolve(index[position]) * stride
            stride = prod((stride, new[position]))  # type: ignore[assignment]
        out: list[Affine] = []
        for size in reversed(old[1:]):
            if size == 1:
                out.append(Affine())
                continue
            parts = self.divmod(flat, size)
            if parts is None:
                return None
            flat = parts[0]
            out.append(parts[1])
        out.append(flat)
        return [self.resolve(e) for e in reversed(out)]

    def named_once(self, index: Sequence[Affine], shape: Sequence[Size]) -> list[tuple[str, ...]] | None:
        """The axes of each dimension, if an index names every element of a tensor exactly once."""
        by_dimension = [self.digits(i, n) for i, n in zip(index, shape, strict=True)]
        digits = [d for d in by_dimension if d is not None]
        flat = [a for d in digits for a in d]
        return digits if len(digits) == len(by_dimension) and len(set(flat)) == len(flat) else None

    def digits(self, index: Affine, size: Size) -> tuple[str, ...] | None:
        """The axes whose mixed-radix number is ``index``, outermost first, if it covers ``0 .. size-1``."""
        index = self.resolve(index)
        if index.const != 0:
            return None
        remaining, names, stride = dict(index.terms), [], 1
        while remaining:
            axis = next((a for a, c in remaining.items() if self.facts.equal(c, stride)), None)
            if axis is None:
                return None
            names.append(axis)
            del remaining[axis]
            stride = prod((stride, self.sizes[axis]))  # type: ignore[assignment]
        return tuple(reversed(names)) if self.facts.equal(stride, size) else None
