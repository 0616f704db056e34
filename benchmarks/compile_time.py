"""The time of the pass and of the whole `torch.compile`, for a Llama-like model of several depths.

    python benchmarks/compile_time.py                               4, 16, 64 and 128 layers with Inductor
    python benchmarks/compile_time.py --layers 4 16 --inner aot_eager

Every depth is compiled in a separate process with all compile caches off. With --check, the run fails if the
pass takes more than 5% of the whole at any depth, or more than 40 times as long for 128 layers as for 4.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

SHARE = 0.05
GROWTH = 40 / (128 / 4)  # the largest growth of the time, divided by the growth of the depth
WIDTH, HEADS, GROUPS, LENGTH, BATCH = 256, 4, 2, 128, 2


class Layer(nn.Module):
    """One decoder layer with its attention written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.head = WIDTH // HEADS
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, GROUPS * self.head, bias=False)
        self.v = nn.Linear(WIDTH, GROUPS * self.head, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), cos, sin, mask)
        y = self.mlp_norm(x)
        mixed: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + mixed

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = repeated(k), repeated(v)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.head**-0.5 + mask
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        attended = torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, -1)
        out: Tensor = self.o(attended)
        return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def repeated(x: Tensor) -> Tensor:
    """Key or value heads, each for all query heads of its group."""
    batch, groups, length, head = x.shape
    wide = x[:, :, None].expand(batch, groups, HEADS // GROUPS, length, head)
    return wide.reshape(batch, HEADS, length, head)


class Decoder(nn.Module):
    """A Llama-like decoder."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        frequencies = 1e4 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angles = torch.arange(length)[:, None] * frequencies.repeat(2)[None]
        mask = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return x


def compile_once(layers: int, inner: str) -> dict[str, Any]:
    """Compile one model without caches; the compile time is the first call's time minus the second's."""
    from fusepass.compilation.backend import fusepass
    from fusepass.reports.collector import collect

    torch.manual_seed(0)
    model, x = Decoder(layers).eval(), torch.randn(BATCH, LENGTH, WIDTH)
    compiled = torch.compile(model, backend=fusepass, options={"inner": inner})
    with torch.no_grad(), collect() as collector:
        start = time.perf_counter()
        compiled(x)
        first = time.perf_counter()
        compiled(x)
        second = time.perf_counter()
    nodes = sum(graph.nodes for graph in collector.graphs)
    counts = {"layers": layers, "nodes": nodes, "sites": len(collector.sites), "fused": len(collector.fused)}
    return {**counts, "pass_s": collector.seconds, "compile_s": (first - start) - (second - first)}


def in_process(layers: int, inner: str) -> dict[str, Any]:
    """`compile_once` in a fresh process with empty caches."""
    root = str(Path(__file__).parent.parent)
    with tempfile.TemporaryDirectory() as cache:
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        off = {
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "PYTHONPATH": path,
        }
        command = [sys.executable, "-W", "ignore", __file__, "--one", str(layers), "--inner", inner]
        done = subprocess.run(
            command, env={**os.environ, **off}, stdout=subprocess.PIPE, text=True, check=True
        )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]], inner: str) -> Table:
    machine = f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}; inner {inner}"
    grid = Table(title=f"Compile time of a Llama-like model\n{machine}", header_style="bold")
    for head in ("layers", "graph nodes", "sites fused", "pass", "whole torch.compile", "share"):
        grid.add_column(head, justify="right")
    for row in rows:
        times = (
            f"{row['pass_s']:.2f} s",
            f"{row['compile_s']:.1f} s",
            f"{row['pass_s'] / row['compile_s']:.1%}",
        )
        grid.add_row(str(row["layers"]), str(row["nodes"]), f"{row['fused']}/{row['sites']}", *times)
    return grid


def within_limits(rows: list[dict[str, Any]]) -> bool:
    shares = all(row["pass_s"] <= SHARE * row["compile_s"] for row in rows)
    return shares and (growth(rows) or 0.0) <= GROWTH * rows[-1]["layers"] / rows[0]["layers"]


def growth(rows: list[dict[str, Any]]) -> float | None:
    """How many times as long the pass takes for the deepest model as for the shallowest."""
    first, last = rows[0]["pass_s"], rows[-1]["pass_s"]
    return last / first if len(rows) > 1 and first else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 16, 64, 128])
    parser.add_argument("--inner", default="inductor", help="the inner backend (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="fail if a limit is exceeded")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_once(options.one, options.inner)))
        return 0
    rows = [in_process(layers, options.inner) for layers in sorted(options.layers)]
    if options.json:
        print(json.dumps({"machine": processor(), "torch": torch.__version__, "rows": rows}, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(table(rows, options.inner))
        if times := growth(rows):
            console.print(
                f"the pass takes {times:.1f} times as long for {rows[-1]['layers']} layers "
                f"as for {rows[0]['layers']}"
            )
    return 0 if not options.check or within_limits(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
