"""Scalar formulas: what one element of a tensor is, in the iteration axes.

``lift`` reads one element of a mask or bias as a formula.  Views, slices, ``arange`` and gathers with known
indices disappear into index expressions; what remains is constants, affine comparisons and loads of tensors,
simplified.  Equal meanings give equal formulas, whatever the spelling.
"""

from __future__ import annotations

import itertools
import math

import sympy
import torch

from fusepass.expressions.contents import Form, Ramp, Uniform
from fusepass.expressions.index import Affine, AxisSpace, Size, simplify_size
from fusepass.expressions.intervals import Ranges
from fusepass.expressions.ir import (
    POINTWISE,
    Expr,
    affine,
    broadcast,
    const,
    converted,
    expr,
    folded,
    is_integer,
    scalar_of,
    walk,
)
from fusepass.rules.engine import Scope, Term
from fusepass.rules.positions import Solution, solve

__all__ = ["FALSE", "TRUE", "Formulas", "against_zero", "index_of", "terms_of"]

TRUE = const(True, torch.bool)
FALSE = const(False, torch.bool)
_INVERSE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
#: Integer operations that may leave the range of their dtype.
_GROWING = frozenset("neg abs add sub mul pow floordiv".split())
#: Operations that tell zero from minus zero.
_SIGNED = frozenset("div pow rsqrt floordiv mod".split())
#: Operations on truth values, as logic.
_TRUTH = {"mul": "and", "min": "and", "max": "or", "add": "or"}
#: Operations on two ``where`` between numbers that are computed case by case: they may state a conjunction.
_CHOOSING = frozenset("mul min max lt le gt ge eq ne".split())
#: The most cases that are computed one by one.
_MOST_CASES = 8
#: 32-bit integers that count positions are assumed to hold any length times a factor up to ``_FACTOR``, plus
#: a constant up to ``_LENGTH``.
_FACTOR, _LENGTH = 1 << 6, 1 << 24


