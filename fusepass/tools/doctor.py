"""The kernels that this machine can run, and why it cannot run the others.

Libraries whose kernels the GPU can run are imported, which shows whether a part of them is missing; no others
are.
"""

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

from fusepass.host.kernel_names import LIBRARIES
from fusepass.host.libraries import GATES, Package
from fusepass.kernels.gates import Capability, built_without, capability_refuses, installed, library_refuses
from fusepass.kernels.registry import Registered, registered


@dataclass(frozen=True)
class Machine:
    """The properties of this machine that matter to kernels."""

    capability: Capability | None
    """CUDA compute capability of the first GPU; None if there is no GPU, or one from AMD."""
    device: str
    packages: dict[str, str]
    """Versions of the installed packages that matter."""


@dataclass(frozen=True)
class KernelStatus:
    """Whether a kernel can run here. `why` says which library runs it, or why none does and what to do."""

    kernel: str
    runs: bool
    why: str
    gpus: str = "any"
    """The compute capabilities that it supports."""
    dtypes: str = "any"
    head_sizes: str = "any"


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found. Prints as a table."""

    machine: Machine
    kernels: tuple[KernelStatus, ...]

    def table(self) -> Table:
        """A table with one row per kernel."""
        table = Table(title="Kernels on this machine", title_justify="left", header_style="bold")
        table.add_column("kernel", no_wrap=True)
        table.add_column("runs", justify="center")
        table.add_column("GPUs", overflow="fold")
        table.add_column("dtypes", overflow="fold")
        table.add_column("head sizes", overflow="fold")
        table.add_column("with what, or why not", overflow="fold")
        for status in self.kernels:
            runs = "[green]yes[/green]" if status.runs else "[yellow]no[/yellow]"
            limits = (status.gpus, status.dtypes, status.head_sizes)
            table.add_row(escape(status.kernel), runs, *map(escape, limits), escape(status.why))
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
    """This machine, and for every kernel whether it runs here."""
    machine = _machine()
    answers = {**_ANSWERS, **{name: _of_package(registration) for name, registration in registered().items()}}
    kernels = tuple(KernelStatus(name, *answer(machine), *_limits(name)) for name, answer in answers.items())
    return Diagnosis(machine, kernels)


def _limits(name: str) -> tuple[str, str, str]:
    """GPUs, dtypes and head sizes of a kernel, from the table of gates."""
    gate = GATES.get(name)
    if gate is None:
        return "any", "any", "any"
    gpus = "any" if gate.majors is None else ", ".join(f"{m}.x" for m in gate.majors)
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    multiples = f", ×{gate.step}" if gate.step > 1 else ""
    sizes = f"{gate.least}…{gate.head_dims or ''}{multiples}"
    if not gate.backward:
        sizes += "; forward only"
    elif gate.backward_dims != gate.head_dims:
        sizes += f"; backward …{gate.backward_dims}"
    return gpus, " ".join(short.get(d, d) for d in gate.dtype_names()), sizes


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
    compiler = next((path for name in compilers if name and (path := shutil.which(name))), None)
    if compiler is None:
        return (
            False,
            "on a CPU FlexAttention needs a C++ compiler, and none is on the PATH (g++, clang++, CXX)",
        )
    return True, f"FlexAttention for CPUs, compiled with {compiler}; inference only"


def _cudnn(machine: Machine) -> Answer:
    if refusal := _refusal("cudnn", machine):
        return False, refusal
    if not torch.backends.cudnn.is_available():
        return False, "this torch was built without cuDNN"
    return True, f"cuDNN {torch.backends.cudnn.version()}, through torch"


def _library(kernel: str) -> Callable[[Machine], "Answer"]:
    """A function that answers for a kernel: can the GPU run it, and is its package installed?"""

    def answer(machine: Machine) -> Answer:
        package, refusal = GATES[kernel].package, _refusal(kernel, machine)
        if package is None:
            return refusal is None, refusal or "part of torch"
        there = installed(package)
        version = machine.packages.get(package.name) or _of_module(package)
        state = (
            f"{package.name} {version}" if there else f"{package.name} is not installed: {package.install}"
        )
        if refusal:
            return False, f"{refusal}; {state}" + (" is installed" if there else "")
        if there and (broken := library_refuses(kernel)):
            return False, broken
        without = built_without(package) if there else ""
        return there, f"{state}, built without {without}" if without else state

    return answer


def _of_package(registration: Registered) -> Callable[[Machine], Answer]:
    """A function that answers for a registered kernel: what its gate says, and who registered it."""

    def answer(machine: Machine) -> Answer:
        unasked = "`auto` may choose it" if registration.by_auto else "by name only"
        state = f"registered by {registration.module}; {unasked}"
        name = registration.kernel.name
        if registration.gate.package is not None:
            runs, why = _library(name)(machine)
            return runs, f"{why}; {state}"
        refusal = _refusal(name, machine)
        return refusal is None, state if refusal is None else f"{refusal}; {state}"

    return answer


def _refusal(kernel: str, machine: Machine) -> str | None:
    """Why the GPU cannot run a kernel; None if it can."""
    return capability_refuses(GATES[kernel], machine.capability)


def _reference(machine: Machine) -> Answer:
    return True, "plain mathematics, for checking; slow"


#: Kernels with an answer of their own. All others are answered for by `_library`.
_OWN: dict[str, Callable[[Machine], Answer]] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "flex": _flex,
    "reference": _reference,
}
_ANSWERS = {name: _OWN.get(name) or _library(name) for name in (*LIBRARIES, "fp8", "reference")}


def _torch_file(file: str) -> bool:
    return (Path(torch.__file__).parent / file).is_file()


@cache
def _of_module(package: Package) -> str:
    """The version of a library by the distribution that its module is from: several build flash-attn 3."""
    names = metadata.packages_distributions().get(package.module, [])
    if not names:
        return "of unknown version"
    version = metadata.version(names[0])
    return version if names[0] == package.name else f"from {names[0]} {version}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
