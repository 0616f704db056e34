"""Aliasing and mutation: whatever is written, the numbers are the same as eager's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from tests.capture import agrees, dynamo_graph, qkv

INF = math.inf
N = 6
TRIL = torch.ones(N, N, dtype=torch.bool).tril()


def product(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * 0.25


# ---------------------------------------------------------------------------------------- understood


def fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s.masked_fill_(~TRIL, -INF)
    return s.softmax(-1) @ v


def set_by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s[..., ~TRIL] = -INF
    return s.softmax(-1) @ v


def set_by_full_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s[(~TRIL).expand_as(s)] = -INF
    return s.softmax(-1) @ v


def set_a_range(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s[..., 4:] = -INF
    return s.softmax(-1) @ v


def set_negative_indices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s[:, :, -2:, -1] = -1e30
    return s.softmax(-1) @ v


def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= 0.5
    s += torch.arange(float(N))
    s -= 1.0
    s /= 3.0
    return s.softmax(-1) @ v


def after_a_temporary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s += torch.arange(float(N))
    s -= 1.0
    return s.softmax(-1) @ v


def weights_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = product(q, k).softmax(-1)
    w.mul_(2.0)
    return w @ v


def bias_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = torch.full((N, N), -INF)
    b.triu_(1)
    return (product(q, k) + b).softmax(-1) @ v


def bias_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = torch.zeros(N, N)
    b[2:4, 1:3] = -INF
    return (product(q, k) + b).softmax(-1) @ v


def mask_cleared_after_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = ~TRIL
    s = product(q, k).masked_fill(hidden, -INF)
    hidden.zero_()
    return s.softmax(-1) @ v


def input_written_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q.add_(1.0)
    return product(q, k).softmax(-1) @ v


def weights_cleared_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = product(q, k).softmax(-1)
    out = w @ v
    w.zero_()
    return out


def result_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = product(q, k).softmax(-1) @ v
    out.add_(1.0)
    return out


def result_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = product(q, k).softmax(-1) @ v
    out.view(-1).mul_(2.0)
    return out


def cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8)
    keys[:, :, 3:] = k
    values[:, :, 3:].copy_(v)
    return product(q, keys).softmax(-1) @ values


FUSED: list[Callable[..., Any]] = [
    fill,
    set_by_mask,
    set_by_full_mask,
    set_a_range,
    set_negative_indices,
    operators,
    after_a_temporary,
    weights_scaled,
    bias_filled,
    bias_block,
    mask_cleared_after_use,
    input_written_before,
    weights_cleared_after,
    result_written,
    result_written_through_a_view,
    cache,
]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("program", FUSED)
def test_writes_that_are_understood(program: Callable[..., Any], kernel: str) -> None:
    seen = agrees(program, *qkv(), kernel=kernel)
    assert [site.fused for site in seen.sites] == [True], seen.sites


# ---------------------------------------------------------------------------------------- right, fused or not


def through_a_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s[..., 4:].fill_(-INF)
    return s.softmax(-1) @ v


def through_a_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s.transpose(-1, -2).mul_(torch.arange(float(N)))
    return s.softmax(-1) @ v


def through_a_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    s.diagonal(dim1=-2, dim2=-1).fill_(-INF)
    return s.softmax(-1) @ v


def scores_written_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = product(q, k)
    w = s.softmax(-1)
    s.add_(100.0)
    return w @ v, s


def q_written_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q = q * 1.0
    s = product(q, k)
    q.add_(1.0)
    return s.softmax(-1) @ v, q


def input_q_written_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    q.add_(1.0)
    return s.softmax(-1) @ v


def q_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    q.view(-1)[:8].zero_()
    return s.softmax(-1) @ v


def k_written_through_its_base(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = k.transpose(-1, -2)
    s = q @ turned
    k.zero_()
    return s.softmax(-1) @ v


def contiguous_may_share(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    same = k.contiguous()
    s = product(q, same)
    same.zero_()
    return s.softmax(-1) @ v


def clone_does_not_share(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    other = k.clone()
    k.zero_()
    return product(q, other).softmax(-1) @ v


def to_the_same_dtype_shares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    same = k.to(torch.float32)
    s = product(q, k)
    same.zero_()
    return s.softmax(-1) @ v


def values_written_around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, k)
    v.mul_(2.0)
    out = s.softmax(-1) @ v
    v.mul_(3.0)
    return out


def bias_written_after_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = torch.zeros(N, N)
    s = product(q, k) + b
    b.add_(5.0 * torch.arange(N))
    return s.softmax(-1) @ v


def bias_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = torch.zeros(N, N)
    b.view(N * N).add_(0.3 * torch.arange(N * N))
    return (product(q, k) + b).softmax(-1) @ v


def two_views_of_one_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = torch.zeros(N, N)
    rows, columns = b.view(N, N), b.t()
    rows[0] = 3.0
    columns[1] += 2.0
    return (product(q, k) + b + columns).softmax(-1) @ v


def out_argument(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.empty(2, 2, N, N)
    torch.matmul(q, k.mT, out=s)
    return s.softmax(-1) @ v


def softmax_into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.zeros(2, 2, N, N)
    w.copy_(product(q, k).softmax(-1))
    w[0] *= 0.5
    return w @ v


def values_written_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    v = v.clone()
    out = product(q, k).softmax(-1) @ v
    v[0] = 3.0
    return out, v


def one_input_is_anothers_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = product(q, q)
    q[0].add_(1.0)
    return s.softmax(-1) @ q


RIGHT: list[Callable[..., Any]] = [
    through_a_slice,
    through_a_transpose,
    through_a_diagonal,
    scores_written_after_the_softmax,
    q_written_after_the_product,
    input_q_written_after_the_product,
    q_written_through_a_view,
    k_written_through_its_base,
    contiguous_may_share,
    clone_does_not_share,
    to_the_same_dtype_shares,
    values_written_around,
    bias_written_after_the_sum,
    bias_written_through_a_view,
    two_views_of_one_bias,
    out_argument,
    softmax_into,
    values_written_after,
    one_input_is_anothers_view,
]


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("program", RIGHT)
def test_writes_never_change_the_numbers(program: Callable[..., Any], kernel: str) -> None:
    agrees(program, *qkv(), kernel=kernel)


# ---------------------------------------------------------------------------------------- buffers


class Masked(torch.nn.Module):
    """A mask buffer that changes between two uses."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", TRIL.clone())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first = product(q, k).masked_fill(~self.mask, -INF).softmax(-1) @ v
        self.mask.fill_(True)
        second = product(q, k).masked_fill(~self.mask, -INF).softmax(-1) @ v
        self.mask.tril_()
        return first, second


