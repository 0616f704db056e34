"""Decoding step by step: `generate()` of Hugging Face models, and key/value caches written by hand.

A compiled model must choose the same tokens as eager, fuse in prefill and in decode steps, and compile no
more graphs than without the pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fusepass.reports import collector
from fusepass.reports.report import GraphReport

os.environ["FUSEPASS_STRICT"] = "1"  # faults of the pass are raised

STEPS = 4
TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 98}
GROUPED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BOTH: dict[str, Any] = {"d_model": 32, "decoder_start_token_id": 1}
T5 = {**BOTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
SPEECH: dict[str, Any] = {
    **BOTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WINDOW = 6
#: name -> (class, configuration, attention sites of every graph)
MODELS: dict[str, tuple[Any, Any, int]] = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4, n_positions=64, **TOKENS),
        1,
    ),
    "llama": (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**GROUPED, **TOKENS), 1),
    "mistral": (
        transformers.MistralForCausalLM,
        lambda: transformers.MistralConfig(sliding_window=WINDOW, **GROUPED, **TOKENS),
        1,
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        lambda: transformers.T5Config(**T5, **TOKENS),
        2,
    ),
    "whisper": (
        transformers.WhisperForConditionalGeneration,
        lambda: transformers.WhisperConfig(**SPEECH, **TOKENS),
        2,
    ),
}


def sharpened(model: nn.Module) -> nn.Module:
    """Weights at fan-in scale: with a library's small ones attention is nearly uniform."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=g) / weight.shape[-1] ** 0.5)
    return model.eval()


def build(name: str) -> Any:
    kind, config, _ = MODELS[name]
    return sharpened(kind._from_config(config(), attn_implementation="eager"))


