"""Exported attention on ONNX Runtime's CUDA provider: its errors against PyTorch, and its time.

Each variant is the attention of one layer, from projected queries, keys and values to the weighted values,
with dynamic sizes.  It is exported by PyTorch alone (unfused), by fusepass for its targets, and by
onnxscript's `optimize_for_ort` from the unfused file.  Errors are against PyTorch in float64, in units of the
largest value.  The kernel is the one that ONNX Runtime itself reports for the run.

Needs a CUDA device and onnxruntime-gpu; `--provider cpu --quick` runs the same steps anywhere.

python -m benchmarks.onnx_cuda --csv benchmarks/results/onnx-nvidia-h200.csv --markdown docs/onnx_cuda.md
python -m benchmarks.onnx_cuda --from benchmarks/results/onnx-nvidia-h200.csv --markdown docs/onnx_cuda.md
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fusepass
from benchmarks.onnx_peers import quiet
from fusepass.exporters.onnx.targets import fused_operators
from fusepass.exporters.onnx.verify import difference

WIDTH = 128
FIELDS = ("variant", "export", "operators", "kernel", "provider", "error", "milliseconds", "times", "note")
Args = tuple[Tensor, ...]


class Core(nn.Module):
    """Attention by hand, as transformers writes it, over packed heads ``[B, S, heads * 128]``."""

    def __init__(
        self,
        heads: int,
        kv: int,
        causal: bool = True,
        window: int = 0,
        cap: float = 0.0,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv, self.causal, self.window, self.cap = heads, kv, causal, window, cap
        self.rotary = rotary

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: ``[B, H, Q, D]``; k, v: ``[B, G, K, D]``; mask: ``[B, K]``, one where there is a token."""
        if self.kv != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv, dim=1) for t in (k, v))
        s = q @ k.transpose(-2, -1) * WIDTH**-0.5
        if self.cap:
            s = torch.tanh(s / self.cap) * self.cap
        if visible := self.visible(q, k, mask):
            hidden = ~functools.reduce(torch.logical_and, visible)
            added = torch.zeros((), dtype=s.dtype, device=s.device).expand(hidden.shape)
            s = s + added.masked_fill(hidden, torch.finfo(s.dtype).min)
        wide = torch.promote_types(s.dtype, torch.float32)
        mixed = torch.softmax(s, -1, dtype=wide).to(s.dtype) @ v
        return mixed.transpose(1, 2).reshape(q.shape[0], q.shape[2], self.heads * WIDTH)

    def visible(self, q: Tensor, k: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The masks of what a query sees, ``[B | 1, 1, Q | 1, K]`` each."""
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
        gap = torch.arange(k.shape[2], device=q.device)[None, :] - rows
        atoms = []
        if self.causal:
            atoms.append((gap <= 0)[None, None])
        if self.window:
            atoms.append((gap > -self.window)[None, None])
        if mask is not None:
            atoms.append(mask[:, None, None, :] != 0)
        return atoms

    def split(self, t: Tensor) -> Tensor:
        """The tensor with a separate dimension for heads."""
        return t.view(t.shape[0], t.shape[1], -1, WIDTH).transpose(1, 2)

    def turned(self, t: Tensor) -> Tensor:
        """``[B, H, n, D]``, rotated by its positions, from zero on, if the variant has rotary embeddings."""
        if not self.rotary:
            return t
        steps = torch.arange(0, WIDTH, 2, device=t.device) / WIDTH
        positions = torch.arange(t.shape[2], device=t.device, dtype=torch.float32)
        angles = positions[None, :, None] * 10000.0**-steps
        angles = torch.cat([angles, angles], -1)[:, None]
        low, high = t.chunk(2, -1)
        return t * angles.cos().to(t.dtype) + torch.cat([-high, low], -1) * angles.sin().to(t.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Without a cache."""
        return self.attend(self.turned(self.split(q)), self.turned(self.split(k)), self.split(v), mask)


class Cached(Core):
    """With a cache ``[B, G, past, D]``, which it returns joined."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:  # type: ignore[override]
        """Attention over what is cached and what is new."""
        keys = torch.cat([past_k, self.split(k)], 2)
        values = torch.cat([past_v, self.split(v)], 2)
        return self.attend(self.split(q), keys, values, None), keys, values


@dataclass(frozen=True)
class Variant:
    """A kind of attention.

    Attributes:
        settings: the module's settings.
        grouped: do several query heads share a key/value head?
        padded: is there a mask of tokens?
        cached: how many of the keys come from a cache, given the length.
    """

    settings: dict[str, Any]
    grouped: bool = True
    padded: bool = False
    cached: Callable[[int], int] | None = None


VARIANTS: dict[str, Variant] = {
    "full": Variant({"causal": False}, grouped=False),
    "causal": Variant({}, grouped=False),
    "causal, grouped heads": Variant({}),
    "causal, softcap 30": Variant({"cap": 30.0}),
    "causal, window 1/4": Variant({"window": 4}),
    "causal, window 1/4, softcap 30": Variant({"window": 4, "cap": 30.0}),
    "causal, padding": Variant({}, padded=True),
    "causal, rotary": Variant({"rotary": True}),
    "causal, window 1/4, rotary": Variant({"window": 4, "rotary": True}),
    "cache, prefill of 1/8": Variant({}, cached=lambda n: n - n // 8),
    "cache, one token": Variant({}, cached=lambda n: n - 1),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of the run."""

    batch: int
    length: int
    heads: int
    kv: int


def case(variant: Variant, sizes: Sizes, dtype: torch.dtype, device: str) -> tuple[nn.Module, Args, Any]:
    """The module, its inputs, and which of their sizes are dynamic."""
    kv = sizes.kv if variant.grouped else sizes.heads
    settings = dict(variant.settings)
    if settings.get("window"):
        settings["window"] = sizes.length // settings["window"]
    past = variant.cached(sizes.length) if variant.cached else 0
    new = sizes.length - past
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=1)
    args: list[Tensor] = [drawn(sizes.batch, new, n * WIDTH) for n in (sizes.heads, kv, kv)]
    shapes: list[Any] = [{0: batch, 1: length}] * 3
    if variant.padded:
        mask = torch.ones(sizes.batch, new, dtype=torch.long, device=device)
        mask[-1, new * 3 // 4 :] = 0
        args.append(mask)
        shapes.append({0: batch, 1: length})
    if variant.cached:
        args += [drawn(sizes.batch, kv, past, WIDTH) for _ in range(2)]
        shapes += [{0: batch, 2: torch.export.Dim("past")}] * 2
    kind = Cached if variant.cached else Core
    return kind(sizes.heads, kv, **settings).eval(), tuple(args), tuple(shapes)


def example(args: Args, shapes: Any) -> Args:
    """Small inputs of the same kind to export with: batch 2, 6 new tokens, 10 cached."""
    wanted = {"batch": 2, "length": 6, "past": 10}
    out = []
    for tensor, varying in zip(args, shapes, strict=True):
        sizes = [wanted[varying[d].__name__] if d in varying else n for d, n in enumerate(tensor.shape)]
        out.append(torch.ones(sizes, dtype=tensor.dtype))
    return tuple(out)


def exports(model: nn.Module, args: Args, shapes: Any, folder: Path) -> Iterator[tuple[str, Path | str]]:
    """The files by the name of the export. A text in place of a file says why there is none.

    Files that are already in the folder are reused.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    small = example(args, shapes)
    plain = folder / "unfused.onnx"

    def unfused(path: Path) -> None:
        with torch.no_grad():
            program = torch.onnx.export(
                model, small, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False
            )
        assert program is not None
        program.save(path)

    def fused(path: Path) -> None:
        fusepass.export_onnx(model, small, path, dynamic_shapes=shapes, target=path.stem, verify=False)

    def theirs(path: Path) -> None:
        optimized: Any = optimize_for_ort(ir.load(plain))
        ir.save(optimized[0] if isinstance(optimized, tuple) else optimized, path)

    written: set[str] = set()  # operators of fused files
    for export, stem, make in (
        ("unfused", "unfused", unfused),
        ("fusepass, onnx", "onnx", fused),
        ("fusepass, ort", "ort", fused),
        ("onnxscript", "onnxscript", theirs),
    ):
        path = folder / f"{stem}.onnx"
        try:
            with quiet():
                if not path.exists():
                    make(path)
        except Exception as error:
            yield export, f"{type(error).__name__}: {error}"
            continue
        if make is fused:
            operators = str(fused_operators(ir.load(path)))
            if operators in written:  # the same operators mean the same file
                continue
            written.add(operators)
        yield export, path


# ---------------------------------------------------------------------------------------- running


def session(path: Path, provider: str, profile: Path | None = None) -> Any:
    """A session on the given provider, and on the CPU for operators that the provider lacks."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    name = "CUDAExecutionProvider" if provider == "cuda" else "CPUExecutionProvider"
    providers = list(dict.fromkeys([name, "CPUExecutionProvider"]))
    opened = ort.InferenceSession(str(path), options, providers=providers)
    if name not in opened.get_providers():
        raise RuntimeError(
            f"onnxruntime did not take {name}; is onnxruntime-gpu installed with its libraries?"
        )
    return opened


def bound(session: Any, feeds: dict[str, Any], provider: str) -> Any:
    """Inputs and outputs on the device."""
    import onnxruntime as ort

    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_ortvalue_input(
            value.name, ort.OrtValue.ortvalue_from_numpy(feeds[value.name], provider, 0)
        )
    for value in session.get_outputs():
        binding.bind_output(value.name, provider)
    return binding


@contextlib.contextmanager
def captured(text: list[str]) -> Iterator[None]:
    """Capture what native code prints in the block."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def inspected(path: Path, feeds: dict[str, Any], provider: str, folder: Path) -> dict[str, str]:
    """The attention kernel that ONNX Runtime reports, and where its attention (or softmaxes) ran."""
    text: list[str] = []
    os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
    try:
        with captured(text):
            opened = session(path, provider, folder / "profile")
            opened.run_with_iobinding(bound(opened, feeds, provider))
            events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    finally:
        del os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"]
    kernels = dict.fromkeys(re.findall(r"SdpaKernel=(\w+)", text[0]))
    ran = [e.get("args", {}) for e in events if e.get("cat") == "Node"]
    named = [a for a in ran if "Attention" in a.get("op_name", "")]
    named = named or [a for a in ran if a.get("op_name") in ("Softmax", "BiasSoftmax")]
    providers = dict.fromkeys(str(a.get("provider", "")).removesuffix("ExecutionProvider") for a in named)
    operators = dict.fromkeys(str(a["op_name"]) for a in named)
    return {
        "kernel": " ".join(kernels),
        "provider": " ".join(providers),
        "operators": " ".join(operators),
    }


def timed(path: Path, feeds: dict[str, Any], provider: str, repeats: int) -> tuple[list[Any], list[float]]:
    """The outputs, and the seconds of every run; inputs and outputs stay on the device."""
    opened = session(path, provider)
    binding = bound(opened, feeds, provider)
    times = []
    for _ in range(repeats + 3):
        binding.synchronize_inputs()
        start = time.perf_counter()
        opened.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append(time.perf_counter() - start)
    return binding.copy_outputs_to_cpu(), times[3:]


def eager(model: nn.Module, args: Args, repeats: int) -> tuple[list[Any], list[float]]:
    """PyTorch's own outputs and seconds."""

    def wait() -> None:
        if args[0].is_cuda:
            torch.cuda.synchronize()

    times, out = [], None
    with torch.no_grad():
        for _ in range(repeats + 3):
            out = None
            wait()
            start = time.perf_counter()
            out = model(*args)
            wait()
            times.append(time.perf_counter() - start)
    return arrays(out), times[3:]


def arrays(out: Any) -> list[Any]:
    """Tensors as arrays."""
    tensors = [t.cpu() for t in (out if isinstance(out, tuple) else (out,))]
    return [(t.float() if t.dtype is torch.bfloat16 else t).numpy() for t in tensors]


def exact(model: nn.Module, args: Args) -> list[Any]:
    """The outputs in float64."""
    with torch.no_grad():
        return arrays(model(*(a.double() if a.is_floating_point() else a for a in args)))


def finished(row: dict[str, Any], got: list[Any], times: list[float], want: list[Any]) -> dict[str, Any]:
    """A row with its error and times."""
    errors = [difference(np.asarray(a), b) for a, b in zip(got, want, strict=True)]
    return row | {
        "error": max(errors),
        "milliseconds": float(np.median(times)) * 1e3,
        "times": " ".join(f"{t * 1e3:.4g}" for t in times),
    }


@contextlib.contextmanager
def place(files: Path | None, name: str) -> Iterator[Path]:
    """The folder of a variant's exports: a permanent or a temporary one."""
    if files is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        folder = files / re.sub(r"\W+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def rows_of(
    name: str, sizes: Sizes, provider: str, repeats: int, dtype: str, files: Path | None = None
) -> list[dict[str, Any]]:
    """The rows of one variant, for all exports."""
    device = "cuda" if provider == "cuda" else "cpu"
    model, args, shapes = case(VARIANTS[name], sizes, getattr(torch, dtype), device)
    want = exact(model, args)
    blank: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"variant": name}
    rows = [finished(blank | {"export": "PyTorch eager"}, *eager(model, args, repeats), want)]
    feeds_by_position = [a.cpu().numpy() for a in args]
    with place(files, name) as folder:
        for export, path in exports(model, args, shapes, folder):
            row = blank | {"export": export}
            if isinstance(path, str):
                rows.append(row | {"note": path[:300]})
                continue
            inputs = [v.name for v in ir.load(path).graph.inputs]
            feeds = dict(zip(inputs, feeds_by_position, strict=True))
            row["operators"] = " ".join(fused_operators(ir.load(path))) or "Softmax"
            try:
                row |= {k: v for k, v in inspected(path, feeds, provider, folder).items() if v}
                row = finished(row, *timed(path, feeds, provider, repeats), want)
            except Exception as error:
                row["note"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            rows.append(row)
            gc.collect()
    return rows


def export_only(name: str, sizes: Sizes, dtype: str, files: Path | None) -> None:
    """The exports of one variant, for another process to measure."""
    with place(files, name) as folder:
        for _ in exports(*case(VARIANTS[name], sizes, getattr(torch, dtype), "cpu"), folder):
            pass


# ---------------------------------------------------------------------------------------- showing


def machine(sizes: Sizes, dtype: str) -> dict[str, Any]:
    """The machine and the versions of the measurement."""
    import onnxruntime as ort

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "onnxruntime": ort.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "cuda": torch.version.cuda or "",
        "sizes": f"{dtype}, batch {sizes.batch}, {sizes.length} keys, {sizes.heads} query heads, "
        f"{sizes.kv} key/value heads where grouped, head size {WIDTH}",
    }
    for name in ("torch", "onnx", "onnxruntime-gpu", "onnxscript"):
        with contextlib.suppress(PackageNotFoundError):
            facts[name] = version(name)
    return facts


