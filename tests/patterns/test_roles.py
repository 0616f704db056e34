"""Which axis is the query and which is the batch, where operands alone do not tell: masks decide."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import checking
from tests.capture import agrees

B, H, N, D = 2, 4, 8, 8
INF = math.inf
PAD = torch.arange(N) < torch.tensor([[6], [N]])
LABELS = torch.arange(N).expand(B, N) // 3
SOME = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) > 0.5
Visible = Callable[[], Tensor]


def i() -> Tensor:
    return torch.arange(N)[:, None]


def j() -> Tensor:
    return torch.arange(N)


#: What a query sees, as [1, N, N] or [B, N, N], and the words for it.
MASKS: dict[str, tuple[str, Visible]] = {
    "causal": ("causal", lambda: (j() <= i())[None]),
    "window": ("window(2)", lambda: ((j() <= i()) & (i() - j() < 3))[None]),
    "chunk": ("chunk(4)", lambda: (i() // 4 == j() // 4)[None]),
    "prefix": ("prefix", lambda: ((j() <= i()) | (j() < 3))[None]),
    "padding": ("key padding", lambda: PAD[:, None].expand(B, N, N)),
    "padding and causal": ("causal & key padding", lambda: PAD[:, None] & (j() <= i())),
    "document": ("document", lambda: LABELS[:, None] == LABELS[:, :, None]),
    "given": ("mask[ij]", lambda: (SOME | (i() == j()))[None]),
}
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {}


def form(attention: Form) -> Form:
    """Register attention of q ``[B, H, N, D]`` and one head of keys and values, or as many as queries."""
    FORMS[attention.__name__] = attention
    return attention


def weights(s: Tensor, visible: Tensor) -> Tensor:
    return (s * 0.35).masked_fill(~visible, -1e9).softmax(-1)


@form
def one_head_positions_first(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    s = torch.einsum("bhsd,btd->bsht", q, k[:, 0])
    return torch.einsum("bsht,btd->bshd", weights(s, visible[:, :, None]), v[:, 0])


@form
def one_head_in_rows_by_position(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    rows = q.transpose(1, 2).reshape(B, N * H, D)
    w = weights(rows @ k[:, 0].mT, visible.repeat_interleave(H, 1))
    return (w @ v[:, 0]).view(B, N, H, D)


@form
def one_head_in_rows_by_head(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    w = weights(q.reshape(B, H * N, D) @ k[:, 0].mT, visible.repeat(1, H, 1))
    return (w @ v[:, 0]).view(B, H, N, D)


@form
def heads_outside_the_batch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return weights(q @ k.mT, visible) @ v


@form
def heads_folded_outside_the_batch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).reshape(-1, N, D) for t in (q, k, v))
    return weights(q @ k.mT, visible.expand(B, N, N).repeat(H, 1, 1)) @ v


@form
def heads_folded_into_the_batch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return weights(q @ k.mT, visible.expand(B, N, N).repeat_interleave(H, 0)) @ v


@form
def positions_before_heads(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    s = torch.einsum("bhsd,bhtd->bsht", q, k)
    return torch.einsum("bsht,bhtd->bshd", weights(s, visible[:, :, None]), v)


@form
def positions_first_of_all(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    s = torch.einsum("bhsd,bhtd->sbht", q, k)
    return torch.einsum("sbht,bhtd->sbhd", weights(s, visible.transpose(0, 1)[:, :, None]), v)


def program(form: str, mask: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FORMS[form](q, k, v, MASKS[mask][1]())

    return attention


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_is_what_it_is(form: str, mask: str, dynamic: bool) -> None:
    if dynamic and mask not in ("causal", "padding"):
        pytest.skip("sizes are written in the masks")
    seen = agrees(program(form, mask), *qkv(), dynamic=dynamic)
    assert [site.fused for site in seen.sites] == [True], seen.sites
    missing = [w for w in MASKS[mask][0].split(" & ") if w not in seen.sites[0].spec]
    assert not missing, seen.sites[0].spec


@pytest.mark.parametrize("mask", ["causal", "padding"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, mask: str) -> None:
    fn, given = program(form, mask), dict(zip("qkv", qkv(), strict=True))
    eager = checking.call(fn, given, grads=True)
    exact = checking.call(fn, given, torch.float64, grads=True)
    got = checking.call(checking.compiled(fn, "auto"), given, grads=True)
    assert got.site.fused, got.site.reason
    checking.assert_same_accuracy(got, eager, exact)


def test_a_mask_over_one_axis_of_a_grid_leaves_the_other_to_the_queries() -> None:
    """Rows of a picture see the rows above: both axes of the picture are the position."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.arange(N) // 4
        s = (q @ k.mT).masked_fill(y[None, :] > y[:, None], -INF)
        return s.softmax(-1) @ v

    seen = agrees(attention, *qkv())
    assert [f"Q={N} K={N}" in site.spec for site in seen.sites] == [True], seen.sites


def test_without_a_mask_the_place_decides() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bhsd,btd->bhst", q, k[:, 0])
        return torch.einsum("bhst,btd->bhsd", s.softmax(-1), v[:, 0])

    seen = agrees(attention, torch.randn(B, 3, 7, D), torch.randn(B, 1, 5, D), torch.randn(B, 1, 5, D))
    assert ["H=3 G=1 Q=7 K=5" in site.spec for site in seen.sites] == [True], seen.sites


# ---------------------------------------------------------------------------------------- several key axes

GRID = (4, 5)


def over_grid(axes: str = "ij", softmax: Callable[[Tensor], Tensor] | None = None) -> Callable[..., Tensor]:
    """Attention of a grid of queries over a grid of keys, summed over both axes at once."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum(f"bhyxd,bhijd->bhyx{axes}", q, k) * 0.3
        w = s.flatten(-2).softmax(-1).view(s.shape) if softmax is None else softmax(s)
        return torch.einsum(f"bhyx{axes},bhijd->bhyxd", w, v)

    return attention


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhyxd,bhijd->bhyxij", q, k) * 0.3
    w = s.flatten(-2).softmax(-1).unflatten(-1, GRID)
    out: Tensor = (w.unsqueeze(-1) * v[:, :, None, None]).sum((-3, -2))
    return out


def in_a_cube(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(3, (5, 1)) for t in (q, k, v))
    s = torch.einsum("bhyxzd,bhijkd->bhyxzijk", q, k)
    return torch.einsum("bhyxzijk,bhijkd->bhyxzd", s.flatten(-3).softmax(-1).view(s.shape), v).squeeze(-2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("program", [over_grid(), over_grid("ji"), summed, in_a_cube])
def test_keys_in_several_axes_are_keys(program: Callable[..., Tensor], dynamic: bool) -> None:
    given = [torch.randn(2, 3, *GRID, D, requires_grad=True) for _ in range(3)]
    (site,) = agrees(program, *given, dynamic=dynamic).sites
    assert site.fused and (dynamic or "K=20" in site.spec), site


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_softmax_over_some_of_the_axes_stays(axis: int) -> None:
    program = over_grid(softmax=lambda s: s.softmax(axis))
    (site,) = agrees(program, *(torch.randn(2, 3, *GRID, D) for _ in range(3))).sites
    assert not site.fused and "another axis" in str(site.reason)
