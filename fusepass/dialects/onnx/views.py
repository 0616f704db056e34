"""Views of ONNX: operators that only rename elements, join or pick them."""

from __future__ import annotations

import sympy

from fusepass.dialects.handlers import dim_of, permute, reshape, view
from fusepass.dialects.onnx.call import Call, Meaning, broadcast, handles
from fusepass.dialects.onnx.sizes import difference
from fusepass.dialects.torch import ops as torch_ops
from fusepass.dialects.torch import views as torch_views
from fusepass.dialects.torch.views import slice_dim
from fusepass.expressions.index import Size, prod, simplify_size
from fusepass.expressions.ir import Expr, Shape, expr, leaf

_FAR = 1 << 31


@handles("Transpose")
def _transpose(c: Call, x: Expr) -> Expr:
    return permute(x, tuple(c.attr("perm") or reversed(range(x.rank))))


@handles("Reshape")
def _reshape(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    wanted = c.numbers(1, "shape")
    shape = c.recorded[0] if wanted is None else _target(c, x, wanted)
    return None if shape is None else reshape(x, shape)


def _target(c: Call, x: Expr, wanted: tuple[Size, ...]) -> Shape | None:
    sizes: list[Size] = list(wanted)
    if not c.attr("allowzero", 0):
        if any(s == 0 and d >= x.rank for d, s in enumerate(sizes)):
            return None
        sizes = [x.shape[d] if s == 0 else s for d, s in enumerate(sizes)]
    if -1 not in sizes:
        return tuple(sizes)
    at = sizes.index(-1)
    rest = c.facts.quotient(prod(x.shape), prod(s for d, s in enumerate(sizes) if d != at))
    if rest is None:
        return c.recorded[0]
    sizes[at] = rest
    return tuple(sizes)


@handles("Flatten")
def _flatten(c: Call, x: Expr) -> Expr:
    axis = c.attr("axis", 1)
    at = axis + x.rank if axis < 0 else axis
    return reshape(x, (prod(x.shape[:at]), prod(x.shape[at:])))


@handles("Unsqueeze")
def _unsqueeze(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    axes = c.numbers(1, "axes")
    if axes is None or not all(isinstance(a, int) for a in axes):
        return None
    rank = x.rank + len(axes)
    new = {a % rank for a in axes if isinstance(a, int)}
    sizes = iter(x.shape)
    return reshape(x, tuple(1 if d in new else next(sizes) for d in range(rank)))


@handles("Squeeze")
def _squeeze(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    axes = c.numbers(1, "axes")
    if axes is None:
        if not c.missing(1) or any(not isinstance(n, int) for n in x.shape):
            return None
        axes = tuple(d for d, n in enumerate(x.shape) if n == 1)
    gone = {dim_of(a, x.rank) for a in axes if isinstance(a, int)}
    return reshape(x, tuple(n for d, n in enumerate(x.shape) if d not in gone))


@handles("Expand")
def _expand(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    wanted = c.numbers(1)
    shape = None if wanted is None else broadcast(c, x.shape, wanted)
    shape = shape or c.recorded[0]
    return None if shape is None else view("expand", x, shape)


@handles("Tile")
def _tile(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    repeats = c.numbers(1)
    if repeats is None or len(repeats) != x.rank:
        return None
    shape = tuple(simplify_size(n * r) for n, r in zip(x.shape, repeats, strict=True))
    tiled = torch_ops.HANDLERS["repeat"](c.result(shape, x.dtype), x, *repeats)
    return tiled if isinstance(tiled, Expr) else None


@handles("Slice")
def _slice(c: Call, x: Expr, *_: Expr | None) -> Expr | None:
    starts, ends = c.numbers(1, "starts"), c.numbers(2, "ends")
    if starts is None or ends is None:
        return None
    axes = c.numbers(3, "axes") or (tuple(range(len(starts))) if c.missing(3) else None)
    steps = c.numbers(4) or ((1,) * len(starts) if c.missing(4) else None)
    if axes is None or steps is None:
        return None
    out: Expr | None = x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        out = None if out is None else _cut(c, out, start, end, axis, step)
    return out


def _cut(c: Call, x: Expr, start: Size, end: Size, axis: Size, step: Size) -> Expr | None:
    """One dimension of a slice."""
    if not isinstance(axis, int) or not isinstance(step, int):
        return None
    dim = dim_of(axis, x.rank)
    size = x.shape[dim]
    if step == -1 and start == -1 and isinstance(end, int) and end < -_FAR:
        return view("flip", x, x.shape, (dim,))
    first, last = _bound(c, start, size), _bound(c, end, size)
    if step < 1 or first is None or last is None:
        return None
    length = difference(last, first)
    recorded = c.recorded[0]
    open_ended = isinstance(length, sympy.Expr) and length.has(sympy.Min)
    if open_ended and recorded and len(recorded) == x.rank and c.names(recorded[dim]):
        length = recorded[dim]  # the exporter knew which is smaller, the bound or the size
    if step > 1:
        if not isinstance(length, int):
            return None
        length = -(-length // step)
    if not c.facts.at_most(0, length):
        return None
    return slice_dim(x, dim, first, length, step)


def _bound(c: Call, at: Size, size: Size) -> Size | None:
    """A bound of a slice, counted from the front and at most ``size``."""
    if isinstance(at, int):
        if at < 0:
            at = simplify_size(size + at)
            return max(at, 0) if isinstance(at, int) else at if c.facts.at_most(0, at) else None
        if at >= _FAR - 1 or c.facts.at_most(size, at):
            return size
    if not c.facts.at_most(0, at):
        return 0 if c.facts.equal(at, -size) else None  # counted from the end, this is the beginning
    return at if c.facts.at_most(at, size) else simplify_size(sympy.Min(at, size))


@handles("Split")
def _split(c: Call, x: Expr, *_: Expr | None) -> Meaning:
    dim = dim_of(c.attr("axis", 0), x.rank)
    count = len(c.node.outputs)
    sizes = c.numbers(1, "split")
    if sizes is None:
        size = x.shape[dim]
        if not c.missing(1) or not isinstance(size, int):
            return None
        each = -(-size // count)
        sizes = tuple(min(each, size - each * n) for n in range(count))
    shapes = [(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in sizes]
    return torch_views.parts_of(x, shapes, dim)


@handles("Concat")
def _concat(c: Call, *parts: Expr) -> Expr | None:
    dim = dim_of(c.attr("axis"), parts[0].rank)
    for part in parts[1:]:
        if any(
            not c.facts.equal(a, b)
            for d, (a, b) in enumerate(zip(parts[0].shape, part.shape, strict=True))
            if d != dim
        ):
            return None
    total = simplify_size(sum((p.shape[dim] for p in parts[1:]), parts[0].shape[dim]))
    shape = (*parts[0].shape[:dim], total, *parts[0].shape[dim + 1 :])
    return parts[0] if len(parts) == 1 else expr("cat", tuple(parts), (dim,), shape, parts[0].dtype)


@handles("Gather")
def _gather(c: Call, x: Expr, at: Expr) -> Expr:
    dim = dim_of(c.attr("axis", 0), x.rank)
    known = c.known[1]
    if isinstance(known, int) and isinstance(size := x.shape[dim], int) and at.rank == 0:
        place = known % size
        return expr("select", (x,), (dim, place), x.shape[:dim] + x.shape[dim + 1 :], x.dtype)
    shape = (*x.shape[:dim], *at.shape, *x.shape[dim + 1 :])
    return expr("index", (x, at), (dim,), shape, x.dtype)


@handles("GatherND")
def _gather_nd(c: Call, x: Expr, at: Expr) -> Expr | None:
    if c.attr("batch_dims", 0) or at.op != "cat" or at.attrs[0] != at.rank - 1:
        return None
    if any(p.shape[-1] != 1 for p in at.args):
        return None
    parts = tuple(reshape(p, p.shape[:-1]) for p in at.args)
    return expr("index", (x, *parts), (0,), (*at.shape[:-1], *x.shape[len(parts) :]), x.dtype)


@handles("GatherElements")
def _gather_elements(c: Call, x: Expr, at: Expr) -> Expr:
    """Only its shape is known, which is that of the indices."""
    return leaf(c.node.outputs[0].name or "", at.shape, x.dtype)
