"""The examples of the ONNX specification: the meaning that is read computes the recorded outputs.

Every operator of the standard comes with node tests (``onnx.backend.test``): small models, inputs and
outputs, some with the operator expanded into others.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.backend.test.case.node import collect_testcases
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from fusepass.dialects.onnx.graph import OnnxReader
from fusepass.exporters.onnx.opsets import infer
from fusepass.expressions.ir import Expr, walk
from tests.evaluate import Evaluator


def tensor(value: Any) -> Tensor | None:
    """A dense tensor of a dtype that PyTorch has, or None."""
    try:
        array = np.asarray(value)
        return torch.from_numpy(np.array(array, order="C").reshape(array.shape))
    except (TypeError, ValueError):
        return None  # sequences, strings, four-bit numbers


def symbolic(meaning: Expr) -> bool:
    """Does its shape depend on values?"""
    return any(not isinstance(n, int) for e in walk(meaning) for n in (*e.shape, *_numbers(e)))


def _numbers(e: Expr) -> tuple[Any, ...]:
    return tuple(a for a in e.attrs if hasattr(a, "free_symbols"))


def read_otherwise(case: Any) -> tuple[int, list[str]]:
    """How many outputs of an example were read, and which ones were read wrongly."""
    model = ir.serde.deserialize_model(case.model)
    InlinePass()(model)
    reader = OnnxReader(model.graph, model.opset_imports, infer(model))
    given, wanted = case.data_sets[0]
    inputs = {
        v.name: t for v, a in zip(model.graph.inputs, given, strict=False) if (t := tensor(a)) is not None
    }
    wide = {str(k): t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    compared, wrong = 0, []
    for value, expected in zip(model.graph.outputs, wanted, strict=False):
        meaning, want = reader.meaning.get(value), tensor(expected)
        if not isinstance(meaning, Expr) or want is None or symbolic(meaning):
            continue
        leaves = [n for n in walk(meaning) if n.op == "input"]
        if any(str(n.attrs[0]) not in wide or n.shape != wide[str(n.attrs[0])].shape for n in leaves):
            continue  # opaque, or an optional input
        got = Evaluator(wide)(meaning)
        compared += 1
        low = want.is_floating_point() and want.dtype.itemsize < 4  # the evaluator does not round
        close = {"rtol": 1e-2, "atol": 1e-3} if low else {"rtol": 1e-5, "atol": 1e-6}
        if got.shape != want.shape:
            wrong.append(f"{case.name}: {tuple(got.shape)} for {tuple(want.shape)}")
        elif not torch.allclose(got.double(), want.double(), equal_nan=True, **close):
            wrong.append(f"{case.name}: other values")
    return compared, wrong


def test_examples_of_the_specification() -> None:
    compared, wrong = dict[str, int](), list[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            if case.model is not None and case.data_sets:
                number, differences = read_otherwise(case)
                operator = case.model.graph.node[0].op_type
                compared[operator] = compared.get(operator, 0) + number
                wrong += differences
    assert not wrong, "\n".join(wrong)
    assert sum(map(bool, compared.values())) > 40, "operators that are read"
    assert sum(compared.values()) > 300