class Counted(torch.nn.Module):
    """A buffer that grows with every call scales the scores."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls.add_(1)
        return (product(q, k) * self.calls).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("make", [Masked, Counted])
def test_buffers_that_change(make: Callable[[], torch.nn.Module], kernel: str) -> None:
    eager, model, args = make(), make(), qkv()
    fused = torch.compile(model, backend="fusepass", options={"inner": "eager", "kernel": kernel})
    for _ in range(3):
        torch.testing.assert_close(fused(*args), eager(*args))
    torch.testing.assert_close(dict(model.named_buffers()), dict(eager.named_buffers()))


# ---------------------------------------------------------------------------------------- packed projections


def by_chunk(x: Tensor) -> Any:
    return x.chunk(3, -1)


def by_split(x: Tensor) -> Any:
    return x.split(8, dim=-1)


def by_sizes(x: Tensor) -> Any:
    return torch.split(x, [8, 8, 8], dim=-1)


def by_unbind(x: Tensor) -> Any:
    return x.unflatten(-1, (3, 8)).unbind(-2)


def by_permute(x: Tensor) -> Any:
    return x.view(2, 2, N, 3, 8).permute(3, 0, 1, 2, 4).unbind(0)


def by_index(x: Tensor) -> Any:
    parts = x.reshape(2, 2, N, 3, 8)
    return parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]


def by_slices(x: Tensor) -> Any:
    return x[..., :8], x[..., 8:16], x[..., 16:]


def by_narrow(x: Tensor) -> Any:
    return tuple(x.narrow(-1, 8 * n, 8) for n in range(3))


PACKED: list[Callable[[Tensor], Any]] = [
    by_chunk, by_split, by_sizes, by_unbind, by_permute, by_index, by_slices, by_narrow,
]  # fmt: skip


@pytest.mark.parametrize("parts", PACKED)
def test_packed_projections_fuse(parts: Callable[[Tensor], Any]) -> None:
    def program(x: Tensor) -> Any:
        q, k, v = parts(x)
        return product(q, k).softmax(-1) @ v

    for kernel in ("reference", "auto"):
        seen = agrees(program, torch.randn(2, 2, N, 24), kernel=kernel)
        assert [site.fused for site in seen.sites] == [True], seen.sites


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("parts", PACKED)
def test_a_written_part_of_a_packed_projection(parts: Callable[[Tensor], Any], which: int) -> None:
    def program(x: Tensor) -> Any:
        x = x * 1.0
        qkv = parts(x)
        s = product(qkv[0], qkv[1])
        qkv[which].mul_(2.0)
        return s.softmax(-1) @ qkv[2]

    def whole(x: Tensor) -> Any:
        x = x * 1.0
        qkv = parts(x)
        s = product(qkv[0], qkv[1])
        x.add_(1.0)
        return s.softmax(-1) @ qkv[2]

    agrees(program if which else whole, torch.randn(2, 2, N, 24))


# -------------------------------------------------------------------------------------- operators as methods


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(N)
    label = (n.diff(prepend=n[:1] - 1) != 1).cumsum(-1)
    s = product(q, k)
    s += torch.where((n <= n[:, None]) & (label[None] == label[:, None]), 0.0, -INF)
    return s.softmax(-1) @ v


def test_operators_written_as_methods() -> None:
    """``x.__eq__(y)`` is ``x == y``, and ``x.__iadd__(y)`` writes: Dynamo of torch 2.11 writes such calls."""
    plain, methods = (dynamo_graph(packed, *qkv(), dynamic=False) for _ in range(2))
    changed = set()
    for node in methods.graph.nodes:
        module = getattr(node.target, "__module__", "")
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and module == "_operator" and isinstance(node.args[0], fx.Node):
            node.op, node.target = "call_method", f"__{name.rstrip('_')}__"
            changed.add(node.target)
    assert {"__eq__", "__ne__", "__le__", "__iadd__", "__and__"} <= changed
    want, got = (rewrite_graph(g, Options(kernel="reference")).sites for g in (plain, methods))
    assert got[0].fused and got[0].spec == want[0].spec and got[0].kind == "causal", got
    given = qkv()
    torch.testing.assert_close(methods(*given), plain(*given))


def test_results_that_are_none() -> None:
    """An axis of size 0 has nothing to unbind."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        none = q.new_zeros(0, 3).unbind(0)
        return product(q, k).softmax(-1) @ v + len(none)

    seen = agrees(program, *qkv())
    assert [site.fused for site in seen.sites] == [True], seen.sites
