"""What compiles a rewritten graph: TorchInductor, as `torch.compile` calls it, or another backend."""

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from fusepass.compilation.profiler_ranges import ROUNDS, eager_ranges, labels_of
from fusepass.host.config import Options
from fusepass.host.faults import strict
from fusepass.kernels.reference import let_inductor_inline

log = logging.getLogger("fusepass")

#: The setting of Inductor that runs a pass over its last graph.
_PASS = "post_grad_custom_post_pass"
#: Inductor as `torch.compile` calls it; `enable` puts another class in its place, which runs the pass.
_INDUCTOR = torch._TorchCompileInductorWrapper


def inner_compiler(options: Options) -> Callable[..., Any]:
    """What compiles the rewritten graph: the callable that the options name, in their mode."""
    if options.inner == "inductor":
        let_inductor_inline()
        return partial(compile_by_inductor, _INDUCTOR(options.mode, None, None))
    if not isinstance(options.inner, str):
        return options.inner
    from torch._dynamo.backends.registry import lookup_backend

    return eager_ranges(options.inner, lookup_backend(options.inner))


def compile_by_inductor(
    inductor: Any, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **more: Any
) -> Callable[..., Any]:
    """Inductor as `torch.compile` calls it, with a named range for every fused site.

    It leaves out casts to narrower dtypes, unless it is told. Where attention stays whose scores are rounded
    by such casts, it is told: a fill that overflows there is infinite.
    """
    made = marked(inductor, gm)
    graphs = (module for module in gm.modules() if isinstance(module, torch.fx.GraphModule))
    if any(graph.meta.get(ROUNDS) for graph in graphs):
        made = copy.copy(made)
        made.config = {"emulate_precision_casts": True, **made.config}
    compiled: Callable[..., Any] = _INDUCTOR.__call__(made, gm, example_inputs, **more)
    return compiled


def marked(inductor: Any, gm: fx.GraphModule) -> Any:
    """Inductor as `torch.compile` calls it, which writes a range for every labelled site of `gm`."""
    labels = labels_of(gm)
    marks = _marks() if labels else None
    if marks is None:
        return inductor
    from torch._inductor import config

    given = inductor.config.get(_PASS) or getattr(config, _PASS)
    before = tuple(given) if isinstance(given, (list, tuple)) else (given,) * (given is not None)
    made = copy.copy(inductor)
    made.config = {**inductor.config, _PASS: marks.Marking(labels, before)}
    return made


@functools.cache
def _marks() -> Any:
    """The module of marks, which Inductor knows then; None where it was written for another Inductor."""
    try:
        from fusepass.compilation import marks

        marks.register()
    except (AttributeError, ImportError, TypeError) as error:
        if strict():
            raise
        log.info("fusepass: no ranges in the code of this Inductor: %s", error)
        return None
    return marks


__all__ = ["compile_by_inductor", "inner_compiler", "marked"]
