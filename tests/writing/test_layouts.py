"""Layouts: strides that readers of a result depend on, results written into slices, strided operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.reports import collector
from tests import checking
from tests.capture import agrees, close, compiled, dynamo_graph

B, H, N, D = 2, 4, 24, 16
KERNELS = ("auto", "sdpa", "flex", "reference")
Program = Callable[..., Any]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v


def split_heads() -> list[Tensor]:
    """Query, key and value ``[B, H, N, D]`` as views of ``[B, N, H, D]``, as a projection gives them."""
    return [torch.randn(B, N, H, D).transpose(1, 2) for _ in range(3)]


def channels_first() -> list[Tensor]:
    """``[B, H, D, N]``, as a convolution gives them."""
    return [torch.randn(B, H, D, N) for _ in range(3)]


# ------------------------------------------------------------------------------- readers in the graph


def view_of_two_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v).view(B, -1, D) + 1


def view_of_folded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v).view(B * H, N, D) + 1


def asks_whether_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attention(q, k, v)
    return out.view(-1, D) if out.is_contiguous() else out.reshape(-1, D) * 2


def asks_for_strides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attention(q, k, v)
    return out / out.stride(1)


def as_strided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.as_strided(attention(q, k, v), (B, H, N, D), (H * N * D, N * D, D, 1)) + 1


def written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attention(q, k, v)
    out.view(-1).mul_(2)
    return out


def written_through_flatten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a contiguous tensor `flatten` is a view: the write is seen."""
    out = attention(q, k, v)
    out.flatten()[0] = 7
    return out


def written_through_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attention(q, k, v)
    out.reshape(B, H * N, D).add_(1)
    return out


def view_of_a_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pointwise operations pass the layout on."""
    return (attention(q, k, v) * 2 + 1).view(B, -1, D)


READERS: list[Program] = [
    view_of_two_axes,
    view_of_folded_heads,
    asks_whether_contiguous,
    asks_for_strides,
    as_strided,
    written_through_a_view,
    written_through_flatten,
    written_through_reshape,
    view_of_a_sum,
]


def same_layout(got: Tensor, want: Tensor) -> None:
    """Equal numbers in equal places of memory."""
    close(got, want)
    assert got.stride() == want.stride(), f"strides {got.stride()}, eager's {want.stride()}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("program", READERS, ids=lambda f: f.__name__)
def test_readers_find_eagers_layout(program: Program, kernel: str) -> None:
    args = split_heads()
    got, seen = compiled(program, *args, kernel=kernel)
    assert [s.fused for s in seen.sites] == [True] and not seen.notes
    same_layout(got, program(*args))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_view_of_a_product_written_transposed(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (q.transpose(-2, -1) @ k * 0.25).softmax(-1)
        return (v @ w.transpose(-2, -1)).view(B, -1, 4, 6) + 1

    args = channels_first()
    got, seen = compiled(program, *args, kernel=kernel)
    assert [s.fused for s in seen.sites] == [True] and not seen.notes
    same_layout(got, program(*args))


# ------------------------------------------------------------------------------- readers outside


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_returned_result_has_eagers_strides(kernel: str, train: bool) -> None:
    args = [t.requires_grad_(train) for t in split_heads()]
    got, seen = compiled(attention, *args, kernel=kernel)
    assert seen.sites[0].fused or (train and kernel == "flex")
    same_layout(got, attention(*args))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_view_after_a_graph_break(kernel: str) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return out.view(B, -1, D) + 1

    args = split_heads()
    fn = checking.compiled(program, kernel, fullgraph=False)
    with collector.collect() as seen, torch.no_grad():
        got = fn(*args)
    assert [s.fused for s in seen.sites] == [True] and not seen.notes
    same_layout(got, program(*args))


def test_a_view_by_the_caller() -> None:
    args = split_heads()
    got, _ = compiled(attention, *args, kernel="auto")
    close(got.view(B, -1, D), attention(*args).view(B, -1, D))


# ------------------------------------------------------------------------------- nobody looks

COPIES = ("contiguous", "clone", "copy", "as_strided", "to_memory_format")


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v).transpose(1, 2).reshape(B, N, H * D)


def projected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(q, k, v) @ torch.ones(H * D, 8)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(*(t.transpose(1, 2) for t in (q, k, v))).sum(1)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2).relu()


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("program", [merged, projected, summed, flattened], ids=lambda f: f.__name__)
def test_no_copy_where_nobody_looks(program: Program, kernel: str) -> None:
    graph = dynamo_graph(program, *(torch.randn(B, N, H, D) for _ in range(3)))
    report = rewrite_graph(graph, Options(kernel=kernel))
    assert [s.fused for s in report.sites] == [True]
    names = [str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes if n.op != "output"]
    assert not [n for n in names if any(c in n for c in COPIES)], names


# ------------------------------------------------------------------------------- written into slices


def by_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for b in range(B):
        out[b] = attention(q[b], k[b], v[b])
    return out


def every_second_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for r in range(2):
        out[:, :, r::2] = attention(q[:, :, r::2], k[:, :, r::2], v[:, :, r::2])
    return out


def chunks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    half = N // 2
    out[:, :, :half].copy_(attention(q[:, :, :half], k, v))
    out[:, :, half:].copy_(attention(q[:, :, half:], k, v))
    return out


def copied_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q).copy_(attention(q, k, v))


def added_to_a_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.ones_like(q)
    out[:, :, : N // 2] += attention(q[:, :, : N // 2], k, v)
    return out


def into_a_copy_of_the_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    q[0] = attention(q[0], k[0], v[0])
    return q * 1


def into_the_argument(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q[0] = attention(q[0], k[0], v[0])
    return q * 1


def into_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v[0] = attention(q[0], k[0], v[0])
    return v * 1


def added_to_the_argument(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A residual connection in place."""
    q += attention(q, k, v)
    return q * 1


