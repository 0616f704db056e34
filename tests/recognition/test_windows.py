"""Unfolded keys are windows over the original ones, computed in both ways; look-alikes are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusepass
from fusepass.compilation import rewrite
from fusepass.kernels import KERNELS, Target
from fusepass.kernels.flex import FLEX
from fusepass.kernels.reference import REFERENCE
from fusepass.kernels.sdpa import SDPA
from fusepass.rules.site import Site
from fusepass.selection.select import rank, skips_copies
from tests import checking, windows
from tests.windows import (
    AROUND,
    DILATED,
    GRIDS,
    INF,
    LEFT,
    NEIGHBOURS,
    REACH,
    RIGHT,
    STEP,
    VISIBLE,
    WHOLE,
    WIDTH,
    Program,
    S,
)

EDGES = f"window({LEFT}, {RIGHT})"


@pytest.fixture(params=["copies", "original"])
def over(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute over the unfolded keys, or over the original ones on any device."""
    if request.param == "original":
        monkeypatch.setattr(rewrite, "skips_copies", lambda kernel, site, target: True)
    return str(request.param)


def check(
    program: Program, kind: str, given: checking.Inputs | None = None, over: str = "", **how: Any
) -> None:
    """The program is recognised, fused, and as accurate as eager, gradients included."""
    given = windows.inputs() if given is None else given
    torch._dynamo.reset()
    fused = checking.call(checking.compiled(program, **how), given, grads=True)
    assert fused.site.fused and fused.site.kind == kind, fused.site
    if over:
        assert (fused.site.reason is None) == (over == "original"), fused.site
    eager, exact = (checking.call(program, given, t, grads=True) for t in (None, torch.float64))
    checking.assert_same_accuracy(fused, eager, exact)


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("spelling", NEIGHBOURS)
def test_neighbours_are_a_band(spelling: str, visible: str, over: str) -> None:
    check(windows.neighbours(NEIGHBOURS[spelling], visible), VISIBLE[visible][1], over=over)


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("spelling", AROUND)
def test_blocks_see_their_neighbours(spelling: str, reach: str, over: str) -> None:
    if spelling == "zeros" and REACH[reach][:2] != (1, 0):
        pytest.skip("it looks one block back")
    check(windows.of_blocks(spelling, reach), REACH[reach][3], over=over)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_of_positions(name: str, over: str) -> None:
    program, kind = GRIDS[name]
    check(program, kind, windows.inputs(windows.B, windows.H, windows.SIDE, windows.SIDE, windows.D), over)


@pytest.mark.parametrize("visible", ["edges", "causal"])
@pytest.mark.parametrize("spelling", DILATED)
def test_dilated_windows(spelling: str, visible: str, over: str) -> None:
    reach = f"window({2 * STEP}, {0 if visible == 'causal' else 2 * STEP}) in steps of {STEP}"
    check(windows.by_steps(DILATED[spelling], visible), reach, over=over)


@pytest.mark.parametrize("name", WHOLE)
def test_windows_that_stay_whole_at_the_edges(name: str, over: str) -> None:
    program, kind = WHOLE[name]
    check(program, kind, over=over)


@pytest.mark.parametrize("spelling", ["slices", "rolled"])
def test_a_length_that_blocks_do_not_divide(spelling: str, over: str) -> None:
    given = windows.inputs(2, 3, 27, 8)
    check(windows.of_blocks(spelling, "causal"), REACH["causal"][3], given, over)


@pytest.mark.parametrize("spelling", ["unfold", "stacked", "concatenated", "clamped index"])
def test_unknown_sizes(spelling: str, over: str) -> None:
    check(windows.neighbours(NEIGHBOURS[spelling], "edges"), EDGES, over=over, dynamic=True)


@pytest.mark.parametrize("reach", ["causal", "sliding"])
def test_unknown_numbers_of_blocks(reach: str, over: str) -> None:
    check(windows.of_blocks("slices", reach), REACH[reach][3], over=over, dynamic=True)