def write(rows: list[dict[str, Any]], on: dict[str, Any], path: Path) -> None:
    """Write the rows, and the machine in a file next to them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(on, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read what :func:`write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    rows.sort(key=lambda row: list(VARIANTS).index(row["variant"]))
    for row in rows:
        row |= {k: float(row[k]) for k in ("error", "milliseconds") if row[k]}
    return rows, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, float) else "–"


def markdown(rows: list[dict[str, Any]], on: dict[str, Any]) -> str:
    """The page of the documentation."""
    named = ", ".join(f"{n} {on[n]}" for n in ("torch", "onnx", "onnxscript") if n in on)
    lines = [
        "# Exported attention on ONNX Runtime's CUDA provider",
        "",
        f"Made by `python -m benchmarks.onnx_cuda` on {on['device']} with onnxruntime {on['onnxruntime']}, "
        f"{named}, CUDA {on['cuda']}, Python {on['python']}:",
        f"{on['sizes']}. Sizes vary in every export.",
        "The error is against PyTorch in float64, in units of an output's largest value. PyTorch's own error",
        "is in the row of eager attention. Times are medians, with inputs and outputs on the device.",
        "*Kernel* is what ONNX Runtime reports about the run.",
        "",
        "| variant | export | operator | kernel | error | ms | × unfused |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    unfused = {r["variant"]: r["milliseconds"] for r in rows if r["export"] == "unfused"}
    for r in rows:
        base = unfused.get(r["variant"])
        both = isinstance(base, float) and isinstance(r["milliseconds"], float)
        faster = base / r["milliseconds"] if both else None
        elsewhere = f" (on {r['provider']})" if r["provider"] not in ("", "CUDA") else ""
        said = r["kernel"] or ("" if not r["note"] else r["note"].replace("|", "\\|")[:120])
        lines.append(
            f"| {r['variant']} | {r['export']} | {r['operators']}{elsewhere} | {said} "
            f"| {_number(r['error'], '.1e')} | {_number(r['milliseconds'], '.3g')} "
            f"| {_number(faster, '.2g')} |"
        )
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> Table:
    """The table for the console."""
    shown = [f for f in FIELDS if f != "times"]
    out = Table(*shown)
    for row in rows:
        out.add_row(*(_number(row[f], ".3g") if isinstance(row[f], float) else str(row[f]) for f in shown))
    return out


def main() -> int:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description="Exported attention on ONNX Runtime's CUDA provider.")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="variants, separated by semicolons")
    parser.add_argument("--length", type=int, default=4096, help="keys (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (%(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (%(default)s)")
    parser.add_argument("--kv", type=int, default=8, help="key/value heads where grouped (%(default)s)")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short sequences, few heads, few runs")
    parser.add_argument("--files", type=Path, help="keep the exports in this folder, and reuse those in it")
    parser.add_argument("--export", action="store_true", help="write the exports, but measure nothing")
    parser.add_argument("--csv", type=Path, help="write the rows, and the machine next to them as .json")
    parser.add_argument("--markdown", type=Path, help="write the table as a page")
    parser.add_argument("--from", dest="given", type=Path, help="show the rows of this file; measure nothing")
    arguments = parser.parse_args()
    console = Console(width=200)
    if arguments.given:
        rows, on = load(arguments.given)
    else:
        if arguments.quick:
            arguments.length, arguments.heads, arguments.kv, arguments.repeats = 64, 4, 2, 3
        sizes = Sizes(arguments.batch, arguments.length, arguments.heads, arguments.kv)
        rows, on = [], machine(sizes, arguments.dtype)
        for name in arguments.variants.split(";"):
            start = time.perf_counter()
            if arguments.export:
                export_only(name, sizes, arguments.dtype, arguments.files)
                continue
            rows += rows_of(
                name, sizes, arguments.provider, arguments.repeats, arguments.dtype, arguments.files
            )
            console.print(f"{name}: {time.perf_counter() - start:.1f} s")
            if arguments.csv:  # after every variant, so that no measurement is lost
                write(rows, on, arguments.csv)
    if not arguments.export:
        console.print(table(rows))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, on), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
