"""Decoders with their cache as inputs and outputs: prefill, then one token after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.onnx_models import MODELS, exported, nodes, run_on

BATCH, LENGTH, PAST = torch.export.Dim("batch"), torch.export.Dim("length"), torch.export.Dim("past")
NAMES = ["input_ids", "k0", "v0", "k1", "v1"]
GQA = "GroupQueryAttention"


class WithCache(nn.Module):
    """A decoder with its cache as flat tensors, in and out."""

    def __init__(self, model: nn.Module, layers: int = 2) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """input_ids: ``[B, S]``; past: keys and values of each layer, ``[B, G, P, D]``."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for n in range(self.layers):
            cache.update(past[2 * n], past[2 * n + 1], n)
        positions = past[0].shape[2] + torch.arange(input_ids.shape[1])[None]
        out = self.model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.layers
        return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    ("target", "dtype", "batch", "operator"),
    [
        ("onnx", torch.float32, 2, "Attention"),
        ("ort", torch.float32, 2, "Attention"),
        ("onnx", torch.float16, 2, "Attention"),
        ("ort", torch.float16, 2, "Attention"),  # several queries after the caches of several sequences
        ("ort", torch.float16, 1, GQA),
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoding_with_a_cache(
    name: str, target: str, dtype: torch.dtype, batch: int, operator: str, cuda: bool, tmp_path: Path
) -> None:
    """Prefill with an empty cache, then eight steps of greedy decoding: the same tokens as PyTorch."""
    path = tmp_path / "model.onnx"
    model = WithCache(MODELS[name][0]()[0]).to(dtype)
    ids = torch.randint(3, 50, (batch, 3), generator=torch.Generator().manual_seed(4))
    past = [torch.randn(batch, 2, 4, 8).to(dtype) for _ in range(4)]
    first = {0: BATCH} if batch > 1 else {}
    shapes = ({**first, 1: LENGTH}, tuple({**first, 2: PAST} for _ in past))
    report = exported(model, path, ids, *past, dynamic_shapes=shapes, input_names=NAMES, target=target)
    assert (report.fused, report.softmaxes) == (2, 0)
    given = [used[3:5] if operator == GQA else used[4:6] for used in _inputs(path, operator)]
    assert given == [[True, True]] * 2, "past keys and values go in"
    cache: list[Any] = [torch.zeros(batch, 2, 0, 8, dtype=dtype) for _ in past]
    mine, state, theirs = ids, [t.numpy() for t in cache], ids
    for _ in range(9):
        with torch.no_grad():
            want, *cache = model(theirs, *cache)
        feeds = dict(zip(NAMES, (mine.numpy(), *state), strict=True))
        got, *state = run_on(path, feeds, cuda=cuda)
        assert np.abs(got - want.numpy()).max() < (1e-4 if dtype is torch.float32 else 2e-2)
        theirs, mine = want[:, -1:].argmax(-1), torch.from_numpy(got[:, -1:].argmax(-1))
        assert torch.equal(mine, theirs)


def _inputs(path: Path, operator: str) -> list[list[bool]]:
    """For each node of an operator, which inputs it has."""
    return [[value is not None for value in node.inputs] for node in nodes(path, operator)]
