"""Attention whose operands, scores and masks are written to in place."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusepass
from tests import checking

B, H, N, D = 2, 3, 7, 8
SCALE = D**-0.5
INF = math.inf
SEEN = torch.ones(N, N).tril().bool()
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(s: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(s, -1) @ v


def query_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q *= SCALE
    return attention(q @ k.mT, v)


def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q.mul_(SCALE**0.5)
    k.mul_(SCALE**0.5)
    return attention(q @ k.mT, v)


def query_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q /= D**0.5
    return attention(torch.einsum("bhid,bhjd->bhij", q, k), v)


def query_scaled_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = q.flatten(0, 1)
    flat *= SCALE
    s = torch.bmm(flat, k.flatten(0, 1).mT).view(B, H, N, N)
    return attention(s.masked_fill_(~SEEN, -INF), v)


def position_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q += torch.linspace(-1, 1, D).to(q)
    q *= SCALE
    return attention(q @ k.mT, v)


def bias_of_the_scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q *= SCALE
    s = q @ k.mT
    s += q @ torch.linspace(-1, 1, N * D).view(D, N).to(q)
    return attention(s, v)


def scores_all_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= SCALE
    s += torch.zeros(N, N).masked_fill_(~SEEN, -1e9)
    s -= s.amax(-1, keepdim=True)
    s.exp_()
    s /= s.sum(-1, keepdim=True)
    return s @ v


def diagonal_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    s.diagonal(dim1=-2, dim2=-1).fill_(-1e9)
    return attention(s, v)


def diagonal_of_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(N, N, dtype=torch.bool).fill_diagonal_(True)
    return attention((q @ k.mT * SCALE).masked_fill(hidden, -INF), v)


def upper_diagonal_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    torch.diagonal(s, 1, 2, 3).fill_(-INF)
    return attention(s, v)


def method_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The receiver of the method is kept, not the condition."""
    s = q @ k.mT * SCALE
    s += torch.zeros(N, N).where(SEEN, torch.tensor(-1e9))
    return attention(s.where(SEEN, -INF), v)


def heads_moved_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.contiguous() * 1.0
    k.transpose_(-1, -2)
    return attention(q @ k * SCALE, v)


TRAINABLE: tuple[Attend, ...] = (
    query_scaled, both_scaled, query_divided, query_scaled_through_a_view, position_added,
    bias_of_the_scaled_query, diagonal_hidden, diagonal_of_a_mask, upper_diagonal_hidden,
    method_where, heads_moved_in_place,
)  # fmt: skip


def product_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.new_empty(B, H, N, N)
    torch.matmul(q, k.mT, out=s)
    s *= SCALE
    return attention(s, v)


def bias_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q.new_empty(B, H, N, N)
    torch.add(q @ k.mT * SCALE, torch.linspace(-1, 1, N).to(q), out=s)
    return attention(s, v)


def weights_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    torch.softmax(s, -1, out=s)
    out: Tensor = s @ v
    return out


#: Autograd does not differentiate these, in eager mode either.
WRITTEN: tuple[Attend, ...] = (scores_all_in_place, product_written, bias_written, weights_written)


class Projected:
    """Queries, keys and values that are the function's own, so that it may write to them."""

    def __init__(self, attend: Attend, together: bool) -> None:
        self.attend, self.together = attend, together

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        parts = F.linear(x, w).chunk(3, -1) if self.together else [F.linear(x, part) for part in w.chunk(3)]
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in parts)
        return self.attend(q, k, v)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    width = H * D
    return {"x": torch.randn(B, N, width), "w": torch.randn(3 * width, width) / width**0.5}


def compare(attend: Attend, together: bool, dtype: torch.dtype, grads: bool) -> None:
    program = Projected(attend, together)
    eager, exact = (checking.call(program, inputs(), t, grads) for t in (dtype, torch.float64))
    for kernel in ("auto", "reference"):
        torch._dynamo.reset()
        got = checking.call(checking.compiled(program, kernel, "aot_eager"), inputs(), dtype, grads)
        assert got.site.fused, got.site.reason
        checking.assert_same_accuracy(got, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("together", [False, True], ids=["three projections", "one projection"])
@pytest.mark.parametrize("attend", [*TRAINABLE, *WRITTEN], ids=lambda f: f.__name__)
def test_forward(attend: Attend, together: bool, dtype: torch.dtype) -> None:
    compare(attend, together, dtype, grads=False)


@pytest.mark.parametrize("attend", TRAINABLE, ids=lambda f: f.__name__)
def test_training(attend: Attend) -> None:
    compare(attend, False, torch.float32, grads=True)


def test_a_scale_written_into_the_query_stays_in_it() -> None:
    """The scaled query is used: the unscaled one, which the write overwrote, no longer exists."""
    spec = fusepass.explain(Projected(query_scaled, False), *inputs().values()).sites[0].spec
    assert "scale" not in spec, spec


def test_a_shape_that_changes_in_place_is_not_read_too_early() -> None:
    """The record of `y` holds its shape after `transpose_`; the reshape of `x` must not be read with it."""

    def program(x: Tensor) -> Tensor:
        y = x.reshape(B, 4, 4, D).clone()
        z = torch.softmax(y @ y.mT, -1) @ y
        y.transpose_(1, 2)
        return z + torch.softmax(y @ y.mT, -1) @ y

    torch._dynamo.reset()
    x = torch.randn(B, 16, D)
    got = checking.compiled(program, inner="aot_eager")(x)
    torch.testing.assert_close(got, program(x))


# ---------------------------------------------------------------------------------------- what stays


def query_written_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.softmax(q @ k.mT * SCALE, -1)
    q *= 0
    return w @ v + q


def diagonal_visible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    s.diagonal(dim1=-2, dim2=-1).zero_()
    return attention(s, v)


def diagonal_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    return attention(s, v) + torch.diagonal(s, 0, 2, 3).unsqueeze(-1)


def written_by_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * SCALE
    s.diagonal(dim1=-2, dim2=-1).add_(torch.arange(float(N)))
    return attention(s, v)


STAYS: dict[Attend, str] = {
    query_written_after: "written over",
    diagonal_visible: "within reach",
    diagonal_read: "scores or weights",
    written_by_positions: "written to",
}


@pytest.mark.parametrize("attend", STAYS, ids=lambda f: f.__name__)
def test_stays_with_a_reason(attend: Attend) -> None:
    torch._dynamo.reset()
    program = Projected(attend, False)
    got = checking.call(checking.compiled(program, "sdpa", "aot_eager"), inputs())
    assert [s.fused for s in got.sites] == [False], got.sites
    assert STAYS[attend] in (got.site.reason or ""), got.site.reason
    checking.assert_identical(got.out, checking.call(program, inputs()).out)