def test_unknown_sizes_that_are_viewed_as_blocks_and_back(over: str) -> None:
    """PyTorch writes the sizes of such views as quotients of quotients."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, d = q.shape
        n = s // 8
        q, k, v = (t.view(b, h, n, 8, d) for t in (q, k, v))
        k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), -2) for t in (k, v))
        i = torch.arange(s).view(n, 8)
        j = torch.cat((F.pad(i, (0, 0, 1, 0), value=-1)[:-1], i), -1)[:, None]
        scores = (q @ k.mT / 3).masked_fill((j > i[..., None]) | (j < 0), -INF)
        return (scores.softmax(-1) @ v).view(b, h, s, d)

    check(program, REACH["causal"][3], over=over, dynamic=True)


@pytest.mark.parametrize("merged", [False, True])
def test_blocks_of_a_grid_of_unknown_size(merged: bool, over: str) -> None:
    """Blocks of 4 by 4 with a halo of one, counted in one axis or two (Vaswani et al., arXiv 2103.12731)."""

    def halo(x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1)).unfold(-2, 6, 4).unfold(-2, 6, 4)

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, y, x, h, d = q.shape
        n, m = y // 4, x // 4
        q = q.view(b, n, 4, m, 4, h, d).permute(0, 5, 1, 3, 2, 4, 6)
        k, v = (halo(t.permute(0, 3, 4, 1, 2)).permute(0, 1, 3, 4, 5, 6, 2) for t in (k, v))
        kept = halo(q.new_ones(y, x))
        q, k, v = (t.reshape(b, h, *((n * m,) if merged else (n, m)), -1, d) for t in (q, k, v))
        kept = kept.reshape(*((n * m,) if merged else (n, m)), 1, 36)
        return (q @ k.mT).masked_fill(kept == 0, -INF).softmax(-1) @ v

    given = {name: torch.randn(2, 8, 12, 3, 8) for name in "qkv"}
    words = ", ".join(f"window(1, 1) of blocks of 4 along axis {axis}" for axis in (0, 1))
    check(program, words, given, over, dynamic=True)


FALLING: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "index": (1, lambda x: x[:, :, (torch.arange(S)[:, None] - torch.arange(5)).clamp(min=0)]),
    "index in steps": (2, lambda x: x[:, :, (torch.arange(S)[:, None] - 2 * torch.arange(5)).clamp(min=0)]),
    "rolled": (1, lambda x: torch.stack([x.roll(n, 2) for n in range(5)], 3)),
    "flipped": (1, lambda x: F.pad(x, (0, 0, 4, 0)).unfold(2, 5, 1).flip(-1).mT),
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", FALLING)
def test_the_last_key_may_come_first(name: str, narrow: bool, over: str) -> None:
    step, unfolded = FALLING[name]

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(5)
        hidden = torch.arange(S)[:, None] - step * place < 0
        hidden = hidden | (place > 2) if narrow else hidden
        s = torch.einsum("bhsd,bhswd->bhsw", q, unfolded(k)).masked_fill(hidden, -INF)
        return torch.einsum("bhsw,bhswd->bhsd", s.softmax(-1), unfolded(v))

    wide = step * (2 if narrow else 4)
    check(program, f"window({wide})" if step == 1 else f"window({wide}, 0) in steps of {step}", over=over)


def test_keys_and_values_in_other_orders_are_no_window(over: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 4, 0)).unfold(2, 5, 1) for t in (k, v))
        hidden = torch.arange(S)[:, None] - torch.arange(5) < 0
        s = torch.einsum("bhsd,bhsdw->bhsw", q, k.flip(-1)).masked_fill(hidden, -INF)
        return torch.einsum("bhsw,bhsdw->bhsd", s.softmax(-1), v)

    check(program, "mask[bj]", kernel="reference")


def test_padding_is_key_padding(over: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        keys, values = (F.pad(t, (0, 0, 3, 2)).unfold(2, 6, 1) for t in (k, v))
        shown = F.pad(kept, (3, 2)).unfold(1, 6, 1)[:, None]
        s = torch.einsum("bhsd,bhsdw->bhsw", q, keys).masked_fill(~shown, -INF)
        return torch.einsum("bhsw,bhsdw->bhsd", s.softmax(-1).nan_to_num(0.0), values)

    kept = torch.ones(2, S, dtype=torch.bool)
    kept[0, -11:] = False
    check(program, f"{EDGES}, key padding", windows.inputs(kept=kept), over)


def test_a_float_mask_that_is_unfolded(over: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (F.pad(t, (0, 0, 3, 2)).unfold(2, 6, 1) for t in (k, v))
        edges = F.pad(torch.zeros(S), (3, 2), value=torch.finfo(torch.float32).min).unfold(0, 6, 1)
        w = (torch.einsum("bhsd,bhsdw->bhsw", q, keys) / 3 + edges).softmax(-1)
        return torch.einsum("bhsw,bhsdw->bhsd", w, values)

    check(program, EDGES, over=over)


def test_windows_inside_the_keys_need_no_mask(over: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (t.unfold(2, 5, 1) for t in (k, v))
        w = torch.einsum("bhsd,bhsdw->bhsw", q[:, :, 4:], keys).softmax(-1)
        return torch.einsum("bhsw,bhsdw->bhsd", w, values)

    check(program, "window(0, 4)", over=over)


def test_a_bias_over_the_window_is_named_and_the_copy_stays(over: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        keys, values = (F.pad(x, (0, 0, 3, 2)).unfold(2, 6, 1) for x in (k, v))
        at = torch.arange(S)[:, None] + torch.arange(-3, 3)
        s = torch.einsum("bhsd,bhsdw->bhsw", q, keys) + t[:, None]
        w = s.masked_fill((at < 0) | (at >= S), -INF).softmax(-1)
        return torch.einsum("bhsw,bhsdw->bhsd", w, values)

    given = windows.inputs(t=torch.randn(3, WIDTH))
    check(program, f"{EDGES}, bias[hij]", given, "copies", kernel="reference")


def test_rows_that_see_no_key_keep_their_windows_mean(over: str) -> None:
    """A finite fill gives such rows the mean over six copies; over the original keys it would be of all."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (F.pad(t, (0, 0, 3, 2)).unfold(2, 6, 1) for t in (k, v))
        at = torch.arange(S)[:, None] + torch.arange(-3, 3)
        s = torch.einsum("bhsd,bhsdw->bhsw", q, keys).masked_fill((at < 9) | (at >= S), -1e30)
        return torch.einsum("bhsw,bhsdw->bhsd", s.softmax(-1), values)

    check(program, f"{EDGES}, mask[j]", over="copies")


