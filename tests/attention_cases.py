"""Programs for tests of kernels, with their sizes and the kernels that take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INF = math.inf


def heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, S, H, D]`` as ``[B, H, S, D]``, with key/value heads repeated."""
    group = q.shape[2] // k.shape[2]
    if group == 1:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return (
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(group, 1),
        v.transpose(1, 2).repeat_interleave(group, 1),
    )


def merge(out: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    return merge((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)


def banded(
    left: int | None, right: int | None, cap: float = 0.0, function: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        s = q @ k.transpose(-1, -2) * 0.1
        if cap:
            s = cap * torch.tanh(s / cap)
        if function is not None:
            s = function(s)
        gap = torch.arange(s.shape[-1], device=q.device) - torch.arange(s.shape[-2], device=q.device)[:, None]
        seen = torch.ones_like(gap, dtype=torch.bool)
        if right is not None:
            seen = seen & (gap <= right)
        if left is not None:
            seen = seen & (gap >= -left)
        return merge(s.masked_fill(~seen, -INF).softmax(-1) @ v)

    return program


def above_distance(s: Tensor) -> Tensor:
    """Scores that are at least minus a tenth of the distance between query and key."""
    i, j = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    return torch.maximum(s, -0.1 * (j - i[:, None]).abs().to(s.dtype))


def sink(left: int | None = None, cap: float = 0.0) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        s = q @ k.transpose(-1, -2) * 0.1
        if cap:
            s = cap * torch.tanh(s / cap)
        ones = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
        hidden = ones.triu(1) if left is None else ones.triu(1) | ones.tril(-left - 1)
        column = sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:-1], 1)
        return merge(torch.cat([s.masked_fill(hidden, -INF), column], -1).softmax(-1)[..., :-1] @ v)

    return program


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return learned_alibi(q, k, v, slopes.detach())


def learned_alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    i, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
    s = q @ k.transpose(-1, -2) * 0.1 + slopes.view(-1, 1, 1) * (j - i[:, None])
    return merge(s.masked_fill(j > i[:, None], -INF).softmax(-1).to(v.dtype) @ v)


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    s = q @ k.transpose(-1, -2) * 0.1
    i, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
    seen = (j <= i[:, None]) & keep[:, None, None, :]
    return merge(s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1) @ v)


def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    s = q @ k.transpose(-1, -2) * 0.1
    i, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
    seen = (j // 96 == i[:, None] // 96) & (j <= i[:, None])
    return merge(s.masked_fill(~seen, -INF).softmax(-1) @ v)


def documents(q: Tensor, k: Tensor, v: Tensor, label: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    s = q @ k.transpose(-1, -2) * 0.1
    i, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
    seen = (j <= i[:, None]) & (label[:, None, :, None] == label[:, None, None, :])
    return merge(s.masked_fill(~seen, -INF).softmax(-1) @ v)


@dataclass(frozen=True)
class Case:
    """A program and the sizes to run it on."""

    program: Callable[..., Tensor]
    queries: int = 320
    keys: int = 320
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    extra: str = ""
    dtype: torch.dtype = torch.bfloat16
    kernels: str = "sdpa cudnn flash2 flash3 flash4 flex"

    def inputs(self, device: str = "cuda") -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes = ((self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        tensors = {
            name: torch.randn(2, n, h, self.head_dim, device=device, dtype=self.dtype)
            for name, (n, h) in zip("qkv", sizes, strict=True)
        }
        if self.extra == "sinks":
            tensors["sinks"] = torch.randn(self.heads, device=device, dtype=self.dtype)
        if self.extra == "slopes":
            tensors["slopes"] = 2.0 ** -torch.arange(1, self.heads + 1, device=device, dtype=self.dtype)
        if self.extra == "keep":
            lengths = torch.tensor([self.keys, self.keys // 2 - 3], device=device)
            tensors["keep"] = torch.arange(self.keys, device=device) < lengths[:, None]
        if self.extra == "left":  # padding on the left: the first queries see no key
            starts = torch.tensor([0, self.keys // 2 - 3], device=device)
            tensors["keep"] = torch.arange(self.keys, device=device) >= starts[:, None]
        if self.extra == "label":
            cuts = torch.tensor([[100, 150], [7, 290]], device=device)
            tensors["label"] = (torch.arange(self.keys, device=device) >= cuts[:, :, None]).sum(1)
        return tensors


CASES = {
    "full": Case(full),
    "full, multi-head": Case(full, kv_heads=8),
    "full, 128": Case(full, head_dim=128),
    "full, 256": Case(full, head_dim=256),
    "full, half": Case(full, dtype=torch.float16),
    "full, float32": Case(full, dtype=torch.float32, kernels="sdpa flex"),
    "cross": Case(full, queries=200, keys=456),
    "one query": Case(full, queries=1, keys=456),
    "causal": Case(banded(None, 0)),
    "causal, bottom right": Case(banded(None, 136), queries=320, keys=456),
    "causal, top left of more keys": Case(banded(None, 0), keys=456, kernels="sdpa cudnn flash4 flex"),
    "window": Case(banded(63, 0), head_dim=128, kernels="sdpa flash2 flash3 flash4 flex"),
    "window both ways": Case(banded(40, 70), kernels="sdpa flash2 flash3 flash4 flex"),
    "softcap": Case(banded(None, 0, cap=5.0), kernels="flash2 flash3 flash4 flex flex_flash"),
    "softcap and window": Case(banded(63, 0, cap=5.0), kernels="flash2 flash3 flash4 flex"),
    "silu": Case(banded(None, 0, function=F.silu), kernels="flash4 flex"),
    "gelu, both ways": Case(banded(40, 70, function=F.gelu), kv_heads=8, kernels="flash4 flex"),
    "softplus of halves": Case(
        banded(None, 0, function=F.softplus), dtype=torch.float16, kernels="flash4 flex"
    ),
    "at least a distance": Case(banded(None, 0, function=above_distance), kv_heads=8, kernels="flash4 flex"),
    "sink": Case(sink(), extra="sinks", kernels="sdpa flash4 flex"),
    "sink, softcap and window": Case(sink(63, cap=5.0), extra="sinks", kernels="flash4 flex"),
    "alibi": Case(alibi, extra="slopes", kernels="flash2 flex"),
    "alibi, multi-head": Case(alibi, kv_heads=8, extra="slopes", kernels="flash2 flash4 flex flex_flash"),
    "learned alibi": Case(learned_alibi, extra="slopes", kernels="flex"),
    "padding": Case(padded, extra="keep", kernels="sdpa flash4 flex flex_flash"),
    "padding on the left": Case(padded, extra="left", kernels="sdpa flash4 flex flex_flash"),
    "documents": Case(documents, extra="label", kernels="sdpa flash4 flex flex_flash"),
    "chunks": Case(chunks, kernels="sdpa flash4 flex flex_flash"),
}
