"""FP8: the arithmetic around the kernel, which sites it takes, and what is written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.kernels import FP8, Target, flash, fp8, gates
from fusepass.kernels.fp8_ops import E4M3_MAX
from fusepass.specification.attention import Band, Bias, Dropout, Mask, Scale, SoftCap
from tests.attention import flattened
from tests.fake_cuda import fake_graph, hopper, targets
from tests.specs import specification

CUDA = Target("cuda", False, False, precision="fp8")
CAUSAL = Mask(0, float("-inf"), atoms=(Band(None, 0),))


spec = partial(specification, head_dim=128, value_dim=128)


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_the_rotation_is_orthogonal(size: int) -> None:
    turn = fp8.hadamard(size, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))


def test_a_rotation_keeps_memory_order() -> None:
    turn, x = fp8.hadamard(16, torch.empty(0)), torch.randn(2, 5, 3, 16)
    across = fp8.rotated(x.transpose(1, 2), turn)
    torch.testing.assert_close(across, x.transpose(1, 2).contiguous() @ turn)
    assert across.transpose(1, 2).is_contiguous() and fp8.rotated(x, turn).is_contiguous()


def uneven(heads: int, scales: list[float]) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, heads, 32, 128) * torch.tensor(scales).view(1, -1, 1, 1)


def test_balanced_scales_have_one_product() -> None:
    """Heads of very different magnitude: each keeps its precision, and one number undoes all scales."""
    q, k = uneven(4, [1e-3, 2e-3, 50.0, 60.0]), uneven(2, [20.0, 1e-2])
    *turned, descale = fp8.balanced(q.transpose(1, 2), k.transpose(1, 2))
    q8, k8 = (t.transpose(1, 2) for t in turned)
    assert q8.dtype is k8.dtype is torch.float8_e4m3fn and descale.shape == (1, 1, 1, 1)
    assert q8.float().isfinite().all() and k8.float().isfinite().all()
    got = q8.float() @ k8.float().repeat_interleave(2, 1).transpose(-1, -2) * descale
    want = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    for head in range(4):
        noise = (got[:, head] - want[:, head]).norm() / want[:, head].norm()
        assert noise < 0.05, (head, noise)  # two roundings of 2**-4 relative at most, averaged over 128


def test_scales_of_nothing_are_finite() -> None:
    zero = torch.zeros(1, 8, 2, 128)
    q8, k8, descale = fp8.balanced(zero, zero)
    assert all(t.float().isfinite().all() for t in (q8, k8, descale))


def test_rounding_never_overflows() -> None:
    x = uneven(2, [1.0, 1e4]).transpose(1, 2)
    rounded = fp8.rounded(x, E4M3_MAX / fp8.largest(x, 2))
    assert rounded.float().abs().amax((0, 1, 3)).tolist() == [E4M3_MAX, E4M3_MAX]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    q, k, v = (t.double() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def of_cudnn(q: Tensor, k: Tensor, v: Tensor, descale: Tensor, scale: float, causal: bool) -> Tensor:
    return exact(q, k, v, scale * descale.item(), causal).transpose(1, 2).contiguous().transpose(1, 2)


def of_flash3(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor, scale: float, causal: bool
) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    of_q, of_k, of_v = (t.double()[:, :, None, None] for t in (of_q, of_k, of_v))
    out = exact(q * of_q.repeat_interleave(2, 1), k * of_k, v * of_v, scale, causal)
    return out.transpose(1, 2).contiguous().bfloat16()


@pytest.mark.parametrize("library", ["cudnn", "flash3"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_what_the_libraries_are_given(
    library: str, heads_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exact operators, the result is the attention of the inputs, up to their rounding."""
    monkeypatch.setattr(torch.ops.fusepass, "fp8_cudnn", of_cudnn)
    monkeypatch.setattr(torch.ops.fusepass, "fp8_flash3", of_flash3)
    sizes = ([1e-3, 2e-3, 0.5, 0.6], [2.0, 0.1], [3.0, 1e3])
    q, k, v = (uneven(len(s), s).bfloat16() for s in sizes)
    if not heads_first:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    true = exact(q, k, v, 0.1, True)
    for rotate in (False, True):
        out = fp8.fp8_attention(q, k, v, 0.1, True, rotate, library)
        assert out.dtype is torch.bfloat16 and out.shape == true.shape
        noise = (out.double() - true).square().sum((0, 2, 3)) / true.square().sum((0, 2, 3))
        assert noise.sqrt().max() < 0.08, noise.sqrt()


