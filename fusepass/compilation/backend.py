"""The torch.compile backend: a captured graph in; the rewritten graph, compiled by an inner backend, out."""

import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fusepass.compilation.assumptions import Original, forget_places, note_changing, static_inputs
from fusepass.compilation.inner import inner_compiler
from fusepass.compilation.rewrite import rewrite_graph
from fusepass.host.config import Options
from fusepass.host.faults import first_line, strict
from fusepass.reports.collector import publish
from fusepass.reports.report import GraphReport

log = logging.getLogger("fusepass")


def fusepass(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="fusepass", options={...})`: fuses attention, then compiles as usual.

    `mode` ("reduce-overhead", "max-autotune", ...) is the argument of `torch.compile(mode=...)`; it means the
    same as the option of that name, which is used with `options=`. It needs Inductor as the inner backend.
    """
    checked = _same_request(options, Options.of(options, **({} if mode is None else {"mode": mode})))
    return compile_fused(gm, example_inputs, checked, inner_compiler(checked))


#: The options of the latest calls of `torch.compile`, which passes the same mapping for each graph.
_requests: deque[tuple[object, Options]] = deque(maxlen=64)


def _same_request(given: object, options: Options) -> Options:
    """The options of an earlier graph of the same `torch.compile` call, if there was one."""
    for known, earlier in _requests:
        if given is not None and known is given and earlier == options:
            return earlier
    _requests.append((given, options))
    return options


#: Dynamo calls this function when Dynamo is reset.
fusepass.reset = forget_places  # type: ignore[attr-defined]


def compile_fused(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    compiler: Callable[..., Any],
    among: Container[torch.Tensor] | None = None,
    stores_itself: bool = True,
) -> Callable[..., Any]:
    """Run the pass, then `compiler`; if that fails on the fused graph, compile the original.

    The fused graph may rely on the elements of buffers, and on certain arguments not sharing memory. The
    result then includes guards that check both.

    Args:
        gm: the graph, which is rewritten.
        example_inputs: its inputs.
        options: the user's.
        compiler: the inner compiler.
        among: the tensors whose elements may be relied on; by default all buffers.
        stores_itself: whether the result may store itself. If it may not, and PyTorch is about to store it,
            the guards would not be stored, so the graph relies on nothing that needs them.
    """
    from fusepass.compilation import guards

    began = time.perf_counter()
    original = Original(gm)
    stored = guards.will_be_stored()
    guarded = not stored or (stores_itself and guards.can_be_stored(original.module()))
    static = static_inputs(gm, example_inputs, among) if guarded else {}
    report = run_pass(gm, example_inputs, options, static, time.perf_counter() - began, guarded)
    note_changing(static[name] for name in report.written)
    if not report.assumed and not report.apart:
        return _compiled(gm, example_inputs, compiler, original, report)
    held = guards.Guards.of(gm, example_inputs, report)
    places = guards.places(gm, held)
    with guards.stored_by_us(gm) if stored else nullcontext():
        compiled = _compiled(gm, example_inputs, compiler, original, report)
    recompile = Recompile(options, compiler)
    result = guards.Guarded(held, compiled, original.module, recompile, places)
    if stored:
        result.store_as(gm)
    return result


def _compiled(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[..., Any],
    original: Original,
    report: GraphReport,
) -> Callable[..., Any]:
    """The compiled graph; if `compiler` fails on the fused graph, the original, compiled."""
    try:
        compiled: Callable[..., Any] = compiler(gm, example_inputs)
    except Exception as error:
        if strict() or _is_control_flow(error) or not any(site.fused for site in report.sites):
            raise
        fault = (
            f"the inner compiler failed on the fused graph, so the original is compiled: {first_line(error)}"
        )
        log.warning("fusepass: %s", fault)
        report.notes.append(fault)
        original.restore()
        compiled = compiler(gm, example_inputs)
    return compiled


@dataclass(frozen=True)
class Recompile:
    """Compiles an original graph when its fused one cannot run."""

    options: Options
    compiler: Callable[..., Any] | None
    """The inner compiler; None: the one that the options name."""

    def __call__(self, among: Container[torch.Tensor]) -> Callable[..., Any]:
        """A backend that relies on the elements of no tensors except ``among``."""
        compiler = self.compiler or inner_compiler(self.options)
        return partial(compile_fused, options=self.options, compiler=compiler, among=among)

    def __reduce__(self) -> Any:
        """Pickle; an inner compiler that cannot be pickled is left out."""
        try:
            pickle.dumps(self.compiler)
            compiler = self.compiler
        except Exception:
            compiler = None
        return Recompile, (self.options, compiler)


def _is_control_flow(error: Exception) -> bool:
    """Is it a signal of Dynamo (restart the analysis, skip the frame) rather than a failure to compile?"""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    return isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)


def run_pass(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    static: Mapping[str, torch.Tensor] | None = None,
    preparation: float = 0.0,
    guarded: bool = False,
) -> GraphReport:
    """Rewrites `gm` in place and publishes the report; a fault of the pass leaves the graph as it was.

    `static` are buffers whose elements may be relied on, provided that the caller guards those in the
    report's `assumed`; `preparation` is the number of seconds already spent on this graph, which the report
    includes; `guarded` says that the arguments in `apart` are guarded too.

    With FUSEPASS_STRICT=1 in the environment, which is for tests, such a fault is raised.
    """
    try:
        report: GraphReport = rewrite_graph(
            gm, options, example_inputs, static=static, compiled=True, guarded=guarded
        )
    except Exception as error:
        if strict():
            raise
        gm.recompile()
        fault = f"the pass failed on a graph, which stays as it was: {type(error).__name__}: {error}"
        log.warning("fusepass: %s", fault, exc_info=True)
        report = GraphReport(nodes=len(gm.graph.nodes), notes=[fault])
    report.seconds += preparation
    options.requested.see(options.kernel, report.sites)
    publish(report)
    return report
