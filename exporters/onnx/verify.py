"""Runs an ONNX model in onnxruntime and compares its outputs."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy
import torch
from torch.utils.dlpack import from_dlpack

from fusepass.dialects.onnx.sizes import parse_dim
from fusepass.exporters.onnx.files import Disagreement
from fusepass.exporters.reports import Check
from fusepass.expressions.index import Size

Arrays = dict[str, npt.NDArray[Any]]

#: The largest error that passes, in units of an output's largest value, by the least precise dtype.
ALLOWED = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def session(path: str | os.PathLike[str], optimized: bool = True) -> Any:
    """An onnxruntime session, on CUDA if it is available, else on the CPU; ``optimized``: by onnxruntime.

    Raises:
        Disagreement: onnxruntime cannot load the model.
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ImportError(
            "verify=True runs the model in onnxruntime, which is not installed "
            "(pip install onnxruntime, or pass verify=False)"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # no TF32: its products would differ from PyTorch's by more than is allowed
    wanted = {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}
    providers = [(p, o) for p, o in wanted.items() if p in ort.get_available_providers()]
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise Disagreement(
            f"onnxruntime {ort.__version__} does not load the model: {_first(error)}"
        ) from error


def run(path: str | os.PathLike[str], feeds: Arrays) -> Arrays:
    """The outputs of a model by name.

    Raises:
        Disagreement: onnxruntime cannot load or run it.
    """
    loaded = session(path)
    return run_session(loaded, feeds)


def run_session(loaded: Any, feeds: Arrays) -> Arrays:
    """The outputs of a loaded model by name."""
    wanted = {i.name: i.type for i in loaded.get_inputs()}
    given = {n: a for n, a in feeds.items() if n in wanted}
    outputs = loaded.get_outputs()
    try:
        if "tensor(bfloat16)" in {*wanted.values(), *(o.type for o in outputs)}:
            values = _run_in_bfloat16(loaded, given)
        else:
            values = loaded.run(None, given)
    except Exception as error:
        shapes = ", ".join(f"{n}{list(a.shape)}" for n, a in feeds.items())
        raise Disagreement(f"onnxruntime does not run the model on {shapes}: {_first(error)}") from error
    return {o.name: v for o, v in zip(outputs, values, strict=True)}


def _run_in_bfloat16(loaded: Any, feeds: Arrays) -> list[npt.NDArray[Any]]:
    """Run a model with bfloat16, which a session's ``run`` does not take: it gets bits, and gives DLPack."""
    import onnxruntime as ort

    given = {
        n: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(a).view(np.uint16), ir.DataType.BFLOAT16
        )
        if a.dtype == ml_dtypes.bfloat16
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a))
        for n, a in feeds.items()
    }
    values = loaded.run_with_ort_values(None, given)
    return [array(from_dlpack(v)) if v.element_type() == ir.DataType.BFLOAT16 else v.numpy() for v in values]


def array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor of any shape and dtype as an array; numpy has no bfloat16, so ml_dtypes' is used."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def difference(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """The largest difference, in units of the largest finite value in ``want`` (at least 1e-6).

    Infinite if shapes differ, or if infinities and NaNs are in other places.
    """
    if got.shape != want.shape:
        return math.inf
    a, b = got.astype(np.float64), want.astype(np.float64)
    kinds = (np.isnan, np.isposinf, np.isneginf)
    if any(not np.array_equal(kind(a), kind(b)) for kind in kinds):
        return math.inf
    finite = np.isfinite(a)
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(np.abs(b[finite]).max(), 1e-6))


def compare(got: Arrays, want: Sequence[npt.NDArray[Any]], allowed: float, label: str) -> list[Check]:
    """One check for every output of a run; the outputs are in the order of ``want``."""
    if len(got) != len(want):
        raise Disagreement(f"the exported model has {len(got)} outputs and the original {len(want)}")
    return [
        Check(label, name, difference(np.asarray(mine), theirs), allowed)
        for (name, mine), theirs in zip(got.items(), want, strict=True)
    ]


def coarsest(arrays: Sequence[npt.NDArray[Any]]) -> float:
    """The error allowed for the least precise floating dtype among some arrays."""
    return max((ALLOWED[str(a.dtype)] for a in arrays if str(a.dtype) in ALLOWED), default=ALLOWED["float32"])


def label_of(feeds: Mapping[str, npt.NDArray[Any]]) -> str:
    """The shapes of some inputs as text."""
    return ", ".join(f"{name}{list(array.shape)}" for name, array in feeds.items())


def disagreement(checks: Sequence[Check]) -> Disagreement:
    """An error that names the outputs that differ."""
    wrong = [
        f"{c.output!r}: error {c.error:.3g}, allowed {c.allowed:.3g} ({c.inputs})" for c in checks if not c.ok
    ]
    return Disagreement(
        "the fused model does not compute what the original computes, and was not written: "
        + "; ".join(wrong)
    )


# ---------------------------------------------------------------------------------------- random inputs


def symbols(model: ir.Model) -> list[sympy.Symbol]:
    """The named sizes of a model's inputs."""
    names: dict[sympy.Symbol, None] = {}
    for value in model.graph.inputs:
        for size in _dims(value):
            names.update(dict.fromkeys(sorted(getattr(size, "free_symbols", ()), key=str)))
    return list(names)


