"""ONNX files: reading with clear errors, versions, writing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from fusepass.exporters.staging import ModelError

#: The newest operator set and IR version that ONNX Runtime 1.31 loads.
NEWEST_OPSET, NEWEST_IR = 26, 13
#: The oldest operator set that can be read.
OLDEST_OPSET = 11
#: Protocol buffers are limited to two gigabytes; larger models keep their weights in a separate file.
_INLINE_BYTES = 1_500_000_000
_SMALL = 1024


class Disagreement(RuntimeError):
    """A fused model is not valid, does not run, or does not compute what the original computes; nothing was
    written."""


def read(path: str | os.PathLike[str]) -> ir.Model:
    """A model from a file; external weights are located but not loaded.

    Raises:
        ModelError: there is no such file, it is not an ONNX model, or its weights are missing.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"cannot read {str(path)!r}: there is no such file; expected an ONNX model")
    try:
        model = ir.load(file)
    except Exception as error:
        raise ModelError(
            f"cannot read {str(path)!r}: it is not a valid ONNX model ({root(error)})"
        ) from error
    if not model.graph.outputs or not model.opset_imports:
        raise ModelError(f"cannot read {str(path)!r}: it has no outputs or no operator sets; is it complete?")
    _check_weights(model, path)
    _load_attributes(model)
    return model


def root(error: BaseException) -> str:
    """The root cause of an error, on one line: libraries wrap errors in several layers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _attributes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    """The attributes of all nodes, those of inner graphs and functions included."""
    inside = [model.graph.all_nodes(), *(f.all_nodes() for f in model.functions.values())]
    for node in itertools.chain(*inside):
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr):
                yield node, attribute


def external_tensors(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """Tensors in other files, each with the name of the value that holds it."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.name or "?", value.const_value
    for node, attribute in _attributes(model):
        if attribute.type is ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            yield node.outputs[0].name or node.op_type, attribute.value


def _check_weights(model: ir.Model, path: str | os.PathLike[str]) -> None:
    for name, tensor in external_tensors(model):
        file, location = Path(tensor.path), Path(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise ModelError(
                f"cannot read {str(path)!r}: {name!r} names the file {tensor.location!r}, which is not in "
                "the model's folder; external data must be in that folder or below it"
            )
        if not file.is_file():
            raise ModelError(
                f"cannot read {str(path)!r}: its weights are in {tensor.location!r}, which is not beside it "
                f"(first missing tensor: {name!r}); copy that file next to the model"
            )
        given = tensor.nbytes if tensor.length is None else tensor.length
        if given < tensor.nbytes:
            raise ModelError(
                f"cannot read {str(path)!r}: {name!r} has {tensor.nbytes} bytes, but the model gives it only "
                f"{given} of {tensor.location!r}"
            )
        end = (tensor.offset or 0) + given
        if file.stat().st_size < end:
            raise ModelError(
                f"cannot read {str(path)!r}: {tensor.location!r} ends at byte {file.stat().st_size}, and "
                f"{name!r} needs bytes up to {end}; the file is incomplete"
            )


def check_opset(model: ir.Model) -> int:
    """The model's ``ai.onnx`` version.

    Raises:
        ModelError: the version is not supported.
    """
    version: int | None = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None:
        raise ModelError("the model imports no version of the ai.onnx operators")
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise ModelError(
            f"the model uses opset {version}; versions {OLDEST_OPSET} to {NEWEST_OPSET} are read "
            "(convert it first, with onnx.version_converter for example)"
        )
    return version


def pin_ir_version(model: ir.Model) -> None:
    """Set the oldest IR version that the model's operator sets need, but none older than its own."""
    known = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training"}
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items() if d in known]
    needed = onnx.helper.find_min_ir_version_for(imports)
    model.ir_version = min(max(model.ir_version or 0, needed, 8), NEWEST_IR)


def write(
    model: ir.Model,
    path: Path,
    external_data: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a model; weights go into ``<name>.data`` if this is requested or necessary.

    Args:
        model: the model.
        path: the file.
        external_data: True, False, or None for "if the model is large".
        progress: called with a short text for every tensor that is written to a separate file.
    """
    weights = (v.const_value for g in model.graphs() for v in g.initializers.values())
    size = sum(w.nbytes for w in weights if w is not None)
    apart = size > _INLINE_BYTES if external_data is None else external_data

    def report_progress(_: Any, about: Any) -> None:
        if progress is not None:
            progress(f"writing weights: {about.index + 1} of {about.total}")

    try:
        if apart:
            data = f"{path.name}.data"
            ir.save(model, path, external_data=data, size_threshold_bytes=_SMALL, callback=report_progress)
        else:
            ir.save(ir.external_data.load_to_model(model), path)
    except Exception as error:
        raise ModelError(f"cannot write {path.name!r}: {root(error)}") from error


def _load_attributes(model: ir.Model) -> None:
    """Load constants from other files into the model; weights stay in their files for now."""
    for node, attribute in list(_attributes(model)):
        if attribute.type is ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            (loaded,) = ir.external_data.convert_tensors_from_external([attribute.value])
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, loaded)
