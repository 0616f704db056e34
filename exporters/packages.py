"""Fused programs as PyTorch packages: ``.pt2`` archives, and libraries compiled ahead of time."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import fx
from torch.export import ExportedProgram

from fusepass.compilation.fusing import fuse_with
from fusepass.exporters.reports import ExportReport
from fusepass.exporters.staging import ModelError, staged
from fusepass.host.config import Options, PassOptions, pass_options
from fusepass.reports.collector import collect


def export_pt2(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Unpack[PassOptions],
) -> ExportReport:
    """Save a fused ``ExportedProgram``.

    With ``kernel="sdpa"`` the file holds only PyTorch's own operators, and ``torch.export.load`` reads it
    even if fusepass is not installed.  With ``kernel="auto"`` the report notes any other operator, as where
    it takes a kernel of flash-attn on a GPU.

    Args:
        model: a module, or an ``ExportedProgram``, which is fused as it is: ``args``, ``kwargs`` and
            ``dynamic_shapes`` are then not used.
        args: example arguments; tensors of any shape and dtype that the model takes.
        path: the ``.pt2`` file to write.
        kwargs: example keyword arguments.
        dynamic_shapes: as for ``torch.export.export``.
        options: ``kernel=``, ``precision=``, ``validate=`` as for the backend.

    Raises:
        ModelError: ``torch.export`` cannot export the model, or the file cannot be written.
        ValueError: an unknown option or value, or an option that is not taken.
    """
    start = time.perf_counter()
    checked = pass_options("export_pt2", options)
    program, report = _fused(model, args, dict(kwargs or {}), dynamic_shapes, checked, path, "pt2")
    with staged(path) as place:
        torch.export.save(program, str(place))
    report.seconds = time.perf_counter() - start
    return report


def compile_aoti(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    inductor_configs: Mapping[str, Any] | None = None,
    **options: Unpack[PassOptions],
) -> ExportReport:
    """Compile a fused program ahead of time into a package that ``torch._inductor.aoti_load_package`` runs.

    This needs what Inductor needs: a C++ compiler and, on CUDA, Triton.

    Args:
        model: a module, or an ``ExportedProgram``, which is fused as it is: ``args``, ``kwargs`` and
            ``dynamic_shapes`` are then not used.
        args: example arguments; tensors of any shape and dtype that the model takes.
        path: the ``.pt2`` package to write.
        kwargs: example keyword arguments.
        dynamic_shapes: as for ``torch.export.export``.
        inductor_configs: options of TorchInductor, by name.
        options: ``kernel=``, ``precision=``, ``validate=`` as for the backend.

    Raises:
        ModelError: the model cannot be exported, or the package cannot be written.
        ValueError: an unknown option or value, or an option that is not taken.
    """
    start = time.perf_counter()
    checked = pass_options("compile_aoti", options)
    program, report = _fused(model, args, dict(kwargs or {}), dynamic_shapes, checked, path, "aoti")
    with staged(path) as place, torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(place), inductor_configs=dict(inductor_configs or {})
        )
        if os.path.abspath(package) != str(place.absolute()):
            raise ModelError(f"cannot write {str(path)!r}: the name of a package ends in .pt2")
    report.seconds = time.perf_counter() - start
    return report


def _fused(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    options: Options,
    path: str | os.PathLike[str],
    target: str,
) -> tuple[ExportedProgram, ExportReport]:
    """The program with its attention fused, and the report of that."""
    if isinstance(model, ExportedProgram):
        program = model
    else:
        try:
            with torch.no_grad():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"torch.export cannot export the model: {first}") from error
    with collect() as seen:
        fused = fuse_with(program, options)
    report = ExportReport(str(path), target, seen.graphs[-1])
    report.operators = dict(Counter(site.kernel or "?" for site in seen.fused).most_common())
    graphs = [m.graph for m in fused.graph_module.modules() if isinstance(m, fx.GraphModule)]
    names = [str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"]
    report.softmaxes = sum("softmax" in name for name in names)
    own = sorted({name for name in names if name.startswith("fusepass.")})
    if own:
        report.notes.append(f"it needs fusepass to run: it uses {', '.join(own)}")
    return fused, report


__all__ = ["compile_aoti", "export_pt2"]
