"""FlexAttention's block tables from a visibility's formula, without any tensor over queries and keys.

A formula is evaluated once per *block* of 128 queries by 128 keys, on intervals: each number becomes the
lowest and highest value that it takes in the block, each truth value becomes "all" and "any".  Bands have
closed forms; paddings and document labels are reduced block by block; a block that cannot be bounded counts
as partial, which is slower but never wrong.  Separate operators make the tables, or copy those that a
compiler has fused, because the tables must be in memory when the kernel starts.

Source for the tables: ``torch.nn.attention.flex_attention.BlockMask``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusepass.expressions.ir import DTYPES
from fusepass.host.surroundings import clean_context
from fusepass.kernels.formula import Formula, read

BLOCK = 128

Interval = tuple[Tensor, Tensor]
"""Lowest and highest value in each block, ``[B | 1, H | 1, query blocks | 1, key blocks | 1]``; for a truth
value, whether it holds everywhere in the block, and whether anywhere."""


class Blocks:
    """Evaluates formulas on the blocks of attention of one size."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        tensors: Sequence[Tensor],
        device: torch.device,
        block: int = BLOCK,
        traced: bool = False,
    ) -> None:
        self.sizes, self.tensors, self.device, self.block = sizes, tensors, device, block
        self.traced = traced
        # Numbers stay on the CPU: they combine with tensors on any device, and reading them waits for no GPU.
        self.unknown = torch.tensor(-math.inf), torch.tensor(math.inf)
        self._indices: dict[str, Interval] = {}

    def count(self, letter: str) -> int:
        """How many blocks (or single indices) a letter has."""
        return -(-self.sizes[letter] // self.block) if letter in "ij" else self.sizes[letter]

    def at(self, letter: str) -> Interval:
        """The lowest and highest index of each block."""
        if letter not in self._indices:
            self._indices[letter] = self._letter(letter)
        return self._indices[letter]

    def _letter(self, letter: str) -> Interval:
        shape = [1, 1, 1, 1]
        shape["bhij".index(letter)] = -1
        low = torch.arange(self.count(letter), device=self.device)
        if letter in "bh":
            return low.view(shape), low.view(shape)
        low = low * self.block
        high = (low + (self.block - 1)).clamp(max=self.sizes[letter] - 1)
        return low.view(shape), high.view(shape)

    def value(self, formula: Formula) -> Interval:
        """The interval of a formula in each block; parts that load nothing are computed once per process.

        A compiler that traces this fuses those parts with the rest.
        """
        if self.tensors and not self.traced and formula[0] != "const" and not _loads(formula):
            sizes = tuple(self.sizes[letter] for letter in "bhij")
            low, high = _constant_interval(formula, sizes, self.block, self.device.type == "cuda")
            return _on_device(low, self.device), _on_device(high, self.device)
        return self._walk(formula)

    def _walk(self, formula: Formula) -> Interval:
        operation = formula[0]
        if operation == "const":
            if formula[1] != formula[1]:
                return self.unknown
            number = self._number(formula[1])
            return number, number
        if operation == "index":
            return self.index(formula[1], formula[2])
        if operation == "load":
            return self.load(self.tensors[formula[1]], formula[2])
        if operation in ("floordiv", "mod"):
            return self._divided(operation, self.value(formula[1]), formula[2])
        handler = getattr(self, f"_{operation}", None)
        if handler is None:
            return self.unknown
        given = [self.value(f) if isinstance(f, tuple) else f for f in formula[1:]]
        interval: Interval = handler(*given)
        return interval

    def index(self, constant: int, terms: Any) -> Interval:
        low = high = self._number(constant)
        for factor, letter, stride, size in terms:
            a, b = (x // stride for x in self.at(letter))
            if size:
                whole = a // size == b // size
                a, b = torch.where(whole, a % size, 0), torch.where(whole, b % size, size - 1)
            a, b = (a * factor, b * factor) if factor > 0 else (b * factor, a * factor)
            low, high = low + a, high + b
        return low, high

    def _number(self, number: bool | int | float) -> Tensor:
        if not self.traced:
            return torch.tensor(number)
        kind = {bool: torch.bool, int: torch.int64}.get(type(number), torch.float32)
        return torch.full((), number, dtype=kind, device=self.device)

    def load(self, tensor: Tensor, indices: Any) -> Interval:
        """Reduce a tensor over blocks if each index is a constant or a letter; otherwise nothing is known."""
        order: list[str] = []
        for dim, (constant, terms) in reversed(list(enumerate(indices))):
            if not terms:
                tensor = tensor.select(dim, constant)
                continue
            if len(terms) > 1 or constant != 0 or terms[0][0] != 1 or terms[0][2] != 1 or terms[0][3]:
                return self._anything(tensor)
            letter = terms[0][1]
            tensor = tensor.narrow(dim, 0, self.sizes[letter])
            order.insert(0, letter)
        if len(set(order)) < len(order):
            return self._anything(tensor)
        tensor = tensor.permute([order.index(x) for x in "bhij" if x in order])
        tensor = tensor.reshape([tensor.shape[sorted(order).index(x)] if x in order else 1 for x in "bhij"])
        return self._reduced(tensor, [d for d, x in enumerate("bhij") if x in order and x in "ij"])

    def _anything(self, tensor: Tensor) -> Interval:
        if tensor.dtype is torch.bool:
            return torch.tensor(False), torch.tensor(True)
        return self.unknown

    def _reduced(self, tensor: Tensor, dims: list[int]) -> Interval:
        low = high = tensor
        if tensor.is_floating_point():
            odd = tensor.isnan()
            low, high = tensor.masked_fill(odd, -math.inf), tensor.masked_fill(odd, math.inf)
        for dim in dims:
            low, high = (self._split(t, dim) for t in (low, high))
            if tensor.dtype is torch.bool:
                low, high = low.all(dim + 1), high.any(dim + 1)
            else:
                low, high = low.amin(dim + 1), high.amax(dim + 1)
        return low, high

    def _split(self, tensor: Tensor, dim: int) -> Tensor:
        """A dimension cut into blocks; the last block repeats the last element."""
        missing = -tensor.shape[dim] % self.block
        if missing:
            last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
            wide = [missing if d == dim else -1 for d in range(4)]
            tensor = torch.cat([tensor, last.expand(wide)], dim)
        cut: Tensor = tensor.unflatten(dim, (-1, self.block))
        return cut

    # -- logic -------------------------------------------------------------------------------

    def _not(self, x: Interval) -> Interval:
        return ~_truth(x)[1], ~_truth(x)[0]

    def _and(self, x: Interval, y: Interval) -> Interval:
        (a, b), (c, d) = _truth(x), _truth(y)
        return a & c, b & d

    def _or(self, x: Interval, y: Interval) -> Interval:
        (a, b), (c, d) = _truth(x), _truth(y)
        return a | c, b | d

    def _xor(self, x: Interval, y: Interval) -> Interval:
        return self._not(self._eq(_numbers(_truth(x)), _numbers(_truth(y))))

    def _le(self, x: Interval, y: Interval) -> Interval:
        return (x[1] <= y[0]) & _known(x) & _known(y), x[0] <= y[1]

    def _lt(self, x: Interval, y: Interval) -> Interval:
        return (x[1] < y[0]) & _known(x) & _known(y), x[0] < y[1]

    def _ge(self, x: Interval, y: Interval) -> Interval:
        return self._le(y, x)

    def _gt(self, x: Interval, y: Interval) -> Interval:
        return self._lt(y, x)

    def _eq(self, x: Interval, y: Interval) -> Interval:
        x, y = _numbers(x), _numbers(y)
        same = (x[0] == x[1]) & (y[0] == y[1]) & (x[0] == y[0]) & _known(x) & _known(y)
        return same, (x[0] <= y[1]) & (y[0] <= x[1])

    def _ne(self, x: Interval, y: Interval) -> Interval:
        return self._not(self._eq(x, y))

    # -- arithmetic --------------------------------------------------------------------------

    def _add(self, x: Interval, y: Interval) -> Interval:
        return _bounds(x[0] + y[0], x[1] + y[1])

    def _sub(self, x: Interval, y: Interval) -> Interval:
        return _bounds(x[0] - y[1], x[1] - y[0])

    def _neg(self, x: Interval) -> Interval:
        return -x[1], -x[0]

    def _mul(self, x: Interval, y: Interval) -> Interval:
        corners = [a * b for a in x for b in y]
        return _bounds(*(functools.reduce(pick, corners) for pick in (torch.minimum, torch.maximum)))

    def _divided(self, operation: str, x: Interval, divisor: Formula) -> Interval:
        """Quotient or remainder of a division by a positive number."""
        if divisor[0] != "const" or type(divisor[1]) is not int or divisor[1] <= 0:
            return self.unknown
        number = divisor[1]
        low, high = x[0] // number, x[1] // number
        if operation == "floordiv":
            return low, high
        whole = low == high
        return torch.where(whole, x[0] % number, 0), torch.where(whole, x[1] % number, number - 1)

    def _abs(self, x: Interval) -> Interval:
        low = torch.where(
            (x[0] <= 0) & (x[1] >= 0), torch.zeros_like(x[0]), torch.minimum(*map(torch.abs, x))
        )
        return _unless_nan((low, torch.maximum(*map(torch.abs, x))), x)

    def _max(self, x: Interval, y: Interval) -> Interval:
        return _unless_nan((torch.maximum(x[0], y[0]), torch.maximum(x[1], y[1])), x, y)

    def _min(self, x: Interval, y: Interval) -> Interval:
        return _unless_nan((torch.minimum(x[0], y[0]), torch.minimum(x[1], y[1])), x, y)

    def _where(self, c: Interval, x: Interval, y: Interval) -> Interval:
        always, sometimes = _truth(c)
        low = torch.where(always, x[0], torch.where(sometimes, torch.minimum(x[0], y[0]), y[0]))
        return low, torch.where(always, x[1], torch.where(sometimes, torch.maximum(x[1], y[1]), y[1]))

    def _cast(self, x: Interval, name: str) -> Interval:
        dtype = DTYPES[name]
        if dtype is torch.bool:
            return _truth(x)
        if x[0].dtype is torch.bool:
            return _numbers(x)
        if x[0].is_floating_point() and not dtype.is_floating_point:
            return self.unknown  # no integer is infinite
        if not dtype.is_floating_point:
            return _wrapped(x, dtype)
        return x[0].to(dtype), x[1].to(dtype)


def _wrapped(x: Interval, dtype: torch.dtype) -> Interval:
    """Integers cast to narrower ones: unbounded where some do not fit."""
    limits = torch.iinfo(dtype)
    fits = (x[0] >= limits.min) & (x[1] <= limits.max)
    return torch.where(fits, x[0], limits.min), torch.where(fits, x[1], limits.max)


def _truth(x: Interval) -> Interval:
    """Numbers as truth values: true unless zero."""
    if x[0].dtype is torch.bool:
        return x
    return (x[0] > 0) | (x[1] < 0), (x[0] != 0) | (x[1] != 0)


def _numbers(x: Interval) -> Interval:
    return (x[0].to(torch.int64), x[1].to(torch.int64)) if x[0].dtype is torch.bool else x


def _bounds(low: Tensor, high: Tensor) -> Interval:
    """Bounds that are NaN (infinity minus infinity, or times zero) become infinite."""
    if not low.is_floating_point() and not high.is_floating_point():
        return low, high
    odd = torch.isnan(low) | torch.isnan(high)
    return torch.where(odd, -math.inf, low), torch.where(odd, math.inf, high)


def _unless_nan(interval: Interval, *given: Interval) -> Interval:
    """Bounds of a function that returns NaN for NaN; infinite bounds on both sides stand for NaN."""
    for low, high in given:
        if low.is_floating_point():
            nothing = (torch.isneginf(low) & torch.isposinf(high)) | torch.isnan(interval[0])
            below = torch.where(nothing, -math.inf, interval[0])
            interval = below, torch.where(nothing, math.inf, interval[1])
    return interval


def _known(x: Interval) -> Tensor | bool:
    """Where "all" may be claimed: infinite bounds stand for NaN and for unbounded values."""
    if not x[0].is_floating_point():
        return True
    return torch.isfinite(x[0]) & torch.isfinite(x[1])


@functools.cache
def _loads(formula: Formula) -> bool:
    """Does a formula read a tensor?"""
    return formula[0] == "load" or any(isinstance(f, tuple) and f and _loads(f) for f in formula[1:])


@functools.lru_cache(maxsize=256)
def _constant_interval(formula: Formula, sizes: tuple[int, ...], block: int, pinned: bool) -> Interval:
    """The interval of a formula that reads no tensor, on the CPU."""
    low, high = Blocks(dict(zip("bhij", sizes, strict=True)), [], torch.device("cpu"), block).value(formula)
    return (_pinned(low), _pinned(high)) if pinned else (low, high)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.contiguous().pin_memory() if tensor.dim() else tensor


_captured: list[Tensor] = []
"""Recorded CUDA graphs read these: every replay copies from the same address."""


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A cached tensor on a device; a number stays on the CPU, as it combines with tensors on any."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(tensor)
    return tensor.to(device, non_blocking=True) if tensor.dim() else tensor


# ---------------------------------------------------------------------------------------- tables


def block_visibility(
    visible: Formula,
    sizes: Mapping[str, int],
    tensors: Sequence[Tensor],
    device: torch.device,
    traced: bool = False,
) -> Interval:
    """For each block: do all of its queries see all of its keys, and does any see any?

    Returns:
        Two boolean tensors ``[B, H, query blocks, key blocks]``.  A block that extends beyond the last query
        or key is never "all".
    """
    blocks = Blocks(sizes, tensors, device, traced=traced)
    shape = [blocks.count(letter) for letter in "bhij"]
    every, some = _truth(blocks.value(visible))
    every, some = every.to(device), some.to(device)
    if sizes["i"] % BLOCK or sizes["j"] % BLOCK:
        if traced:
            whole = _inside(blocks)
        else:
            whole = _on_device(_complete_blocks(sizes["i"], sizes["j"], device.type == "cuda"), device)
        every = every & whole
    return every.expand(shape), some.expand(shape)


@functools.lru_cache(maxsize=256)
def _complete_blocks(queries: int, keys: int, pinned: bool) -> Tensor:
    """The blocks that lie within the last query and key, ``[1, 1, query blocks, key blocks]``."""
    inside = _inside(Blocks({"b": 1, "h": 1, "i": queries, "j": keys}, [], torch.device("cpu")))
    return _pinned(inside) if pinned else inside


def _inside(blocks: Blocks) -> Tensor:
    (low_i, high_i), (low_j, high_j) = blocks.at("i"), blocks.at("j")
    return (high_i - low_i == BLOCK - 1) & (high_j - low_j == BLOCK - 1)


def tables(every: Tensor, some: Tensor, both: bool = True) -> list[Tensor]:
    """``kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices``.

    ``both``: followed by the same four by queries, which a backward reads.
    """
    kinds = torch.stack((some & ~every, every))
    results: list[Tensor] = []
    for rows in (kinds, kinds.transpose(-2, -1))[: 1 + both]:
        order = rows.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        for kind, indices in zip(rows, order, strict=True):
            results += [kind.sum(-1, dtype=torch.int32), indices.to(torch.int32).contiguous()]
    return results


def _block_tables(
    tensors: list[Tensor], visible: str, batch: int, heads: int, queries: int, keys: int,
    device: torch.device, both: bool,
) -> list[Tensor]:  # fmt: skip
    if not tensors:
        settings = (visible, batch, heads, queries, keys, both)
        fixed = _resident.get((settings, _numbered(device)))
        joined = _on_device(_fixed(*settings, device.type == "cuda") if fixed is None else fixed, device)
        results = table_shapes(tensors, visible, batch, heads, queries, keys, device, both)
        parts = joined.split([t.numel() for t in results])
        torch._foreach_copy_(results, [part.view(t.shape) for part, t in zip(parts, results, strict=True)])
        return results
    sizes = {"b": batch, "h": heads, "i": queries, "j": keys}
    return tables(*block_visibility(read(visible), sizes, tensors, device), both)


def plain_tables(
    tensors: list[Tensor], visible: str, batch: int, heads: int, queries: int, keys: int,
    device: torch.device, both: bool,
) -> list[Tensor]:  # fmt: skip
    """The same as ``fusepass::block_tables``, in operations that a compiler traces and fuses."""
    sizes = {"b": batch, "h": heads, "i": queries, "j": keys}
    return tables(*block_visibility(read(visible), sizes, tensors, device, traced=True), both)


@functools.lru_cache(maxsize=256)
def _fixed(visible: str, batch: int, heads: int, queries: int, keys: int, both: bool, pinned: bool) -> Tensor:
    """The tables of a formula that reads no tensor, concatenated, on the CPU."""
    sizes = {"b": batch, "h": heads, "i": queries, "j": keys}
    results = tables(*block_visibility(read(visible), sizes, [], torch.device("cpu")), both)
    joined = torch.cat([t.flatten() for t in results])
    return _pinned(joined) if pinned else joined


_resident: dict[tuple[Any, torch.device], Tensor] = {}
"""The results of :func:`_fixed`, on a GPU."""
_RESIDENT_BYTES = 1 << 20
"""Larger tables are copied from the CPU at every call; for such long sequences this does not matter."""


def keep_resident(
    visible: str, batch: int, heads: int, queries: int, keys: int, both: bool, device: torch.device
) -> None:
    """Put the tables of a formula that reads no tensor on a GPU, where calls find them.

    This is called when a graph is compiled, not by the operator itself: a tensor that is first made while a
    CUDA graph is recorded lies in that graph's memory, and holds nothing until the graph is replayed.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    settings = (visible, batch, heads, queries, keys, both)
    place = (settings, _numbered(device))
    if place in _resident:
        return
    with clean_context(draws=False):
        fixed = _fixed(*settings, True)
        if fixed.numel() * fixed.itemsize <= _RESIDENT_BYTES:
            _resident[place] = fixed.to(device)


def _numbered(device: torch.device) -> torch.device:
    """A GPU device with its index."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def table_shapes(
    tensors: list[Tensor], visible: str, batch: int, heads: int, queries: int, keys: int,
    device: torch.device, both: bool,
) -> list[Tensor]:  # fmt: skip
    """Empty tables of the right shapes."""
    rows, columns = ((n + BLOCK - 1) // BLOCK for n in (queries, keys))
    results: list[Tensor] = []
    for a, b in ((rows, columns), (columns, rows))[: 1 + both]:
        for _ in range(2):
            results.append(torch.empty((batch, heads, a), dtype=torch.int32, device=device))
            results.append(torch.empty((batch, heads, a, b), dtype=torch.int32, device=device))
    return results


_definitions = torch.library.Library("fusepass", "FRAGMENT")
_definitions.define(
    "block_tables(Tensor[] tensors, str visible, SymInt batch, SymInt heads, SymInt queries, SymInt keys, "
    "Device device, bool both) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_definitions.impl("block_tables", _block_tables, "CompositeExplicitAutograd")
torch.library.register_fake("fusepass::block_tables", table_shapes, lib=_definitions)


def _unwritten(results: list[Tensor]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in results]


def _stored_tables(tables: list[Tensor]) -> list[Tensor]:
    kept = _unwritten(tables)
    torch._foreach_copy_(kept, tables)
    return kept


_definitions.define("stored_tables(Tensor[] tables) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
_definitions.impl("stored_tables", _stored_tables, "CompositeExplicitAutograd")
torch.library.register_fake("fusepass::stored_tables", _unwritten, lib=_definitions)

tables_op = torch.ops.fusepass.block_tables.default
stored_tables_op = torch.ops.fusepass.stored_tables.default
"""Tables that a compiler must keep in memory: FlexAttention reads them from there."""

__all__ = [
    "BLOCK", "Blocks", "block_visibility", "keep_resident", "plain_tables", "stored_tables_op",
    "table_shapes", "tables", "tables_op",
]  # fmt: skip
