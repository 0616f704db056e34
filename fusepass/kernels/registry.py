"""Kernels of other packages: `register_kernel`.

Where the pass looks for packages that call it is in :mod:`fusepass.host.kernel_names`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fusepass.dialects.torch.nodes import size_of
from fusepass.host.faults import first_line, strict
from fusepass.host.kernel_names import KERNELS, REGISTERED, look_for_packages
from fusepass.host.libraries import GATES, Gate
from fusepass.kernels.base import Kernel, Refused, Target
from fusepass.kernels.gates import gate_refuses
from fusepass.rules.site import Site
from fusepass.specification.attention import Attention
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder, CannotEmit

Emit = Callable[[Site, Builder, Target], fx.Node]
Refuse = Callable[[Attention, Target], str | None]

log = logging.getLogger("fusepass")


@dataclass(frozen=True)
class Registered:
    """A kernel of another package, and the module that it comes from."""

    kernel: Kernel
    gate: Gate
    module: str

    @property
    def by_auto(self) -> bool:
        """May `auto` and `autotune` choose it?"""
        return self.gate.auto and not self.kernel.rounds


_registered: dict[str, Registered] = REGISTERED


def register_kernel(
    name: str,
    emit: Emit,
    *,
    takes: Takes,
    gate: Gate,
    refuse: Refuse | None = None,
    rounds: bool = False,
    of_torch: bool = False,
    replace: bool = False,
) -> Kernel:
    """A kernel of your own, under a name that every `kernel=` takes.

    `doctor` lists it, `explain` gives its reasons, `bench --contenders NAME` measures it, and where its gate
    says `auto=True` the pass chooses it unasked: before the others until `bench --profile` has measured it.

    Args:
        name: what users call it.
        emit: `(site, build, target) -> node` writes the nodes and returns the result, `[B, H, Q, Dv]` in the
            dtype `site.spec.out_dtype`; it raises `fusepass.kernels.Refused` where the operands show a
            reason. What it needs is in `fusepass.kernels`.
        takes: the modifiers that it computes. All others are refused; every field defaults to "no".
        gate: its machines, dtypes and head sizes, whether it has a backward pass, and the package it needs.
        refuse: `(spec, target) -> reason or None`, for what `takes` and `gate` cannot say.
        rounds: does it round more than its dtype, as FP8 does? Then it is used by name only, and
            `validate` does not judge it.
        of_torch: does it consist of PyTorch's operators, which `torch.func` can differentiate?
        replace: take the place of a kernel that was registered under this name.

    Returns:
        The kernel, an object like those in `fusepass.kernels.KERNELS`.

    Raises:
        ValueError: the name is taken or is not an identifier, the gate has another name, or `rounds` is set
            and the gate says `auto=True`.
    """
    _check(name, gate, rounds, replace)
    kernel = Kernel(name, takes, _careful(name, emit), _with_gate(name, refuse), of_torch, rounds)
    GATES[name] = gate
    _registered[name] = Registered(kernel, gate, getattr(emit, "__module__", None) or "?")
    return kernel


def unregister_kernel(name: str) -> None:
    """Remove a registered kernel; graphs that were compiled with it keep it.

    Raises:
        ValueError: no kernel is registered under this name.
    """
    if name not in _registered:
        raise ValueError(
            f"no kernel {name!r} is registered; registered are {', '.join(_registered) or 'none'}"
        )
    del _registered[name], GATES[name]


def registered() -> dict[str, Registered]:
    """The kernels of other packages, by name, in the order of their registration."""
    look_for_packages()
    return _registered


def _check(name: str, gate: Gate, rounds: bool, replace: bool) -> None:
    if not name.isidentifier():
        raise ValueError(f"register_kernel({name!r}): expected a name of letters, digits and underscores")
    if name in (*KERNELS, "fp8", "unfused"):
        raise ValueError(f"register_kernel({name!r}): fusepass has a kernel of this name; choose another")
    if name in _registered and not replace:
        module = _registered[name].module
        raise ValueError(
            f"register_kernel({name!r}): {module} has registered this name; choose another, or pass "
            "replace=True"
        )
    if gate.kernel != name:
        raise ValueError(
            f"register_kernel({name!r}): its gate is of {gate.kernel!r}; expected Gate({name!r}, ...)"
        )
    if rounds and gate.auto:
        raise ValueError(
            f"register_kernel({name!r}): a kernel that rounds more than its dtype serves by name only; leave "
            "auto=True out of its gate"
        )


def _with_gate(name: str, refuse: Refuse | None) -> Refuse:
    """A registered kernel's reasons to refuse what it takes: those of its gate, then its own."""

    def more(spec: Attention, target: Target) -> str | None:
        reason = gate_refuses(name, spec, target.device, target.training)
        return reason or (None if refuse is None else refuse(spec, target))

    return more


def _careful(name: str, emit: Emit) -> Emit:
    """``emit``, checked: a fault in it costs only this kernel, and its result has to fit the site."""

    def careful(site: Site, build: Builder, target: Target) -> fx.Node:
        try:
            out = emit(site, build, target)
        except (Refused, CannotEmit):
            raise
        except Exception as error:
            if strict():
                raise
            log.warning("fusepass: kernel %r failed while it was written", name, exc_info=True)
            raise Refused(f"it failed while it was written: {first_line(error)}") from error
        if reason := _wrong_result(site, build, out) or (_no_operator(build) if target.aten else None):
            raise Refused(reason)
        return out

    return careful


def _wrong_result(site: Site, build: Builder, out: fx.Node) -> str | None:
    """How a result differs from what a site needs; None if it fits. Unknown sizes are not compared here."""
    spec, value = site.spec, build.value(out)
    wanted = (spec.batch, spec.heads, spec.queries, spec.value_dim)
    shape = tuple(size_of(n) for n in value.shape)
    fits = len(shape) == 4 and all(
        a == b for a, b in zip(shape, wanted, strict=True) if isinstance(a, int) and isinstance(b, int)
    )
    if fits and value.dtype is spec.out_dtype:
        return None
    sizes = ", ".join(map(str, wanted))
    written = f"{list(value.shape)} of {value.dtype}"
    return f"its result is {written}, and a site needs [B, H, Q, Dv] = [{sizes}] of {spec.out_dtype}"


def _no_operator(build: Builder) -> str | None:
    """Why new nodes cannot be part of an exported graph; None if they can."""
    targets = {node.target for node in build.new_nodes}
    for target in (t for t in targets if not isinstance(t, (OpOverload, HigherOrderOperator))):
        if getattr(target, "__module__", "") != "_operator":  # arithmetic of sizes
            name = getattr(target, "__qualname__", str(target))
            return f"exported graphs hold operators of torch.ops, and it writes a call of '{name}'"
    return None


__all__ = ["Registered", "register_kernel", "registered", "unregister_kernel"]
