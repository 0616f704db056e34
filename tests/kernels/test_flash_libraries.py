"""flash-attn 2, 3 and 4 as their operators call them, with stand-ins for the libraries in plain torch.

A stand-in has the signature of the library's function, computes what the arguments say, and knows nothing
about its caller.  So an argument that is dropped or misplaced, in either direction, changes the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.kernels import Target, flash_ops, gates, torch_flash
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dropout,
    KeyPadding,
    Mask,
    Scale,
    ScaleBy,
    Sink,
    SoftCap,
)
from tests.attention_cases import INF


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float = 0.0,
    slopes: Tensor | None = None, sink: Tensor | None = None, kept: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``[B, S, H, D]``; the window is aligned at the last query and key, and -1 is unbounded."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    gap = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    s = torch.tanh(s / softcap) * softcap if softcap else s
    s = s if slopes is None else s - slopes[:, None, None] * gap.abs()
    s = s.masked_fill(gap < -left, -INF) if left >= 0 else s
    s = s.masked_fill(gap > right, -INF) if right >= 0 else s
    whole = s if sink is None else torch.cat([s, sink[:, None, None].expand(*s.shape[:3], 1)], -1)
    p = whole.softmax(-1)[..., : k.shape[1]] * kept
    return torch.einsum("bhqk,bkhd->bqhd", p, v), whole.logsumexp(-1)


def again(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
    scale: float, left: int, right: int, softcap: float, slopes: Tensor | None = None,
    kept: Tensor | float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """The gradients of :func:`attention`; its results must be those of the forward pass."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([] if sink is None else [sink]))]
    with torch.enable_grad():
        q, k, v, *rest = leaves
        result, log_sum_exp = attention(
            q, k, v, scale, left, right, softcap, slopes, rest[0] if rest else None, kept
        )
    torch.testing.assert_close(result.detach(), out)
    torch.testing.assert_close(log_sum_exp.detach(), lse)
    return list(torch.autograd.grad(result, leaves, grad))


