"""Training on several GPUs: a model of hand-written attention under DDP, FSDP2 and tensor parallelism.

    python benchmarks/parallel.py --out benchmarks/results/parallel-h100.csv --markdown docs/parallel.md
    python benchmarks/parallel.py --read benchmarks/results/parallel-h100.csv --markdown docs/parallel.md
    python benchmarks/parallel.py --small --device cpu --out parallel.csv     to check that everything runs

Random weights in bfloat16 and random data; a step is forward, backward and AdamW.  Every row is measured by
separate processes, one per GPU.  "compile" is `torch.compile` without fusepass.  Peak memory is that of one
GPU.  Before any timing, a few steps are made from equal weights and data; the loss is that of the last one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fusepass.host.faults import first_line
from fusepass.reports.collector import collect
from fusepass.selection.machine import machine

CONTENDERS = ("eager", "compile", "fusepass")
STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model, and the tokens of one process."""

    layers: int = 8
    width: int = 4096
    heads: int = 32
    groups: int = 8
    length: int = 4096
    batch: int = 1


SMALL = Sizes(2, 64, 4, 2, 32, 2)


@dataclass(frozen=True)
class Row:
    """One measurement, as the first process made it."""

    kind: str
    contender: str
    processes: int
    layers: int
    width: int
    length: int
    milliseconds: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    fused: int = 0
    sites: int = 0
    kernels: str = ""
    problem: str = ""


class Layer(nn.Module):
    """One decoder layer with grouped heads; the tensors show how many heads there are."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head, width = sizes.width // sizes.heads, sizes.width
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, sizes.groups * self.head, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 7 * width // 2, bias=False) for _ in range(2))
        self.down = nn.Linear(7 * width // 2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        y = self.mlp_norm(x)
        out: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return out

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * self.head**-0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return out


class Recomputed(nn.Module):
    """A layer in a checkpoint, which is outside the compiled part."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return out


# ---------------------------------------------------------------------------------- kinds


def prepare(module: nn.Module, contender: str, dynamic: bool | None = None) -> None:
    """Compile in place, as the contender does."""
    if contender != "eager":
        module.compile(backend="inductor" if contender == "compile" else "fusepass", dynamic=dynamic)


def ddp(layers: nn.Sequential, mesh: DeviceMesh, contender: str) -> nn.Module:
    model = DistributedDataParallel(layers)
    prepare(model, contender)
    return model


def fsdp2(layers: nn.Sequential, mesh: DeviceMesh, contender: str) -> nn.Module:
    for layer in layers:
        prepare(layer, contender)
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(layers, mesh=mesh)
    return layers


def fsdp2_with_checkpoints(layers: nn.Sequential, mesh: DeviceMesh, contender: str) -> nn.Module:
    for layer in layers:
        prepare(layer, contender)
    return fsdp2(nn.Sequential(*map(Recomputed, layers)), mesh, "eager")


def tensor_parallel(layers: nn.Sequential, mesh: DeviceMesh, contender: str) -> nn.Module:
    """DTensors from projection to projection."""
    plan: dict[str, Any] = {name: ColwiseParallel(use_local_output=False) for name in "qkv"}
    plan |= {"gate": ColwiseParallel(), "up": ColwiseParallel()}
    plan |= {"o": RowwiseParallel(), "down": RowwiseParallel()}
    for layer in layers:
        parallelize_module(layer, mesh, plan)
        prepare(layer, contender, dynamic=False)
    return layers


KINDS: dict[str, Callable[[nn.Sequential, DeviceMesh, str], nn.Module]] = {
    f.__name__: f for f in (ddp, fsdp2, fsdp2_with_checkpoints, tensor_parallel)
}

# ---------------------------------------------------------------------------------- one process


