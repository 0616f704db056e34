"""FP8 attention: accuracy against float64, and time with the quantisation included.

    python benchmarks/fp8.py --out benchmarks/results/fp8-nvidia-h200.csv
    python benchmarks/fp8.py --read benchmarks/results/fp8-nvidia-h200.csv --markdown docs/fp8.md

Inputs are N(0, 1), and N(0, 1) with N(0, 100) added to 0.1% of the elements (the outliers of Shah et al.,
arXiv 2407.08608, table 3).  "cast" is the unscaled `.to(float8_e4m3fn)` of tutorials.  "identical" is exact
arithmetic on exactly the e4m3 inputs of "fp8", with the result rounded like the kernel's.  The last table is
the loss of a small trained language model.  Needs a Hopper GPU, and nvidia-cudnn-frontend or flash-attn 3.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fusepass.host.libraries import FLASH3, FRONTEND
from fusepass.kernels import fp8, fp8_ops
from fusepass.kernels.gates import installed
from fusepass.selection import clock as bench_clock
from fusepass.selection.machine import machine

HEAD_DIM = 128


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention as people write it: ``[B, S, H, D]`` in, ``[B, S, H * D]`` out."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    out = s.softmax(-1, dtype=torch.float32).to(v.dtype) @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def inputs(length: int, heads: int, kv_heads: int, outliers: bool, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = []
    for n in (heads, kv_heads, kv_heads):
        x = torch.randn(batch, length, n, HEAD_DIM, device="cuda")
        if outliers:
            x = x + torch.randn_like(x) * 10.0 * (torch.rand_like(x) < 0.001)
        tensors.append(x.bfloat16())
    return tensors


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """The result in float64, one head at a time; ``[B, H, S, D]`` in, float64 out."""
    group, out = q.shape[1] // k.shape[1], torch.empty(q.shape, dtype=torch.float64, device=q.device)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = q[b, h].double() @ k[b, h // group].double().T * scale
            if causal:
                s.masked_fill_(hidden, -math.inf)
            out[b, h] = s.softmax(-1) @ v[b, h // group].double()
    return out


def quality(out: Tensor, true: Tensor) -> tuple[float, float]:
    """The relative error, and the ratio of signal to quantisation noise (SQNR) in dB."""
    noise = (out.double() - true).square().sum().item()
    power = true.square().sum().item()
    return math.sqrt(noise / power), 10 * math.log10(power / max(noise, 1e-300))


def libraries() -> list[str]:
    """The installed libraries with FP8 kernels."""
    return [name for name, package in (("cudnn", FRONTEND), ("flash3", FLASH3)) if installed(package)]


def methods(q: Tensor, k: Tensor, v: Tensor, causal: bool, library: str) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute ``[B, H, S, D]`` tensors."""
    scale = HEAD_DIM**-0.5

    def native() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def cast() -> Tensor:
        eight = [t.transpose(1, 2).to(torch.float8_e4m3fn) for t in (q, k, v)]
        return _kernel(*eight, _ones(eight[1], library), scale, causal, library).transpose(1, 2).float()

    def identical(rotate: bool) -> Tensor:
        x, y = q, k
        if rotate:
            turn = fp8.hadamard(HEAD_DIM, q)
            x, y = fp8.rotated(q, turn), fp8.rotated(k, turn)
        x, y, z = (t.transpose(1, 2) for t in (x, y, v))
        of_v = fp8.largest(z, z.shape[2]) / fp8_ops.E4M3_MAX
        z8 = fp8.rounded(z, 1 / of_v)
        if library == "flash3":
            x8, y8, factor = _unscaled(x, y.shape[2]), _unscaled(y, y.shape[2]), scale
        else:
            q8, k8, descale = fp8.balanced(x, y)
            x8, y8, factor = q8.float(), k8.float(), scale * descale.item()
        out = exact(*(t.float().transpose(1, 2) for t in (x8, y8, z8)), causal, factor)
        back = fp8.per_head(of_v, x.shape[2]).transpose(1, 2)
        if library == "flash3":
            return (out * back).bfloat16()
        return out.float().to(torch.float8_e4m3fn).double() * back

    return {
        "bf16": native,
        "cast": cast,
        "fp8_unrotated": lambda: fp8.fp8_attention(q, k, v, scale, causal, False, library),
        "fp8": lambda: fp8.fp8_attention(q, k, v, scale, causal, True, library),
        "identical, unrotated": lambda: identical(False),
        "identical": lambda: identical(True),
    }


