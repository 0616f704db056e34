"""`fusepass.fuse`: graphs that somebody captured, rewritten as copies."""

from __future__ import annotations

import copy
from typing import Any, Unpack, overload

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from fusepass.compilation.rewrite import rewrite_graph
from fusepass.dialects.torch.nodes import value_of
from fusepass.host.config import Options, PassOptions, pass_options
from fusepass.host.surroundings import clean_context, graph_context
from fusepass.reports.collector import publish


@overload
def fuse(graph: fx.GraphModule, *example_inputs: Any, **options: Unpack[PassOptions]) -> fx.GraphModule: ...
@overload
def fuse(graph: ExportedProgram, *example_inputs: Any, **options: Unpack[PassOptions]) -> ExportedProgram: ...
def fuse(graph: Any, *example_inputs: Any, **options: Unpack[PassOptions]) -> Any:
    """A copy of ``graph`` with its attention fused.

    Args:
        graph: a ``GraphModule`` (from ``torch.fx.symbolic_trace``, say) or an ``ExportedProgram``,
            before or after ``run_decompositions()``.
        example_inputs: tensors for a ``GraphModule`` whose nodes carry no shapes.  The result then accepts
            inputs of these shapes and dtypes only, and raises an error that says so for others.
        options: ``kernel=``, ``precision=``, ``validate=`` as for the backend; nothing is compiled, so
            ``inner=`` and ``mode=`` are refused.

    Raises:
        TypeError: ``graph`` is of another type, or it needs example inputs and none are given, or an option
            has a value of the wrong type.
        ValueError: an unknown value, or an option that is unknown or not taken here.
    """
    checked = pass_options("fuse", options)
    if isinstance(graph, ExportedProgram):
        return fuse_with(graph, checked)
    if not isinstance(graph, fx.GraphModule):
        raise TypeError(
            f"fuse() takes a torch.fx.GraphModule or an ExportedProgram, got {type(graph).__name__}; "
            "for a module use torch.compile(model, backend='fusepass')"
        )
    with clean_context():
        return _fuse_module(graph, example_inputs, checked)


def fuse_with(program: ExportedProgram, options: Options) -> ExportedProgram:
    """A copy of an exported program with its attention fused."""
    out = copy.copy(program)
    graph_module = copy.deepcopy(program.graph_module)
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    constants = {
        n: c for n, key in lifted.items() if isinstance(c := program.constants.get(key), torch.Tensor)
    }
    with torch.no_grad(), clean_context():
        report = rewrite_graph(graph_module, options, constants=constants)
    options.requested.see(options.kernel, report.sites, is_last=True)
    publish(report)
    out._graph_module = graph_module
    out._graph_signature = _renamed_outputs(program, graph_module)
    return out


def _renamed_outputs(program: ExportedProgram, graph_module: fx.GraphModule) -> Any:
    """The signature, with the present names of the outputs."""
    signature = copy.deepcopy(program.graph_signature)
    results = graph_module.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    for spec, node in zip(signature.output_specs, results, strict=True):
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name
    return signature


def _fuse_module(gm: fx.GraphModule, example_inputs: tuple[Any, ...], options: Options) -> fx.GraphModule:
    out = copy.deepcopy(gm)
    needs_shapes = any(
        value_of(n) is None
        for n in out.graph.nodes
        if n.op in ("placeholder", "call_function", "call_method", "call_module")
    )
    if needs_shapes:
        if not example_inputs:
            raise TypeError("fuse() of a graph without shapes needs example inputs: fuse(graph, *inputs)")
        _propagate(out, example_inputs)
    report = rewrite_graph(out, options, example_inputs)
    options.requested.see(options.kernel, report.sites, is_last=True)
    publish(report)
    return out


def _propagate(gm: fx.GraphModule, example_inputs: tuple[Any, ...]) -> None:
    """Record fake values on every node, and insert a check that later inputs have these shapes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in example_inputs]

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["example_value"] = result
            return result

    with graph_context(), mode:
        Propagate(gm).run(*fakes)
    _insert_check(gm, example_inputs)


def _insert_check(gm: fx.GraphModule, example_inputs: tuple[Any, ...]) -> None:
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    expected = tuple(
        (tuple(x.shape), str(x.dtype)) if isinstance(x, torch.Tensor) else None for x in example_inputs
    )
    with gm.graph.inserting_after(places[-1]):
        gm.graph.call_function(expect_inputs, (tuple(places[: len(expected)]), expected))


@fx.has_side_effect
def expect_inputs(given: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Raise if inputs have other shapes or dtypes than those that the graph was fused for."""
    for number, (value, wanted) in enumerate(zip(given, expected, strict=True)):
        if wanted is None or not isinstance(value, torch.Tensor):
            continue
        if tuple(value.shape) != tuple(wanted[0]) or str(value.dtype) != wanted[1]:
            raise ValueError(
                f"input {number} is {tuple(value.shape)} {value.dtype}, but the graph was fused for "
                f"{tuple(wanted[0])} {wanted[1]}; call fusepass.fuse() again with inputs of the new shape"
            )


__all__ = ["expect_inputs", "fuse", "fuse_with"]