def _dims(value: ir.Value) -> list[Size]:
    if value.shape is None:
        return []
    return [
        d if isinstance(d, int) else parse_dim(d.value or f"{value.name}_{n}")
        for n, d in enumerate(value.shape)
    ]


def size_choices(model: ir.Model) -> Iterator[dict[sympy.Symbol, int]]:
    """Sizes to try, those first that tell most: all different, then all equal.

    The small numbers in the model come last: a traced model may run only at the sizes of its example.
    """
    names = symbols(model)
    if not names:
        yield {}
        return
    for primes in ((2, 7, 5, 11, 3, 13), (3, 4, 9, 6, 5, 8)):
        yield dict(zip(names, primes * len(names), strict=False))
    yield dict.fromkeys(names, 8)
    yield dict.fromkeys(names, 4)
    for total in names:  # a mask over past and present keys
        others = [s for s in names if s is not total]
        for first, second in itertools.combinations(others, 2):
            sizes = dict(zip(names, (2, 7, 5, 11, 3, 13) * len(names), strict=False))
            yield {**sizes, total: sizes[first] + sizes[second]}
    if len(names) <= 3:
        traced = itertools.product(_small_numbers(model), repeat=len(names))
        yield from (dict(zip(names, sizes, strict=True)) for sizes in itertools.islice(traced, 150))


def _small_numbers(model: ir.Model) -> list[int]:
    """The integers of the model's shapes and indices, small ones first."""
    numbers: set[int] = set()
    for node in model.graph:
        for value in node.inputs:
            known = None if value is None else ir.convenience.get_const_tensor(value)
            if known is not None and known.dtype is ir.DataType.INT64 and known.size <= 8:
                numbers |= {int(n) for n in known.numpy().flatten() if 2 <= n <= 4096}
    return sorted(numbers)[:12]


def random_feeds(model: ir.Model, sizes: Mapping[sympy.Symbol, int], seed: int) -> Arrays:
    """Random values for a model's inputs; integers are valid indices into the tables that they index.

    Other integers are zeros and ones, like masks.  In a float16 model the first of each row is a one, because
    the result of a row that sees no key would depend on how a runtime rounds.
    """
    half = any(v.dtype is ir.DataType.FLOAT16 for n in model.graph for v in n.outputs)
    generator = np.random.default_rng(seed)
    feeds: Arrays = {}
    for value in model.graph.inputs:
        if value.is_initializer() or value.name is None or value.dtype is None:
            continue
        shape = [n if isinstance(n, int) else int(n.subs(list(sizes.items()))) for n in _dims(value)]
        kind = value.dtype.numpy()
        if np.issubdtype(kind, np.integer):
            entries = _entries(value)
            feeds[value.name] = np.asarray(generator.integers(0, entries, shape)).astype(kind)
            if half and entries == 2 and shape and shape[-1]:
                feeds[value.name][..., 0] = 1
        elif kind == np.bool_:
            feeds[value.name] = np.asarray(generator.random(shape) < 0.8)
        else:
            feeds[value.name] = np.asarray(generator.standard_normal(shape)).astype(kind)
    return feeds


def _entries(value: ir.Value) -> int:
    """The size of the smallest table that an input indexes; 2 where it indexes none."""
    sizes = []
    for user in value.consumers():
        table = user.inputs[0]
        indexes = user.op_type == "Gather" and len(user.inputs) == 2 and user.inputs[1] is value
        if indexes and table is not None and table.const_value is not None:
            axis = user.attributes.get_int("axis", 0)
            sizes.append(int(table.const_value.shape[axis]))
    return min(sizes, default=2)
