"""``export_onnx``: exports a PyTorch model to ONNX with its attention fused."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import numpy.typing as npt
import onnx_ir as ir
import sympy
import torch
from torch.utils import _pytree as pytree

from fusepass.dialects.onnx.sizes import parse_dim
from fusepass.exporters.onnx import verify as onnx_verify
from fusepass.exporters.onnx.files import Disagreement, pin_ir_version, root, write
from fusepass.exporters.onnx.leftover import softmaxes
from fusepass.exporters.onnx.opsets import raise_opset
from fusepass.exporters.onnx.optimize import check_model, fuse
from fusepass.exporters.onnx.targets import checked_target, fused_operators
from fusepass.exporters.reports import Check, ExportReport
from fusepass.exporters.staging import ModelError, staged
from fusepass.host.config import refuse_others

#: PyTorch's exporter writes this version, in which attention is not yet a single operator.
_PLAIN_OPSET = 20


def export_onnx(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    target: str = "onnx",
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
    external_data: bool | None = None,
    progress: Callable[[str], None] | None = None,
    **others: Never,
) -> ExportReport:
    """Export a PyTorch model to ONNX with fused attention operators.

    Args:
        model: a module in eval mode, or an ``ExportedProgram``.
        args: example arguments; tensors of any shape and dtype that the model takes.
        path: the file to write.
        kwargs: example keyword arguments.
        dynamic_shapes: as for ``torch.export.export``.
        target: ``"onnx"`` (``ai.onnx`` Attention), ``"ort"`` (with ``com.microsoft`` operators) or
            ``"tensorrt"``.
        opset: the version of ``ai.onnx`` (default 24).
        input_names: names for the inputs.
        output_names: names for the outputs.
        verify: run the file in onnxruntime and compare with PyTorch, at two shapes if some are dynamic.
        external_data: whether to put weights in a separate file; None: only if the model is large.
        progress: called with a short text at the start of each step.
        others: none are accepted; an option of the pass is refused with a message that names its equivalent.

    Raises:
        ModelError: PyTorch cannot export the model, or the file cannot be written.
        Disagreement: the exported model is not valid, does not run in onnxruntime, or computes something
            else; nothing is written.
        ImportError: ``verify`` is True, and onnxruntime is not installed.
        ValueError: an unknown target or opset, or an option that an ONNX file cannot have.
    """
    refuse_others("export_onnx", others, ())
    start = time.perf_counter()
    aim, say = checked_target(target, opset), progress or _nothing
    with staged(path) as place:
        say("PyTorch exports the model")
        exported = _exported(model, args, dict(kwargs or {}), dynamic_shapes, input_names, output_names)
        say("fusing attention")
        raise_opset(exported, aim.opset)
        report = fuse(exported, aim)
        pin_ir_version(exported)
        result = ExportReport(
            str(path),
            target,
            report,
            fused_operators(exported),
            softmaxes(exported.graph),
            versions={
                **{str(k): int(v) for k, v in exported.opset_imports.items()},
                "IR": exported.ir_version,
            },
        )
        write(exported, place, external_data, say)
        check_model(place)
        if verify:
            say("running the file and comparing with PyTorch")
            result.checks, result.notes = _verified(model, args, dict(kwargs or {}), exported, place)
            if not all(c.ok for c in result.checks):
                _refuse_random(model)
                say("exporting without fusion, to see whether that differs as much")
                plain = _exported(model, args, dict(kwargs or {}), dynamic_shapes, input_names, output_names)
                result.checks = _excused(result.checks, _unfused(model, args, dict(kwargs or {}), plain))
                if not all(c.ok for c in result.checks):
                    raise onnx_verify.disagreement(result.checks)
                result.notes.append(
                    "some errors are above the usual limit, but at most twice those of a file without fusion"
                )
    result.seconds = time.perf_counter() - start
    return result


def _nothing(_: str) -> None:
    """Ignore progress."""


def _unfused(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], plain: ir.Model) -> list[Check]:
    """The checks of a file without fusion; an empty list if it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unfused.onnx"
        try:
            write(plain, path, None, _nothing)
            return _verified(model, args, kwargs, plain, path)[0]
        except (Disagreement, ModelError):
            return []


def _excused(checks: list[Check], plain: list[Check]) -> list[Check]:
    """The checks, with twice the error of a file without fusion allowed, up to 100 times the usual limit."""
    if len(checks) != len(plain):
        return checks
    return [
        replace(c, allowed=max(c.allowed, min(2 * p.error, 100 * c.allowed)))
        for c, p in zip(checks, plain, strict=True)
    ]


def _refuse_random(model: Any) -> None:
    """Refuse a model in training mode after a failed comparison: its results may change from call to call."""
    if getattr(model, "training", False):
        raise ModelError(
            "the model is in training mode, and its outputs differ from those of the exported file; call "
            "model.eval() first (or pass verify=False to export it as it is)"
        )


def _exported(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """The result of PyTorch's own exporter, without fused attention."""
    try:
        with _silent(), torch.no_grad():
            model = _captured(model, args, kwargs, dynamic_shapes)
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                opset_version=_PLAIN_OPSET,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
                external_data=False,
            )
    except Exception as error:
        raise ModelError(f"PyTorch cannot export the model to ONNX: {root(error)}") from error
    assert program is not None
    for value in program.model.graph.inputs:
        _settle_sizes(value)
    return program.model