def test_kernels_over_the_original_keys_are_chosen_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only on a GPU, and only if they skip hidden keys; FlexAttention only if many keys would be copied."""
    seen: list[Site] = []
    monkeypatch.setattr(rewrite, "skips_copies", lambda kernel, site, target: seen.append(site))
    check(windows.of_blocks("slices", "causal"), REACH["causal"][3])
    small = seen[0]
    large = replace(small, spec=replace(small.spec, batch=1 << 16))
    gpu, cpu = (Target(device, training=False, aten=False) for device in ("cuda", "cpu"))
    assert skips_copies(FLEX, large, gpu) and not skips_copies(FLEX, small, gpu)
    assert not any(skips_copies(kernel, large, cpu) for kernel in KERNELS)
    assert not any(skips_copies(kernel, replace(large, original=None), gpu) for kernel in KERNELS)
    assert not skips_copies(SDPA, large, gpu) and not skips_copies(REFERENCE, large, gpu)


def test_copies_of_one_query_stay_where_a_compiler_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a tensor that learns is read at distances only in inference."""
    seen: list[Site] = []
    monkeypatch.setattr(rewrite, "skips_copies", lambda kernel, site, target: seen.append(site))

    table = torch.nn.Parameter(torch.randn(3, WIDTH))

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (F.pad(x, (0, 0, 3, 2)).unfold(2, 6, 1) for x in (k, v))
        at = torch.arange(S)[:, None] + torch.arange(-3, 3)
        s = torch.einsum("bhsd,bhsdw->bhsw", q, keys) + table.to(q.dtype)[:, None]
        w = s.masked_fill((at < 0) | (at >= S), -INF).softmax(-1)
        return torch.einsum("bhsw,bhsdw->bhsd", w, values)

    check(program, f"{EDGES}, bias[hij]", kernel="reference")
    large = replace(seen[0], spec=replace(seen[0].spec, batch=1 << 18))
    gpu = Target("cuda", training=False, aten=False, compiled=True)
    assert skips_copies(FLEX, large, gpu) and not skips_copies(FLEX, large, replace(gpu, training=True))
    assert rank(large, gpu, KERNELS, None)[0].kernel is None
    assert rank(large, replace(gpu, compiled=False), KERNELS, None)[0].kernel is not None


# ---------------------------------------------------------------------------------------- look-alikes


def attend(q: Tensor, keys: Tensor, values: Tensor, shown: Tensor | None, fill: float = -INF) -> Tensor:
    s = torch.einsum("bhsd,bhsdw->bhsw", q, keys)
    s = s if shown is None else s.masked_fill(~shown, fill)
    return torch.einsum("bhsw,bhsdw->bhsd", s.softmax(-1), values)


def edges(left: int = 3, width: int = 6, first: int = 0) -> Tensor:
    at = torch.arange(S)[:, None] + torch.arange(width) - left
    return (at >= first) & (at < S)


def unfolded(x: Tensor, left: int = 3, width: int = 6) -> Tensor:
    return F.pad(x, (0, 0, left, width - 1 - left)).unfold(2, width, 1)


def first_is_zero(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, 1:]), 2)