def dropped(q: Tensor, k: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor | float:
    """What is left of the weights; drawn again from the state."""
    if not dropout_p:
        return 1.0
    generator = torch.Generator().manual_seed(int(rng_state[0]))
    drawn = torch.rand(q.shape[0], q.shape[2], q.shape[1], k.shape[1], generator=generator)
    return (drawn >= dropout_p).to(q.dtype) / (1 - dropout_p)


class Interface:
    """The functions of a library; ``deterministic`` records that argument of its backward passes."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []


class Interface2(Interface):
    """``flash_attn.flash_attn_interface``, version 2.8."""

    def _flash_attn_forward(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rng, right = torch.tensor([7, 0]), 0 if causal else window_size_right
        kept = dropped(q, k, dropout_p, rng)
        out, lse = attention(
            q, k, v, softmax_scale, window_size_left, right, softcap, alibi_slopes, kept=kept
        )
        return out, lse, q.new_empty(0), rng

    def _flash_attn_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.deterministic.append(deterministic)
        kept = dropped(q, k, dropout_p, torch.tensor([8, 0]) if rng_state is None else rng_state)
        gradients = again(
            dout, out, softmax_lse, q, k, v, None, softmax_scale, window_size_left,
            0 if causal else window_size_right, softcap, alibi_slopes, kept=kept,
        )  # fmt: skip
        for mine, given in zip((dq, dk, dv), gradients, strict=True):
            mine.copy_(given)
        return softmax_lse


class Interface3(Interface):
    """``torch.ops.flash_attn_3``."""

    def fwd(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, num_splits: int = 0,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert num_splits == 1, "more are summed in an order of their own"
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        right = 0 if is_causal else window_size_right
        return attention(q, k, v, scale, window_size_left, right, softcap)

    def bwd(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, *, softmax_scale: float | None = None, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.deterministic.append(deterministic)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        right = 0 if is_causal else window_size_right
        gradients = again(dout, out, softmax_lse, q, k, v, None, scale, window_size_left, right, softcap)
        for mine, given in zip((dq, dk, dv), gradients, strict=True):
            mine.copy_(given)


class Interface4(Interface):
    """``flash_attn.cute.interface``."""

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False,
        softcap: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None, learnable_sink: Tensor | None = None, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        left, right = flash_ops.minus_one((window_size_left, 0 if causal else window_size_right))
        out, lse = attention(q, k, v, scale, left, right, softcap or 0.0, sink=learnable_sink)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
        softmax_scale: float | None = None, causal: bool = False, softcap: float = 0.0, *,
        window_size_left: int | None = None, window_size_right: int | None = None,
        deterministic: bool = False, learnable_sink: Tensor | None = None, dq: Tensor | None = None,
        dk: Tensor | None = None, dv: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        self.deterministic.append(deterministic)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        left, right = flash_ops.minus_one((window_size_left, 0 if causal else window_size_right))
        return again(dout, out, lse, q, k, v, learnable_sink, scale, left, right, softcap)


LIBRARIES: dict[str, tuple[Any, type[Interface]]] = {
    "flash2": (flash_ops.Flash2, Interface2),
    "flash3": (flash_ops.Flash3, Interface3),
    "flash4": (flash_ops.Flash4, Interface4),
}


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Interface]]:
    """The operators on CPU tensors, each over the stand-in of its library."""
    adapters, stand_ins = {}, {}
    for name, (adapter, interface) in LIBRARIES.items():
        adapters[name], stand_ins[name] = adapter.__new__(adapter), interface()
        adapters[name].interface = stand_ins[name]
    monkeypatch.setattr(flash_ops, "library", adapters.__getitem__)
    with torch.library._scoped_library("fusepass", "FRAGMENT") as scope:
        for name in LIBRARIES:
            scope.impl(name, flash_ops._forward(name), "CPU")
            scope.impl(f"{name}_backward", flash_ops._backward(name), "CPU")
        yield stand_ins


@dataclass(frozen=True)
class Call:
    """Arguments of the operators."""

    scale: float = 0.2
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    extra: str = ""
    kv_heads: int = 4
    value_dim: int = 8


CALLS: dict[str, tuple[str, Call]] = {
    "plain": ("flash2 flash3 flash4", Call()),
    "another scale": ("flash2 flash3 flash4", Call(scale=0.7)),
    "grouped": ("flash2 flash3 flash4", Call(kv_heads=2)),
    "causal": ("flash2 flash3 flash4", Call(right=0)),
    "window": ("flash2 flash3 flash4", Call(left=2, right=0)),
    "window to both sides": ("flash2 flash3 flash4", Call(left=1, right=2)),
    "window of the past": ("flash2 flash3 flash4", Call(left=1)),
    "window of the future": ("flash2 flash3 flash4", Call(right=1)),
    "softcap": ("flash2 flash3 flash4", Call(softcap=0.8)),
    "softcap and window": ("flash2 flash3 flash4", Call(left=2, right=0, softcap=0.8, kv_heads=1)),
    "dropout": ("flash2", Call(dropout=0.4)),
    "slopes": ("flash2", Call(right=0, extra="slopes")),
    "everything of flash 2": ("flash2", Call(0.5, 2, 0, 0.9, 0.3, "slopes", 2)),
    "sink": ("flash4", Call(extra="sink")),
    "sink and window": ("flash4", Call(0.5, 2, 0, extra="sink", kv_heads=2)),
    "sink and softcap": ("flash4", Call(0.5, None, 0, 0.9, extra="sink")),
    "values of another size": ("flash4", Call(value_dim=5)),
}


@pytest.mark.parametrize(
    ("name", "words"), [(n, w) for w, (names, _) in CALLS.items() for n in names.split()]
)
@pytest.mark.parametrize("queries", [6, 9])
def test_results_and_gradients_are_those_of_the_call(
    name: str, words: str, queries: int, interfaces: dict[str, Interface]
) -> None:
    """Every argument arrives, forward and backward."""
    c = CALLS[words][1]
    q, k, v = (
        torch.randn(2, n, h, d, dtype=torch.float64, requires_grad=True)
        for n, h, d in ((queries, 4, 8), (9, c.kv_heads, 8), (9, c.kv_heads, c.value_dim))
    )
    extra = torch.rand(4, dtype=torch.float64, requires_grad=c.extra == "sink") if c.extra else None
    left, right = (-1 if b is None else b for b in (c.left, c.right))
    want = attention(
        q, k, v, c.scale, left, right, c.softcap, extra if c.extra == "slopes" else None,
        extra if c.extra == "sink" else None, dropped(q, k, c.dropout, torch.tensor([7, 0])),
    )[0]  # fmt: skip
    operator = getattr(torch.ops.fusepass, name)
    got = operator(q, k, v, extra, c.scale, c.left, c.right, c.softcap, c.dropout)[0]
    torch.testing.assert_close(got, want)
    leaves = [t for t in (q, k, v, extra) if t is not None and t.requires_grad]
    weights = torch.randn_like(want)
    for mine, true in zip(
        torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True
    ):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("wanted", [False, True])
def test_backward_passes_are_deterministic_where_that_is_asked_for(
    name: str, wanted: bool, interfaces: dict[str, Interface]
) -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    torch.use_deterministic_algorithms(wanted)
    try:
        getattr(torch.ops.fusepass, name)(q, q, q, None, 0.3, None, 0, 0.0, 0.0)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert interfaces[name].deterministic == [wanted]


# ---------------------------------------------------------------------------------------- PyTorch's window

CUDA = Target("cuda", False, False)
BAND = Mask(0, -INF, atoms=(Band(7, 0),))
HALF = torch.bfloat16


def windowed(*scores: Any, **more: Any) -> Attention:
    default = Attention(2, 4, 2, 64, 64, 64, 64, HALF, scores or (Scale(0.1), BAND), out_dtype=HALF)
    return replace(default, **more)


NO_WINDOW: dict[str, tuple[Attention, Target, torch.dtype]] = {
    "a sink": (windowed(sink=Sink(1, "h")), CUDA, HALF),
    "dropout": (windowed(weights=(Dropout(0.1),)), CUDA, HALF),
    "a CPU": (windowed(), replace(CUDA, device="cpu"), HALF),
    "a graph of ATen": (windowed(), replace(CUDA, aten=True), HALF),
    "float32": (windowed(), CUDA, torch.float32),
    "two head sizes": (windowed(value_dim=32), CUDA, HALF),
    "an odd head size": (windowed(head_dim=60, value_dim=60), CUDA, HALF),
    "wide heads": (windowed(head_dim=264, value_dim=264), CUDA, HALF),
    "a softcap": (windowed(SoftCap(5.0), BAND), CUDA, HALF),
    "a bias": (windowed(Bias(1, "hij"), BAND), CUDA, HALF),
    "a causal mask, which SDPA has": (windowed(Mask(0, -INF, atoms=(Band(None, 0),))), CUDA, HALF),
    "padding": (windowed(BAND, Mask(0, -INF, atoms=(KeyPadding(),))), CUDA, HALF),
    "rows that see no key": (windowed(rows_seen=False), CUDA, HALF),
    "a fill within reach": (windowed(replace(BAND, fill=-1e4)), CUDA, HALF),
    "a band off the diagonal": (windowed(queries=32), CUDA, HALF),
}


@pytest.mark.parametrize("name", NO_WINDOW)
def test_what_the_window_of_pytorch_does_not_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "capability", lambda: (9, 0))
    assert torch_flash.window(*NO_WINDOW[name]) is None


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        (windowed(), (7, 0)),
        (windowed(Scale(-2.0), ScaleBy(1, "hi"), BAND), (7, 0)),
        (windowed(Mask(0, -INF, atoms=(Band(3, 2),))), (3, 2)),
        (windowed(Mask(0, -INF, atoms=(Band(3, None),))), (3, None)),
        (windowed(head_dim=256, value_dim=256), (7, 0)),
    ],
)
def test_what_the_window_of_pytorch_computes(
    given: Attention, bounds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "capability", lambda: (8, 0))
    assert torch_flash.window(given, CUDA, torch.float16) == bounds
    for have in (None, (7, 5), (11, 0)):
        monkeypatch.setattr(gates, "capability", lambda have=have: have)
        assert torch_flash.window(given, CUDA, torch.float16) is None
