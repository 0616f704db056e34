"""Tensors that are concatenated, or written into a part of another one: ``cat``, ``pad``, ``x[a:b] = y``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fusepass.dialects.handlers import Result, Value, are_integers, dim_of, handles, permute, reshape, view
from fusepass.dialects.torch.creation import within
from fusepass.dialects.torch.views import slice_dim, slice_start
from fusepass.dialects.torch.writes import NEUTRAL
from fusepass.expressions.index import Facts, Size, simplify_size
from fusepass.expressions.ir import Expr, Shape, cast, const, expr, pointwise, scalar_of

# ---------------------------------------------------------------------------------------- side by side


def joined(parts: Sequence[Expr], dim: int, r: Result) -> Expr | None:
    """``cat(parts, dim)`` with the result's shape; parts that are provably empty are left out."""
    kept = [cast(p, r.dtype) for p in parts if not r.facts.equal(p.shape[dim], 0)]
    if len(kept) < 2:
        return kept[0] if kept else None
    return expr("cat", tuple(kept), (dim,), r.shape, r.dtype)


@handles("cat", "concat", "concatenate")
def _cat(r: Result, tensors: tuple[Value, ...], dim: int = 0, **kw: Value) -> Expr | None:
    if not all(isinstance(t, Expr) for t in tensors):
        return None
    rank = len(r.shape)
    parts = [t for t in tensors if rank == 1 or t.shape != (0,)]  # PyTorch ignores these, whatever the rank
    if any(t.rank != rank for t in parts):
        return None
    return joined(parts, dim_of(kw.get("axis", dim), rank), r)


@handles("stack")
def _stack(r: Result, tensors: tuple[Value, ...], dim: int = 0) -> Expr | None:
    if not all(isinstance(t, Expr) for t in tensors):
        return None
    d = dim_of(dim, len(r.shape))
    return joined([reshape(t, (*t.shape[:d], 1, *t.shape[d:])) for t in tensors], d, r)


def _stack_of_rank(shape: Callable[[Shape], Shape], dim: int) -> Callable[..., Expr | None]:
    def handler(r: Result, tensors: tuple[Value, ...]) -> Expr | None:
        if not all(isinstance(t, Expr) for t in tensors):
            return None
        return joined([reshape(t, shape(t.shape)) for t in tensors], dim if len(r.shape) > 1 else 0, r)

    return handler


def _two(shape: Shape) -> Shape:
    return (1,) * (2 - len(shape)) + shape


def _three(shape: Shape) -> Shape:
    return (*_two(shape), 1) if len(shape) < 3 else shape


handles("hstack")(_stack_of_rank(lambda s: s or (1,), 1))
handles("vstack", "row_stack")(_stack_of_rank(_two, 0))
handles("dstack")(_stack_of_rank(_three, 2))
handles("column_stack")(_stack_of_rank(lambda s: s if len(s) > 1 else (*(s or (1,)), 1), 1))


@handles("roll")
def _roll(r: Result, x: Expr, shifts: Value, dims: Value = ()) -> Expr | None:
    """``roll``: the end of a dimension is put in front of its beginning."""
    by, along = (v if isinstance(v, (tuple, list)) else (v,) for v in (shifts, dims))
    if not along or len(by) != len(along) or not are_integers((*by, *along)):
        return None
    out: Expr | None = x
    for shift, dim in zip(by, along, strict=True):
        out = None if out is None else _rolled(out, dim_of(dim, x.rank), shift, r.facts)
    return out


def _rolled(x: Expr, dim: int, shift: int, facts: Facts) -> Expr | None:
    size = x.shape[dim]
    shift = shift % size if isinstance(size, int) and size else shift
    if shift == 0 or not facts.at_most(abs(shift), size):
        return x if shift == 0 else None
    cut = simplify_size(size - shift) if shift > 0 else -shift
    rest = simplify_size(size - cut)
    parts = (slice_dim(x, dim, cut, rest), slice_dim(x, dim, 0, cut))
    return joined(parts, dim, Result(x.shape, x.dtype, facts, ""))


# ---------------------------------------------------------------------------------------- padding