@pytest.mark.parametrize("library", ["cudnn", "flash3"])
@pytest.mark.parametrize("split", ["nothing", "batch", "heads"])
def test_operators_split_by_batch_and_heads(library: str, split: str, mesh: Any) -> None:
    """DTensor runs them on shards: the scales of flash-attn 3 are sharded like their tensors."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    flash._shard_once()
    heads = 1 if library == "cudnn" else 2
    kind = {"nothing": Replicate(), "batch": Shard(0), "heads": Shard(heads)}[split]
    of = {"nothing": Replicate(), "batch": Shard(0), "heads": Shard(1)}[split]

    def spread(part: Tensor, place: Any) -> Tensor:
        return DTensor.from_local(part, mesh, (place,), run_check=False)

    parts = [torch.randn(2, h, 8, 16) for h in (4, 2, 2)]
    if library == "flash3":
        parts = [t.transpose(1, 2) for t in parts]
    eight = [t.to(torch.float8_e4m3fn) for t in parts]
    scales = [torch.ones(1, 1, 1, 1)] if library == "cudnn" else [torch.rand(2, 2) for _ in range(3)]
    operator = getattr(torch.ops.fusepass, f"fp8_{library}")
    with torch.library._scoped_library("fusepass", "FRAGMENT") as scope:
        scope.impl(f"fp8_{library}", of_cudnn if library == "cudnn" else of_flash3, "CPU")
        out = operator(
            *(spread(t, kind) for t in eight),
            *(spread(t, Replicate() if library == "cudnn" else of) for t in scales), 0.3, True,
        )  # fmt: skip
        want = operator(*eight, *scales, 0.3, True)
    assert out.placements == (kind,)
    torch.testing.assert_close(out.to_local(), want)


REFUSED = {
    "training": (spec(), replace(CUDA, training=True), "inference"),
    "exported": (spec(), replace(CUDA, aten=True), "exported"),
    "cpu": (spec(), replace(CUDA, device="cpu"), "NVIDIA"),
    "head size": (spec(head_dim=64, value_dim=64), CUDA, "its head sizes are"),
    "float32": (spec(dtype=torch.float32), CUDA, "float16 and bfloat16"),
    "bias": (spec(Bias(0, "hij")), CUDA, "it has no 'bias[hij]'"),
    "softcap": (spec(SoftCap(5.0)), CUDA, "softcap"),
    "window": (spec(replace(CAUSAL, atoms=(Band(7, 0),))), CUDA, "its masks are causal"),
    "dropout": (spec(weights=(Dropout(0.1),)), CUDA, "no dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    given, target, words = REFUSED[name]
    assert words in str(FP8.refuse(given, target))


def test_takes_full_and_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    assert FP8.refuse(spec(Scale(0.1)), CUDA) is None
    assert FP8.refuse(spec(Scale(0.1), CAUSAL), CUDA) is None
    monkeypatch.setattr(gates, "capability", lambda: (8, 9))
    assert "(Ada)" in str(FP8.refuse(spec(), CUDA))


def test_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    graph = fake_graph(flattened, *[(2, 4, 64, 128)] * 3)
    with torch.no_grad():
        site = rewrite_graph(graph, Options(precision="fp8")).sites[0]
    assert site.kernel == "fp8" and site.reason is None
    assert targets(graph).count("fp8_attention") == 1


def test_a_site_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    graph = fake_graph(flattened, *[(2, 4, 64, 64)] * 3)
    with torch.no_grad():
        site = rewrite_graph(graph, Options(precision="fp8")).sites[0]
    assert site.fused and site.kernel != "fp8"
    assert site.reason is not None and site.reason.startswith("not in FP8: its head sizes are")
