"""Small attention modules and tiny models for tests of exporters, and helpers to run the files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fusepass
from fusepass.exporters.reports import ExportReport

Arrays = dict[str, npt.NDArray[Any]]


class Attention(nn.Module):
    """Hand-written attention over ``[B, S, 32]`` with every feature that operators have.

    heads: query heads; kv: key/value heads; the score is scaled, capped, biased, masked.
    """

    def __init__(
        self, heads: int = 4, kv: int = 4, causal: bool = False, window: int = 0, cap: float = 0.0,
        bias: bool = False, sink: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv, self.causal, self.window, self.cap = heads, kv, causal, window, cap
        self.q, self.k, self.v = nn.Linear(32, heads * 8), nn.Linear(32, kv * 8), nn.Linear(32, kv * 8)
        self.out = nn.Linear(heads * 8, 32)
        self.table = nn.Parameter(torch.randn(heads, 64)) if bias else None
        self.sink = nn.Parameter(torch.randn(heads)) if sink else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: ``[B, S, 32]``; mask: ``[B, S]``, one where there is a token."""
        batch, length = x.shape[:2]
        q, k, v = (f(x).view(batch, length, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.kv, dim=1) for t in (k, v))
        s = q @ k.transpose(-2, -1) * 8**-0.5
        if self.cap:
            s = torch.tanh(s / self.cap) * self.cap
        n = torch.arange(length)
        gap = n[None, :] - n[:, None]
        if self.table is not None:
            s = s + self.table[:, (gap.clamp(-3, 3) + 3)]
        if self.causal:
            s = s.masked_fill(gap > 0, torch.finfo(s.dtype).min)
        if self.window:
            s = s.masked_fill(gap <= -self.window, torch.finfo(s.dtype).min)
        if mask is not None:
            s = s + (1.0 - mask[:, None, None, :].to(s.dtype)) * torch.finfo(s.dtype).min
        if self.sink is not None:
            sinks = self.sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)
            w = torch.cat([s, sinks], -1).softmax(-1)[..., :-1]
        else:
            w = s.softmax(-1)
        mixed = (w @ v).transpose(1, 2).reshape(batch, length, -1)
        out: Tensor = self.out(mixed)
        return out


def drawn(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    """``[batch, length, 32]``."""
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


def sharpened(model: nn.Module) -> nn.Module:
    """Weights at fan-in scale: with small ones attention is nearly uniform, and hides wrong masks."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def nodes(path: Path, name: str) -> list[ir.Node]:
    """The nodes of an operator in a file."""
    return [n for n in ir.load(path).graph.all_nodes() if n.op_type == name]


def run(path: Path, **feeds: Any) -> list[npt.NDArray[Any]]:
    """The outputs of a file in onnxruntime on the CPU."""
    return run_on(path, feeds, cuda=False)


def run_on(path: Path, feeds: dict[str, Any], *, cuda: bool) -> list[npt.NDArray[Any]]:
    """The outputs of a file in onnxruntime on the CPU, or on CUDA without TF32."""
    import onnxruntime as ort

    if cuda and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu")
    first: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else []
    session = ort.InferenceSession(str(path), providers=[*first, "CPUExecutionProvider"])
    assert not cuda or "CUDAExecutionProvider" in session.get_providers()
    names = {i.name for i in session.get_inputs()}
    given = {n: np.asarray(a) for n, a in feeds.items() if n in names}
    return session.run(None, given)  # type: ignore[no-any-return]


def exported(model: nn.Module, path: Path, *args: Any, **options: Any) -> ExportReport:
    """`export_onnx`, with every check passed."""
    report = fusepass.export_onnx(model, args, path, **options)
    assert all(check.ok for check in report.checks) and report.checks
    return report


def attributes(path: Path, name: str = "Attention") -> dict[str, Any]:
    """The attributes of the only node of an operator."""
    (node,) = nodes(path, name)
    return {key: attribute.value for key, attribute in node.attributes.items()}


def used(path: Path, name: str = "Attention") -> list[bool]:
    """Which inputs the only node of an operator has."""
    (node,) = nodes(path, name)
    return [value is not None for value in node.inputs]


# ---------------------------------------------------------------------------------------- tiny models

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def _text(batch: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _build(
    model: str, config: str, inputs: dict[str, Tensor], **settings: Any
) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    torch.manual_seed(0)
    configuration = getattr(transformers, config)(**settings)
    configuration.use_cache = False
    for part in (getattr(configuration, "text_config", None), getattr(configuration, "vision_config", None)):
        if part is not None:
            part.use_cache = False
    kind = getattr(transformers, model)
    return sharpened(kind._from_config(configuration, attn_implementation="eager")), inputs


def _decoder(name: str, **more: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    settings = {
        **TINY,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **more,
    }
    return functools.partial(_build, f"{name}ForCausalLM", f"{name}Config", _text(), **settings)


def _pixels(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))}


def _features() -> Tensor:
    return torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(3))


_ENCODER = {**TINY, "intermediate_size": 48}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
           "image_size": 16, "patch_size": 4}  # fmt: skip
#: name -> (a model and its inputs, how many attention sites it has)
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int]] = {
    "bert": (functools.partial(_build, "BertModel", "BertConfig", _text(), **_ENCODER), 2),
    "gpt2": (
        functools.partial(
            _build, "GPT2LMHeadModel", "GPT2Config", _text(), n_embd=32, n_layer=2, n_head=4, vocab_size=50,
            n_positions=64,
        ),
        2,
    ),
    "llama": (_decoder("Llama"), 2),
    "mistral": (_decoder("Mistral", sliding_window=4), 2),
    "gemma2": (_decoder("Gemma2", sliding_window=4, head_dim=8), 2),
    "t5": (
        functools.partial(
            _build, "T5Model", "T5Config", {**_text(), "decoder_input_ids": _text(2, 5)["input_ids"]},
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0,
        ),
        6,
    ),
    "whisper": (
        functools.partial(
            _build, "WhisperModel", "WhisperConfig",
            {"input_features": _features(), "decoder_input_ids": _text(2, 5)["input_ids"]},
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50, num_mel_bins=16,
            max_source_positions=12, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
        6,
    ),
    "vit": (functools.partial(_build, "ViTModel", "ViTConfig", _pixels(), **_VISION), 2),
    "swin": (
        functools.partial(
            _build, "SwinModel", "SwinConfig", _pixels(32), image_size=32, patch_size=4, embed_dim=16,
            depths=[2, 1], num_heads=[2, 4], window_size=4,
        ),
        3,
    ),
    "clip": (
        functools.partial(
            _build, "CLIPModel", "CLIPConfig", {**_text(), **_pixels()},
            text_config={**_ENCODER, "max_position_embeddings": 64, "eos_token_id": 2},
            vision_config=_VISION, projection_dim=16,
        ),
        4,
    ),
}  # fmt: skip


def dynamic(inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Batch and lengths vary."""
    batch, lengths = torch.export.Dim("batch"), {}
    for name in ("input_ids", "attention_mask"):
        lengths[name] = {1: torch.export.Dim("seq")}
    lengths["decoder_input_ids"] = {1: torch.export.Dim("target")}
    return {name: {0: batch, **lengths.get(name, {})} for name in inputs}
