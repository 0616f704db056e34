"""Distributed training as people do it, in two processes: ``python -m tests.parallel_programs FOLDER``.

Each program builds the same small model, distributes it, trains two steps at two lengths, and records the
distance of losses and gradients from those of the undistributed model, and which sites were fused.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fusepass  # noqa: F401  (the backend's name)
from fusepass.reports.collector import collect

WIDTH, HEADS, GROUPS, LAYERS = 32, 4, 2, 2


class Attention(nn.Module):
    """Hand-written causal attention with grouped heads; the tensors show how many heads there are."""

    def __init__(self) -> None:
        super().__init__()
        self.size = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, HEADS * self.size)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * self.size) for _ in range(2))
        self.o = nn.Linear(HEADS * self.size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        s = q @ k.transpose(-2, -1) / self.size**0.5
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
        out: Tensor = self.o((s.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return out


class Layer(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.norm, self.attention, self.recompute = nn.LayerNorm(WIDTH), Attention(), recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            out: Tensor = checkpoint(self._run, x, use_reentrant=False)
            return out
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(self.norm(x))
        return out


class Model(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(recompute) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def compiled(module: nn.Module, dynamic: bool | None = None) -> nn.Module:
    """Compile in place, as FSDP and tensor parallelism require."""
    module.compile(backend="fusepass", options={"inner": "aot_eager"}, dynamic=dynamic)
    return module


def fully_shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2, in place."""
    sharded: Any = fsdp.fully_shard(module, mesh=mesh)
    assert isinstance(sharded, nn.Module)
    return sharded


def compiled_layers(model: Model) -> None:
    for layer in model.layers:
        compiled(layer)


# ---------------------------------------------------------------------------------- programs

Spread = Callable[[DeviceMesh], nn.Module]


def ddp(mesh: DeviceMesh) -> nn.Module:
    model = DistributedDataParallel(Model())
    return compiled(model)


def ddp_with_checkpoints(mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(compiled(Model(recompute=True)))


def fsdp_of_layers(mesh: DeviceMesh) -> nn.Module:
    model = Model()
    compiled_layers(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_of_the_whole(mesh: DeviceMesh) -> nn.Module:
    model = Model()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return compiled(fully_shard(model, mesh=mesh))


def fsdp_checkpoints_inside(mesh: DeviceMesh) -> nn.Module:
    model = Model(recompute=True)
    compiled_layers(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_checkpoints_outside(mesh: DeviceMesh) -> nn.Module:
    """Compiled layers, each in a checkpoint."""
    model = Model()
    compiled_layers(model)
    for n in range(LAYERS):
        model.layers[n] = fully_shard(checkpoint_wrapper(model.layers[n]), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    """Projections that return shards as plain tensors: every process sees its own heads."""
    return split_by_heads(mesh, ColwiseParallel())


def tensor_parallel_in_dtensors(mesh: DeviceMesh) -> nn.Module:
    """Projections that return DTensors."""
    return split_by_heads(mesh, ColwiseParallel(use_local_output=False))


def tensor_parallel_with_strategies(mesh: DeviceMesh) -> nn.Module:
    """DTensors, where the operators of SDPA on a CPU have strategies as those of GPUs do."""
    shard_attention_on_cpu()
    return tensor_parallel_in_dtensors(mesh)


def shard_attention_on_cpu() -> list[Any]:
    """Tell DTensor how SDPA's CPU operators are sharded: by batch or by heads."""
    forward, backward = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}").default
        for name in ("", "_backward")
    )
    kinds = (Replicate(), Shard(0), Shard(1))

    def split(q: Any, k: Any, v: Any, *given: Any, **more: Any) -> Any:
        return [([kind] * 2, [kind] * 3 + [None] * len(given)) for kind in kinds]

    def split_backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *given: Any, **more: Any
    ) -> Any:
        return [([kind] * 3, [kind] * 6 + [None] * len(given)) for kind in kinds]

    register_sharding(forward)(split)
    register_sharding(backward)(split_backward)
    return [forward, backward]


def split_by_heads(mesh: DeviceMesh, projection: ColwiseParallel) -> nn.Module:
    """Each process gets some heads. Sizes are fixed: PyTorch 2.13 compiles no DTensors of symbolic sizes."""
    model = Model()
    plan = {f"attention.{name}": projection for name in "qkv"}
    for layer in model.layers:
        parallelize_module(layer, mesh, {**plan, "attention.o": RowwiseParallel()})
    return compiled(model, dynamic=False)


def sequence_parallel(mesh: DeviceMesh) -> nn.Module:
    """Norms on parts of the sequence, which is gathered for the attention."""
    model = Model()
    split, whole = (Shard(1),), (Replicate(),)
    plan = {
        "norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=split, desired_input_layouts=whole),
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, PrepareModuleInput(
        input_layouts=whole, desired_input_layouts=split, use_local_output=True
    ))  # fmt: skip
    parallelize_module(model, mesh, PrepareModuleOutput(output_layouts=split, desired_output_layouts=whole))
    return compiled(model, dynamic=False)


PROGRAMS: dict[str, Spread] = {
    f.__name__: f
    for f in (
        ddp, ddp_with_checkpoints, fsdp_of_layers, fsdp_of_the_whole, fsdp_checkpoints_inside,
        fsdp_checkpoints_outside, tensor_parallel, tensor_parallel_in_dtensors, sequence_parallel,
        tensor_parallel_with_strategies,  # the last: what it registers stays
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------- running them


def train(model: nn.Module, batches: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and the gradients summed over the batches."""
    losses = []
    for x in batches:
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
    grads = {clean(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def clean(name: str) -> str:
    for part in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(part, "")
    return name


def run(name: str, mesh: DeviceMesh) -> dict[str, Any]:
    """The distance of a program from the undistributed model, and its sites."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    batches = [torch.randn(2, length, WIDTH) for length in (8, 8, 12)]
    torch.manual_seed(1)
    losses, grads = train(Model(), batches)
    torch.manual_seed(1)
    with collect() as seen:
        mine, spread = train(PROGRAMS[name](mesh), batches)
    worst = max((spread[n] - g).abs().max().item() for n, g in grads.items())
    return {
        "loss": max(abs(a - b) for a, b in zip(mine, losses, strict=True)),
        "gradient": worst,
        "parameters": len(spread) == len(grads),
        "sites": [(s.fused, s.reason) for s in seen.sites],
        "seconds": sum(g.seconds for g in seen.graphs),
    }


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", world_size=2, rank=rank)
    mesh = init_device_mesh("cpu", (2,))
    outcomes: dict[str, Any] = {}
    for name in sys.argv[2:] or PROGRAMS:
        try:
            outcomes[name] = run(name, mesh)
        except Exception:
            outcomes[name] = {"error": traceback.format_exc()}
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
