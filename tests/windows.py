"""Programs that unfold their keys: spellings of windows, and of what is visible in them.

Every spelling takes ``x [B, H, S, D]`` and gives the neighbours of every position, ``[B, H, S, W, D]``, or of
every block, ``[B, H, N, W, D]``; where there is no neighbour, the elements may be anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checking import Inputs

INF = float("inf")
B, H, S, D = 2, 3, 32, 8
LEFT, RIGHT, BLOCK = 3, 2, 8
WIDTH = LEFT + RIGHT + 1
Spelling = Callable[[Tensor], Tensor]
Program = Callable[..., Tensor]


# ---------------------------------------------------------------------------------------- neighbours


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, LEFT, RIGHT))


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2])[:, None] + torch.arange(-LEFT, RIGHT + 1)


def shifted(x: Tensor, dim: int) -> Tensor:
    """Shifted slices of a padded tensor, stacked."""
    return torch.stack([_padded(x)[:, :, n : n + x.shape[2]] for n in range(WIDTH)], dim)


def concatenated(x: Tensor) -> Tensor:
    """Zeros before a block and after it, instead of padding."""
    before, after = x.new_zeros(*x.shape[:2], LEFT, D), x.new_zeros(*x.shape[:2], RIGHT, D)
    whole = torch.cat((before, x, after), 2)
    return torch.cat([whole.narrow(2, n, x.shape[2])[:, :, :, None] for n in range(WIDTH)], 3)


def strided(x: Tensor) -> Tensor:
    """A view of a padded tensor in which windows overlap."""
    padded = _padded(x).contiguous()
    b, h, s, d = padded.stride()
    shape = (*x.shape[:3], WIDTH, x.shape[3])
    return padded.as_strided(shape, (b, h, s, s, d))


NEIGHBOURS: dict[str, Spelling] = {
    "unfold": lambda x: _padded(x).unfold(2, WIDTH, 1).mT,
    "unfold, last dimension": lambda x: F.pad(x.mT, (LEFT, RIGHT)).unfold(-1, WIDTH, 1).movedim(2, -1),
    "strides": strided,
    "stacked": lambda x: shifted(x, 3),
    "stacked last": lambda x: shifted(x, -1).mT,
    "concatenated": concatenated,
    "rolled": lambda x: torch.stack([x.roll(-n, 2) for n in range(-LEFT, RIGHT + 1)], 3),
    "index": lambda x: _padded(x)[:, :, _positions(x) + LEFT],
    "clamped index": lambda x: x[:, :, _positions(x).clamp(0, x.shape[2] - 1)],
    "index_select": lambda x: (
        _padded(x).index_select(2, (_positions(x) + LEFT).flatten()).view(*x.shape[:3], WIDTH, x.shape[3])
    ),
    "where in an index": lambda x: x[
        :, :, torch.where((_positions(x) < 0) | (_positions(x) >= x.shape[2]), 0, _positions(x))
    ],
}

#: What is visible beside the edges, by offsets ``j - i``; and what it is called.
VISIBLE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "edges": (lambda i, j: j == j, f"window({LEFT}, {RIGHT})"),
    "causal": (lambda i, j: j <= i, f"window({LEFT})"),
    "narrower": (lambda i, j: (j - i).abs() < 2, "window(1, 1)"),
}


def neighbours(spelling: Spelling, visible: str, fill: float = -INF) -> Program:
    """Attention of every position to its neighbours."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        j, i = _positions(q), torch.arange(q.shape[2])[:, None]
        shown = (j >= 0) & (j < q.shape[2]) & VISIBLE[visible][0](i, j)
        s = torch.einsum("bhsd,bhswd->bhsw", q, spelling(k)) * D**-0.5
        return torch.einsum("bhsw,bhswd->bhsd", s.masked_fill(~shown, fill).softmax(-1), spelling(v))

    return program


STEP = 2


def _padded_for_steps(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 2 * STEP, 2 * STEP)).contiguous()


