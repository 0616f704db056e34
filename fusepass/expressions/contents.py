"""What is known of the elements of a graph's leaves.

A buffer that holds a mask (``tril`` of ones, say) or positions is the same at every call as long as
nobody writes into it.  Its elements are read when the graph is compiled and described in closed form; code
that relies on a description puts a guard on the buffer (:class:`Snapshot`).
"""

from __future__ import annotations

import io
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fusepass.expressions.ir import Expr

#: Buffers with more elements are not read.
LARGEST = 1 << 26
#: Integers of this size or more are not positions: sums of them may wrap.
LARGEST_POSITION = 1 << 48
#: Values of this size or more are fills, not scores.
FILL = 1e8


@dataclass(frozen=True)
class Uniform:
    """Every element is ``value``."""

    value: float | int | bool


@dataclass(frozen=True)
class Ramp:
    """``start + sum_d steps[d] * index[d]``, in integers."""

    start: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Banded:
    """``inside`` where ``-left <= index[column] - index[row] <= right``, else ``outside``; None: no bound."""

    row: int
    column: int
    left: int | None
    right: int | None
    inside: float | int | bool
    outside: float | int | bool


Form = Uniform | Ramp | Banded


def describe(tensor: Tensor) -> Form | None:
    """The closed form that every element of ``tensor`` fits, or None."""
    if not 0 < tensor.numel() <= LARGEST or tensor.is_complex():
        return None
    x = _comparable(tensor.detach().cpu())
    dims = [d for d in range(x.dim()) if x.shape[d] > 1]
    for d in list(dims):
        first = x.narrow(d, 0, 1)
        if torch.equal(first.expand_as(x), x):
            x = first
            dims.remove(d)
    return _uniform(x, dims) or _ramp(x, dims) or _banded(x, dims)


def may_count(tensor: Tensor, form: Form) -> bool:
    """Could ``tensor`` hold a number that every call increments, such as the number of tokens in a cache?

    Equal integers in at most one dimension could, and their present value says nothing about the next call.
    Masks vary, have two dimensions or more, or are not integers.
    """
    integers = not (tensor.dtype is torch.bool or tensor.is_floating_point())
    return isinstance(form, Uniform) and integers and tensor.dim() <= 1


def _uniform(x: Tensor, dims: list[int]) -> Form | None:
    return None if dims else Uniform(x.reshape(-1)[0].item())


def _ramp(x: Tensor, dims: list[int]) -> Form | None:
    if x.is_floating_point() or x.dtype is torch.bool:
        return None
    if max(abs(int(n)) for n in torch.aminmax(x)) >= LARGEST_POSITION:
        return None
    start = int(x.reshape(-1)[0])
    steps = [int(x.select(d, 1).reshape(-1)[0]) - start if d in dims else 0 for d in range(x.dim())]
    fitted = torch.full((), start, dtype=torch.int64)
    for d in dims:
        shape = [-1 if e == d else 1 for e in range(x.dim())]
        fitted = fitted + steps[d] * torch.arange(x.shape[d]).reshape(shape)
    return Ramp(start, tuple(steps)) if torch.equal(fitted.expand_as(x), x.long()) else None


def _banded(x: Tensor, dims: list[int]) -> Form | None:
    """The tightest band around the elements that equal one of the corners; every element is compared."""
    if len(dims) != 2:
        return None
    flat = x.reshape(x.shape[dims[0]], x.shape[dims[1]])
    gap = torch.arange(flat.shape[1])[None, :] - torch.arange(flat.shape[0])[:, None]
    for inside in (flat[0, 0], flat[-1, 0], flat[0, -1]):
        hit = flat == inside
        rest = flat[~hit]
        if rest.numel() == 0 or not bool((rest == rest[0]).all()):
            continue
        low, high = int(gap[hit].min()), int(gap[hit].max())
        if not torch.equal((gap >= low) & (gap <= high), hit):
            continue
        left = None if low == int(gap.min()) else -low
        right = None if high == int(gap.max()) else high
        return Banded(dims[0], dims[1], left, right, inside.item(), rest[0].item())
    return None