def prompt(name: str) -> dict[str, Tensor]:
    """Ten tokens, with four of left padding in the second row; features for speech models."""
    g = torch.Generator().manual_seed(3)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=g)}
    ids, seen = torch.randint(3, 90, (2, 10), generator=g), torch.ones(2, 10, dtype=torch.long)
    ids[1, :4], seen[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": seen}


class Counting:
    """An inner backend that runs the graphs uncompiled, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return gm.forward


def compile_with(fn: Any, fuse: bool, inner: Counting) -> Any:
    torch._dynamo.reset()
    if fuse:
        return torch.compile(fn, backend="fusepass", options={"inner": inner})
    return torch.compile(fn, backend=inner)


@dataclass
class Generated:
    tokens: Tensor
    logits: list[Tensor]
    graphs: list[GraphReport]
    compiled: int


def generate(name: str, cache: str, fuse: bool) -> Generated:
    """Greedy decoding with a compiled forward."""
    model, inner = build(name), Counting()
    model.forward = compile_with(model.forward, fuse, inner)
    how: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    if name != "whisper":
        how["min_new_tokens"] = STEPS
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    with collector.collect() as seen, torch.no_grad():
        out = model.generate(**prompt(name), **how, output_logits=True)
    return Generated(out.sequences, list(out.logits), seen.graphs, inner.graphs)


def assert_fused(graphs: list[GraphReport], sites: int) -> None:
    """A prefill graph and at least one for decode steps; in each, every site is fused."""
    assert len(graphs) >= 2 and not [note for graph in graphs for note in graph.notes]
    assert [len(graph.sites) for graph in graphs] == [sites] * len(graphs)
    left = [site for graph in graphs for site in graph.sites if not site.fused]
    assert not left, left


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, cache: str) -> None:
    """The other run uses Dynamo's graphs unchanged: this gives eager results and the number of graphs."""
    got, want = generate(name, cache, fuse=True), generate(name, cache, fuse=False)
    assert torch.equal(got.tokens, want.tokens)
    assert len(got.logits) == len(want.logits) == STEPS
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert_fused(got.graphs, MODELS[name][2])
    assert got.compiled <= want.compiled, "the pass makes Dynamo compile more graphs"


# ------------------------------------------------------------------------------- caches written by hand

B, H, D, M = 2, 4, 8, 16
WIDTH = H * D
LOWEST = torch.finfo(torch.float32).min
Past = tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    """Projections and an empty cache of `M` positions; a subclass keeps keys and values in its own way."""

    slots = M

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.keys: Tensor
        self.values: Tensor
        self.register_buffer("keys", torch.zeros(B, H, self.slots, D))
        self.register_buffer("values", torch.zeros(B, H, self.slots, D))

    def heads(self, x: Tensor) -> list[Tensor]:
        shape = (*x.shape[:2], H, D)
        return [3 * t.view(shape).transpose(1, 2) for t in self.project(x).chunk(3, -1)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, fill: float = LOWEST) -> Tensor:
        s = (q @ k.transpose(-2, -1) / D**0.5).masked_fill(hidden, fill)
        out: Tensor = self.out((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class Concatenated(Attention):
    """Keys and values are passed from step to step; causality starts at an offset."""

    def forward(self, x: Tensor, at: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        q, k, v = self.heads(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        n, m = q.shape[2], k.shape[2]
        hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        return self.attend(q, k, v, hidden, float("-inf")), (k, v)


class Evicting(Attention):
    """Keeps the last five keys."""

    def forward(self, x: Tensor, at: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        q, k, v = self.heads(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        n, m = q.shape[2], k.shape[2]
        hidden = torch.arange(m) > torch.arange(m - n, m)[:, None]
        return self.attend(q, k, v, hidden), (k[:, :, -5:], v[:, :, -5:])


class IndexCopied(Attention):
    """A static cache, and the position in a tensor."""

    def forward(self, x: Tensor, at: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        q, k, v = self.heads(x)
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        return self.attend(q, self.keys, self.values, torch.arange(M) > at[:, None]), None


class Sliced(Attention):
    """Slice assignment at a position that is a number, and only the filled part is read."""

    def forward(self, x: Tensor, at: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        q, k, v = self.heads(x)
        end = position + x.shape[1]
        self.keys[:, :, position:end] = k
        self.values[:, :, position:end] = v
        hidden = torch.arange(end)[None] > torch.arange(position, end)[:, None]
        return self.attend(q, self.keys[:, :, :end], self.values[:, :, :end], hidden), None


class SlicedWhole(Attention):
    """The same, and the whole cache is read."""

    def forward(self, x: Tensor, at: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        q, k, v = self.heads(x)
        end = position + x.shape[1]
        self.keys[:, :, position:end] = k
        self.values[:, :, position:end] = v
        seen = torch.arange(M)[None] <= torch.arange(position, end)[:, None]
        return self.attend(q, self.keys, self.values, ~seen, float("-inf")), None


class Ring(Attention):
    """A ring of eight slots, with the position that each slot holds; keys are not in order."""

    slots = 8

    def __init__(self) -> None:
        super().__init__()
        self.held: Tensor
        self.register_buffer("held", torch.full((self.slots,), -1))

    def forward(self, x: Tensor, at: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        q, k, v = self.heads(x)
        slot = at % self.slots
        self.keys[:, :, slot] = k
        self.values[:, :, slot] = v
        self.held[slot] = at
        hidden = (self.held < 0) | (self.held > at[:, None]) | (self.held <= at[:, None] - self.slots)
        return self.attend(q, self.keys, self.values, hidden, float("-inf")), None


CACHES: list[type[Attention]] = [Concatenated, Evicting, IndexCopied, Sliced, SlicedWhole, Ring]


@dataclass
class Decoded:
    outputs: list[Tensor]
    left: dict[str, Tensor]
    graphs: list[GraphReport]
    compiled: int


def decode(kind: type[Attention], fuse: bool) -> Decoded:
    """A prefill of five tokens, then enough single steps to go around the ring."""
    torch.manual_seed(0)
    model, inner = kind().eval(), Counting()
    step, past, outputs, position = compile_with(model, fuse, inner), None, [], 0
    with collector.collect() as seen, torch.no_grad():
        for n in (5, 1, 1, 1, 1, 1):
            out, past = step(torch.randn(B, n, WIDTH), torch.arange(position, position + n), position, past)
            outputs.append(out)
            position += n
    left = {name: t.clone() for name, t in model.named_buffers()}
    left |= {} if past is None else {"past keys": past[0], "past values": past[1]}
    return Decoded(outputs, left, seen.graphs, inner.graphs)


@pytest.mark.parametrize("kind", CACHES, ids=lambda kind: kind.__name__)
def test_a_cache_written_by_hand(kind: type[Attention]) -> None:
    """The result of every step, and the final caches."""
    got, want = decode(kind, fuse=True), decode(kind, fuse=False)
    for mine, theirs in zip(got.outputs, want.outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.left, want.left)
    assert_fused(got.graphs, 1)
    assert got.compiled <= want.compiled, "the pass makes Dynamo compile more graphs"
