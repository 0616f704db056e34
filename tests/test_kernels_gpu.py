"""Every kernel on a real GPU: results and gradients against float64, layouts, compilers, CUDA graphs.

Run with ``pytest -m gpu``; a kernel whose library is missing is skipped by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fusepass.kernels.gates import GATES, machine_refuses
from tests.checking import Run, assert_same_accuracy, call, compiled

pytestmark = pytest.mark.gpu
INF = math.inf


def heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, S, H, D]`` as ``[B, H, S, D]``, with key/value heads repeated."""
    group = q.shape[2] // k.shape[2]
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


def banded(left: int | None, right: int | None, cap: float = 0.0) -> Callable[..., Tensor]:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        s = q @ k.transpose(-1, -2) * 0.1
        if cap:
            s = cap * torch.tanh(s / cap)
        gap = torch.arange(s.shape[-1], device=q.device) - torch.arange(s.shape[-2], device=q.device)[:, None]
        seen = torch.ones_like(gap, dtype=torch.bool)
        if right is not None:
            seen = seen & (gap <= right)
        if left is not None:
            seen = seen & (gap >= -left)
        return merge(s.masked_fill(~seen, -INF).softmax(-1) @ v)

    return program


def sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    s = q @ k.transpose(-1, -2) * 0.1
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -INF)
    column = sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:-1], 1)
    return merge(torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
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

    def inputs(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes = ((self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        found = {
            name: torch.randn(2, n, h, self.head_dim, device="cuda", dtype=self.dtype)
            for name, (n, h) in zip("qkv", sizes, strict=True)
        }
        if self.extra == "sinks":
            found["sinks"] = torch.randn(self.heads, device="cuda", dtype=self.dtype)
        if self.extra == "slopes":
            found["slopes"] = 2.0 ** -torch.arange(1, self.heads + 1, device="cuda", dtype=self.dtype)
        if self.extra == "keep":
            lengths = torch.tensor([self.keys, self.keys // 2 - 3], device="cuda")
            found["keep"] = torch.arange(self.keys, device="cuda") < lengths[:, None]
        if self.extra == "left":  # padding on the left: the first queries see no key
            starts = torch.tensor([0, self.keys // 2 - 3], device="cuda")
            found["keep"] = torch.arange(self.keys, device="cuda") >= starts[:, None]
        if self.extra == "label":
            cuts = torch.tensor([[100, 150], [7, 290]], device="cuda")
            found["label"] = (torch.arange(self.keys, device="cuda") >= cuts[:, :, None]).sum(1)
        return found


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
    "causal, top left of more keys": Case(banded(None, 0), keys=456, kernels="sdpa cudnn flex"),
    "window": Case(banded(63, 0), head_dim=128, kernels="sdpa flash2 flash3 flash4 flex"),
    "window both ways": Case(banded(40, 70), kernels="sdpa flash2 flash3 flash4 flex"),
    "softcap": Case(banded(None, 0, cap=5.0), kernels="flash2 flash3 flash4 flex"),
    "softcap and window": Case(banded(63, 0, cap=5.0), kernels="flash2 flash3 flash4 flex"),
    "sink": Case(sink, extra="sinks", kernels="sdpa flash4"),
    "alibi": Case(alibi, extra="slopes", kernels="sdpa flex"),
    "padding": Case(padded, extra="keep", kernels="sdpa flex"),
    "padding on the left": Case(padded, extra="left", kernels="sdpa flex"),
    "documents": Case(documents, extra="label", kernels="sdpa flex"),
}
PAIRS = [(kernel, name) for name, case in CASES.items() for kernel in case.kernels.split()]


def need(kernel: str) -> None:
    reason = machine_refuses(GATES[kernel], "cuda") if kernel in GATES else None
    if reason:
        pytest.skip(f"{kernel}: {reason}")


def check(case: Case, kernel: str, inner: str, grads: bool) -> Run:
    inputs = case.inputs()
    got = call(compiled(case.program, kernel, inner), inputs, case.dtype, grads)
    assert got.site.fused and got.site.kernel == kernel, got.site
    eager = call(case.program, inputs, case.dtype, grads)
    exact = call(case.program, inputs, torch.float64, grads)
    assert_same_accuracy(got, eager, exact)
    return got


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_results_and_gradients(kernel: str, name: str) -> None:
    need(kernel)
    check(CASES[name], kernel, "inductor" if kernel == "flex" else "aot_eager", grads=True)


@pytest.mark.parametrize(("kernel", "name"), [p for p in PAIRS if p[1] in ("causal", "padding", "window")])
def test_inference_under_inductor(kernel: str, name: str) -> None:
    """Forward only, everything in one graph: where block tables were once fused away."""
    need(kernel)
    check(CASES[name], kernel, "inductor", grads=False)


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash2", "flash3", "flash4"])
def test_no_copies_of_sequence_major_tensors(kernel: str) -> None:
    """``[B, S, H, D]`` in and out: nothing but the result is allocated, and the result is contiguous."""
    need(kernel)
    case = Case(full, kv_heads=8, queries=1024, keys=1024, head_dim=128)
    inputs = case.inputs()
    fused = compiled(case.program, kernel, "inductor")
    with torch.no_grad():
        fused(**inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fused(**inputs)
        peak = torch.cuda.max_memory_allocated() - before
    assert out.is_contiguous()
    assert peak < 1.5 * out.numel() * out.itemsize, peak


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flash4"])
@pytest.mark.parametrize("grads", [False, True])
def test_cuda_graphs(kernel: str, grads: bool) -> None:
    need(kernel)
    case = CASES["causal"]
    fused = torch.compile(
        case.program, backend="fusepass", mode="reduce-overhead", options={"kernel": kernel}, fullgraph=True
    )
    exact = call(case.program, case.inputs(), torch.float64, grads)
    eager = call(case.program, case.inputs(), grads=grads)
    for _ in range(3):
        got = call(fused, case.inputs(), grads=grads)
    assert_same_accuracy(got, eager, exact)


@pytest.mark.parametrize("kernel", ["flash2", "flash3", "flash4"])
def test_operators_are_sound(kernel: str) -> None:
    """Schema, fake kernel and autograd registration agree with what the library does."""
    need(kernel)
    q, k, v = (torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    arguments = (q, k, v, None, 0.125, None, 0, 0.0, 0.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fusepass, kernel).default, arguments, test_utils=tests)
