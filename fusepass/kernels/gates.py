"""Why a library cannot serve a site, or run on this machine, by its row in the table of libraries.

The table is in :mod:`fusepass.host.libraries`.  A kernel's ``refuse`` asks here first.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import import_module

import torch

from fusepass.expressions.index import Size
from fusepass.host.libraries import GATES, Gate, Package, dtype_name
from fusepass.specification.attention import Attention

Capability = tuple[int, int]

_GENERATIONS = {
    (7, 0): "Volta", (7, 2): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 7): "Ampere",
    (8, 9): "Ada", (9, 0): "Hopper", (10, 0): "Blackwell", (10, 3): "Blackwell", (11, 0): "Blackwell",
    (12, 0): "Blackwell", (12, 1): "Blackwell",
}  # fmt: skip


def gate_refuses(kernel: str, spec: Attention, device: str, training: bool) -> str | None:
    """Why a kernel cannot serve a site: the hardware, a missing package, a dtype or a head size."""
    gate = GATES[kernel]
    if reason := machine_refuses(gate, device):
        return reason
    if not gate.computes_in(spec.dtype):
        return f"it computes in {' and '.join(gate.dtype_names())}, and this is {dtype_name(spec.dtype)}"
    if training and not gate.backward:
        return "it has no backward pass"
    return _head_sizes(gate, spec.head_dim, spec.value_dim, training)


def machine_refuses(gate: Gate, device: str) -> str | None:
    """Why this machine cannot run a kernel on a device; None if it can."""
    if gate.majors is not None:
        if device != "cuda":
            return f"it runs on NVIDIA GPUs, and this is {device}"
        if reason := capability_refuses(gate, capability()):
            return reason
    if gate.package is not None and not any(map(installed, _packages(gate))):
        return f"{gate.package.name} is not installed: {gate.package.install}"
    return None


def _packages(gate: Gate) -> list[Package]:
    """The libraries of a kernel; any one of them will do."""
    return [package for package in (gate.package, gate.substitute) if package is not None]


def runs_here(kernel: str, device: str) -> bool:
    """Can this machine run a kernel at all, whatever the site?"""
    return kernel not in GATES or machine_refuses(GATES[kernel], device) is None


def capability_refuses(gate: Gate, have: Capability | None) -> str | None:
    """Why a GPU with this compute capability will not do."""
    if gate.majors is None:
        return None
    if have is None:
        return "it needs an NVIDIA GPU, and there is none"
    if have[0] in gate.majors:
        return None
    wanted = ", ".join(f"{m}.x" for m in gate.majors)
    return f"it needs compute capability {wanted}; this GPU has {have[0]}.{have[1]}{_called(have)}"


def _called(have: Capability) -> str:
    return f" ({_GENERATIONS[have]})" if have in _GENERATIONS else ""


def _head_sizes(gate: Gate, head_dim: Size, value_dim: Size, training: bool) -> str | None:
    if not isinstance(head_dim, int) or not isinstance(value_dim, int):
        return "it needs head sizes that are known when it is compiled"
    if gate.same_width and head_dim != value_dim:
        return f"it needs keys and values of the same head size, and these are {head_dim} and {value_dim}"
    most = gate.backward_dims if training and gate.backward_dims is not None else gate.head_dims
    have = capability()
    most = most if have is None else dict(gate.wide).get(have[0], most)
    for size in (head_dim, value_dim):
        if size % gate.step or size < gate.least or (most is not None and size > most):
            way = " backward" if training and gate.backward_dims != gate.head_dims else ""
            multiples = f"multiples of {gate.step} " if gate.step > 1 else ""
            return f"its head sizes{way} are {multiples}from {gate.least} up to {most}, and this is {size}"
    return None


#: The head sizes that flash-attn 3 may be built for.
_BUILT_SIZES = (64, 96, 128, 192, 256)
#: What a library may be built without, as its flags name it and as people do.
_PARTS = {
    "backward": "a backward pass", "softcap": "softcaps", "local": "windows", "fp16": "float16",
    "fp8": "FP8", **{f"hdim{size}": f"head size {size}" for size in _BUILT_SIZES},
}  # fmt: skip
_DISABLE = "FLASHATTENTION_DISABLE_"


@cache
def lacks(package: Package) -> tuple[str, ...]:
    """What an installed library says that it was built without, in the words of ``_PARTS``.

    Nothing if it does not say: then it has what its row in the table says.
    """
    if not package.config or not package.installed():
        return ()
    try:
        flags = import_module(package.config).CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return ()
    return tuple(part for part in _PARTS if flags.get(_DISABLE + part.upper()))


def build_refuses(package: Package, needs: Collection[str], head_dim: Size) -> str | None:
    """Why the installed build of a library does not have all that a site needs; None if it has, or is absent.

    Args:
        needs: the parts, in the words of ``_PARTS``.
        head_dim: kernels of a larger head size compute a smaller one.
    """
    missing = lacks(package)
    part = next((part for part in missing if part in needs), None)
    if part is not None:
        return f"the installed {package.name} was built without {_PARTS[part]}"
    sizes = [size for size in _BUILT_SIZES if f"hdim{size}" not in missing]
    if missing and isinstance(head_dim, int) and head_dim > max(sizes, default=0):
        return f"the installed {package.name} was built for head sizes up to {max(sizes, default=0)}"
    return None


def built_without(package: Package) -> str:
    """What an installed library was built without, for people; empty if it has everything."""
    return ", ".join(_PARTS[part] for part in lacks(package))


def capability() -> Capability | None:
    """The compute capability of the current NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    return _capability(torch.cuda.current_device())


@cache
def _capability(device: int) -> Capability:
    return torch.cuda.get_device_capability(device)


@cache
def installed(package: Package) -> bool:
    """Is a package installed?  Looked up once per process; nothing is imported."""
    return package.installed()


def library_refuses(kernel: str) -> str | None:
    """Why the library of a kernel is installed but cannot be imported: a part is missing, or is from another
    release.

    None if one of its libraries can be imported, or if none is installed: a graph may be compiled for another
    machine.  This is checked when a call of the library is written; otherwise the call would fail in the
    middle of a model.
    """
    there = [p for p in _packages(GATES[kernel]) if p.installed()] if kernel in GATES else []
    reasons = [import_refuses(p) for p in there]
    return None if None in reasons else next(iter(reasons), None)


@cache
def import_refuses(package: Package) -> str | None:
    """Why an installed package cannot be imported; None if it can be, or if it is not installed."""
    if not package.installed():
        return None
    try:
        import_module(package.path())
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        fault = f"{package.name} is installed but cannot be imported ({why})"
        return f"{fault}: reinstall it with its dependencies"
    return None


__all__ = [
    "Capability", "build_refuses", "built_without", "capability", "capability_refuses", "gate_refuses",
    "import_refuses", "installed", "lacks", "library_refuses", "machine_refuses", "runs_here",
]  # fmt: skip
