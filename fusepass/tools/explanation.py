"""`explain`: every attention site of a model, what it was recognised as, and its kernel or why it stays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from fusepass.compilation.assumptions import Original, static_inputs
from fusepass.compilation.backend import run_pass
from fusepass.host.config import Options
from fusepass.reports.collector import Collector, collect, summary
from fusepass.reports.report import SiteReport
from fusepass.reports.tables import site_table
from fusepass.tools.sandbox import compiled_apart, copied, restored, unwrapped


@dataclass(frozen=True)
class Explanation:
    """What the pass found in a model. Prints as a table."""

    collector: Collector

    @property
    def sites(self) -> list[SiteReport]:
        """The attention sites of all graphs, fused or not, in order."""
        return self.collector.sites

    @property
    def fused(self) -> list[SiteReport]:
        """The sites that would run on one kernel."""
        return self.collector.fused

    @property
    def left(self) -> list[SiteReport]:
        """The sites that would stay as they were written; each has a `reason`."""
        return self.collector.left

    def table(self) -> Table:
        """The sites as a rich table; sites that read the same share a row."""
        return site_table(self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return self.collector.to_json()

    def __str__(self) -> str:
        return str(self.collector)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.sites:
            yield self.table()
        yield "\n".join([summary(self.collector), *(f"note: {note}" for note in self.collector.notes)])


def explain(
    model: Callable[..., Any],
    *args: Any,
    fusepass_options: Mapping[str, Any] | Options | None = None,
    fusepass_dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Tell what the pass does to `model(*args, **kwargs)`; the model runs once, on copies of the arguments.

    Keywords that begin with `fusepass_` are for this function, all others go to the model: `fusepass_options`
    are the backend's options, and `fusepass_dynamic` is `torch.compile`'s `dynamic`. The original graphs run,
    without the kernels; the options `inner` and `mode` matter only with `kernel="autotune"`, which compiles
    what it measures. The model is explained in its present train or eval mode and in the caller's grad mode;
    its state and its compiled code do not change.

    Raises:
        TypeError, ValueError: an option that is wrong, as for `Options`.
    """
    options = Options.of(fusepass_options)
    model = unwrapped(model)

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        original = Original(gm)
        run_pass(gm, example_inputs, options, static_inputs(gm, example_inputs))
        return original.module()

    with collect() as collector, restored(model):
        compiled_apart(model, backend, fusepass_dynamic)(*copied(args), **copied(kwargs))
    return Explanation(collector)
