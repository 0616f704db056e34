"""GroupQueryAttention of ONNX Runtime: windows, sinks, caches, rotary embeddings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.onnx_models import Attention, attributes, drawn, exported, nodes, run, sharpened, used

BATCH, LENGTH, PAST = torch.export.Dim("batch"), torch.export.Dim("length"), torch.export.Dim("past")
GQA = "GroupQueryAttention"


def test_a_window_in_half_precision_is_grouped_query_attention(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = sharpened(Attention(kv=2, causal=True, window=3, cap=5.0)).half()
    report = exported(model, path, drawn().half(), target="ort", dynamic_shapes=({0: BATCH, 1: LENGTH},))
    assert report.operators == {"com.microsoft.GroupQueryAttention": 1}
    written = attributes(path, "GroupQueryAttention")
    assert written["local_window_size"] == 3 and written["kv_num_heads"] == 2 and written["softcap"] == 5.0
    assert not nodes(path, "Where"), "no mask is left"


@pytest.mark.parametrize("window", [0, 3])
def test_a_sink_is_grouped_query_attention(window: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = sharpened(Attention(kv=2, causal=True, window=window, sink=True))
    report = exported(model, path, drawn(), target="ort")
    assert report.operators == {"com.microsoft.GroupQueryAttention": 1} and report.softmaxes == 0


class Windowed(nn.Module):
    """Causal attention of grouped heads within a window, after a cache."""

    def __init__(self, window: int = 3, cap: float = 0.0, sink: bool = False) -> None:
        super().__init__()
        self.window, self.cap = window, cap
        self.sink = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0])) if sink else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        s = q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 0.3
        if self.cap:
            s = torch.tanh(s / self.cap) * self.cap
        n, past = q.shape[2], past_k.shape[2]
        gap = torch.arange(past + n)[None, :] - (torch.arange(n)[:, None] + past)
        s = s.masked_fill((gap > 0) | (gap <= -self.window), -math.inf)
        if self.sink is not None:
            s = torch.cat([s, self.sink.to(s.dtype)[None, :, None, None].expand(s.shape[0], 4, n, 1)], -1)
        w = s.softmax(-1)[..., : past + n]
        return w @ v.repeat_interleave(2, 1), k, v


@pytest.mark.parametrize("kind", ["one token", "one sequence", "two sequences"])
@pytest.mark.parametrize("settings", [{}, {"cap": 2.0}, {"sink": True}])
def test_windows_after_a_cache_are_grouped_query_attention(
    settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    batch, length = {"one token": (2, 1), "one sequence": (1, 4), "two sequences": (2, 4)}[kind]
    model = Windowed(**settings).eval()
    half = torch.float32 if settings.get("sink") else torch.float16
    drawn_ = [
        torch.randn(batch, h, n, 8).to(half) for h, n in ((4, length), *[(2, length)] * 2, *[(2, 5)] * 2)
    ]
    varying = {0: BATCH} if kind == "one token" else {2: LENGTH}
    shapes = (varying,) * 3 + ({2: PAST, **(varying if 0 in varying else {})},) * 2
    report = exported(model, path, *drawn_, target="ort", dynamic_shapes=shapes)
    assert report.operators == {"com.microsoft.GroupQueryAttention": 1} and report.softmaxes == 0
    (node,) = nodes(path, "GroupQueryAttention")
    assert attributes(path, "GroupQueryAttention")["local_window_size"] == 3
    assert used(path, "GroupQueryAttention")[3:5] == [True, True]
    joined = {v.name for n in nodes(path, "Concat") for v in n.inputs if v is not None}
    assert not joined & {"past_k", "past_v"}
    assert kind == "two sequences" or all(v.is_graph_output() for v in node.outputs[1:])
    names = ("q", "k", "v", "past_k", "past_v")
    given = [*drawn_[:3], *(t[:, :, :0] for t in drawn_[3:])]
    got = run(path, **dict(zip(names, given, strict=True)))
    with torch.no_grad():
        for mine, theirs in zip(got, model(*given), strict=True):
            assert np.abs(mine - theirs.numpy()).max() < 1e-2, "an empty cache"


def test_a_window_after_a_cache_of_constant_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    new, past = [torch.randn(2, h, 1, 8).half() for h in (4, 2, 2)], torch.randn(2, 2, 2, 5, 8).half()
    report = exported(Windowed().eval(), path, *new, *past, target="ort")
    assert report.operators == {"com.microsoft.GroupQueryAttention": 1}
    assert attributes(path, "GroupQueryAttention")["local_window_size"] == 3


def test_a_window_after_a_cache_of_any_size_is_a_mask(tmp_path: Path) -> None:
    """On the CPU, GroupQueryAttention with a cache takes several queries only for a single sequence."""
    path = tmp_path / "model.onnx"
    new = [torch.randn(2, h, 4, 8).half() for h in (4, 2, 2)]
    past = [torch.randn(2, 2, 5, 8).half() for _ in range(2)]
    shapes = ({0: BATCH, 2: LENGTH},) * 3 + ({0: BATCH, 2: PAST},) * 2
    report = exported(Windowed().eval(), path, *new, *past, target="ort", dynamic_shapes=shapes)
    assert report.operators == {"Attention": 1} and used(path)[3:6] == [True] * 3


class Turning(nn.Module):
    """Causal attention of grouped heads, turned by tables, within a window, after a cache."""

    frequencies: Tensor

    def __init__(self, window: int = 0, neighbours: bool = False, keeps: bool = False) -> None:
        super().__init__()
        self.window, self.neighbours, self.keeps = window, neighbours, keeps
        self.register_buffer("frequencies", 50.0 ** -(torch.arange(8) / 8))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        if self.neighbours:
            angles = angles.repeat_interleave(2, -1)
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            angles = torch.cat([angles, angles], -1)
            other = torch.cat([-x[..., 8:], x[..., :8]], -1)
        cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
        return x * cos + other * sin

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, ...]:
        """q: ``[B, S, 4 * 16]``; k, v: ``[B, S, 2 * 16]``; the cache: ``[B, 2, P, 16]``."""
        n, past = q.shape[1], past_k.shape[2]
        q, k, v = (t.view(t.shape[0], n, -1, 16).transpose(1, 2) for t in (q, k, v))
        angles = positions[:, :, None].to(torch.float32) * self.frequencies
        q, k = self.turned(q, angles), self.turned(k, angles)
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        s = q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 0.25
        gap = torch.arange(past + n)[None, :] - (torch.arange(n)[:, None] + past)
        hidden = gap > 0
        if self.window:
            hidden = hidden | (gap <= -self.window)
        w = s.masked_fill(hidden, -math.inf).softmax(-1)
        mixed = (w @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
        return mixed, k, v


class WithoutCache(Turning):
    """``keeps``: the turned keys are an output too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Any:  # type: ignore[override]
        n = q.shape[1]
        q, k, v = (t.view(t.shape[0], n, -1, 16).transpose(1, 2) for t in (q, k, v))
        angles = positions[:, :, None].to(torch.float32) * self.frequencies
        q, k = self.turned(q, angles), self.turned(k, angles)
        s = q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 0.25
        gap = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        hidden = (gap > 0) | (gap <= -self.window) if self.window else gap > 0
        w = s.masked_fill(hidden, -math.inf).softmax(-1)
        mixed = (w @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
        return (mixed, k) if self.keeps else mixed


def half(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def turning_inputs(batch: int, n: int, past: int | None) -> list[Tensor]:
    """Queries, keys, values, one row of positions, a cache."""
    inputs = [half(batch, n, w, seed=w + j) for j, w in enumerate((64, 32, 32))]
    inputs.append((torch.arange(n) * 3 + 2)[None])
    return inputs + ([] if past is None else [half(batch, 2, past, 16, seed=j) for j in (7, 8)])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("neighbours", [False, True])
def test_rotary_embeddings_are_done_by_the_operator(neighbours: bool, window: int, tmp_path: Path) -> None:
    """Any positions will do, as long as all sequences have the same ones."""
    path = tmp_path / "model.onnx"
    shapes = ({0: BATCH, 1: LENGTH},) * 3 + ({1: LENGTH},)
    model = WithoutCache(window, neighbours).eval()
    report = exported(model, path, *turning_inputs(2, 6, None), target="ort", dynamic_shapes=shapes)
    assert report.operators == {"com.microsoft.GroupQueryAttention": 1}
    written = attributes(path, GQA)
    assert written["do_rotary"] == 1 and written["rotary_interleaved"] == int(neighbours)
    assert written.get("local_window_size", 0) == window and not nodes(path, "Where")


@pytest.mark.parametrize("kind", ["one token", "one sequence", "two sequences"])
@pytest.mark.parametrize("window", [0, 3])
def test_rotary_embeddings_after_a_cache(window: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    batch, n = {"one token": (2, 1), "one sequence": (1, 4), "two sequences": (2, 4)}[kind]
    given = turning_inputs(batch, n, 5)
    several = {1: LENGTH} if n > 1 else {}
    first = {0: BATCH} if kind == "one token" else {}
    shapes = ({**first, **several},) * 3 + (several,) + ({**first, 2: PAST},) * 2
    model = Turning(window).eval()
    report = exported(model, path, *given, target="ort", dynamic_shapes=shapes)
    assert report.operators == {"com.microsoft.GroupQueryAttention": 1}
    written = attributes(path, GQA)
    assert written["do_rotary"] == 1 and written["num_heads"] == 4 * (2 if kind == "two sequences" else 1)
    names = ("q", "k", "v", "positions", "past_k", "past_v")
    given = [*given[:4], *(t[:, :, :0] for t in given[4:])]
    got = run(path, **dict(zip(names, given, strict=True)))
    for mine, theirs in zip(got, model(*given), strict=True):
        assert np.abs(mine - theirs.numpy()).max() < 1e-2, "an empty cache"


def test_positions_that_differ_between_sequences_are_an_operator_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    q, k, v, _ = turning_inputs(2, 6, None)
    positions = torch.stack([torch.arange(6), torch.arange(6) * 2])
    report = exported(WithoutCache(3).eval(), path, q, k, v, positions, target="ort")
    assert report.operators == {"RotaryEmbedding": 2, "com.microsoft.GroupQueryAttention": 1}
    assert attributes(path, GQA).get("do_rotary", 0) == 0


def test_turned_keys_that_are_a_result_are_turned_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = exported(WithoutCache(3, keeps=True).eval(), path, *turning_inputs(2, 6, None), target="ort")
    assert report.operators == {"RotaryEmbedding": 2, "com.microsoft.GroupQueryAttention": 1}
