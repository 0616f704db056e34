"""The surroundings of a call of the pass: the user's hooks, modes and settings, which are kept out of it.

Everything in the pass that computes on tensors runs in :func:`clean_context`: no hook or mode of the user
sees its tensors, and no setting of the user changes its results.  The settings that a graph's own operations
will run under (gradient recording, autocast, the default dtype, deterministic algorithms) are part of the
graph's meaning: they are noted on the way in, and :func:`graph_context` restores them where a new operation
is tried on fake tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

_autograd: Any = torch._C._autograd


@dataclass(frozen=True)
class Settings:
    """The settings under which PyTorch computes its operations.

    Attributes:
        grad: are gradients recorded?
        autocast: the device types under autocast, each with its dtype.
        dtype: the default dtype.
        deterministic: are deterministic algorithms required?
        warn_only: does a violation of that only cause a warning?
    """

    grad: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    dtype: torch.dtype = torch.float32
    deterministic: bool = False
    warn_only: bool = False

    @classmethod
    def present(cls) -> Settings:
        """The settings in force in this thread now."""
        autocast = ((d, torch.get_autocast_dtype(d)) for d in _device_types() if torch.is_autocast_enabled(d))
        return cls(
            torch.is_grad_enabled(),
            tuple(autocast),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def change(self, before: Settings) -> None:
        """Put these settings in force in place of ``before``; those that do not differ are not touched."""
        if self.grad is not before.grad:
            torch._C._set_grad_enabled(self.grad)
        for device in dict(before.autocast).keys() - dict(self.autocast).keys():
            torch.set_autocast_enabled(device, False)
        for device, dtype in set(self.autocast) - set(before.autocast):
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
        if self.dtype is not before.dtype:
            torch.set_default_dtype(self.dtype)
        if (self.deterministic, self.warn_only) != (before.deterministic, before.warn_only):
            torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)


_CLEAN = Settings()
#: The settings outside the outermost clean context, noted when it was entered; None where there is none.
_outside: ContextVar[Settings | None] = ContextVar("fusepass_outside", default=None)


@contextlib.contextmanager
def clean_context(draws: bool = True) -> Iterator[None]:
    """Inside, PyTorch is plain, whatever surrounds the call; afterwards everything is as it was.

    Args:
        draws: whether random numbers may be drawn inside, so that the generators must be restored.  Not for
            code that runs at every call of compiled code: a GPU's generator cannot be read while a CUDA graph
            is recorded.

    It suspends saved-tensor hooks, dispatch and function modes (a default device is one), the levels of
    ``torch.func``, inference mode, and what :class:`Settings` lists.  The default dtype and deterministic
    algorithms are settings of the whole process: they are touched only where they differ from PyTorch's own.
    """
    if is_clean():
        yield
        return
    before = Settings.present()
    token = None if _outside.get() is not None else _outside.set(before)
    try:
        with (
            _no_function_modes(),
            _disable_current_modes(),
            temporarily_clear_interpreter_stack(),
            _no_hooks(),
            torch.inference_mode(False),
            _same_random_numbers(draws),
            _in_force(_CLEAN),
        ):
            yield
    finally:
        if token is not None:
            _outside.reset(token)


def is_clean() -> bool:
    """Is this a clean context in which no mode has been entered and no setting changed since?"""
    return (
        _outside.get() is not None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch.is_grad_enabled()
        and Settings.present() == _CLEAN
    )


def graph_context() -> contextlib.AbstractContextManager[None]:
    """Inside, the settings of the current graph are in force; outside a clean context nothing changes."""
    return _in_force(settings())


def settings() -> Settings:
    """The settings that the current graph runs under."""
    outside = _outside.get()
    return Settings.present() if outside is None else outside


@contextlib.contextmanager
def _in_force(wanted: Settings) -> Iterator[None]:
    before = Settings.present()
    caches = torch.is_autocast_cache_enabled()
    wanted.change(before)
    if before.autocast or wanted.autocast:
        torch.set_autocast_cache_enabled(False)  # the cache would keep the pass's tensors
    try:
        yield
    finally:
        before.change(Settings.present())
        torch.set_autocast_cache_enabled(caches)


def _device_types() -> tuple[str, ...]:
    """The device types that may be under autocast."""
    accelerator = torch.accelerator.current_accelerator()
    return tuple(sorted({"cpu", "cuda"} | ({accelerator.type} if accelerator else set())))


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    popped = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(popped):
            _push_mode(mode)


@contextlib.contextmanager
def _no_hooks() -> Iterator[None]:
    """Tensors are saved for backward without the hooks of ``torch.autograd.graph.saved_tensors_hooks``."""
    tracing = _autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        _autograd._saved_tensors_hooks_set_tracing(tracing)


@contextlib.contextmanager
def _same_random_numbers(draws: bool) -> Iterator[None]:
    if not draws:
        yield
        return
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


def will_be_stored() -> bool:
    """Will PyTorch store what it compiles now, to be called later without the pass?"""
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    return bool(
        getattr(dynamo, "caching_precompile", False) or getattr(functorch, "bundled_autograd_cache", False)
    )


__all__ = ["Settings", "clean_context", "graph_context", "is_clean", "settings", "will_be_stored"]
