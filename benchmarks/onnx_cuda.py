"""Exported attention on ONNX Runtime's CUDA provider: numbers against PyTorch, time against other exports.

Each variant is one attention layer, exported unfused, by fusepass, and by onnxscript's `optimize_for_ort`.
Needs a CUDA device and onnxruntime-gpu; `--provider cpu --quick` runs the same steps anywhere.

python -m benchmarks.onnx_cuda --csv onnx_cuda.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table

import fusepass
from benchmarks.onnx_peers import quiet
from fusepass.exporters.onnx_verify import difference
from tests.onnx_models import Attention, sharpened

#: name -> (settings of the layer, is there a padding mask, target)
VARIANTS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "full": ({}, False, "onnx"),
    "causal": ({"causal": True}, False, "onnx"),
    "causal, grouped heads": ({"causal": True, "kv": 2}, False, "onnx"),
    "causal, softcap": ({"causal": True, "cap": 30.0}, False, "onnx"),
    "causal, padding": ({"causal": True}, True, "onnx"),
    "window": ({"causal": True, "window": 256, "kv": 2}, False, "ort"),
}
FIELDS = ("variant", "export", "operators", "error", "milliseconds", "note")


def exports(
    model: torch.nn.Module, args: tuple[Any, ...], target: str, folder: Path
) -> dict[str, Path | str]:
    """Files by the name of the export; a text says why one is missing."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    found: dict[str, Path | str] = {}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model, args, dynamo=True, opset_version=20, verbose=False)
        assert program is not None
        plain = folder / "unfused.onnx"
        ir.save(program.model, plain)
        found["unfused"] = plain
        fused = folder / "fusepass.onnx"
        fusepass.optimize_onnx(plain, fused, target=target, verify=False)
        found["fusepass"] = fused
        try:
            made = optimize_for_ort(ir.load(plain))
            ir.save(made[0] if isinstance(made, tuple) else made, folder / "onnxscript.onnx")
            found["onnxscript"] = folder / "onnxscript.onnx"
        except Exception as error:
            found["onnxscript"] = f"{type(error).__name__}: {error}"
    return found


def timed(path: Path, feeds: dict[str, Any], provider: str, repeats: int) -> tuple[Any, float]:
    """The first output and the median time of a run, inputs and outputs kept on the device."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    name = "CUDAExecutionProvider" if provider == "cuda" else "CPUExecutionProvider"
    session = ort.InferenceSession(str(path), options, providers=[name, "CPUExecutionProvider"])
    if name not in session.get_providers():
        raise RuntimeError(
            f"onnxruntime did not take {name}; is onnxruntime-gpu installed with its libraries?"
        )
    binding = session.io_binding()
    for value in session.get_inputs():
        held = ort.OrtValue.ortvalue_from_numpy(feeds[value.name], provider, 0)
        binding.bind_ortvalue_input(value.name, held)
    for value in session.get_outputs():
        binding.bind_output(value.name, provider)
    times = []
    for _ in range(repeats + 3):
        binding.synchronize_inputs()
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append(time.perf_counter() - start)
    return binding.copy_outputs_to_cpu()[0], float(np.median(times[3:])) * 1e3


def rows_of(name: str, length: int, batch: int, provider: str, repeats: int) -> list[dict[str, Any]]:
    """One variant, all exports."""
    settings, padded, target = VARIANTS[name]
    half = torch.float16
    model = sharpened(Attention(heads=4, **{"kv": 4, **settings})).to(half)
    x = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(0)).to(half)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length * 3 // 4 :] = 0
    args = (x, mask) if padded else (x,)
    with torch.no_grad():
        want = model.double()(*(a.double() if a.is_floating_point() else a for a in args)).numpy()
    model.to(half)
    feeds = {"x": x.numpy(), "mask": mask.numpy()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for export, path in exports(model, args, target, Path(folder)).items():
            row: dict[str, Any] = dict.fromkeys(FIELDS, "") | {"variant": name, "export": export}
            if isinstance(path, str):
                rows.append(row | {"note": path[:200]})
                continue
            kinds = {n.op_type for n in ir.load(path).graph.all_nodes()}
            row["operators"] = " ".join(sorted(k for k in kinds if "Attention" in k)) or "Softmax"
            try:
                got, row["milliseconds"] = timed(path, feeds, provider, repeats)
                row["error"] = difference(np.asarray(got), want)
            except Exception as error:
                row["note"] = str(error).strip().splitlines()[0][:200]
            rows.append(row)
    return rows


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def main() -> int:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description="Exported attention on ONNX Runtime's CUDA provider.")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--length", type=int, default=4096, help="tokens (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short sequences, few runs")
    parser.add_argument("--csv", type=Path, help="write the rows, and the machine beside them as .json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.length, arguments.repeats = 64, 3
    rows = [
        row
        for name in VARIANTS
        for row in rows_of(name, arguments.length, arguments.batch, arguments.provider, arguments.repeats)
    ]
    table = Table(*FIELDS)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        arguments.csv.with_suffix(".json").write_text(json.dumps(machine(), indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
