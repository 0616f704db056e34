"""The torch.compile backend: a captured graph in; the rewritten graph, compiled by an inner backend, out."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fusepass.assumptions import Original, guarded, static_inputs
from fusepass.config import Options
from fusepass.faults import first_line, strict
from fusepass.ranges import eager_ranges, marked
from fusepass.report import GraphReport, publish

log = logging.getLogger("fusepass")

#: Inductor as `torch.compile` calls it; `enable` puts another class in its place, which runs the pass.
_INDUCTOR = torch._TorchCompileInductorWrapper


def fusepass(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="fusepass", options={...})`: fuses attention, then compiles as usual.

    `mode` ("reduce-overhead", "max-autotune", ...) is that of `torch.compile(mode=...)`, where there are no
    options: the option of that name. Inductor gets it, which must be the inner backend.
    """
    checked = _same_request(options, Options.of(options, **({} if mode is None else {"mode": mode})))
    return compile_fused(gm, example_inputs, checked, inner_compiler(checked))


#: The options of the latest calls of `torch.compile`, which hands the same mapping over for each graph.
_requests: deque[tuple[object, Options]] = deque(maxlen=64)


def _same_request(given: object, options: Options) -> Options:
    """The options of an earlier graph of the same call of `torch.compile`, if they are these."""
    for known, earlier in _requests:
        if given is not None and known is given and earlier == options:
            return earlier
    _requests.append((given, options))
    return options


def compile_fused(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    compiler: Callable[..., Any],
    assume: bool = True,
) -> Callable[..., Any]:
    """The pass, then `compiler`; the original graph where `compiler` fails on the fused one.

    With `assume`, the elements of buffers may be relied on, under a guard.
    """
    began = time.perf_counter()
    original = Original(gm)
    static = static_inputs(gm, example_inputs) if assume else {}
    report = run_pass(gm, example_inputs, options, static, time.perf_counter() - began)
    compiled: Callable[..., Any]
    try:
        compiled = compiler(gm, example_inputs)
    except Exception as error:
        if strict() or _is_control_flow(error) or not any(site.fused for site in report.sites):
            raise
        fault = (
            f"the inner compiler failed on the fused graph, which is compiled as it was: {first_line(error)}"
        )
        log.warning("fusepass: %s", fault)
        report.notes.append(fault)
        original.restore()
        compiled = compiler(gm, example_inputs)
        return compiled
    if not report.assumed and not report.apart:
        return compiled
    backend = partial(compile_fused, options=options, compiler=compiler, assume=False)
    return guarded(compiled, gm, example_inputs, report, original, backend)


def _is_control_flow(error: Exception) -> bool:
    """Is it Dynamo's own word (restart the analysis, skip the frame) and not a failure to compile?"""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    return isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)


def run_pass(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    static: Mapping[str, torch.Tensor] | None = None,
    preparation: float = 0.0,
) -> GraphReport:
    """Rewrites `gm` in place and publishes the report; a fault of the pass leaves the graph as it was.

    `static` are buffers whose elements may be relied on, if those in the report's `assumed` are guarded;
    `preparation` are seconds already spent on this graph, which the report adds to its own.

    With FUSEPASS_STRICT=1 in the environment such a fault is raised: for tests.
    """
    from fusepass.rewrite import rewrite_graph

    try:
        report: GraphReport = rewrite_graph(gm, options, example_inputs, static=static, compiled=True)
    except Exception as error:
        if strict():
            raise
        gm.recompile()
        fault = f"the pass failed on a graph, which stays as it was: {type(error).__name__}: {error}"
        log.warning("fusepass: %s", fault, exc_info=True)
        report = GraphReport(nodes=len(gm.graph.nodes), notes=[fault])
    report.seconds += preparation
    options.requested.see(options, report)
    publish(report)
    return report


def inner_compiler(options: Options) -> Callable[..., Any]:
    """What compiles the rewritten graph: the callable that the options name, in their mode."""
    from fusepass.kernels.reference import let_inductor_inline

    if options.inner == "inductor":
        let_inductor_inline()
    if options.inner == "inductor":
        return partial(compile_by_inductor, _INDUCTOR(options.mode, None, None))
    if not isinstance(options.inner, str):
        return options.inner
    from torch._dynamo.backends.registry import lookup_backend

    return eager_ranges(options.inner, lookup_backend(options.inner))


def compile_by_inductor(
    inductor: Any, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **more: Any
) -> Callable[..., Any]:
    """Inductor as `torch.compile` calls it, with a named range for every fused site."""
    compiled: Callable[..., Any] = _INDUCTOR.__call__(marked(inductor, gm), gm, example_inputs, **more)
    return compiled
