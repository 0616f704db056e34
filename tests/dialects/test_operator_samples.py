"""PyTorch's own samples of every operator: the meaning that is read computes the operator's result.

The samples are those of its test suite (``op_db``): functions, methods and in-place forms, with odd ranks,
broadcasting, keyword arguments and empty tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fusepass.dialects.torch.graph import Reader
from fusepass.dialects.torch.nodes import operation
from fusepass.dialects.torch.ops import HANDLERS
from fusepass.expressions.ir import Expr, walk
from tests.evaluate import Evaluator

#: The number of samples per operator, dtype and spelling.
MOST_SAMPLES = 60
DTYPES = (torch.float64, torch.int64, torch.bool)
Spelling = tuple[Any, str]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch's table of operators; warnings about samples that are errors are silenced.

    For every set of samples PyTorch looks for its own test on the stack, through all imported modules: this
    takes minutes if a large library is loaded.
    """
    logging.disable(logging.ERROR)
    try:
        from torch.testing._internal import common_utils
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.opinfo import core

        for module in (common_utils, core):
            monkeypatch.setattr(module, "extract_test_fn", lambda: None, raising=False)
        yield op_db
    finally:
        logging.disable(logging.NOTSET)


def spellings(op: Any) -> Iterator[Spelling]:
    """The function, the method and the in-place method, if they exist."""
    kinds = ((op.op, "function"), (op.method_variant, "method"), (op.inplace_variant, "method"))
    for target, kind in kinds:
        name = getattr(target, "__name__", "<lambda>")
        if name != "<lambda>":
            yield (target, kind) if kind == "function" else (name, kind)


class Captured:
    """One call as a graph of one node; ``tensors`` are its inputs."""

    def __init__(self, spelling: Spelling, args: Any, kwargs: Any) -> None:
        self.target, self.kind = spelling
        self.graph, self.tensors, self.mode = fx.Graph(), dict[str, Tensor](), FakeTensorMode()
        put = (self._put(args), self._put(kwargs))
        create = self.graph.call_method if self.kind == "method" else self.graph.call_function
        self.node = create(self.target, *put)
        with self.mode:
            self.node.meta["example_value"] = self._called(lambda n: n.meta["example_value"])
        self.graph.output(self.node)

    def _put(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            node = self.graph.placeholder(f"p{len(self.tensors)}")
            self.tensors[node.name] = value.detach()
            node.meta["example_value"] = self.mode.from_tensor(value.detach())
            return node
        if isinstance(value, dict):
            return {k: self._put(v) for k, v in value.items()}
        return type(value)(map(self._put, value)) if isinstance(value, (list, tuple)) else value

    def _called(self, given: Any) -> Any:
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), given)
        call = getattr(args[0], self.target) if self.kind == "method" else self.target
        return call(*(args[1:] if self.kind == "method" else args), **kwargs)

    def result(self) -> Any:
        """PyTorch's result, on copies of the inputs."""
        return self._called(lambda n: self.tensors[n.name].clone())


def captured(spelling: Spelling, sample: Any) -> tuple[Captured, Any] | None:
    """The call and its result; None if it is not a call with dense tensors, or is an error."""
    args = (sample.input, *sample.args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not isinstance(args[0], (Tensor, list, tuple)) or any(t.layout is not torch.strided for t in tensors):
        return None
    try:
        call = Captured(spelling, args, sample.kwargs)
        return call, call.result()
    except Exception:  # a sample that does not run in this spelling (a broadcast in place, say)
        return None


def read_otherwise(call: Captured, result: Any) -> tuple[int, list[str]]:
    """How many results were read, and which ones were read wrongly."""
    meanings = Reader(call.graph).meaning.get(call.node)
    several = isinstance(meanings, tuple) and isinstance(result, (tuple, list))
    pairs = zip(meanings, result, strict=False) if several else [(meanings, result)]  # type: ignore[arg-type]
    compared, wrong = 0, []
    for meaning, want in pairs:
        if not isinstance(meaning, Expr) or not isinstance(want, Tensor):
            continue
        if not {str(n.attrs[0]) for n in walk(meaning) if n.op == "input"} <= set(call.tensors):
            continue  # opaque
        got = Evaluator(call.tensors)(meaning)
        low = want.is_floating_point() and want.dtype.itemsize < 8  # the evaluator does not round
        close = {"rtol": 1e-2, "atol": 1e-2} if low else {"rtol": 1e-9, "atol": 1e-9}
        compared += 1
        if meaning.dtype is not want.dtype:
            wrong.append(f"{meaning.dtype} for {want.dtype}")
        elif got.shape != want.shape:
            wrong.append(f"{tuple(got.shape)} for {tuple(want.shape)}")
        elif not torch.allclose(got.double(), want.double(), equal_nan=True, **close):
            wrong.append(f"other values, of {tuple(want.shape)}")
    return compared, wrong


def test_samples_are_read_as_what_they_compute(operators: Any) -> None:
    compared, wrong = dict[str, int](), list[str]()
    for op in operators:
        for spelling in spellings(op):
            name = getattr(spelling[0], "__name__", spelling[0])
            for dtype in (d for d in DTYPES if op.supports_dtype(d, "cpu")):
                for _, sample in zip(range(MOST_SAMPLES), op.sample_inputs("cpu", dtype), strict=False):
                    capture = captured(spelling, sample)
                    if capture is None:
                        continue
                    if operation(capture[0].node)[0] not in HANDLERS:
                        break
                    number, differences = read_otherwise(*capture)
                    compared[op.name] = compared.get(op.name, 0) + number
                    wrong += [f"{name} ({spelling[1]}, {dtype}): {what}; {sample}" for what in differences]
    assert not wrong, "\n".join(wrong[:20])
    assert sum(map(bool, compared.values())) > 80, "most of the operators that have a handler are compared"
    assert sum(compared.values()) > 3000