def padded(x: Expr, dim: int, before: Size, after: Size, fill: float, facts: Facts) -> Expr | None:
    """``before`` and ``after`` more elements at the ends of one dimension; negative numbers remove elements.

    None if the sign of a number is not known.
    """
    for width, at_end in ((before, False), (after, True)):
        if facts.at_most(0, width):
            if facts.equal(width, 0):
                continue
            shape = (*x.shape[:dim], width, *x.shape[dim + 1 :])
            more = view("expand", const(fill, x.dtype), shape)
            length = simplify_size(x.shape[dim] + width)
            wide = Result((*x.shape[:dim], length, *x.shape[dim + 1 :]), x.dtype, facts, "")
            both = joined((x, more) if at_end else (more, x), dim, wide)
            if both is None:
                return None
            x = both
        elif facts.at_most(width, 0):
            x = slice_dim(x, dim, 0 if at_end else -width, simplify_size(x.shape[dim] + width))
        else:
            return None
    return x


@handles("pad")
def _pad(
    r: Result,
    x: Expr,
    pad: tuple[Value, ...],
    mode: str = "constant",
    value: Value = None,
    fill: Value = None,
) -> Expr | None:
    """``F.pad``: widths come in pairs, the last dimension first."""
    value = 0 if value is None else value
    widths = [w for w in pad if isinstance(w, (int, sympy.Expr))]
    if mode != "constant" or not isinstance(value, (int, float)) or len(widths) != len(pad):
        return None
    out: Expr | None = x
    for n in range(len(widths) // 2):
        if out is None:
            return None
        out = padded(out, x.rank - 1 - n, widths[2 * n], widths[2 * n + 1], value, r.facts)
    return out


@handles("constant_pad_nd")
def _constant_pad(r: Result, x: Expr, pad: tuple[Value, ...], value: Value = 0) -> Expr | None:
    return _pad(r, x, pad, "constant", value)


# ---------------------------------------------------------------------------------------- parts


Ranges = tuple[tuple[Size, Size] | None, ...]


@dataclass(frozen=True)
class Window:
    """A box of elements: a range per dimension (None: all of it), and the dimensions with a single index."""

    ranges: Ranges
    single: frozenset[int] = frozenset()


def window_of_key(x: Expr, key: Value) -> Window | None:
    """The box that ``x[key]`` selects, if the key consists of slices and integers."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, Expr) or k is None for k in keys):
        return None
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.rank - len(keys) + 1)
    if len(keys) > x.rank:
        return None
    keys += [slice(None)] * (x.rank - len(keys))
    ranges: list[tuple[Size, Size] | None] = []
    for k, size in zip(keys, x.shape, strict=True):
        bounds = _range(k, size)
        if bounds is None:
            return None
        ranges.append(None if bounds == (0, size) and isinstance(k, slice) else bounds)
    return Window(tuple(ranges), frozenset(d for d, k in enumerate(keys) if not isinstance(k, slice)))


def _range(key: Value, size: Size) -> tuple[Size, Size] | None:
    if isinstance(key, slice):
        start = slice_start(key.start, size)
        stop = size if key.stop is None else slice_start(key.stop, size)
        return None if start is None or stop is None or key.step not in (None, 1) else (start, stop)
    at = slice_start(key, size) if isinstance(key, (int, sympy.Expr)) and not isinstance(key, bool) else None
    return None if at is None else (at, simplify_size(at + 1))


def window_of_view(part: Expr, whole: Expr) -> Window | None:
    """The box of ``whole`` that a chain of slices and selections covers."""
    chain = []
    while part is not whole:
        if not (part.op == "select" or (part.op == "slice" and part.attrs[2] == 1)):
            return None
        chain.append(part)
        part = part.args[0]
    ranges: list[tuple[Size, Size] | None] = [None] * whole.rank
    left = list(range(whole.rank))
    for step in reversed(chain):
        d, start = left[step.attrs[0]], step.attrs[1]
        low = (ranges[d] or (0, 0))[0]
        length = 1 if step.op == "select" else step.shape[step.attrs[0]]
        ranges[d] = (simplify_size(low + start), simplify_size(low + start + length))
        if step.op == "select":
            left.remove(d)
    return Window(tuple(ranges), frozenset(range(whole.rank)) - frozenset(left))


def selected(x: Expr, window: Window) -> Expr:
    """A boolean expression that is true inside the box, broadcastable to ``x``."""
    out = const(True, torch.bool)
    for dim, reach in enumerate(window.ranges):
        if reach is not None:
            out = pointwise("and", out, within(x, dim, *reach))
    return out


def holds(e: Expr, ranges: Ranges, value: Expr, facts: Facts) -> bool:
    """Is ``value`` provably equal to the box of ``e`` with these ranges?"""
    if all(r is None for r in ranges):
        return e is value
    window = window_of_view(value, e)
    if window is not None and not window.single and _same_ranges(window.ranges, ranges, facts):
        return True
    if e.op == "slice" and e.attrs[2] == 1:
        dim, start = int(e.attrs[0]), e.attrs[1]
        low, high = ranges[dim] or (0, e.shape[dim])
        reach = (simplify_size(low + start), simplify_size(high + start))
        return holds(e.args[0], (*ranges[:dim], reach, *ranges[dim + 1 :]), value, facts)
    if e.op == "cat" and (box := ranges[int(e.attrs[0])]) is not None:
        dim, start = int(e.attrs[0]), simplify_size(0)
        for part in e.args:
            stop = simplify_size(start + part.shape[dim])
            if facts.equal(box[0], start) and facts.equal(box[1], stop):
                return holds(part, (*ranges[:dim], None, *ranges[dim + 1 :]), value, facts)
            start = stop
    if e.op not in (*NEUTRAL, "cast") or (e.op, e.dtype) != (value.op, value.dtype):
        return False
    return all(_argument_holds(a, ranges, v, facts) for a, v in zip(e.args, value.args, strict=True))


def _argument_holds(a: Expr, ranges: Ranges, value: Expr, facts: Facts) -> bool:
    mine = ranges[len(ranges) - a.rank :]
    return holds(a, tuple(None if n == 1 else r for n, r in zip(a.shape, mine, strict=True)), value, facts)


def _same_ranges(a: Ranges, b: Ranges, facts: Facts) -> bool:
    return all(
        x == y or (x is not None and y is not None and all(map(facts.equal, x, y)))
        for x, y in zip(a, b, strict=True)
    )


@dataclass(frozen=True)
class _Write:
    """``x[window] = value``, as an expression over all of ``x``."""

    x: Expr
    window: Window
    facts: Facts
    own: Expr | None = None  # another expression for ``x[window]``

    def run(self, value: Expr) -> Expr | None:
        """The new meaning of ``x``; None if the shapes do not show where the elements go."""
        value = cast(value, self.x.dtype)
        if not self.window.single and holds(self.x, self.window.ranges, value, self.facts):
            return self.x  # ``x[a:b] += y`` changes the part, and then puts it back
        changed = self._changed(value, _in_place)
        if changed is not None:
            return changed
        known = scalar_of(value)
        spread = self._spread(value, 0) if known is None else const(known, self.x.dtype)
        if spread is None:
            return None
        if all(r is None for r in self.window.ranges):
            return view("expand", spread, self.x.shape)
        return pointwise("where", selected(self.x, self.window), spread, self.x, dtype=self.x.dtype)

    def _changed(self, value: Expr, place: Callable[[Expr], Expr]) -> Expr | None:
        """For a value ``f(x[window])``, computed from the part: ``g(x)`` for a ``g`` that is ``f`` in the
        box and changes nothing outside it.  None for other values.

        ``x[w] + t`` written to ``x[w]`` is ``x + pad(t)``.  ``place`` turns an expression with the value's
        shape into one with the layout of the part.
        """
        if self._is_part(place(value)):
            return self.x
        if value.op == "cast":
            inner = self._changed(value.args[0], place) if self._exact(value.dtype) else None
            return None if inner is None else cast(inner, value.dtype)
        if value.op in ("reshape", "permute"):
            return self._changed(value.args[0], lambda e: place(_viewed(e, value)))
        if value.op == "where":
            return self._replaced(value, place)
        for side in (0, 1) if value.op in ("add", "mul") else (0,) if value.op in NEUTRAL else ():
            if value.args[side].shape != value.shape:
                continue
            inner = self._changed(value.args[side], place)
            if inner is None:
                continue
            other = value.args[1 - side]
            known = scalar_of(other)
            if known is None and place is not _in_place:
                other = place(view("expand", other, value.shape))
            spread = self._spread(other, NEUTRAL[value.op])
            return None if spread is None else pointwise(value.op, inner, spread, dtype=value.dtype)
        return None

    def _replaced(self, value: Expr, place: Callable[[Expr], Expr]) -> Expr | None:
        """``where(c, f(x[window]), number)`` written to the part, with ``c`` made true in the rest of ``x``.

        If the number is first, ``c`` is made false there.
        """
        c = place(view("expand", value.args[0], value.shape))
        for kept in (1, 2):
            known = scalar_of(value.args[3 - kept])
            if known is None or value.args[kept].shape != value.shape:
                continue
            inner, spread = self._changed(value.args[kept], place), self._spread(c, kept == 1)
            if inner is not None and spread is not None:
                sides = (inner, const(known, value.dtype))
                return pointwise("where", spread, *(sides if kept == 1 else sides[::-1]), dtype=value.dtype)
        return None

    def _exact(self, dtype: torch.dtype) -> bool:
        """Does a cast leave the elements of ``x`` unchanged?"""
        mine = self.x.dtype
        return dtype is mine or (mine.is_floating_point and torch.promote_types(mine, dtype) is dtype)

    def _is_part(self, e: Expr) -> bool:
        if e is self.own:
            return True
        if e.shape == self.x.shape and e is self.x:
            return all(r is None for r in self.window.ranges)
        window = window_of_view(e, self.x)
        if window is None or window.single != self.window.single:
            return False
        return _same_ranges(window.ranges, self.window.ranges, self.facts)

    def _spread(self, value: Expr, fill: float) -> Expr | None:
        """The value inside the box and ``fill`` elsewhere, broadcastable to ``x``."""
        known = scalar_of(value)
        if known is not None:
            inside, outside = const(known, value.dtype), const(fill, value.dtype)
            if all(r is None for r in self.window.ranges):
                return inside
            return pointwise("where", selected(self.x, self.window), inside, outside, dtype=value.dtype)
        kept = [d for d in range(self.x.rank) if d not in self.window.single]
        if value.rank > len(kept):
            return None
        shape: list[Size] = [1] * self.x.rank
        for d, n in zip(kept[len(kept) - value.rank :], value.shape, strict=True):
            shape[d] = n
        out: Expr | None = reshape(value, tuple(shape))
        for d, reach in enumerate(self.window.ranges):
            if reach is not None and out is not None:
                out = self._spread_over(out, d, reach, fill)
        return out

    def _spread_over(self, value: Expr, dim: int, reach: tuple[Size, Size], fill: float) -> Expr | None:
        start, stop = reach
        length = simplify_size(stop - start)
        if not self.facts.equal(value.shape[dim], length):
            if value.shape[dim] != 1 or not self.facts.at_most(stop, self.x.shape[dim]):
                return None
            value = view("expand", value, (*value.shape[:dim], length, *value.shape[dim + 1 :]))
        after = simplify_size(self.x.shape[dim] - stop)
        return padded(value, dim, start, after, fill, self.facts)


def _viewed(e: Expr, like: Expr) -> Expr:
    """The same view as ``like``, of another tensor."""
    return reshape(e, like.shape) if like.op == "reshape" else permute(e, like.attrs[0])


def _in_place(e: Expr) -> Expr:
    return e


def written(x: Expr, window: Window, value: Expr, facts: Facts, own: Expr | None = None) -> Expr | None:
    """``x`` after ``x[window] = value``; ``own`` is another expression for what the part held before."""
    return _Write(x, window, facts, own).run(value)


@handles("slice_scatter")
def _slice_scatter(
    r: Result, x: Expr, src: Expr, dim: int = 0, start: Value = None, end: Value = None, step: int = 1
) -> Expr | None:
    d = dim_of(dim, x.rank)
    first = slice_start(start, x.shape[d])
    if first is None or step != 1:
        return None
    reach = (first, simplify_size(first + src.shape[d]))
    ranges = tuple((reach if reach != (0, x.shape[d]) else None) if n == d else None for n in range(x.rank))
    return written(x, Window(ranges), src, r.facts)


@handles("select_scatter")
def _select_scatter(r: Result, x: Expr, src: Expr, dim: int, index: Value) -> Expr | None:
    d = dim_of(dim, x.rank)
    at = slice_start(index, x.shape[d]) if isinstance(index, (int, sympy.Expr)) else None
    if at is None:
        return None
    ranges: tuple[Any, ...] = tuple((at, simplify_size(at + 1)) if n == d else None for n in range(x.rank))
    return written(x, Window(ranges, frozenset((d,))), src, r.facts)


__all__ = ["Window", "joined", "padded", "window_of_key", "window_of_view", "written"]