def _by_steps() -> Tensor:
    """Every position with two neighbours on each side, ``STEP`` apart."""
    return torch.arange(S)[:, None] + STEP * (torch.arange(5) - 2)


def strided_by_steps(x: Tensor) -> Tensor:
    padded = _padded_for_steps(x)
    b, h, s, d = padded.stride()
    return padded.as_strided((*x.shape[:3], 5, D), (b, h, s, STEP * s, d))


DILATED: dict[str, Spelling] = {
    "stacked": lambda x: torch.stack(
        [_padded_for_steps(x)[:, :, STEP * n : STEP * n + S] for n in range(5)], 3
    ),
    "unfold": lambda x: _padded_for_steps(x).unfold(2, 4 * STEP + 1, 1)[..., ::STEP].mT,
    "strides": strided_by_steps,
    "rolled": lambda x: torch.stack([x.roll(-STEP * n, 2) for n in range(-2, 3)], 3),
    "index": lambda x: _padded_for_steps(x)[:, :, _by_steps() + 2 * STEP],
    "clamped index": lambda x: x[:, :, _by_steps().clamp(0, S - 1)],
}


def by_steps(spelling: Spelling, visible: str) -> Program:
    """Attention of every position to every second of its neighbours."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        j, i = _by_steps(), torch.arange(S)[:, None]
        shown = (j >= 0) & (j < S) & VISIBLE[visible][0](i, j)
        s = torch.einsum("bhsd,bhswd->bhsw", q, spelling(k)).masked_fill(~shown, -INF)
        return torch.einsum("bhsw,bhswd->bhsd", s.softmax(-1), spelling(v))

    return program


def _kept_whole(size: int, width: int) -> Tensor:
    """The positions of neighbours, ``[size, width]``: every position has the same number of them."""
    first = (torch.arange(size) - width // 2).clamp(0, size - width)
    return first[:, None] + torch.arange(width)


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows that move inwards at the edges: Hassani et al., arXiv 2204.07143, equation 3."""
    at = _kept_whole(S, WIDTH)
    w = (torch.einsum("bhsd,bhswd->bhsw", q, k[:, :, at]) / 3).softmax(-1)
    return torch.einsum("bhsw,bhswd->bhsd", w, v[:, :, at])