def work(kind: str, contender: str, device: str, sizes: Sizes, repeats: int, folder: Path) -> None:
    """Measure one row in this process, which is one of several; the first writes it down."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    backend = "nccl" if device == "cuda" else "gloo"
    store = f"file://{folder / 'store'}"
    distributed.init_process_group(backend, init_method=store, world_size=world, rank=rank)
    row = Row(kind, contender, world, sizes.layers, sizes.width, sizes.length)
    try:
        values = measure(kind, contender, here, sizes, repeats)
    except Exception as error:  # a row with its problem
        values = {"problem": first_line(error)[:200]}
    if rank == 0:
        (folder / "row.json").write_text(json.dumps(asdict(row) | values))
    distributed.destroy_process_group()


def measure(kind: str, contender: str, here: torch.device, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """The columns of a row that are measured."""
    world = distributed.get_world_size()
    torch.manual_seed(0)
    with here:
        layers = nn.Sequential(*(Layer(sizes) for _ in range(sizes.layers))).to(torch.bfloat16)
    model = KINDS[kind](layers, init_device_mesh(here.type, (world,)), contender)
    mixed = kind == "tensor_parallel"  # norms are plain tensors, which cannot be in a list with DTensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=not mixed)
    torch.manual_seed(1 if kind == "tensor_parallel" else 1 + distributed.get_rank())
    x = torch.randn(sizes.batch, sizes.length, sizes.width, dtype=torch.bfloat16, device=here)

    def step() -> float | Tensor:
        loss: Tensor = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with collect() as seen:
        losses = [float(step()) for _ in range(STEPS)]
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(step, here) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if here.type == "cuda" else None
    kernels = sorted({s.kernel or "" for s in seen.sites if s.fused})
    return {
        "milliseconds": statistics.median(times),
        "peak_bytes": peak,
        "loss": losses[-1],
        "fused": sum(s.fused for s in seen.sites),
        "sites": len(seen.sites),
        "kernels": " ".join(kernels),
        "problem": "; ".join(sorted({s.reason or "" for s in seen.sites if not s.fused})),
    }


def timed(step: Callable[[], object], here: torch.device) -> float:
    """Milliseconds of one step of all processes."""
    distributed.barrier()
    if here.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if here.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


# ---------------------------------------------------------------------------------- all of them


def spread(kind: str, contender: str, arguments: argparse.Namespace) -> Row:
    """The row that all processes, one per GPU, measure together."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", folder, "--kinds", kind, "--contenders", contender]
        command += ["--device", arguments.device, "--repeats", str(arguments.repeats)]
        command += ["--small"] * arguments.small
        runs = []
        for rank in range(arguments.processes):
            given = {"RANK": str(rank), "WORLD_SIZE": str(arguments.processes)}
            runs.append(subprocess.Popen(command, env=os.environ | given))
        try:
            for run in runs:
                run.wait(timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            for run in runs:
                run.kill()
        place = Path(folder) / "row.json"
        if place.exists():
            return Row(**json.loads(place.read_text()))
    sizes = SMALL if arguments.small else Sizes()
    row = Row(kind, contender, arguments.processes, sizes.layers, sizes.width, sizes.length)
    return Row(**asdict(row) | {"problem": "the processes ended, or were ended, without an answer"})


def write(rows: Sequence[Row], about: dict[str, str], place: Path) -> None:
    """Write the machine in comments, then a table."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in about.items())
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(place: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows as text, and the machine."""
    text = place.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in text if line.startswith("# "))
    return list(csv.DictReader(line for line in text if not line.startswith("# "))), about


def markdown(rows: Sequence[dict[str, str]], about: dict[str, str], place: Path) -> str:
    """The table of the documentation."""
    first = rows[0]
    versions = ", ".join(f"{name} {value}" for name, value in about.items())
    source = f"../benchmarks/results/{place.name}"
    lines = [
        "# Training on several GPUs, measured",
        "",
        f"Made by `python benchmarks/parallel.py` from [{place.name}]({source}): {versions}.",
        "",
        f"A step is forward, backward and AdamW of {first['layers']} layers with hand-written attention of",
        f"grouped heads: width {first['width']}, {first['length']} tokens for each process, bfloat16,",
        f"{first['processes']} processes. Times are medians. Memory is the most that one GPU held.",
        "`compile` is `torch.compile` alone. The last column is the difference between the loss of step",
        f"{STEPS} and that of eager.",
        "",
        "| kind | contender | ms | GB | fused sites | kernels | loss − eager's |",
        "|---|---|---|---|---|---|---|",
    ]
    eager = {r["kind"]: float(r["loss"]) for r in rows if r["contender"] == "eager" and r["loss"]}
    for r in rows:
        loss = f"{float(r['loss']) - eager[r['kind']]:+.1e}" if r["loss"] and r["kind"] in eager else ""
        sites = f"{r['fused']} of {r['sites']}" if r["contender"] == "fusepass" else ""
        numbers = [f"{float(r['milliseconds']):.1f}" if r["milliseconds"] else r["problem"]]
        numbers.append(f"{float(r['peak_bytes']) / 1e9:.1f}" if r["peak_bytes"] else "")
        cells = [r["kind"].replace("_", " "), r["contender"], *numbers, sites, r["kernels"], loss]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def parsed() -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--processes", type=int, default=2, help="one per GPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one row")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    parser.add_argument("--read", type=Path, help="a CSV file to make the table from, instead of measuring")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    if arguments.work:
        sizes, kind = SMALL if arguments.small else Sizes(), arguments.kinds[0]
        work(kind, arguments.contenders[0], arguments.device, sizes, arguments.repeats, arguments.work)
        return 0
    place = arguments.read or arguments.out
    if place is None:
        print(
            "give --out, a CSV file to write, or --read, a CSV file to make the table from", file=sys.stderr
        )
        return 2
    if arguments.read is None:
        rows: list[Row] = []
        for kind in arguments.kinds:
            for contender in arguments.contenders:
                rows.append(spread(kind, contender, arguments))
                print(rows[-1], flush=True)
                write(rows, machine(arguments.device), place)
    table = markdown(*read(place), place)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
