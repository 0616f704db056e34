"""Operator sets: which one a target needs, how a model is converted, and what shape inference finds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir

from fusepass.exporters.onnx.files import root
from fusepass.exporters.staging import ModelError


def raise_opset(model: ir.Model, wanted: int) -> None:
    """Convert a model, in place, to a newer version of ``ai.onnx``.

    Raises:
        ModelError: some operator cannot be converted.
    """
    from onnxscript import version_converter

    have = model.opset_imports[""]
    if have >= wanted:
        return
    names = [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    try:
        with _quiet():
            if have < 18:
                _convert_old(model)
            version_converter.convert_version(model, wanted, fallback=False)
    except Exception as error:
        raise ModelError(
            f"the model's operators cannot be converted from opset {have} to {wanted} "
            f"({root(error)}); export it at opset {wanted}, or use "
            "target='ort', whose operators need no newer opset"
        ) from error
    if model.opset_imports[""] != wanted:
        raise ModelError(f"the model's operators cannot be converted from opset {have} to {wanted}")
    assert names == [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]


def _convert_old(model: ir.Model) -> None:
    """Convert to opset 18 with onnx's own converter, without large weights."""
    from onnx_ir.passes.common import _c_api_utils

    proto = _c_api_utils.call_onnx_api(lambda p: onnx.version_converter.convert_version(p, 18), model)
    converted = ir.from_proto(proto)
    weights = dict(model.graph.initializers)
    inputs = {v.name for v in model.graph.inputs}
    for value in [v for v in converted.graph.inputs if v.name not in inputs]:
        converted.graph.inputs.remove(value)
    for name, value in weights.items():
        mine = _find_value(converted.graph, name)
        if mine is not None and value.const_value is not None:
            mine.const_value = value.const_value
            if name not in converted.graph.initializers:
                converted.graph.register_initializer(mine)
    model.graph = converted.graph  # its operator sets come with the model


def _find_value(graph: ir.Graph, name: str) -> ir.Value | None:
    if name in graph.initializers:
        return graph.initializers[name]
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.name == name:
                return value
    return None


def infer(model: ir.Model) -> dict[str, list[Any]]:
    """The shapes that onnx infers, by the name of the value: each dimension is an integer, a name or None.

    Values without a recorded dtype get the inferred one; nothing else in the model changes.
    """
    from onnx_ir.passes.common import _c_api_utils

    if all(v.dtype is not None and v.shape is not None for n in model.graph for v in n.outputs):
        return {}

    def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)

    try:
        proto = _c_api_utils.call_onnx_api(inferred, model)
    except Exception:
        return {}
    kinds = {v.name: v.type.tensor_type for v in proto.graph.value_info if v.type.HasField("tensor_type")}
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and value.name in kinds and kinds[value.name].elem_type:
                value.type = ir.TensorType(ir.DataType(kinds[value.name].elem_type))
    return {
        str(name): [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
        for name, kind in kinds.items()
        if kind.HasField("shape")
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence converters, which log every node that they do not change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