def whole_by_bounds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = torch.minimum(torch.arange(S).sub(WIDTH // 2).clamp(min=0), torch.tensor(S - WIDTH))
    at = (torch.arange(WIDTH) + first[:, None]).flatten()
    keys, values = (t.index_select(2, at).unflatten(2, (S, WIDTH)) for t in (k, v))
    out: Tensor = (q[:, :, :, None] @ keys.mT).softmax(-1) @ values
    return out[:, :, :, 0]


def whole_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = _kept_whole(S, WIDTH)
    s = torch.einsum("bhsd,bhswd->bhsw", q, k[:, :, at]).masked_fill(at > torch.arange(S)[:, None], -INF)
    return torch.einsum("bhsw,bhswd->bhsd", s.softmax(-1), v[:, :, at])


def whole_reversed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query sees the first keys."""
    at = (S - 10 - torch.arange(S)).clamp(min=0)[:, None] + torch.arange(WIDTH)
    w = torch.einsum("bhsd,bhswd->bhsw", q, k[:, :, at]).softmax(-1)
    return torch.einsum("bhsw,bhswd->bhsd", w, v[:, :, at])


def whole_by_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = (torch.arange(S) - STEP).clamp(0, S - 1 - 2 * STEP)[:, None] + STEP * torch.arange(3)
    w = torch.einsum("bhsd,bhswd->bhsw", q, k[:, :, at]).softmax(-1)
    return torch.einsum("bhsw,bhswd->bhsd", w, v[:, :, at])


def whole_grid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = int(S**0.5)
    q, k, v = (t[:, :, : n * n].unflatten(2, (n, n)) for t in (q, k, v))
    rows, columns = _kept_whole(n, 3)[:, None, :, None], _kept_whole(n, 3)[None, :, None, :]
    keys, values = (t[:, :, rows, columns].flatten(4, 5) for t in (k, v))
    w = torch.einsum("bhyxd,bhyxwd->bhyxw", q, keys).softmax(-1)
    return torch.einsum("bhyxw,bhyxwd->bhyxd", w, values).flatten(2, 3)


_WHOLE = f"window({LEFT}, {RIGHT}, whole at the edges)"
WHOLE: dict[str, tuple[Program, str]] = {
    "clamped": (whole, _WHOLE),
    "bounds": (whole_by_bounds, _WHOLE),
    "causal": (whole_causal, f"causal, {_WHOLE}"),
    "reversed": (whole_reversed, "mask[ij]"),
    "dilated": (whole_by_steps, f"window({STEP}, {STEP}, whole at the edges) in steps of {STEP}"),
    "grid": (whole_grid, ", ".join(f"window(1, 1, whole at the edges) along axis {n}" for n in (0, 1))),
}


# ---------------------------------------------------------------------------------------- blocks


def blocks(x: Tensor) -> Tensor:
    """``[B, H, N, BLOCK, ...]``."""
    return x.view(*x.shape[:2], -1, BLOCK, x.shape[3])


def around(x: Tensor, back: int, ahead: int) -> Tensor:
    """Blocks with their neighbours, as slices of padded blocks."""
    count, padded = x.shape[2], F.pad(x, (0, 0, 0, 0, back, ahead))
    return torch.cat([padded[:, :, n : n + count] for n in range(back + ahead + 1)], 3)


def rolled(x: Tensor, back: int, ahead: int) -> Tensor:
    """Blocks with their neighbours; the first and the last block are neighbours of each other."""
    return torch.cat([x.roll(-n, 2) for n in range(-back, ahead + 1)], 3)


def windows(x: Tensor, back: int, ahead: int) -> Tensor:
    """Blocks with their neighbours, unfolded from a padded sequence."""
    flat = F.pad(x.flatten(2, 3), (0, 0, back * BLOCK, ahead * BLOCK))
    return flat.unfold(2, (back + ahead + 1) * BLOCK, BLOCK).mT


def shorter(x: Tensor, back: int, ahead: int) -> Tensor:
    """The block before, as a tensor that begins with zeros."""
    assert (back, ahead) == (1, 0)
    return torch.cat((torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, :-1]), 2), x), 3)


def strided_blocks(x: Tensor, back: int, ahead: int) -> Tensor:
    """Chunks that overlap, as in Longformer's code (Beltagy et al., arXiv 2004.05150)."""
    flat = F.pad(x.flatten(2, 3), (0, 0, back * BLOCK, ahead * BLOCK))
    b, h, s, d = flat.stride()
    shape = (*x.shape[:3], (back + ahead + 1) * BLOCK, x.shape[4])
    return flat.as_strided(shape, (b, h, BLOCK * s, s, d))


AROUND: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "slices": around,
    "rolled": rolled,
    "unfold": windows,
    "zeros": shorter,
    "strides": strided_blocks,
}
_OF_BLOCKS = f" of blocks of {BLOCK}"
REACH: dict[str, tuple[int, int, Callable[[Tensor, Tensor], Tensor], str]] = {
    "both": (1, 1, lambda i, j: j == j, f"window({BLOCK}, {BLOCK}){_OF_BLOCKS}"),
    "causal": (1, 0, lambda i, j: j <= i, f"causal, window({BLOCK}, ){_OF_BLOCKS}"),
    "sliding": (1, 0, lambda i, j: (j <= i) & (i - j < BLOCK), f"window({BLOCK - 1})"),
    "symmetric": (1, 1, lambda i, j: (i - j).abs() <= BLOCK, f"window({BLOCK}, {BLOCK})"),
    "two back": (2, 0, lambda i, j: j <= i, f"causal, window({2 * BLOCK}, ){_OF_BLOCKS}"),
}


def of_blocks(spelling: str, reach: str) -> Program:
    """Attention of blocks to themselves and their neighbours; a sequence is padded to whole blocks."""
    back, ahead, visible, _ = REACH[reach]

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = q.shape[2]
        if end % BLOCK:
            q, k, v = (F.pad(t, (0, 0, 0, BLOCK - end % BLOCK)) for t in (q, k, v))
        i = torch.arange(q.shape[2]).view(-1, BLOCK)
        j = torch.cat([i + n * BLOCK for n in range(-back, ahead + 1)], 1)
        shown = visible(i[:, :, None], j[:, None]) & ((j >= 0) & (j < end))[:, None]
        keys, values = (AROUND[spelling](blocks(t), back, ahead) for t in (k, v))
        s = (blocks(q) @ keys.mT / 3).masked_fill(~shown, -INF)
        return (s.softmax(-1) @ values).flatten(2, 3)[:, :, :end]

    return program


# ---------------------------------------------------------------------------------------- grids of positions

SIDE = 6


def _rows(width: int) -> Tensor:
    """Are the neighbours of a row rows of the grid? ``[SIDE, width]``."""
    at = torch.arange(SIDE)[:, None] + torch.arange(width) - width // 2
    return (at >= 0) & (at < SIDE)


def neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hassani et al., Neighborhood attention transformer (arXiv 2204.07143), with hidden edges."""
    keys, values = (F.pad(t, (0, 0, 1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1) for t in (k, v))
    shown = _rows(3)[:, None, :, None] & _rows(3)[None, :, None, :]
    s = torch.einsum("bhyxd,bhyxdtu->bhyxtu", q, keys).flatten(-2)
    w = s.masked_fill(~shown.flatten(-2), -INF).softmax(-1)
    return torch.einsum("bhyxw,bhyxdw->bhyxd", w, values.flatten(-2))


def flat_neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries, keys and values as sequences of pixels."""
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    keys, values = (
        F.pad(t.unflatten(2, (SIDE, SIDE)), (0, 0, 1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        for t in (k, v)
    )
    keys, values = (t.reshape(B, H, SIDE * SIDE, D, 9) for t in (keys, values))
    shown = (_rows(3)[:, None, :, None] & _rows(3)[None, :, None, :]).reshape(SIDE * SIDE, 9)
    w = torch.einsum("bhsd,bhsdw->bhsw", q, keys).masked_fill(~shown, -1e30).softmax(-1)
    out = torch.einsum("bhsw,bhsdw->bhsd", w, values)
    return out.view(B, H, SIDE, SIDE, D)


def stacked_neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Nine shifted images in one stack."""

    def around_pixel(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        return torch.stack([padded[:, :, y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)], -2)

    shown = (_rows(3)[:, None, :, None] & _rows(3)[None, :, None, :]).reshape(SIDE, SIDE, 9)
    s = (around_pixel(k) @ q[..., None]).squeeze(-1).masked_fill(~shown, -INF)
    return (s.softmax(-1).unsqueeze(-2) @ around_pixel(v)).squeeze(-2)


def image_neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``F.unfold`` of images ``[B, D, SIDE, SIDE]``."""
    q, k, v = (t[:, 0].permute(0, 3, 1, 2) for t in (q, k, v))
    keys, values = (F.unfold(t, 3, padding=1).view(B, D, 9, SIDE * SIDE) for t in (k, v))
    shown = (_rows(3)[:, None, :, None] & _rows(3)[None, :, None, :]).reshape(SIDE * SIDE, 9)
    w = torch.einsum("bdn,bdwn->bnw", q.flatten(2), keys).masked_fill(~shown, -INF).softmax(-1)
    return torch.einsum("bnw,bdwn->bdn", w, values).view(B, D, SIDE, SIDE)


def dilated_image_neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``F.unfold`` of images with a dilation."""
    q, k, v = (t[:, 0].permute(0, 3, 1, 2) for t in (q, k, v))
    keys, values = (F.unfold(t, 3, dilation=2, padding=2).view(B, D, 9, SIDE * SIDE) for t in (k, v))
    rows = torch.arange(SIDE)[:, None] + 2 * torch.arange(3) - 2
    inside = (rows >= 0) & (rows < SIDE)
    shown = (inside[:, None, :, None] & inside[None, :, None, :]).reshape(SIDE * SIDE, 9)
    w = torch.einsum("bdn,bdwn->bnw", q.flatten(2), keys).masked_fill(~shown, -INF).softmax(-1)
    return torch.einsum("bnw,bdwn->bdn", w, values).view(B, D, SIDE, SIDE)


def halo(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of a grid with a border: Vaswani et al., HaloNet (arXiv 2103.12731)."""
    n = SIDE // 3
    q = q.view(B, H, n, 3, n, 3, D).permute(0, 1, 2, 4, 3, 5, 6).reshape(B, H, n * n, 9, D)

    def with_border(x: Tensor) -> Tensor:
        blocks = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(2, 5, 3).unfold(3, 5, 3)
        return blocks.permute(0, 1, 2, 3, 5, 6, 4).reshape(B, H, n * n, 25, D)

    inside = F.pad(torch.ones(SIDE, SIDE, dtype=torch.bool), (1, 1, 1, 1)).unfold(0, 5, 3).unfold(1, 5, 3)
    s = (q @ with_border(k).mT).masked_fill(~inside.reshape(n * n, 1, 25), -INF)
    out = s.softmax(-1) @ with_border(v)
    return out.view(B, H, n, n, 3, 3, D).permute(0, 1, 2, 4, 3, 5, 6).reshape(B, H, SIDE, SIDE, D)


def volume(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Neighbours in three dimensions; along the first one, only earlier positions are seen."""
    keys, values = (
        F.pad(t, (0, 0, 1, 1, 1, 1, 1, 0)).unfold(1, 2, 1).unfold(2, 3, 1).unfold(3, 3, 1) for t in (k, v)
    )
    t = torch.arange(H)[:, None] + torch.arange(2) >= 1
    rows, columns = _rows(3)[:, None, None, :, None], _rows(3)[None, :, None, None, :]
    shown = t[:, None, None, :, None, None] & rows & columns
    s = torch.einsum("btyxd,btyxdauv->btyxauv", q, keys).flatten(-3).masked_fill(~shown.flatten(-3), -INF)
    return torch.einsum("btyxw,btyxdw->btyxd", s.softmax(-1), values.flatten(-3))


_AXES = "window(1, 1) along axis 0, window(1, 1) along axis 1"
GRIDS: dict[str, tuple[Program, str]] = {
    "neighbourhood": (neighbourhood, _AXES),
    "flat": (flat_neighbourhood, _AXES),
    "stacked": (stacked_neighbourhood, _AXES),
    "image": (image_neighbourhood, _AXES),
    "dilated image": (
        dilated_image_neighbourhood,
        ", ".join(f"window(2, 2) in steps of 2 along axis {n}" for n in (0, 1)),
    ),
    "halo": (halo, "window(1, 1) of blocks of 3 along axis 0, window(1, 1) of blocks of 3 along axis 1"),
    "volume": (
        volume,
        "window(1, 0) along axis 0, window(1, 1) along axis 1, window(1, 1) along axis 2",
    ),
}


def inputs(*shape: int, **more: Any) -> Inputs:
    """Queries, keys and values of one shape."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(*(shape or (B, H, S, D)), generator=draw) for name in "qkv"} | more


__all__ = [
    "AROUND", "DILATED", "GRIDS", "NEIGHBOURS", "REACH", "STEP", "VISIBLE", "WHOLE", "Program", "by_steps",
    "inputs", "neighbours", "of_blocks",
]  # fmt: skip