class Formulas:
    """Lifts and simplifies within one site's axes; remembers what it has done."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.space: AxisSpace = scope.space
        self._lifted: dict[Term, Expr] = {}
        self._ranges = Ranges(scope.contents, scope.facts, scope.space)

    # -- lifting -----------------------------------------------------------------------------

    def lift(self, term: Term) -> Expr:
        """The scalar formula of one element."""
        formula = self._lifted.get(term)
        if formula is None:
            formula = self._lifted[term] = self._lift(term)
        return formula

    def _lift(self, term: Term) -> Expr:
        node = term.expr
        if node.op == "const":
            return node
        if node.op == "iota":
            return self._iota(term)
        if node.op in POINTWISE:
            args = tuple(self.lift(term.of(a)) for a in node.args)
            return self.make(node.op, args, node.dtype, node.attrs)
        if node.op == "index":
            gathered = self._gather(term)
            if gathered is not None:
                return self.lift(gathered)
        if node.op == "cat":
            return self._cat(term)
        if node.op == "dot" and (product := self._outer(term)) is not None:
            return product
        if node.op == "hit" and (named := self._hit(term)) is not None:
            return named
        if node.op == "cumsum":
            counted = self._count(term)
            if counted is not None:
                return counted
        below = self.scope.step(term)
        return self.load(term) if below is None else self.lift(below)

    def _outer(self, term: Term) -> Expr | None:
        """A matrix product that sums over nothing: the product of two elements."""
        node = term.expr
        left, right, out = node.attrs
        pairs = [
            list(zip(names, x.shape, strict=True)) for names, x in zip((left, right), node.args, strict=True)
        ]
        if any(size != 1 and name not in out for side in pairs for name, size in side):
            return None
        at = dict(zip(out, term.index, strict=True))
        sides = (
            self.lift(Term(x, tuple(Affine() if size == 1 else at[name] for name, size in side)))
            for x, side in zip(node.args, pairs, strict=True)
        )
        return self.make("mul", tuple(sides), node.dtype)

    def _count(self, term: Term) -> Expr | None:
        """``cumsum`` of a constant integer: ``c * (i + 1)``."""
        x, dim = term.expr.args[0], term.expr.attrs[0]
        value = scalar_of(self.lift(Term(x, tuple(self.space.new_axis("n", n) for n in x.shape))))
        if value is None or not math.isfinite(value) or int(value) != value:
            return None
        return self._cast(affine((term.index[dim] + 1) * int(value)), term.expr.dtype)

    def _cat(self, term: Term) -> Expr:
        """``cat(x, y)[i] = where(i < len(x), x[i], y[i - len(x)])``."""
        dim, node = int(term.expr.attrs[0]), term.expr
        at = self.space.resolve(term.index[dim])
        starts: list[Size] = [0]
        for part in node.args:
            starts.append(simplify_size(starts[-1] + part.shape[dim]))

        def element(n: int) -> Expr:
            inside = at + (-1 * starts[n])
            index = tuple(inside if d == dim else i for d, i in enumerate(term.index))
            return self.lift(
                Term(
                    node.args[n],
                    tuple(Affine() if s == 1 else i for s, i in zip(node.args[n].shape, index, strict=True)),
                )
            )

        out: Expr | None = None
        for n in reversed(range(len(node.args))):
            if self.scope.facts.equal(node.args[n].shape[dim], 0):
                continue
            before_end = self.at_most_zero(at + 1 - starts[n + 1])
            if out is None or before_end is TRUE:
                out = element(n)
            elif before_end is not FALSE:
                out = self._where(before_end, element(n), out, node.dtype)
        assert out is not None
        return out

    def load(self, term: Term) -> Expr:
        """An element of a tensor that no rule looks into: its closed form if the contents are known."""
        index = tuple(self.space.resolve(i) for i in term.index)
        form = self.scope.contents.form(term.expr, counters=False)
        if form is not None:
            return self._formula(form, index, term.expr.dtype)
        return expr("load", (term.expr,), index, (), term.expr.dtype)

    def _formula(self, form: Form, index: tuple[Affine, ...], dtype: torch.dtype) -> Expr:
        """The formula of an element of a tensor whose contents are known."""
        if isinstance(form, Uniform):
            return const(form.value, dtype)
        if isinstance(form, Ramp):
            total = Affine((), form.start)
            for at, step in zip(index, form.steps, strict=True):
                total = total + at * step
            return affine(self.space.resolve(total))
        gap = self.space.resolve(index[form.column] - index[form.row])
        within = TRUE
        if form.right is not None:
            within = self._logic("and", (within, self.at_most_zero(gap - form.right)))
        if form.left is not None:
            within = self._logic("and", (within, self.at_most_zero(gap * -1 - form.left)))
        return self._where(within, const(form.inside, dtype), const(form.outside, dtype), dtype)

    def _iota(self, term: Term) -> Expr:
        start, step = term.expr.attrs
        position = term.index[0] if term.index else Affine()
        return affine(position * step + start)

    def _hit(self, term: Term) -> Expr | None:
        """``exists n: i[n] = a and j[n] = b``, if that is solved for ``n``."""
        wide = broadcast(*(a.shape for a in term.expr.args))
        rows = Term(term.expr, tuple(self.space.new_axis("n", n) for n in wide))
        listed = self._listed([self.lift(rows.of(a)) for a in term.expr.args])
        if listed is None:
            return None
        masks, values = listed
        indices = [self._within(v, n) for v, n in zip(values, term.expr.shape, strict=True)]
        known = [i for i in indices if i is not None]
        if len(known) < len(indices):
            return None
        gone = frozenset(row for row, _, _ in masks)
        if any(self.space.resolve(i).axes & gone for i in known):
            return None  # a list is read beside something else at the same positions
        axes = frozenset().union(*(self.space.resolve(r).axes for r in rows.index)) - gone
        axes |= frozenset(a for _, _, index in masks for i in index for a in i.axes)
        solution = solve(known, term.index, axes, self.space)
        return (
            None if solution is None else self._at_solution(solution, [(m, index) for _, m, index in masks])
        )

    def _listed(
        self, values: list[Expr]
    ) -> tuple[list[tuple[str, Expr, tuple[Affine, ...]]], list[Expr]] | None:
        """Values in which every read from a list of a mask's true elements (``nonzero``) is replaced by an
        index into that mask.

        Returns:
            For every list the axis of its position, the mask, and new indices into it; and the values.  None
            if two lists are read at one position, or if something other than a column is read.
        """
        by_axis: dict[str, tuple[Expr, tuple[Affine, ...]]] = {}
        known: dict[Expr, Expr] = {}
        for load in dict.fromkeys(node for v in values for node in walk(v) if node.op == "load"):
            if load.args[0].op != "nonzero":
                continue
            (row, column), (mask,) = map(self.space.resolve, load.attrs), load.args[0].args
            if len(row.terms) != 1 or row.terms[0][1] != 1 or row.const != 0 or not column.is_const:
                return None
            axis = row.terms[0][0]
            if axis not in by_axis:
                by_axis[axis] = mask, tuple(self.space.new_axis("m", n) for n in mask.shape)
            if by_axis[axis][0] is not mask:
                return None
            known[load] = affine(by_axis[axis][1][int(column.const)])
        return [(a, *f) for a, f in by_axis.items()], [self._substitute(v, known) for v in values]

    def _within(self, value: Expr, size: Size) -> Affine | None:
        """An index that is proved to be within a dimension; a negative one counts from its end.

        Where indices of known number end exactly where a dimension of unknown size does, they were written
        for that size, and the graph is restricted to it.
        """
        at = index_of(value)
        reach = None if at is None else self.space.bounds(self.space.resolve(at))
        if at is None or reach is None:
            return None
        at_most = self.scope.facts.at_most
        if at_most(0, reach[0]) and at_most(reach[1], simplify_size(size - 1)):
            return at
        if at_most(simplify_size(-1 * size), reach[0]) and at_most(reach[1], -1):
            return at + size
        if at_most(0, reach[0]) and self.scope.facts.restrict(size, simplify_size(reach[1] + 1)):
            return at
        return None

    def _at_solution(self, solution: Solution, masks: list[tuple[Expr, tuple[Affine, ...]]]) -> Expr | None:
        """Is the position among those of the index tensors?  None if that is not an expression of indices."""
        zero = const(0, torch.int64)
        inside = TRUE
        for e in solution.equations:
            last = (self.space.sizes[e.axis] - 1) * e.step
            ends = self._logic("and", (self.at_most_zero(e.value * -1), self.at_most_zero(e.value - last)))
            whole = self.make("mod", (affine(e.value), const(e.step, torch.int64)), torch.int64)
            even = TRUE if e.step == 1 else self.make("eq", (whole, zero), torch.bool)
            inside = self._all("and", [inside, ends, even])
        out, place = inside, solution.place
        for rest in solution.zeros:
            out = self._logic("and", (out, self.make("eq", (affine(rest), zero), torch.bool)))
        for mask, index in masks:
            if not all(i.axes <= place.keys() for i in index):
                return None
            listed = self.lift(Term(mask, tuple(place[i.terms[0][0]] if i.terms else i for i in index)))
            if inside is not TRUE and any(node.op == "load" for node in walk(listed)):
                return None  # it would be read out of bounds
            out = self._logic("and", (out, listed))
        return out

    def _gather(self, term: Term) -> Term | None:
        """``x[..., i, ...]`` whose index tensors are affine and provably within bounds."""
        x, *indices = term.expr.args
        dim = int(term.expr.attrs[0])
        wide = max(i.rank for i in indices)
        middle = term.index[dim : dim + wide]
        within: list[Affine] = []
        for position, node in enumerate(indices):
            value = self.lift(
                Term(
                    node,
                    tuple(
                        Affine() if n == 1 else i
                        for n, i in zip(node.shape, middle[wide - node.rank :], strict=True)
                    ),
                )
            )
            at = index_of(value)
            reach = None if at is None else self.space.bounds(self.space.resolve(at))
            if at is None or reach is None or not self.scope.facts.at_most(0, reach[0]):
                return None
            if not self.scope.facts.at_most(reach[1], x.shape[dim + position] - 1):
                return None
            within.append(at)
        return Term(x, (*term.index[:dim], *within, *term.index[dim + wide :]))

    # -- simplification ----------------------------------------------------------------------

    def make(
        self, op: str, args: tuple[Expr, ...], dtype: torch.dtype, attrs: tuple[object, ...] = ()
    ) -> Expr:
        """``op(args)`` in simplest form."""
        if op == "where":
            return self._where(args[0], args[1], args[2], dtype)
        if op == "cast":
            return self._cast(args[0], dtype)
        known = folded(op, args, dtype, attrs)
        if known is not None:
            return known
        if op in ("and", "or", "not", "xor"):
            return self._logic(op, args)
        if op in _TRUTH and all(a.dtype is torch.bool for a in (*args, TRUE)) and dtype is torch.bool:
            return self._logic(_TRUTH[op], args)
        for rewrite in (
            self._arithmetic, self._boolean_product, self._distribute, self._in_both, self._compare,
        ):  # fmt: skip
            simpler = rewrite(op, args, dtype)
            if simpler is not None:
                return simpler
        return self._in_range(op, args, attrs, dtype)

    def _in_range(
        self, op: str, args: tuple[Expr, ...], attrs: tuple[object, ...], dtype: torch.dtype
    ) -> Expr:
        """The operation itself, not simplified.

        On narrow integers beside wider ones or constants it gets a cast, which says that its result wraps.
        """
        narrow = is_integer(dtype) and dtype is not torch.int64
        mixed = narrow and any(a.dtype is torch.int64 or a.op == "const" for a in args)
        if mixed and op in _GROWING and not self._stays(op, args, dtype):
            wide = expr(op, args, attrs, (), torch.int64)
            return expr("cast", (wide,), (dtype,), (), dtype)
        return expr(op, args, attrs, (), dtype)

    def _stays(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> bool:
        """Does the result stay within the range of a dtype because the operands are within it?"""
        if op == "abs" and args[0].op == "affine":
            return self._survives_cast(affine(args[0].attrs[0] * -1), dtype)
        return op == "floordiv" and args[1].op == "const" and args[1].attrs[0] > 0

    def _cast(self, x: Expr, dtype: torch.dtype) -> Expr:
        if x.dtype is dtype:
            return x
        if x.op == "const":
            return const(x.attrs[0], dtype)
        if x.op == "affine" and dtype is not torch.bool and self._survives_cast(x, dtype):
            return x
        if x.op == "where":
            return self._where(x.args[0], self._cast(x.args[1], dtype), self._cast(x.args[2], dtype), dtype)
        if x.dtype is torch.bool:
            return self._where(x, const(1, dtype), const(0, dtype), dtype)
        if dtype is torch.bool and x.op == "mul" and self._never_wraps(x):
            return self._logic("and", x.args)
        return expr("cast", (x,), (dtype,), (), dtype)

    def _never_wraps(self, product: Expr) -> bool:
        """Is a product of integers within the range of its dtype?  Then it is zero only where a factor is."""
        sides = [self._ranges.of(a) for a in product.args]
        if not is_integer(product.dtype) or None in sides:
            return False
        known = torch.iinfo(product.dtype)
        ends = [a * b for a, b in itertools.product(*filter(None, sides))]
        return known.min <= min(ends) and max(ends) <= known.max

    def _survives_cast(self, x: Expr, dtype: torch.dtype) -> bool:
        """Does an index value survive a cast?  Floats hold integers up to a bound exactly."""
        if dtype is torch.int64:
            return True
        if dtype.is_complex:
            return False
        if dtype.is_floating_point:
            most = 2 ** {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(
                dtype, 3
            )
            least = -most
        else:
            least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        index = self.space.resolve(x.attrs[0])
        reach, at_most = self.space.bounds(index), self.scope.facts.at_most
        if reach is not None and at_most(least, reach[0]) and at_most(reach[1], most):
            return True
        return is_integer(dtype) and dtype.is_signed and dtype.itemsize >= 4 and self._counts(index)

    def _is_exact_in(self, x: Expr, dtype: torch.dtype) -> bool:
        """Can a dtype represent an index value, or a number, exactly?"""
        if x.op == "const":
            return bool(converted(x.attrs[0], dtype) == x.attrs[0])
        return self._survives_cast(x, dtype)

    def _counts(self, index: Affine) -> bool:
        """Is it a position: a sum of small multiples of axes and lengths, at least one of unknown size?"""
        factors = [c for _, c in index.terms]
        if not all(isinstance(c, int) and abs(c) <= _FACTOR for c in factors):
            return False
        unknown = any(not isinstance(self.space.sizes[a], int) for a, _ in index.terms)
        if isinstance(index.const, int):
            return unknown and abs(index.const) <= _LENGTH
        return all(abs(c) <= _FACTOR for c in _coefficients(index.const))

    def _where(self, c: Expr, a: Expr, b: Expr, dtype: torch.dtype) -> Expr:
        if c.op == "const":
            return self._cast(a if c.attrs[0] else b, dtype)
        a, b = self._cast(a, dtype), self._cast(b, dtype)
        a, b = self._assuming(c, True, a), self._assuming(c, False, b)
        if a is b or self._same_on_edge(c, a, b):
            return b
        if c.op == "not":
            return self._where(c.args[0], b, a, dtype)
        if a.op == "where" and a.args[2] is b:
            return self._where(self._logic("and", (c, a.args[0])), a.args[1], b, dtype)
        if b.op == "where" and b.args[1] is a:
            return self._where(self._logic("or", (c, b.args[0])), a, b.args[2], dtype)
        if dtype is torch.bool:
            if a is TRUE:
                return self._logic("or", (c, b))
            if b is FALSE:
                return self._logic("and", (c, a))
            if a is FALSE:
                return self._logic("and", (self._not(c), b))
            if b is TRUE:
                return self._logic("or", (self._not(c), a))
        return expr("where", (c, a, b), (), (), dtype)

    def _assuming(self, c: Expr, truth: bool, branch: Expr) -> Expr:
        """A branch with what its condition implies substituted: ``where(x == 0, f(x), y)`` has ``f(0)``."""
        if branch.op in ("const", "affine"):
            return branch
        return self._substitute(branch, dict(self._pinned(c, truth)))

    def _pinned(self, c: Expr, truth: bool) -> list[tuple[Expr, Expr]]:
        """Formulas whose value is known where ``c`` is ``truth``."""
        if c.op == "const":
            return []
        yes, no = (TRUE, FALSE) if truth else (FALSE, TRUE)
        pinned = [(c, yes), (self._not(c), no)]
        if c.op == "not":
            return pinned + self._pinned(c.args[0], not truth)
        if c.op == ("and" if truth else "or"):
            return pinned + self._pinned(c.args[0], truth) + self._pinned(c.args[1], truth)
        x, value = c.args[0] if c.args else c, None
        if c.op == ("eq" if truth else "ne"):
            value = _pin(x, c.args[1])
        elif c.op == "cast" and not truth:
            value = const(0, x.dtype)
        if value is not None and x.op not in ("const", "affine"):
            pinned.append((x, value))
        return pinned

    def _substitute(self, node: Expr, known: dict[Expr, Expr]) -> Expr:
        """``node`` with known values substituted, except where the sign of zero matters: a known zero has
        none."""
        if node in known:
            return known[node]
        if not node.args or node.op == "load" or node.op in _SIGNED:
            return node
        args = tuple(self._substitute(a, known) for a in node.args)
        return node if args == node.args else self.make(node.op, args, node.dtype, node.attrs)

    def _same_on_edge(self, c: Expr, a: Expr, b: Expr) -> bool:
        """Does ``c`` hold only where its left side is zero, and do ``a`` and ``b`` agree there?"""
        edge = against_zero(c, "le")
        if edge is None:
            return False
        x, y, reach = index_of(a), index_of(b), self.space.bounds(edge)
        if x is None or y is None or reach is None or reach[0] != 0:
            return False
        difference = self.space.resolve(x - y)
        return any(difference == edge * (n if isinstance(n, int) else 1) for _, n in difference.terms)

    def _not(self, x: Expr) -> Expr:
        if x.op == "const":
            return FALSE if x.attrs[0] else TRUE
        if x.op == "not":
            return x.args[0]
        if x.op == "where" and x.dtype is not torch.bool:
            return self._not(self._cast(x, torch.bool))
        if x.op in ("and", "or"):
            return self._logic("or" if x.op == "and" else "and", (self._not(x.args[0]), self._not(x.args[1])))
        if x.op in _INVERSE and not any(a.is_float for a in x.args):
            return self.make(_INVERSE[x.op], x.args, torch.bool)
        return expr("not", (x,), (), (), torch.bool)

    def _logic(self, op: str, args: tuple[Expr, ...]) -> Expr:
        if op == "not":
            return self._not(args[0])
        a, b = (self._cast(x, torch.bool) for x in args)
        if op == "xor":
            return self._not(b) if a is TRUE else b if a is FALSE else expr("xor", (a, b), (), (), torch.bool)
        absorbing, neutral = (FALSE, TRUE) if op == "and" else (TRUE, FALSE)
        if absorbing in (a, b):
            return absorbing
        if a is neutral or a is b:
            return b
        if b is neutral:
            return a
        absorbed = self._absorbed(op, a, b)
        return expr(op, (a, b), (), (), torch.bool) if absorbed is None else absorbed

    def _absorbed(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """``a or (not a and b) = a or b``; ``a or b = b`` where ``a`` implies ``b``; ``and`` likewise."""
        dual = "and" if op == "or" else "or"
        for x, y in ((a, b), (b, a)):
            terms, opposite = terms_of(y, dual), self._not(x)
            if opposite in terms:
                rest = [t for t in terms if t is not opposite]
                return self._logic(op, (x, self._all(dual, rest)))
            if self.implies(x, y):
                return y if op == "or" else x
        return None

    def _all(self, op: str, terms: list[Expr]) -> Expr:
        out = TRUE if op == "and" else FALSE
        for term in terms:
            out = self._logic(op, (out, term))
        return out

    def implies(self, a: Expr, b: Expr) -> bool:
        """Is ``b`` provably true wherever ``a`` is?  Only comparisons of indices are looked into."""
        return all(any(self._bound_implies(p, q) for p in terms_of(a, "and")) for q in terms_of(b, "and"))

    def _bound_implies(self, a: Expr, b: Expr) -> bool:
        if a is b:
            return True
        x, y = against_zero(a, "le"), against_zero(b, "le")
        if x is None or y is None:
            return False
        reach = self.space.bounds(self.space.resolve(y - x))
        return reach is not None and self.scope.facts.at_most(reach[1], 0)

    def _arithmetic(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
        """Affine arithmetic on integers, brought to the range of their dtype."""
        if dtype is torch.bool or op not in ("add", "sub", "mul", "neg"):
            return None
        parts = [index_of(a) for a in args]
        if any(p is None for p in parts) or any(a.op != "affine" and a.is_float for a in args):
            return None
        if dtype.is_floating_point and not all(self._is_exact_in(a, dtype) for a in args):
            return None
        index = _affine_sum(op, *parts)  # type: ignore[arg-type]
        return None if index is None else self._cast(affine(index), dtype)

    def _boolean_product(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
        """``where(c, 1, 0) * x = where(c, x, 0)`` of finite numbers."""
        if op != "mul":
            return None
        args = tuple(self._cast(a, dtype) if a.dtype is torch.bool else a for a in args)
        for a, b in (args, args[::-1]):
            if (
                a.op == "where"
                and scalar_of(a.args[1]) == 1
                and scalar_of(a.args[2]) == 0
                and b.op != "const"
                and self._ranges.is_finite(b)
            ):
                return self._where(a.args[0], self._cast(b, dtype), const(0, dtype), dtype)
        return None

    def _distribute(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
        """``f(where(c, a, b), k) = where(c, f(a, k), f(b, k))`` for constants ``k``."""
        chosen = [i for i, a in enumerate(args) if a.op == "where"]
        if len(chosen) != 1 or any(a.op != "const" for i, a in enumerate(args) if i != chosen[0]):
            return None
        c, yes, no = args[chosen[0]].args
        if "const" not in (yes.op, no.op) and _cases(args[chosen[0]]) > _MOST_CASES:
            return None
        if op == "nan_to_num":
            return None
        branches = [
            self.make(op, tuple(x if i == chosen[0] else a for i, a in enumerate(args)), dtype)
            for x in (yes, no)
        ]
        return self._where(c, branches[0], branches[1], dtype)

    def _in_both(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
        """``f(where(c, a, b), y) = where(c, f(a, y), f(b, y))``, if ``y`` chooses between numbers as well.

        Sums of floats stay sums, because masks may be added up, except where the sums are compared.
        """
        if op in _INVERSE and any(a.op == "add" for a in args):
            sums = [self._cases_of_both("add", a.args, a.dtype) if a.op == "add" else a for a in args]
            return None if None in sums else self.make(op, tuple(sums), dtype)  # type: ignore[arg-type]
        both = op in _CHOOSING or (op == "add" and is_integer(dtype))
        return self._cases_of_both(op, args, dtype) if both else None

    def _cases_of_both(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
        if not all(a.op == "where" for a in args) or math.prod(map(_cases, args)) > _MOST_CASES:
            return None
        c, yes, no = args[0].args
        return self._where(
            c, self.make(op, (yes, args[1]), dtype), self.make(op, (no, args[1]), dtype), dtype
        )

    def _compare(self, op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
        if op not in _INVERSE:
            return None
        a, b = args
        if a is b and not a.is_float:
            return TRUE if op in ("eq", "le", "ge") else FALSE
        if a.dtype is torch.bool or b.dtype is torch.bool:
            return self._compare_bits(op, a, b)
        if op in ("le", "lt", "gt", "ge") and "abs" in (a.op, b.op):
            return self._compare_abs(op, a, b)
        x, y = index_of(a), index_of(b)
        if x is None or y is None or not self._compared_exactly(a, b):
            return None
        if op in ("gt", "ge"):
            op, x, y = ("lt" if op == "gt" else "le"), y, x
        difference = self.space.resolve(x - y)
        if op in ("eq", "ne"):
            if difference.is_const and isinstance(difference.const, int):
                return const((difference.const == 0) is (op == "eq"), torch.bool)
            return expr(op, (affine(difference), const(0, torch.int64)), (), (), torch.bool)
        return self.at_most_zero(difference + 1 if op == "lt" else difference)

    def _compared_exactly(self, a: Expr, b: Expr) -> bool:
        """Are two index values compared as integers, or as floats that hold them?"""
        dtype = next((x.dtype for x in (a, b) if x.is_float), torch.int64)
        return all(self._is_exact_in(x, dtype) for x in (a, b))

    def _compare_bits(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """``x == 1`` of a bool is ``x``; whatever is equal to zero is false."""
        if op not in ("eq", "ne"):
            return None
        for x, y in ((a, b), (b, a)):
            if y.op != "const":
                continue
            if y.attrs[0] not in (0, 1):
                return (FALSE if op == "eq" else TRUE) if x.dtype is torch.bool else None
            if x.dtype is torch.bool or y.attrs[0] == 0:
                wanted = bool(y.attrs[0]) is (op == "eq")
                x = self._cast(x, torch.bool)
                return x if wanted else self._not(x)
        return None

    def _compare_abs(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """``abs(e) <= w`` is ``e <= w and -e <= w``."""
        if b.op == "abs":
            flipped = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}[op]
            return self._compare_abs(flipped, b, a) if a.op != "abs" else None
        inside, width = index_of(a.args[0]), index_of(b)
        if inside is None or width is None or not self._compared_exactly(a.args[0], b):
            return None
        if op in ("ge", "gt"):
            return self._not(self._compare_abs("lt" if op == "ge" else "le", a, b) or FALSE)
        slack = 1 if op == "lt" else 0
        above = self.at_most_zero(self.space.resolve(inside - width) + slack)
        below = self.at_most_zero(self.space.resolve(inside * -1 - width) + slack)
        return self._logic("and", (above, below))

    def at_most_zero(self, e: Affine) -> Expr:
        """``e <= 0``, decided where the bounds of the axes decide it; a common factor is divided out."""
        e = _reduced(e)
        reach = self.space.bounds(e)
        if reach is not None:
            if self.scope.facts.at_most(reach[1], 0):
                return TRUE
            if self.scope.facts.at_most(1, reach[0]):
                return FALSE
        return expr("le", (affine(e), const(0, torch.int64)), (), (), torch.bool)


def _cases(node: Expr) -> int:
    """How many numbers a formula chooses between; more than is allowed if it is anything else."""
    if node.op == "where":
        return _cases(node.args[1]) + _cases(node.args[2])
    return 1 if node.op == "const" else _MOST_CASES + 1


def _reduced(e: Affine) -> Affine:
    """``2*x + 3 <= 0`` is ``x + 2 <= 0``: integers on the left let the constant be rounded up."""
    factors = [c for _, c in e.terms]
    if not factors or not all(isinstance(c, int) for c in (*factors, e.const)):
        return e
    common = math.gcd(*factors)  # type: ignore[arg-type]
    if common <= 1:
        return e
    return Affine(tuple((a, c // common) for a, c in e.terms), -(-e.const // common))


def index_of(node: Expr) -> Affine | None:
    """The affine index behind an integer formula."""
    if node.op == "affine":
        index: Affine = node.attrs[0]
        return index
    if node.op == "const" and not node.dtype.is_complex and float(node.attrs[0]).is_integer():
        return Affine((), int(node.attrs[0]))
    return None


def _affine_sum(op: str, a: Affine, b: Affine | None = None) -> Affine | None:
    """``-a``, or the sum, difference or product of two index expressions; None where it is not affine."""
    if b is None:
        return a * -1
    if op == "mul":
        return b * a.const if a.is_const else a * b.const if b.is_const else None
    return a + b if op == "add" else a - b


def _coefficients(size: Size) -> list[int]:
    """The integer coefficients of a sum of lengths; one large integer for anything else."""
    poly = sympy.Poly(size) if isinstance(size, sympy.Expr) and size.is_polynomial() else None
    if poly is None or poly.total_degree() > 1 or not all(c.is_Integer for c in poly.coeffs()):
        return [_FACTOR + 1]
    return [int(c) for m, c in poly.terms() if any(m)]


def _pin(x: Expr, value: Expr) -> Expr | None:
    """The constant that ``x`` is where it equals ``value``; None where several constants compare equal."""
    number = scalar_of(value)
    if number is None or x.dtype.is_complex:
        return None
    if not x.is_float and value.is_float and abs(number) > 256:
        return None
    pinned = const(number, x.dtype)
    return pinned if pinned.op == "const" and pinned.attrs[0] == number else None


def terms_of(formula: Expr, op: str) -> list[Expr]:
    """The operands of a chain of ``and`` or of ``or``."""
    return [t for a in formula.args for t in terms_of(a, op)] if formula.op == op else [formula]


def against_zero(part: Expr, op: str) -> Affine | None:
    """The index ``e`` of a comparison ``e op 0``, the form that comparisons of indices have; else None."""
    if part.op != op or scalar_of(part.args[1]) != 0:
        return None
    return index_of(part.args[0])