WRITTEN: dict[Program, int] = {
    by_batch: 2,
    every_second_row: 2,
    chunks_of_queries: 2,
    copied_whole: 1,
    added_to_a_slice: 1,
    into_a_copy_of_the_query: 1,
    into_the_argument: 1,
    into_the_values: 1,
    added_to_the_argument: 1,
}


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("program", WRITTEN, ids=lambda f: f.__name__)
def test_results_written_into_slices(program: Program, kernel: str) -> None:
    seen = agrees(program, *(torch.randn(B, H, N, D) for _ in range(3)), kernel=kernel)
    assert [s.fused for s in seen.sites] == [True] * WRITTEN[program], seen.sites


def test_gradients_through_a_written_slice() -> None:
    inputs = {name: torch.randn(B, H, N, D) for name in ("q", "k", "v")}
    got = checking.call(checking.compiled(by_batch), inputs, grads=True)
    eager, exact = (checking.call(by_batch, inputs, dtype, grads=True) for dtype in (None, torch.float64))
    assert len(got.sites) == 2 and all(s.fused for s in got.sites)
    checking.assert_same_accuracy(got, eager, exact)


# ------------------------------------------------------------------------------- strided operands


def convolved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(*(t.transpose(-2, -1) for t in (q, k, v)))


def values_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q.transpose(-2, -1).contiguous(), k.transpose(-2, -1).contiguous(), v.transpose(-2, -1))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("program", [convolved, values_alone], ids=lambda f: f.__name__)
def test_heads_with_strided_elements_take_sdpa(program: Program, train: bool) -> None:
    """Fused kernels need contiguous elements in each head: three copies are made, and SDPA is still taken."""
    inputs = dict(zip("qkv", channels_first(), strict=True))
    got = checking.call(checking.compiled(program), inputs, grads=train)
    eager, exact = (checking.call(program, inputs, dtype, grads=train) for dtype in (None, torch.float64))
    assert (got.site.fused, got.site.kernel, got.site.rejected) == (True, "sdpa", ())
    checking.assert_same_accuracy(got, eager, exact)


# ------------------------------------------------------------------------------- learned operands


class Learned(nn.Module):
    """A learned temperature, bias or both, and perhaps a softcap, which SDPA does not have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(H, N, N))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-2, -1)
        if "temperature" in self.how:
            s = s * self.temperature
        if "softcap" in self.how:
            s = s.tanh() * 3.0
        if "bias" in self.how:
            s = s + self.bias
        return s.softmax(-1) @ v


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("how", ["temperature", "bias", "temperature, softcap", "softcap, bias"])
def test_parameters_need_no_gradient_where_none_is_recorded(how: str, mode: Callable[[], Any]) -> None:
    model, args = Learned(how), [torch.randn(B, H, N, D) for _ in range(3)]
    with mode():
        got, seen = compiled(model, *args, kernel="auto")
        close(got, model(*args))
    (site,) = seen.sites
    assert site.fused, site.reason
    assert not [why for _, why in site.rejected if "gradient" in why], site.rejected