@dataclass
class Contents:
    """The leaves of one graph: which have known elements, and which are of ordinary size.

    Attributes:
        tensors: the leaves that keep their elements as long as their guard holds.
        ordinary: leaves of learned or computed numbers, which are not fills.
        values: leaves that hold an expression's value without its gradient.
        fixed: whether the known elements can never change, so that they need no guard.
        consulted: the leaves whose elements were relied on since :meth:`begin`.
        used: the leaves that kept results rely on (:meth:`keep`).
    """

    tensors: Mapping[Expr, Tensor] = field(default_factory=dict)
    ordinary: set[Expr] = field(default_factory=set)
    values: dict[Expr, Expr] = field(default_factory=dict)
    fixed: bool = False
    consulted: set[Expr] = field(default_factory=set)
    used: set[Expr] = field(default_factory=set)
    _forms: dict[Expr, Form | None] = field(default_factory=dict)
    _extremes: dict[Expr, tuple[float, float]] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the leaves consulted so far: only results that were kept rely on them."""
        self.consulted.clear()

    def keep(self) -> None:
        """Keep the result made since ``begin``: it relies on the leaves consulted since then."""
        self.used |= self.consulted

    def form(self, leaf: Expr, counters: bool = True) -> Form | None:
        """The closed form of a leaf; asking for one that exists counts as relying on it.

        Args:
            leaf: a leaf of the graph.
            counters: whether to give the form of a leaf that every call may increment (:func:`may_count`).
        """
        if leaf not in self._forms:
            tensor = self.tensors.get(leaf)
            self._forms[leaf] = None if tensor is None else describe(tensor)
        form = self._forms[leaf]
        if form is None or not (counters or self.fixed or not may_count(self.tensors[leaf], form)):
            return None
        self.consulted.add(leaf)
        return form

    def extremes(self, leaf: Expr) -> tuple[float, float] | None:
        """The least and greatest element of a known leaf (NaN if any is NaN); asking counts as relying."""
        tensor = self.tensors.get(leaf)
        if tensor is None or tensor.is_complex() or tensor.numel() == 0:
            return None
        self.consulted.add(leaf)
        if leaf not in self._extremes:
            low, high = torch.aminmax(_comparable(tensor.detach()))
            self._extremes[leaf] = (float(low), float(high))
        return self._extremes[leaf]


def _comparable(x: Tensor) -> Tensor:
    """The tensor in a dtype that PyTorch can compare and subtract."""
    if x.is_floating_point():
        return x.float() if x.element_size() < 2 else x
    return x if x.dtype is torch.bool or x.dtype.is_signed or x.element_size() == 1 else x.long()


#: Device types on which elements are always compared: it is quick, and sees writes that are not counted.
_ALWAYS_COMPARED = frozenset({"cpu"})


class _Comparison(NamedTuple):
    """A tensor that was compared: its version then, whether it was equal, and whether it ever was."""

    tensor: weakref.ref[Tensor]
    version: int | None
    same: bool
    ever: bool


class Snapshot:
    """A copy of a tensor's elements, to ask whether a tensor (the same one later, or another) holds them.

    PyTorch's version counter shows in-place writes.  Writes that bypass it (``x.data``, NumPy) are seen only
    on the CPU, where the elements are compared every time.  A snapshot can be pickled: it then knows the
    elements, but no tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().clone()
        self._known: dict[int, _Comparison] = {}
        self._remember(tensor, same=True, ever=True)

    def holds(self, tensor: Tensor) -> bool:
        """Are the elements of ``tensor`` equal to those of the snapshot, bit by bit?"""
        seen, version = self._comparison(tensor), version_of(tensor)
        unwritten = seen is not None and version is not None and seen.version == version
        if seen is not None and unwritten and tensor.device.type not in _ALWAYS_COMPARED:
            return seen.same
        same = self._equals(tensor)
        if seen is None or not unwritten or seen.same is not same:
            self._remember(tensor, same, same or (seen is not None and seen.ever))
        return same

    def has_held(self, tensor: Tensor) -> bool:
        """Is ``tensor`` known to have held these elements at some point?"""
        seen = self._comparison(tensor)
        return seen is not None and seen.ever

    def _comparison(self, tensor: Tensor) -> _Comparison | None:
        comparison = self._known.get(id(tensor))
        return comparison if comparison is not None and comparison.tensor() is tensor else None

    def _equals(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype is not self._copy.dtype:
            return False
        if tensor.shape != self._copy.shape or tensor.is_meta:
            return False
        if tensor.device != self._copy.device:
            self._copy = self._copy.to(tensor.device)
        return torch.equal(_bits(self._copy), _bits(tensor.detach()))

    def _remember(self, tensor: Tensor, same: bool, ever: bool) -> None:
        self._known = {i: seen for i, seen in self._known.items() if seen.tensor() is not None}
        self._known[id(tensor)] = _Comparison(weakref.ref(tensor), version_of(tensor), same, ever)

    def __getstate__(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(self._copy.cpu(), buffer)
        return zlib.compress(buffer.getvalue(), level=1)

    def __setstate__(self, state: bytes) -> None:
        self._copy = torch.load(io.BytesIO(zlib.decompress(state)))
        self._known = {}


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers, which compare bit by bit, so that NaN equals itself."""
    return x if x.dtype is torch.bool else x.view(_INTEGERS[x.element_size()])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for tensors of inference mode, whose writes are not counted."""
    return None if tensor.is_inference() else tensor._version


__all__ = ["Banded", "Contents", "Form", "Ramp", "Snapshot", "Uniform", "describe", "may_count", "version_of"]
