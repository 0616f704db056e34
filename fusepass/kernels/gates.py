"""What the libraries behind the kernels accept, as data: GPUs, dtypes, head sizes, packages.

Every row states what the library's own interface checks (versions in ``Gate.source``); a kernel's ``refuse``
looks at its row first, and ``python -m fusepass doctor`` prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from fusepass.expressions.index import Size
from fusepass.specification.attention import Attention

Capability = tuple[int, int]

HALF = (torch.float16, torch.bfloat16)
_GENERATIONS = {
    (7, 0): "Volta", (7, 2): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 7): "Ampere",
    (8, 9): "Ada", (9, 0): "Hopper", (10, 0): "Blackwell", (10, 3): "Blackwell", (11, 0): "Blackwell",
    (12, 0): "Blackwell", (12, 1): "Blackwell",
}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A library, and how to tell whether it is installed without importing it."""

    name: str
    module: str
    file: str
    install: str

    def installed(self) -> bool:
        """Does its file exist?  (Two distributions share the import name ``flash_attn``.)"""
        return _holds(self.module, self.file)

    def path(self) -> str:
        """The module that is imported."""
        inner = self.file.removesuffix(".py").removesuffix("__init__").replace("/", ".")
        return f"{self.module}.{inner}" if inner else self.module


FLASH2 = Package(
    "flash-attn", "flash_attn", "flash_attn_interface.py", "pip install flash-attn --no-build-isolation"
)
FLASH3 = Package(
    "flash-attn-3",
    "flash_attn_interface",
    "",
    "build it from the `hopper` folder of the flash-attention repository",
)
FLASH4 = Package("flash-attn-4", "flash_attn", "cute/interface.py", "pip install --pre flash-attn-4")
FRONTEND = Package("nvidia-cudnn-frontend", "cudnn", "__init__.py", "pip install nvidia-cudnn-frontend")


@dataclass(frozen=True)
class Gate:
    """One row of the table.

    majors: major compute capabilities; None means any device, GPU or not.
    step, least: head sizes are multiples of ``step`` and at least ``least``.
    head_dims, backward_dims: the largest head size, forward and backward.
    wide: major compute capabilities that take larger heads, and how large.
    same_width: keys and values must have the same head size.
    auto: for a registered kernel: may ``auto`` choose it?  Built-in kernels are always ranked.
    """

    kernel: str
    dtypes: tuple[torch.dtype, ...]
    majors: tuple[int, ...] | None = None
    package: Package | None = None
    step: int = 1
    least: int = 1
    head_dims: int | None = None
    backward_dims: int | None = None
    wide: tuple[tuple[int, int], ...] = ()
    same_width: bool = False
    backward: bool = True
    source: str = ""
    auto: bool = False


_FA2, _CUDNN = "flash-attn 2.8.3, and its folder hopper", "torch 2.11, cuDNN 9.19, frontend 1.32"

GATES: dict[str, Gate] = {
    g.kernel: g
    for g in (
        Gate("flash2", HALF, (8, 9, 10, 11, 12), FLASH2, 8, 8, 256, 256, same_width=True, source=_FA2),
        Gate("flash3", HALF, (9,), FLASH3, 8, 8, 256, 256, same_width=True, source=_FA2),
        Gate("flash4", HALF, (9, 10, 11), FLASH4, 8, 8, 256, 256, source="flash-attn-4 4.0.0b36"),
        Gate("cudnn", HALF, (8, 9, 10, 11, 12), None, 8, 8, 128, 128, ((9, 256),), source=_CUDNN),
        Gate("fp8", HALF, (9,), FRONTEND, 128, 128, 128, same_width=True, backward=False, source=_CUDNN),
        Gate("flex_flash", HALF, (9, 10), FLASH4, 8, 8, 256, 256, source="torch 2.11, flash-attn-4 4.0.0b36"),
        Gate(
            "flex", (torch.float32, *HALF), None, None, 1, 16, 512, 256, source="torch 2.11, Triton and C++"
        ),
    )
}  # fmt: skip


def gate_refuses(kernel: str, spec: Attention, device: str, training: bool) -> str | None:
    """Why a kernel cannot serve a site: the hardware, a missing package, a dtype or a head size."""
    gate = GATES[kernel]
    if reason := machine_refuses(gate, device):
        return reason
    if spec.dtype not in gate.dtypes:
        taken = " and ".join(_dtype_name(d) for d in gate.dtypes)
        return f"it computes in {taken}, and this is {_dtype_name(spec.dtype)}"
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
    return [p for p in (gate.package, FLASH3 if gate.kernel == "fp8" else None) if p is not None]


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
    """Why the library of a kernel is installed but cannot be imported: a part is missing, or from another
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


def _holds(module: str, file: str) -> bool:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if not file:
        return True
    return any((Path(place) / file).is_file() for place in spec.submodule_search_locations or [])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = [
    "GATES", "Capability", "Gate", "Package", "capability", "capability_refuses", "gate_refuses",
    "import_refuses", "installed", "library_refuses", "machine_refuses", "runs_here",
]  # fmt: skip
