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

#: Inductor's setting for a custom pass over its final graph.
_PASS = "post_grad_custom_post_pass"
#: Inductor as `torch.compile` calls it. `enable` makes that name in `torch` stand for a class that runs the
#: pass first; this is the original.
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

    By default Inductor omits casts to narrower dtypes. It is told to keep them if a site that is not fused
    has scores or weights that such casts round: a fill that overflows in such a cast becomes infinite.
    """
    compiler = marked(inductor, gm)
    graphs = (module for module in gm.modules() if isinstance(module, torch.fx.GraphModule))
    if any(graph.meta.get(ROUNDS) for graph in graphs):
        compiler = copy.copy(compiler)
        compiler.config = {"emulate_precision_casts": True, **compiler.config}
    compiled: Callable[..., Any] = _INDUCTOR.__call__(compiler, gm, example_inputs, **more)
    return compiled


def marked(inductor: Any, gm: fx.GraphModule) -> Any:
    """Inductor as `torch.compile` calls it, with a range in its code for every labelled site of `gm`."""
    labels = labels_of(gm)
    marks = _marks() if labels else None
    if marks is None:
        return inductor
    from torch._inductor import config

    given = inductor.config.get(_PASS) or getattr(config, _PASS)
    before = tuple(given) if isinstance(given, (list, tuple)) else (given,) * (given is not None)
    compiler = copy.copy(inductor)
    compiler.config = {**inductor.config, _PASS: marks.Marking(labels, before)}
    return compiler


@functools.cache
def _marks() -> Any:
    """The module of marks, registered with Inductor; None if it does not fit this version of Inductor."""
    try:
        from fusepass.compilation import marks

        marks.register()
    except (AttributeError, ImportError, TypeError) as error:
        if strict():
            raise
        log.info("fusepass: no named ranges with this version of Inductor: %s", error)
        return None
    return marks


__all__ = ["compile_by_inductor", "inner_compiler", "marked"]
