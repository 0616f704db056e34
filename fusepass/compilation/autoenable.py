"""The pass in every plain `torch.compile(...)` of the process, switched on and off; nothing is edited.

Each call of `torch.compile` whose backend is Inductor creates one `_TorchCompileInductorWrapper`; other calls
create none. While the pass is enabled, that name stands for a subclass that runs the pass first. So `mode=`,
`options=` and every other argument keep their meaning, and other backends are not affected. `torch.compile`
itself is not replaced, so references to it that were imported earlier get the pass too. What counts is
whether the pass is enabled when `torch.compile(...)` is called, not at the model's first call, which compiles
it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

import torch

from fusepass.compilation.assumptions import forget_places
from fusepass.compilation.backend import compile_fused
from fusepass.compilation.inner import compile_by_inductor
from fusepass.host.config import Options, PassOptions, pass_options
from fusepass.kernels.reference import let_inductor_inline

_HOOK = "_TorchCompileInductorWrapper"
_original: type[Any] = getattr(torch, _HOOK)


def _with_pass(options: Options) -> type[Any]:
    """The class that replaces the wrapper: Inductor as it is, with the pass before it."""

    class InductorWithFusepass(_original):  # type: ignore[misc]
        fusepass_options = options

        def __call__(self, model_: torch.fx.GraphModule, inputs_: Sequence[Any], **kwargs: Any) -> Any:
            let_inductor_inline()
            compiler = partial(compile_by_inductor, self, **kwargs)
            # PyTorch treats the result of this class as Inductor's own, and may store parts of it itself.
            stored_by_torch = bool(getattr(torch._functorch.config, "bundled_autograd_cache", False))
            return compile_fused(
                model_, inputs_, self.fusepass_options, compiler, stores_itself=not stored_by_torch
            )

        def reset(self) -> None:
            forget_places()
            super().reset()

        def __eq__(self, other: object) -> bool:
            # Dynamo reuses compiled code where backends are equal.
            parts = ("fusepass_options", "config", "dynamic", "name")
            return all(getattr(other, part, None) == getattr(self, part, None) for part in parts)

        __hash__ = None  # type: ignore[assignment]

    return InductorWithFusepass


def enable(**options: Unpack[PassOptions]) -> None:
    """From now on, every `torch.compile(...)` whose backend is Inductor gets the pass.

    Takes `kernel`, `precision` and `validate`, as described for `Options`; a second call replaces them. The
    inner backend and its mode are those of each `torch.compile` call.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: an unknown value, or an option that is unknown or not taken here.
    """
    setattr(torch, _HOOK, _with_pass(pass_options("enable", options)))


def disable() -> None:
    """Later calls of `torch.compile(...)` are plain again; models that were compiled before keep the pass."""
    setattr(torch, _HOOK, _original)


@contextmanager
def enabled(**options: Unpack[PassOptions]) -> Iterator[None]:
    """`enable(**options)` for the `torch.compile(...)` calls inside a `with` block; blocks may nest."""
    before = getattr(torch, _HOOK)
    enable(**options)
    try:
        yield
    finally:
        setattr(torch, _HOOK, before)


def is_enabled() -> bool:
    """Whether a plain `torch.compile(...)` gets the pass now."""
    return getattr(torch, _HOOK) is not _original
