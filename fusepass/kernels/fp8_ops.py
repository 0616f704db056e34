"""FP8 attention of two libraries, as ``torch.ops.fusepass.fp8_cudnn`` and ``fp8_flash3``; forward only.

cuDNN's is built with ``nvidia-cudnn-frontend`` (``pygraph.sdpa_fp8``): e4m3 in, e4m3 out; a graph is built
once for each shape, layout and scale, and cached.  On Hopper cuDNN writes only e4m3, so the result is scaled
by what the caller knows about the values.  Source: cuDNN frontend documentation, "Attention FP8 forward".
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusepass.kernels.flash_ops import Flash3, library

E4M3_MAX = 448.0
#: Weights are at most 1: scaled by this number they use the exponents of e4m3, and cannot overflow.
WEIGHT_SCALE = 256.0

_lock = threading.Lock()
_local = threading.local()


def _handle(device: torch.device) -> Any:
    """This thread's cuDNN handle, on torch's current stream: handles are not thread-safe."""
    import cudnn

    handles = _local.__dict__.setdefault("handles", {})
    if device not in handles:
        with torch.cuda.device(device):
            handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


@cache
def _graph(
    device: torch.device, shapes: tuple[Any, ...], strides: tuple[Any, ...], scale: float, causal: bool
) -> tuple[Any, dict[str, Any], int]:
    """The built graph, its tensors by name, and the bytes of its workspace."""
    import cudnn

    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        handle=_handle(device),
        io_data_type=kinds.FP8_E4M3,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
    )
    tensors: dict[str, Any] = {
        name: graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=kinds.FP8_E4M3)
        for name, shape, stride in zip("qkv", shapes[:3], strides[:3], strict=True)
    }
    for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"):
        tensors[name] = graph.tensor(name=name, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.FLOAT)
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **tensors, is_inference=True, attn_scale=scale, use_causal_mask=causal, name="sdpa"
    )
    out.set_output(True).set_dim(list(shapes[3])).set_stride(list(strides[3])).set_data_type(kinds.FP8_E4M3)
    for name, amax in (("amax_s", amax_s), ("amax_o", amax_o)):
        amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
        tensors[name] = amax
    tensors["out"] = out
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph, tensors, graph.get_workspace_size()


def _run(q: Tensor, k: Tensor, v: Tensor, descale: Tensor, scale: float, causal: bool) -> Tensor:
    out = _result(q, v)
    tensors = (q, k, v, out)
    with _lock:
        graph, ports, size = _graph(
            q.device,
            tuple(tuple(t.shape) for t in tensors),
            tuple(tuple(t.stride()) for t in tensors),
            scale,
            causal,
        )
    one, up, down = constants(q.device)
    spare = q.new_empty((2, 1, 1, 1, 1), dtype=torch.float32)
    given = {
        "q": q, "k": k, "v": v, "descale_q": descale, "descale_k": one, "descale_v": one,
        "descale_s": down, "scale_s": up, "scale_o": one, "out": out, "amax_s": spare[0], "amax_o": spare[1],
    }  # fmt: skip
    workspace = q.new_empty(max(size, 1), dtype=torch.uint8)
    graph.execute({ports[n]: t for n, t in given.items()}, workspace, handle=_handle(q.device))
    return out


@cache
def constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One, the weights' scale, and its inverse, on the GPU."""
    numbers = torch.tensor([1.0, WEIGHT_SCALE, 1 / WEIGHT_SCALE], device=device).view(3, 1, 1, 1, 1)
    return numbers[0], numbers[1], numbers[2]


def _result(q: Tensor, v: Tensor) -> Tensor:
    """An empty ``[B, H, Q, Dv]`` with the memory layout of ``[B, Q, H, Dv]``."""
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)


_definitions = torch.library.Library("fusepass", "FRAGMENT")
_definitions.define(
    "fp8_cudnn(Tensor q, Tensor k, Tensor v, Tensor descale, float scale, bool causal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_definitions.impl("fp8_cudnn", _run, "CUDA")
torch.library.register_fake(
    "fusepass::fp8_cudnn", lambda q, k, v, descale, scale, causal: _result(q, v), lib=_definitions
)


def _flash3(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor, scale: float, causal: bool
) -> Tensor:
    flash3 = library("flash3")
    assert isinstance(flash3, Flash3)
    return flash3.rounded(q, k, v, (of_q, of_k, of_v), scale, causal)


_definitions.define(
    "fp8_flash3(Tensor q, Tensor k, Tensor v, Tensor of_q, Tensor of_k, Tensor of_v, float scale, "
    "bool causal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_definitions.impl("fp8_flash3", _flash3, "CUDA")
torch.library.register_fake(
    "fusepass::fp8_flash3",
    lambda q, k, v, of_q, of_k, of_v, scale, causal: q.new_empty(q.shape, dtype=torch.bfloat16),
    lib=_definitions,
)


def shard_heads() -> None:
    """Tell DTensor that these operators shard by batch and by heads, without communication."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole = Replicate()

    def cudnn(q, k, v, descale, scale, causal):  # type: ignore[no-untyped-def]
        places = (whole, Shard(0), Shard(1))
        return [([place], [place] * 3 + [whole, None, None]) for place in places]

    def flash3(q, k, v, of_q, of_k, of_v, scale, causal):  # type: ignore[no-untyped-def]
        places = ((whole, whole), (Shard(0), Shard(0)), (Shard(2), Shard(1)))
        return [([place], [place] * 3 + [of] * 3 + [None, None]) for place, of in places]

    register_sharding(torch.ops.fusepass.fp8_cudnn.default)(cudnn)
    register_sharding(torch.ops.fusepass.fp8_flash3.default)(flash3)


__all__ = ["E4M3_MAX", "WEIGHT_SCALE", "shard_heads"]