def rolled(q: Tensor, k: Tensor, v: Tensor, shifts: tuple[int, ...]) -> Tensor:
    keys, values = (torch.stack([t.roll(n, 2) for n in shifts], -1) for t in (k, v))
    return attend(q, keys, values, None)


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = (torch.arange(S)[:, None] + torch.arange(4)).clamp(0, S - 1)
    return attend(q, k[:, :, at].mT, v[:, :, at].mT, None)


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (
        torch.stack([F.pad(t, (0, 0, 1, 1))[:, :, n : n + S] for n in (0, 1, 1, 2)], -1) for t in (k, v)
    )
    at = torch.arange(S)[:, None] + torch.tensor([-1, 0, 0, 1])
    return attend(q, keys, values, (at >= 0) & (at < S))


def uneven_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (
        torch.stack([F.pad(t, (0, 0, 2, 2))[:, :, n : n + S] for n in (0, 2, 3)], -1) for t in (k, v)
    )
    at = torch.arange(S)[:, None] + torch.tensor([-2, 0, 1])
    return attend(q, keys, values, (at >= 0) & (at < S))


def other_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys two apart, and values one apart."""
    keys, values = (
        torch.stack([F.pad(t, (0, 0, 2, 2))[:, :, 2 + n * step : 2 + n * step + S] for n in (-1, 0, 1)], -1)
        for t, step in ((k, 2), (v, 1))
    )
    at = torch.arange(S)[:, None] + torch.tensor([-2, 0, 2])
    return attend(q, keys, values, (at >= 0) & (at < S))


def of_two_tensors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.cat((t[:, :, :9], t[:, :, 9:] * 2), 2) for t in (k, v))
    return attend(q, unfolded(k), unfolded(v), edges())


def starting(q: Tensor, k: Tensor, v: Tensor, low: int, high: int, of_values: int = 0) -> Tensor:
    """Windows of six that start three keys back, within bounds; a negative number counts from the end."""
    first = (torch.arange(S) - 3).clamp(low, high)[:, None] + torch.arange(6)
    return attend(q, k[:, :, first].mT, v[:, :, first - of_values].mT, None)


LOOKALIKES: dict[str, Program] = {
    "padding is visible": lambda q, k, v: attend(q, unfolded(k), unfolded(v), None),
    "one padded key is visible": lambda q, k, v: attend(q, unfolded(k), unfolded(v), edges(2)),
    "the other end is visible": lambda q, k, v: rolled(q, k, v, (1, 0, -1)),
    "the last key is repeated": clamped,
    "other values": lambda q, k, v: attend(q, unfolded(k), unfolded(v, 2), edges()),
    "other values, edges hidden": lambda q, k, v: attend(
        q, unfolded(k), unfolded(v, 2), edges(first=1) & edges(2)
    ),
    "values in reverse": lambda q, k, v: attend(q, unfolded(k), unfolded(v).flip(-1), edges()),
    "a key twice": twice,
    "uneven steps": uneven_steps,
    "other steps of values": other_steps,
    "a fill within reach": lambda q, k, v: attend(q, unfolded(k), unfolded(v), edges(), -3.0),
    "starts before the first key": lambda q, k, v: starting(q, k, v, -1, S - 6),
    "other starts of values": lambda q, k, v: starting(q, k, v, 1, S - 6, 1),
    "a key that is zero": lambda q, k, v: attend(
        q, unfolded(first_is_zero(k)), unfolded(first_is_zero(v)), edges()
    ),
    "a hidden key that is zero": lambda q, k, v: attend(
        q, unfolded(first_is_zero(k)), unfolded(first_is_zero(v)), edges(first=1)
    ),
    "keys of two tensors": of_two_tensors,
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_no_windows(name: str, over: str) -> None:
    program, given = LOOKALIKES[name], windows.inputs()
    torch._dynamo.reset()
    fused = checking.call(checking.compiled(program, kernel="reference"), given, grads=True)
    assert fused.site.fused and "window" not in fused.site.kind, fused.site
    eager, exact = (checking.call(program, given, t, grads=True) for t in (None, torch.float64))
    checking.assert_same_accuracy(fused, eager, exact)


def test_windows_that_do_not_overlap_stay_blocks() -> None:
    """Shifted windows copy no key: they stay as they are (Liu et al., Swin transformer, arXiv 2103.14030)."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.roll(-2, 2).unflatten(2, (4, 8)) for t in (q, k, v))
        return (q @ k.mT).softmax(-1).matmul(v).flatten(2, 3).roll(2, 2)

    sites = fusepass.explain(program, *windows.inputs().values()).sites
    assert [s.kind for s in sites] == ["full"]


def test_keys_that_were_overwritten_stay_copies(over: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.cumsum(2)
        keys = torch.stack([F.pad(k, (0, 0, 3, 2))[:, :, n : n + S] for n in range(6)], -1)
        k.zero_()
        return attend(q, keys, unfolded(v), edges()) + k

    check(program, EDGES, over="copies")
