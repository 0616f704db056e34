"""Which kernels this machine can run, and why not the others. Nothing heavy is imported to find out."""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

Capability = tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What the kernels need to know about this machine."""

    capability: Capability | None
    """CUDA compute capability of the first GPU; None without a GPU, and on AMD's."""
    device: str
    packages: dict[str, str]
    """Versions of the installed packages that matter."""


@dataclass(frozen=True)
class KernelStatus:
    """Whether a kernel can run here: `why` says with what, or why not and what to do."""

    kernel: str
    runs: bool
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found. Prints as a table."""

    machine: Machine
    kernels: tuple[KernelStatus, ...]

    def table(self) -> Table:
        """One row a kernel."""
        table = Table(title="Kernels on this machine", title_justify="left", header_style="bold")
        table.add_column("kernel", no_wrap=True)
        table.add_column("runs", justify="center")
        table.add_column("with what, or why not", overflow="fold")
        for status in self.kernels:
            runs = "[green]yes[/green]" if status.runs else "[yellow]no[/yellow]"
            table.add_row(escape(status.kernel), runs, escape(status.why))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        versions = ", ".join(f"{name} {version}" for name, version in self.machine.packages.items())
        yield escape(f"{self.machine.device}; Python {platform.python_version()}; {versions}")
        yield self.table()


PACKAGES = (
    "fusepass",
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "onnxruntime",
    "onnxruntime-gpu",
    "transformers",
)


def diagnose() -> Diagnosis:
    """This machine, and every kernel's answer to it."""
    machine = _machine()
    kernels = tuple(KernelStatus(name, *_written(name, answer(machine))) for name, answer in _ANSWERS.items())
    return Diagnosis(machine, kernels)


def _written(name: str, answer: "Answer") -> "Answer":
    """A kernel that the pass cannot write into a graph yet does not run, whatever the machine has."""
    from fusepass.kernels import BY_NAME

    if name in BY_NAME:
        return answer
    return False, f"this version of fusepass does not write {name} calls yet; {answer[1]}"


def _machine() -> Machine:
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    if not torch.cuda.is_available():
        return Machine(None, f"no GPU, {os.cpu_count()} CPU cores ({platform.machine()})", versions)
    properties = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    device = f"{count} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.version.hip:
        return Machine(None, f"{device}, ROCm {torch.version.hip}", versions)
    capability = torch.cuda.get_device_capability(0)
    return Machine(capability, f"{device}, compute capability {_dotted(capability)}", versions)


Answer = tuple[bool, str]


def _sdpa(machine: Machine) -> Answer:
    if machine.capability is None and not torch.cuda.is_available():
        return True, "torch's flash attention for CPUs, else plain math"
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return True, "torch's own: " + ", ".join(name for name, on in enabled.items() if on)


def _flex(machine: Machine) -> Answer:
    if find_spec("torch.nn.attention") is None or not _torch_file("nn/attention/flex_attention.py"):
        return False, f"torch {torch.__version__} has no FlexAttention"
    if torch.cuda.is_available():
        if find_spec("triton") is None:
            return False, "needs triton to generate the kernel: pip install triton"
        return True, "FlexAttention, a Triton kernel generated for each site"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    found = next((path for name in compilers if name and (path := shutil.which(name))), None)
    if found is None:
        return (
            False,
            "on a CPU FlexAttention needs a C++ compiler, and none is on the PATH (g++, clang++, CXX)",
        )
    return True, f"FlexAttention for CPUs, compiled with {found}; inference only"


def _cudnn(machine: Machine) -> Answer:
    if refusal := _needs(machine, (8, 0)):
        return False, refusal
    if not torch.backends.cudnn.is_available():
        return False, "this torch was built without cuDNN"
    version = torch.backends.cudnn.version()
    frontend = machine.packages.get("nvidia-cudnn-frontend")
    extra = f"frontend {frontend}" if frontend else "FP8 needs more: pip install nvidia-cudnn-frontend"
    return True, f"cuDNN {version}, through torch; {extra}"


def _flash2(machine: Machine) -> Answer:
    return _package(machine, (8, 0), "flash-attn", _holds("flash_attn", "flash_attn_interface.py"))


def _flash3(machine: Machine) -> Answer:
    if machine.capability is not None and machine.capability[0] != 9:
        return (
            False,
            f"needs a Hopper GPU (9.0); this one has compute capability {_dotted(machine.capability)}",
        )
    hint = "build it from the `hopper` folder of the flash-attention repository"
    return _package(machine, (9, 0), "flash-attn-3", find_spec("flash_attn_interface") is not None, hint)


def _flash4(machine: Machine) -> Answer:
    found = _holds("flash_attn", "cute/interface.py")
    return _package(machine, (9, 0), "flash-attn-4", found, "pip install --pre flash-attn-4")


def _reference(machine: Machine) -> Answer:
    return True, "the plain mathematics, for checking; slow"


_ANSWERS: dict[str, Callable[[Machine], Answer]] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "flash2": _flash2,
    "flash3": _flash3,
    "flash4": _flash4,
    "flex": _flex,
    "reference": _reference,
}


def _needs(machine: Machine, least: Capability) -> str | None:
    """Why the GPU will not do; None if it will."""
    if machine.capability is None:
        return f"needs an NVIDIA GPU; {machine.device.split(',')[0]} here"
    if machine.capability < least:
        has = _dotted(machine.capability)
        return f"needs compute capability {_dotted(least)} or newer; this GPU has {has}"
    return None


def _package(machine: Machine, least: Capability, name: str, found: bool, hint: str | None = None) -> Answer:
    refusal = _needs(machine, least)
    if not found:
        missing = f"{name} is not installed: {hint or f'pip install {name}'}"
        return False, f"{refusal}; {missing}" if refusal else missing
    version = machine.packages.get(name, "of unknown version")
    return (False, f"{refusal}; {name} {version} is installed") if refusal else (True, f"{name} {version}")


def _holds(package: str, file: str) -> bool:
    """Whether an installed package has a file: `flash_attn` is shared by two distributions."""
    spec = find_spec(package)
    places = (spec.submodule_search_locations or []) if spec else []
    return any((Path(place) / file).is_file() for place in places)


def _torch_file(file: str) -> bool:
    return (Path(torch.__file__).parent / file).is_file()


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
