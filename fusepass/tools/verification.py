"""`verify`: compares a fused model with the eager one and with float64: errors, gradients, time, memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from math import isfinite
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult

from fusepass.compilation.backend import compile_fused
from fusepass.compilation.inner import inner_compiler
from fusepass.host.config import Options
from fusepass.reports.check import Check
from fusepass.reports.collector import Collector, collect, summary
from fusepass.reports.measure import Cost, cost
from fusepass.reports.report import SiteReport
from fusepass.reports.tables import check_table, cost_table
from fusepass.tools.sandbox import compiled_apart, unwrapped
from fusepass.tools.trial import Results, Tensors, Trial, distance

ROOM = 2.0
"""A fused result's error may be this many times the eager one's, plus twice the epsilon of the dtype."""


class Unsteady(ValueError):
    """The model's results change from run to run, so there is nothing to compare."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Prints as tables."""

    outputs: tuple[Check, ...]
    """One check for every floating tensor that the model returns."""
    gradients: tuple[Check, ...]
    """One check for every gradient; empty if gradients were not compared."""
    costs: Mapping[str, Cost]
    """Time and memory of each way to run: "eager", "inner" (the inner backend alone) and "fused"; empty if
    not measured."""
    collector: Collector
    inner: str
    """The name of the inner backend."""
    exact: str
    """The dtype of the exact results, "float64" or "float32"."""

    @property
    def ok(self) -> bool:
        """Are all errors of outputs and gradients within what is allowed?"""
        return all(check.ok for check in (*self.outputs, *self.gradients))

    @property
    def sites(self) -> list[SiteReport]:
        """The attention sites of all graphs, fused or not."""
        return self.collector.sites

    @property
    def difference(self) -> float:
        """The largest difference between fused and eager outputs, relative to the largest value of each."""
        return max((check.difference for check in self.outputs), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        checks = {"outputs": self.outputs, "gradients": self.gradients}
        return {
            "ok": self.ok,
            "inner": self.inner,
            "exact": self.exact,
            **{name: [_plain_data(check) for check in of] for name, of in checks.items()},
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "pass": self.collector.to_json(),
        }

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield check_table(self.outputs, self.gradients, self.exact)
        if self.costs:
            yield cost_table(self.costs, self.inner)
        yield summary(self.collector)
        yield (
            "[green]verified[/green]" if self.ok else "[bold red]WRONG: larger errors than allowed[/bold red]"
        )


def verify(
    model: Callable[..., Any],
    *args: Any,
    fusepass_options: Mapping[str, Any] | Options | None = None,
    fusepass_dynamic: bool | None = None,
    fusepass_grads: bool = False,
    fusepass_repeats: int = 5,
    **kwargs: Any,
) -> Verification:
    """Run `model(*args, **kwargs)` eagerly, fused, and as a float64 copy, and compare the results.

    A half-precision model that does not run in float64 is copied in float32 instead. A result passes if its
    error is at most twice the eager model's error plus twice the machine epsilon of the least precise dtype
    among arguments and parameters; errors are relative to the largest value of the exact result. The model's
    state does not change.

    Keywords that begin with `fusepass_` are for this function, all others go to the model: `fusepass_options`
    are the backend's options (here `inner` defaults to "aot_eager", which compiles quickly, unless there is a
    `mode`), `fusepass_dynamic` is `torch.compile`'s `dynamic`, `fusepass_grads=True` also compares gradients
    of parameters and arguments, and time is the median of `fusepass_repeats` runs (0: neither time nor memory
    is measured).

    Raises:
        TypeError, ValueError: an option that is wrong, as for `Options`.
        ValueError: the model's results change from run to run.
        RuntimeError: no copy of the model in a more precise dtype runs.
    """
    quick = {} if Options.of(fusepass_options).mode else {"inner": "aot_eager"}
    settings = Options.of(fusepass_options, **quick)
    trial = Trial(unwrapped(model), args, kwargs, fusepass_grads)
    eager = _steady(trial)
    exact, exact_name = _exact(trial)
    fused = compiled_apart(trial.model, _backend(settings), fusepass_dynamic)
    with collect() as collector:
        results = trial.run(fused)
    ways = {"eager": trial.model, "fused": fused}
    if fusepass_repeats:
        ways["inner"] = compiled_apart(trial.model, inner_compiler(settings), fusepass_dynamic)
        trial.run(ways["inner"])
    floor = 2 * torch.finfo(trial.dtype).eps
    return Verification(
        outputs=_checks(eager.outputs, results.outputs, exact.outputs, floor),
        gradients=_checks(eager.gradients, results.gradients, exact.gradients, floor),
        costs=_costs(trial, ways, fusepass_repeats),
        collector=collector,
        inner=settings.inner if isinstance(settings.inner, str) else _name(settings.inner),
        exact=exact_name,
    )


def _costs(trial: Trial, ways: Mapping[str, Callable[..., Any]], repeats: int) -> dict[str, Cost]:
    if not repeats:
        return {}
    order = ("eager", "inner", "fused")
    return {way: cost(partial(trial.prepare, ways[way]), trial.device, repeats) for way in order}


def _name(compiler: Callable[..., Any]) -> str:
    return str(getattr(compiler, "__name__", "a custom backend"))


def _backend(options: Options) -> Callable[..., Any]:
    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_fused(gm, example_inputs, options, inner_compiler(options))

    return backend


def _steady(trial: Trial) -> Results:
    """The eager results, if they do not depend on random numbers."""
    first, second = trial.run(), trial.run(seed=1)
    limit = torch.finfo(trial.dtype).eps ** 0.5
    for name, value in first.outputs.items():
        if distance(second.outputs[name], value, value) > limit:
            raise Unsteady(
                f"the model's output {name!r} changes from run to run (dropout in training?), so there is "
                "nothing to compare: call model.eval(), or set its dropout to 0"
            )
    return first


def _exact(trial: Trial) -> tuple[Results, str]:
    """The results in float64, or in float32 for a half-precision model that cannot run in float64."""
    dtypes = [torch.float64]
    if torch.finfo(trial.dtype).eps > torch.finfo(torch.float32).eps:
        dtypes.append(torch.float32)
    faults = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        try:
            return trial.exact(dtype), name
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    raise RuntimeError(
        "no more precise copy of the model runs, so errors cannot be measured. " + "; ".join(faults)
    )


def _checks(eager: Tensors, fused: Tensors, exact: Tensors, floor: float) -> tuple[Check, ...]:
    """One check per tensor. One that is much smaller than the largest tensor is judged by the largest."""
    scale = 1e-3 * max((_largest(tensor) for tensor in exact.values()), default=0.0)
    return tuple(
        _check(name, value, fused.get(name), exact[name], scale, floor) for name, value in eager.items()
    )


def _check(
    name: str,
    eager: torch.Tensor,
    fused: torch.Tensor | None,
    exact: torch.Tensor,
    scale: float,
    floor: float,
) -> Check:
    eager_error = distance(eager, exact, eager, scale)
    allowed = ROOM * eager_error + floor
    if fused is None:
        return Check(name, eager_error, float("inf"), float("inf"), allowed)
    fused_error, difference = distance(fused, exact, eager, scale), distance(fused, eager, eager, scale)
    return Check(name, eager_error, fused_error, difference, allowed)


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _plain_data(check: Check) -> dict[str, Any]:
    numbers = {**asdict(check), "ratio": check.ratio}
    del numbers["name"]
    # JSON has no infinity
    finite = {name: value if isfinite(value) else None for name, value in numbers.items()}
    return {"name": check.name, **finite, "ok": check.ok}