def _captured(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Any:
    """The exported program; if ``torch.export`` fails, the model itself, for the exporter's other ways."""
    if isinstance(model, torch.export.ExportedProgram):
        return model
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception:
        return model


def _settle_sizes(value: ir.Value) -> None:
    """Make dimensions constant that PyTorch found to be constant: it gives them a number as their name."""
    for position, dim in enumerate(value.shape or ()):
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isdigit():
            value.shape[position] = int(dim.value)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence PyTorch's exporter, which prints its steps and warns about its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------------------------------- verification


def _verified(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], exported: ir.Model, path: Path
) -> tuple[list[Check], list[str]]:
    """Compare the file with PyTorch, at the example's sizes and, if some are dynamic, at others."""
    call = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    inputs = [v for v in exported.graph.inputs if not v.is_initializer()]
    if len(inputs) != len(tensors):
        tensors = _used(exported, leaves, tensors, kwargs, args)
    if len(inputs) != len(tensors):
        return [], [
            f"not verified: the model takes {len(inputs)} inputs and was given {len(tensors)} tensors"
        ]
    try:
        loaded = onnx_verify.session(path)
    except Disagreement as error:
        if not _in_bfloat16(exported):
            raise
        return [], [f"not verified: {error} (the CPU provider has few bfloat16 operators)"]
    checks: list[Check] = []
    notes: list[str] = []
    for number, sizes in enumerate(_trials(inputs, [leaves[n] for n in tensors])):
        drawn = list(leaves)
        for position, value in zip(tensors, inputs, strict=True):
            drawn[position] = _drawn(leaves[position], value, sizes, number)
        try:
            want = _eager(call, pytree.tree_unflatten(drawn, tree))
        except Exception as error:
            if number == 0:
                raise ModelError(f"the model does not run in PyTorch on its example: {error}") from error
            notes.append(f"not verified at other sizes: PyTorch fails there ({type(error).__name__})")
            continue
        feeds = {str(v.name): onnx_verify.array(drawn[n]) for n, v in zip(tensors, inputs, strict=True)}
        got = onnx_verify.run_session(loaded, feeds)
        allowed = onnx_verify.coarsest([*want, *feeds.values()])
        checks += onnx_verify.compare(got, want, allowed, onnx_verify.label_of(feeds))
        if number > 0:
            return checks, []
    return checks, notes


def _in_bfloat16(model: ir.Model) -> bool:
    """Does a model compute in bfloat16?"""
    return any(v.dtype is ir.DataType.BFLOAT16 for n in model.graph.all_nodes() for v in n.outputs)


def _used(
    exported: ir.Model, leaves: list[Any], tensors: list[int], kwargs: dict[str, Any], args: tuple[Any, ...]
) -> list[int]:
    """The tensors that the exported model takes; the exporter may have dropped some that it does not read."""
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    names = {v.name for v in exported.graph.inputs}
    return [
        n
        for n in tensors
        if str(getattr(paths[n][0][-1], "key", getattr(paths[n][0][-1], "idx", ""))) in names
    ]


def _trials(inputs: Sequence[ir.Value], tensors: Sequence[torch.Tensor]) -> Iterator[dict[sympy.Symbol, int]]:
    """The example's sizes, then larger ones, then smaller ones."""
    given: dict[sympy.Symbol, int] = {}
    for value, tensor in zip(inputs, tensors, strict=True):
        for dim, size in zip(value.shape or (), tensor.shape, strict=True):
            parsed = dim if isinstance(dim, int) else parse_dim(dim.value or "?")
            if isinstance(parsed, sympy.Symbol):
                given[parsed] = int(size)
    yield given
    if given:
        yield _resized(given, 1)
        yield _resized(given, -1)


def _resized(given: dict[sympy.Symbol, int], step: int) -> dict[sympy.Symbol, int]:
    """Other sizes. One that is the sum of two others (keys, of past and new ones) stays their sum."""
    out = {s: max(n + step, 2) for s, n in given.items()}
    for total, n in given.items():
        parts = [s for s in given if s is not total and given[s] < n]
        pair = next(((a, b) for a in parts for b in parts if a is not b and given[a] + given[b] == n), None)
        if pair is not None:
            out[total] = out[pair[0]] + out[pair[1]]
    return out


def _drawn(
    example: torch.Tensor, value: ir.Value, sizes: Mapping[sympy.Symbol, int], number: int
) -> torch.Tensor:
    """The example at other sizes: floating values are drawn anew, integers are taken from the example."""
    shape = [
        int(n) if isinstance(d, int) else _evaluated(parse_dim(d.value or "?"), sizes, int(n))
        for d, n in zip(value.shape or (), example.shape, strict=True)
    ]
    if number == 0:
        return example
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randn(shape, generator=generator)
        return drawn.to(device=example.device, dtype=example.dtype)
    out = example
    for dim, size in enumerate(shape):
        out = out.index_select(dim, torch.arange(size, device=out.device) % max(1, out.shape[dim]))
    return out


def _evaluated(size: Any, sizes: Mapping[sympy.Symbol, int], example: int) -> int:
    value = sympy.sympify(size).subs(list(sizes.items()))
    return int(value) if value.is_Integer else example


def _eager(call: Any, drawn: Any) -> list[npt.NDArray[Any]]:
    args, kwargs = drawn
    with torch.no_grad():
        leaves = pytree.tree_leaves(call(*args, **kwargs))
    return [onnx_verify.array(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


__all__ = ["Disagreement", "ModelError", "export_onnx"]
