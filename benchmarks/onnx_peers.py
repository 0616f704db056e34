"""Fused attention in ONNX, side by side: fusepass and the optimizers of ONNX Runtime and onnxscript.

Every tool gets the same files: tiny models of transformers with eager attention and random weights, exported
by PyTorch with unfused attention. A site counts as fused when its softmax is gone; the error is against
PyTorch, in units of the largest value of an output.

python -m benchmarks.onnx_peers --models bert,llama --markdown docs/onnx_peers.md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fusepass
from fusepass.exporters.onnx.targets import fused_operators
from fusepass.exporters.onnx.verify import difference, run_session, session
from tests.onnx_models import MODELS, dynamic

#: The `model_type` that ONNX Runtime's optimizer is given for each model; for all others it is "gpt2".
FAMILIES = {
    "bert": "bert",
    "gpt2": "gpt2",
    "t5": "t5",
    "whisper": "bart",
    "vit": "vit",
    "clip": "clip",
    "swin": "swin",
}


@dataclass(frozen=True)
class Row:
    """The result of one tool on one model."""

    model: str
    tool: str
    sites: int
    fused: int
    loads: str
    error: float
    operators: str


def by_fusepass(target: str) -> Callable[[Path, Path, str], None]:
    """The tool ``optimize_onnx``."""
    return lambda before, after, name: void(
        fusepass.optimize_onnx(before, after, target=target, verify=False)
    )


def void(_: object) -> None:
    """Discard a result."""


def by_onnxruntime(before: Path, after: Path, name: str) -> None:
    """``onnxruntime.transformers.optimizer``, as its documentation calls it."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimized = optimize_model(str(before), model_type=FAMILIES.get(name, "gpt2"), num_heads=0, hidden_size=0)
    optimized.save_model_to_file(str(after))


def by_onnxscript(before: Path, after: Path, name: str) -> None:
    """``onnxscript.rewriter.ort_fusions``."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(before)
    optimized = optimize_for_ort(model)
    ir.save(optimized[0] if isinstance(optimized, tuple) else optimized, after)


TOOLS: dict[str, Callable[[Path, Path, str], None]] = {
    "fusepass, target onnx": by_fusepass("onnx"),
    "fusepass, target ort": by_fusepass("ort"),
    "onnxruntime.transformers.optimizer": by_onnxruntime,
    "onnxscript.rewriter.ort_fusions": by_onnxscript,
}


def softmaxes(path: Path) -> int:
    """The number of softmaxes left."""
    return sum(n.op_type in ("Softmax", "BiasSoftmax") for n in ir.load(path).graph.all_nodes())


@contextlib.contextmanager
def quiet() -> Any:
    """Silence exporters and optimizers."""
    logging.disable(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def measure(name: str, varying: bool, folder: Path) -> list[Row]:
    """Measure all tools on one model."""
    make, sites = MODELS[name]
    with quiet(), torch.no_grad():
        model, inputs = make()
        want = [
            t.numpy() for t in torch.utils._pytree.tree_leaves(model(**inputs)) if isinstance(t, torch.Tensor)
        ]
        before = folder / "plain.onnx"
        shapes = dynamic(inputs) if varying else None
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamo=True, opset_version=20, verbose=False, dynamic_shapes=shapes
        )
        assert program is not None
        program.save(before)
    total = softmaxes(before)
    assert total == sites, f"{name}: {total} softmaxes, expected {sites}"
    label = f"{name}{', dynamic' if varying else ''}"
    feeds = {n: t.numpy() for n, t in inputs.items()}
    return [one(label, name, tool, total, before, folder / "after.onnx", feeds, want) for tool in TOOLS]


def one(
    label: str, name: str, tool: str, total: int, before: Path, after: Path, feeds: Any, want: list[Any]
) -> Row:
    """Measure one tool on one file."""
    after.unlink(missing_ok=True)
    try:
        with quiet():
            TOOLS[tool](before, after, name)
    except Exception as error:
        return Row(label, tool, total, 0, f"tool fails: {type(error).__name__}", float("nan"), "")
    fused = total - softmaxes(after)
    operators = ", ".join(f"{n} {k}" for k, n in fused_operators(ir.load(after)).items())
    try:
        got = [np.asarray(v) for v in run_session(session(after), feeds).values()]
        error = max(difference(a, b) for a, b in zip(got, want, strict=True))
    except Exception as failure:
        return Row(label, tool, total, fused, f"no: {str(failure)[-60:]}", float("nan"), operators)
    return Row(label, tool, total, fused, "yes", error, operators)


def markdown(rows: list[Row]) -> str:
    """The page of the documentation."""
    names = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
    versions = ", ".join(f"{n} {version(n)}" for n in names)
    lines = [
        "# Fused attention in ONNX, side by side",
        "",
        f"Made by `python -m benchmarks.onnx_peers` with {versions}, Python {platform.python_version()}, on "
        "the CPU provider.",
        "Tiny models of transformers (two layers, random weights, eager attention); the error is against",
        "PyTorch, in units of the largest value of an output.",
        "",
        "| model | tool | sites | fused | loads and runs | error | operators |",
        "|---|---|---:|---:|---|---:|---|",
    ]
    for r in rows:
        error = "–" if r.error != r.error else f"{r.error:.1e}"
        lines.append(
            f"| {r.model} | {r.tool} | {r.sites} | {r.fused} | {r.loads} | {error} | {r.operators} |"
        )
    lines += ["", "| tool | sites | fused in files that load and agree to 1e-4 |", "|---|---:|---:|"]
    for tool in TOOLS:
        mine = [r for r in rows if r.tool == tool]
        good = sum(r.fused for r in mine if r.error <= 1e-4)
        lines.append(f"| {tool} | {sum(r.sites for r in mine)} | {good} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description="Fused attention in ONNX, side by side.")
    parser.add_argument("--models", default=",".join(MODELS), help="which models (%(default)s)")
    parser.add_argument("--dynamic", action="store_true", help="also with dynamic sizes")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    console = Console()
    names = [
        (n, v) for n in arguments.models.split(",") for v in ([False, True] if arguments.dynamic else [False])
    ]
    for name, varying in track(names, "models", console=console):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, varying, Path(folder))
    table = Table("model", "tool", "sites", "fused", "loads", "error", "operators")
    for r in rows:
        table.add_row(r.model, r.tool, str(r.sites), str(r.fused), r.loads, f"{r.error:.1e}", r.operators)
    console.print(table)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
