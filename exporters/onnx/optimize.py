"""``optimize_onnx``: fuses the attention of an ONNX model from any exporter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from fusepass.exporters.onnx import verify as onnx_verify
from fusepass.exporters.onnx.files import (
    Disagreement,
    check_opset,
    external_tensors,
    pin_ir_version,
    read,
    root,
    write,
)
from fusepass.exporters.onnx.leftover import softmaxes
from fusepass.exporters.onnx.operators import Target
from fusepass.exporters.onnx.opsets import infer, raise_opset
from fusepass.exporters.onnx.rewriting import fuse_model
from fusepass.exporters.onnx.targets import checked_target, fused_operators
from fusepass.exporters.reports import Check, ExportReport
from fusepass.exporters.staging import ModelError, staged
from fusepass.host.config import refuse_others
from fusepass.reports.collector import publish
from fusepass.reports.report import GraphReport


def optimize_onnx(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    *,
    target: str = "onnx",
    opset: int | None = None,
    verify: bool = True,
    inputs: Mapping[str, npt.NDArray[Any]] | None = None,
    external_data: bool | None = None,
    progress: Callable[[str], None] | None = None,
    **others: Never,
) -> ExportReport:
    """Fuse the attention of an ONNX model.

    Weights, the names of inputs and outputs, and the model's metadata stay as they are.

    Args:
        path_in: the model, opset 11 to 26, from any exporter.
        path_out: where to write; may be ``path_in``.
        target: ``"onnx"`` (``ai.onnx`` Attention), ``"ort"`` (with ``com.microsoft`` operators) or
            ``"tensorrt"``.
        opset: raise the model to this version of ``ai.onnx`` (default 24); newer models stay as they are.
        verify: run both models in onnxruntime on random inputs and compare.
        inputs: arrays by name to compare on, instead of random ones.
        external_data: whether to put weights in a separate file; None: as in the original, or if the model
            is large.
        progress: called with a short text at the start of each step.
        others: none are accepted; an option of the pass is refused with a message that names its equivalent.

    Raises:
        ModelError: the model cannot be read, converted or written, or its opset is not supported.
        Disagreement: the fused model is not valid, does not run in onnxruntime, or computes something else;
            nothing is written.
        ImportError: ``verify`` is True, and onnxruntime is not installed.
        ValueError: an unknown target or opset, or an option that an ONNX file cannot have.
    """
    refuse_others("optimize_onnx", others, ())
    start = time.perf_counter()
    aim, say = checked_target(target, opset), progress or (lambda _: None)
    say("reading the model")
    model = read(path_in)
    apart = external_data
    if apart is None and any(external_tensors(model)):
        apart = True
    have = check_opset(model)
    say("fusing attention")
    model, notes = _raised(model, path_in, aim, have, opset)
    report = fuse(model, replace(aim, opset=check_opset(model)))
    pin_ir_version(model)
    result = ExportReport(
        str(path_out),
        target,
        report,
        fused_operators(model),
        softmaxes(model.graph),
        notes=notes,
        versions={**{str(k): int(v) for k, v in model.opset_imports.items()}, "IR": model.ir_version},
    )
    with staged(path_out) as place:
        write(model, place, apart, say)
        try:
            check_model(place)
        except Disagreement:
            _check_original(path_in)
            raise
        if verify:
            say("running both models and comparing them")
            result.checks, remarks = _compared(path_in, place, model, inputs)
            result.notes += remarks
            if not all(c.ok for c in result.checks):
                raise onnx_verify.disagreement(result.checks)
    result.seconds = time.perf_counter() - start
    return result


def _raised(
    model: ir.Model, path: str | os.PathLike[str], aim: Target, have: int, asked: int | None
) -> tuple[ir.Model, list[str]]:
    """The model at the wanted version; or as it was, with a note, if it cannot and need not be converted."""
    try:
        raise_opset(model, aim.opset if asked is None else asked)
    except ModelError as error:
        if aim.since > 0 or asked is not None:
            raise
        return read(path), [f"kept at opset {have}: {error}"]
    return model, []


def fuse(model: ir.Model, target: Target) -> GraphReport:
    """Fuse a model in place, and publish the report."""
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        try:
            InlinePass()(model)
        except Exception as error:
            raise ModelError(f"the model's functions cannot be inlined: {root(error)}") from error
    report = fuse_model(model, target, infer(model))
    publish(report)
    return report


def check_model(path: Path) -> None:
    """Let onnx check a written model.

    Raises:
        Disagreement: it is not valid.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise Disagreement(f"the fused model is not valid, and was not written: {error}") from error


def _check_original(path: str | os.PathLike[str]) -> None:
    """Check the original, after the fused model turned out not to be valid.

    Raises:
        ModelError: the original is not valid either.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"cannot read {str(path)!r}: it is not a valid ONNX model ({root(error)})"
        ) from error


def _compared(
    before: str | os.PathLike[str],
    after: Path,
    model: ir.Model,
    inputs: Mapping[str, npt.NDArray[Any]] | None,
) -> tuple[list[Check], list[str]]:
    """Compare both models on the same inputs, at two choices of sizes if some are dynamic."""
    try:
        original = onnx_verify.session(before)
    except Disagreement as error:
        return [], [f"not verified: {error} (the original model)"]
    fused = onnx_verify.session(after)
    if inputs is not None:
        trials = [{n: np.asarray(a) for n, a in inputs.items()}]
    else:
        trials = [
            onnx_verify.random_feeds(model, sizes, seed)
            for seed, sizes in enumerate(onnx_verify.size_choices(model))
        ]
    checks: list[Check] = []
    failures: list[str] = []
    runs = 0
    for feeds in trials:
        try:
            want = onnx_verify.run_session(original, feeds)
        except Disagreement as error:
            failures.append(str(error))
            continue
        got = onnx_verify.run_session(fused, feeds)
        allowed = onnx_verify.coarsest([np.asarray(v) for v in want.values()])
        checks += onnx_verify.compare(
            got, [np.asarray(v) for v in want.values()], allowed, onnx_verify.label_of(feeds)
        )
        runs += 1
        if runs == 2:
            break
    if not runs:
        return [], [
            f"not verified: the original model does not run on random inputs ({failures[0]}); pass inputs=..."
        ]
    return checks, []


__all__ = ["Disagreement", "ModelError", "optimize_onnx"]
