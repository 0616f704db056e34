"""Rotary embeddings: every spelling becomes the operator, alone and in models with layers."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.onnx_models import exported, nodes

BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length")


class Rotated(nn.Module):
    """A rotary embedding of halves, or of neighbours; ``even``: do the tables hold every angle twice?"""

    frequencies: Tensor

    def __init__(self, even: bool, neighbours: bool = False, heads_last: bool = False) -> None:
        super().__init__()
        self.even, self.neighbours, self.heads_last = even, neighbours, heads_last
        self.register_buffer("frequencies", torch.rand(8 if not even else 4))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, :, None].to(x.dtype) * self.frequencies
        if self.even and self.neighbours:
            angles = angles.repeat_interleave(2, -1)
        elif self.even:
            angles = torch.cat([angles, angles], -1)
        cos, sin = (t[:, :, None] if self.heads_last else t[:, None] for t in (angles.cos(), angles.sin()))
        if self.neighbours:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            low, high = x.chunk(2, -1)
            turned = torch.cat([-high, low], -1)
        return x * cos + turned * sin


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("even", [True, False])
def test_a_rotary_embedding(even: bool, neighbours: bool, heads_last: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = Rotated(even, neighbours, heads_last).eval()
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 5, 3, 1, 0]])
    x = x.transpose(1, 2).contiguous() if heads_last else x
    shapes = ({0: BATCH, 1 if heads_last else 2: LENGTH}, {0: BATCH, 1: LENGTH})
    report = exported(model, path, x, positions, dynamic_shapes=shapes)
    assert len(nodes(path, "RotaryEmbedding")) == int(even) and report.max_error <= 1e-5
    shared = torch.arange(5)[None]
    exported(model, path, x, shared)
    assert len(nodes(path, "RotaryEmbedding")) == int(even), "one row of positions for the whole batch"


class Parted(nn.Module):
    """A rotary embedding of two parts of a tensor, with tables that hold every number once."""

    def __init__(self, neighbours: bool) -> None:
        super().__init__()
        self.neighbours = neighbours

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None, :, None].to(x.dtype) * 0.5 ** torch.arange(4)
        cos, sin = angles.cos(), angles.sin()
        if self.neighbours:
            low, high = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            return torch.stack([low * cos - high * sin, low * sin + high * cos], -1).flatten(3)
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@pytest.mark.parametrize("neighbours", [False, True])
def test_a_rotary_embedding_of_parts(neighbours: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 5, 3, 1, 0]])
    shapes = ({0: BATCH, 2: LENGTH}, {0: BATCH, 1: LENGTH})
    report = exported(Parted(neighbours).eval(), path, x, positions, dynamic_shapes=shapes)
    assert len(nodes(path, "RotaryEmbedding")) == 1 and report.max_error <= 1e-5
    assert len(list(ir.load(path).graph)) < 20


class Weighted(nn.Module):
    """A rotary embedding of a tensor times weights that are still all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.turn = nn.Parameter(torch.zeros(8)), Rotated(even=True)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = self.turn(x * (1 + self.offset), positions)
        return out


def test_a_rotary_embedding_of_a_product_with_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported(Weighted().eval(), path, torch.randn(2, 3, 5, 8), torch.arange(5)[None])
    assert len(nodes(path, "RotaryEmbedding")) == 1


# ---------------------------------------------------------------------------------------- in models


class Layer(nn.Module):
    """Causal attention over ``[B, S, 64]``, four heads; rotary embeddings of neighbours where asked to."""

    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.rotary, self.project = rotary, nn.Linear(64, 3 * 64)

    def turned(self, x: Tensor) -> Tensor:
        """x: ``[B, S, H, D]``, in the parts of complex numbers, as Llama's own code has it."""
        steps = 1e4 ** -(torch.arange(0, 16, 2) / 16)
        angles = torch.outer(torch.arange(x.shape[1]).float(), steps)[:, None]
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
        return turned.flatten(-2).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 16)).unbind(2)
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        n = x.shape[1]
        s = q @ k.transpose(2, 3) / math.sqrt(16) + torch.full((n, n), -math.inf).triu(1).to(q.dtype)
        out: Tensor = (s.float().softmax(-1).type_as(q) @ v).transpose(1, 2).flatten(2)
        return x + out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize(
    "kinds", [(True,), (False, True), (True, False), (True, True, False, False)], ids=str
)
def test_layers_with_and_without(
    kinds: tuple[bool, ...], target: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """What the layers share is written in front of the first one, and stays as long as it is needed."""
    path = tmp_path / "model.onnx"
    model = nn.Sequential(*map(Layer, kinds)).to(dtype).eval()
    x = torch.randn(2, 6, 64, dtype=dtype)
    report = exported(model, path, x, target=target, dynamic_shapes=({0: BATCH, 1: LENGTH},))
    assert (report.sites, report.fused, report.softmaxes) == (len(kinds), len(kinds), 0)
    operators = {n.op_type for n in ir.load(path).graph}
    assert not operators & {"Neg", "Softmax"}, "neither turned nor normalised by hand"