def _unscaled(x: Tensor, heads: int) -> Tensor:
    """``[B, S, H, D]`` after rounding with scales per batch and key/value head."""
    scale = fp8.largest(x, heads) / fp8_ops.E4M3_MAX
    return fp8.rounded(x, 1 / scale).float() * fp8.per_head(scale, x.shape[2])


def accuracy(lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        for kind in ("normal", "outliers"):
            q, k, v = (t.transpose(1, 2) for t in inputs(length, 8, 2, kind == "outliers"))
            for causal in (False, True):
                true = exact(q, k, v, causal, HEAD_DIM**-0.5)
                for library in libraries():
                    case = {"library": library, "length": length, "inputs": kind, "causal": causal}
                    for name, compute in methods(q, k, v, causal, library).items():
                        row: dict[str, Any] = case | {"method": name}
                        try:
                            error, sqnr = quality(compute(), true)
                            row |= {"relative error": f"{error:.4g}", "SQNR dB": f"{sqnr:.2f}"}
                        except Exception as problem:
                            row["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
                        rows.append(row)
    return rows


def speed(lengths: list[int]) -> list[dict[str, Any]]:
    """Milliseconds, quantisation included, through `torch.compile(backend="fusepass")`.

    All contenders of a row are timed in turns, because a GPU's clock follows its temperature.
    """
    rows = []
    for length in lengths:
        tensors = inputs(length, 32, 8, False, batch=max(1, 16384 // length))
        for causal in (False, True):
            steps: dict[str, Callable[[], Any]] = {}
            problems: dict[str, str] = {}
            with torch.no_grad():
                for name, call in _contenders(causal).items():
                    try:
                        call(*tensors)
                        steps[name] = functools.partial(call, *tensors)
                    except Exception as problem:
                        problems[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:60]
                times = bench_clock.in_turn(list(steps.values()), tensors[0].device, 60)
            spent = {name: round(time, 4) for name, time in zip(steps, times, strict=True)}
            rows += [_row(length, causal, library, spent, problems) for library in libraries()]
            torch._dynamo.reset()
    return rows


_BF16 = ("sdpa", "flash3", "flash4")


def _row(
    length: int, causal: bool, library: str, spent: dict[str, float], problems: dict[str, str]
) -> dict[str, Any]:
    row: dict[str, Any] = {"length": length, "causal": causal, "library": library}
    row |= {name: spent.get(name, problems.get(name, "")) for name in _BF16}
    of_library = {name: f"{name} {library}" for name in ("fp8", "fp8_unrotated", "kernel alone", "copy")}
    row |= {name: spent.get(key, problems.get(key, "")) for name, key in of_library.items()}
    parts = [spent.get(of_library[name]) for name in ("kernel alone", "copy")]
    row["bound"] = "" if None in parts else round(sum(p for p in parts if p is not None), 4)
    best = min((spent[name] for name in _BF16 if name in spent), default=None)
    for name in ("fp8", "fp8_unrotated", "kernel alone", "bound"):
        known = best is not None and isinstance(row[name], float)
        row[f"{name}, times best bf16"] = round(best / row[name], 3) if known else ""
    return row


def _contenders(causal: bool) -> dict[str, Callable[..., Any]]:
    """The best kernels without FP8, and the contenders of each library with FP8 kernels."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def flash4(q: Tensor, k: Tensor, v: Tensor) -> Any:
        from flash_attn.cute import flash_attn_func

        return flash_attn_func(q, k, v, causal=causal)

    def flash3(q: Tensor, k: Tensor, v: Tensor) -> Any:
        from flash_attn_interface import flash_attn_func

        return flash_attn_func(q, k, v, causal=causal)

    contenders: dict[str, Callable[..., Any]] = {"sdpa": sdpa, "flash4": flash4}
    if installed(FLASH3):
        contenders["flash3"] = flash3
    for library in libraries():
        contenders |= {f"{name} {library}": call for name, call in _of_library(library, causal).items()}
    return contenders


def _of_library(library: str, causal: bool) -> dict[str, Callable[..., Any]]:
    def fused(precision: str) -> Callable[..., Any]:
        def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal)

        compiled = torch.compile(program, backend="fusepass", dynamic=False, options={"precision": precision})

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with mock.patch.object(fp8, "library", return_value=library):  # read when it is compiled
                out: Tensor = compiled(q, k, v)
            return out

        return call

    rounded: list[Any] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The library's kernel on tensors that were rounded before the clock started."""
        if not rounded:
            rounded.extend(t.to(torch.float8_e4m3fn) for t in (q, k, v))
            rounded.extend(_ones(k, library))
        q, k, v, *scales = rounded
        return _kernel(q, k, v, scales, HEAD_DIM**-0.5, causal, library)

    moved: list[Tensor] = []

    def copy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Moves the bytes that scaling without rotation must move.

        Inputs are read for their largest magnitudes, then read again and written as one byte each; an e4m3
        result is read as one byte each and written as two.
        """
        if not moved:
            count = 5 * (q.numel() + k.numel() + v.numel()) + (3 * q.numel() if library == "cudnn" else 0)
            moved.extend(torch.randint(256, (2, count // 2), dtype=torch.uint8, device=q.device))
        return moved[0].copy_(moved[1])

    return {
        "fp8": fused("fp8"), "fp8_unrotated": fused("fp8_unrotated"), "kernel alone": kernel, "copy": copy,
    }  # fmt: skip


def _ones(k: Tensor, library: str) -> list[Tensor]:
    """Scales of 1 for ``k`` in ``[B, S, H, D]``, in the operators' form."""
    if library == "cudnn":
        return [torch.ones(1, 1, 1, 1, device=k.device)]
    return [torch.ones(k.shape[0], k.shape[2], device=k.device)] * 3


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, scales: list[Tensor], scale: float, causal: bool, library: str
) -> Tensor:
    """The operator on e4m3 tensors ``[B, S, H, D]``; its result has that layout too."""
    if library == "flash3":
        result: Tensor = torch.ops.fusepass.fp8_flash3(q, k, v, *scales, scale, causal)
        return result
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    out: Tensor = torch.ops.fusepass.fp8_cudnn(*turned, *scales, scale, causal)
    return out.transpose(1, 2)


class Model(nn.Module):
    """A small causal language model with attention written out."""

    def __init__(self, words: int = 64, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(512, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(layers)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for qkv, out, mlp, norm in zip(self.qkv, self.out, self.mlp, self.norm, strict=True):
            q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)) for t in qkv(norm(x)).chunk(3, -1))
            x = x + out(attention(q, k, v, True))
            x = x + mlp(x)
        logits: Tensor = self.head(x)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _text(batch: int, length: int = 512) -> Tensor:
    """Sequences that repeat a random phrase, which attention learns to copy."""
    phrase = torch.randint(0, 64, (batch, 64), device="cuda")
    return phrase.repeat(1, length // 64)


def model_loss(steps: int = 300) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = Model().cuda()
    trained = torch.compile(model, dynamic=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        with torch.autocast("cuda", torch.bfloat16):
            loss = trained(_text(32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.manual_seed(1)
    held_out, half = _text(64), model.bfloat16().eval().requires_grad_(False)
    rows = []
    with torch.no_grad():
        for precision in ("eager", "native", "fp8_unrotated", "fp8"):
            torch._dynamo.reset()
            call = half if precision == "eager" else torch.compile(
                half, backend="fusepass", dynamic=False, options={"precision": precision}
            )  # fmt: skip
            rows.append({"precision": precision, "loss": f"{call(held_out).item():.5f}"})
    return rows


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    names = list(dict.fromkeys(n for row in rows for n in row))
    table = Table(*names, title=title, title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*(str(row.get(n, "")) for n in names))
    console.print(table)


def markdown(results: Path, place: Path) -> None:
    """The tables of a CSV file as a page."""
    lines = results.read_text().splitlines()
    about = [line[2:] for line in lines if line.startswith("# ")]
    device = dict(line.split(": ", 1) for line in about)["device"]
    page = [
        f"# FP8 attention, measured on {device}",
        "",
        f"Made by `python benchmarks/fp8.py` from [{results.name}](../{results}), measured with:",
        "",
        *(f"- {line}" for line in about),
        "",
        "Milliseconds include the quantisation. All contenders of one length and mask were timed in turn.",
        "",
        "- `copy` moves as many bytes as scaling by the largest magnitudes must, without rotation, at the",
        "  speed of a copy on the GPU. Inputs are read twice, because a scale is known only after the last",
        "  element, and written once. cuDNN on Hopper writes e4m3 only, so its result is scaled back;",
        "  flash-attn 3 writes bfloat16.",
        "- `bound` is `copy` and the library's kernel alone. No way to call the kernel can be faster.",
        "- `cast` is the unscaled cast of tutorials.",
        "- `identical` is exact arithmetic on the very e4m3 inputs of `fp8`, with its result rounded as the",
        "  kernel's is.",
        "- Relative errors and SQNR are against float64. The loss is that of a small language model trained",
        "  in bfloat16.",
    ]
    names: list[str] = []
    title = ""
    for row in csv.reader(line for line in lines if not line.startswith("#")):
        if row[0] == "table":
            names = row[1:]
            continue
        if row[0] != title:
            title = row[0]
            page += ["", f"## {title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        page.append(f"| {' | '.join(row[1:])} |")
    place.write_text("\n".join(page) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("fp8.csv"), help="(%(default)s)")
    parser.add_argument("--accuracy-lengths", default="2048,8192")
    parser.add_argument("--lengths", default="4096,8192,16384,32768")
    parser.add_argument("--parts", default="time,accuracy,loss")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the small model")
    parser.add_argument("--read", type=Path, help="measure nothing; write these results to --markdown")
    parser.add_argument("--markdown", type=Path, help="write the tables to this page")
    arguments = parser.parse_args()
    if arguments.read:
        markdown(arguments.read, arguments.markdown or arguments.read.with_suffix(".md"))
        return
    console, about = Console(width=150), machine()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "time": lambda: speed([int(n) for n in arguments.lengths.split(",")]),
        "accuracy": lambda: accuracy([int(n) for n in arguments.accuracy_lengths.split(",")]),
        "loss": lambda: model_loss(arguments.steps),
    }
    with arguments.out.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        for title, part in parts.items():
            if title not in arguments.parts.split(","):
                continue
            start = time.time()
            try:
                rows = part()
            except Exception as problem:
                rows = [{"problem": f"{type(problem).__name__}: {problem}"[:200]}]
            show(f"FP8: {title} ({time.time() - start:.0f} s)", rows, console)
            names = list(dict.fromkeys(n for row in rows for n in row))
            writer = csv.DictWriter(file, ["table", *names], restval="")
            writer.writeheader()
            writer.writerows({"table": title} | row for row in rows)
            file.flush()
    if arguments.markdown:
        markdown(arguments.out, arguments.markdown)


if __name__ == "__main__":
    main()
