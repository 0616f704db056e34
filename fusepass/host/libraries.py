"""The libraries behind the kernels, as data: GPUs, dtypes, head sizes, packages, and where each kernel is.

A row states what the library's own interface checks (its version is in ``Gate.source``).  Everything that
lists kernels reads this table: the names that options take, the order in which kernels are tried, `doctor`
and `bench`.  So it loads nothing: dtypes and modules are given by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A library, and how to tell whether it is installed without importing it.

    config: a module with a table ``CONFIG`` of the flags that the library was built with, if there is one.
    """

    name: str
    module: str
    file: str
    install: str
    config: str = ""

    def installed(self) -> bool:
        """Does its file exist?  (Two distributions share the import name ``flash_attn``.)"""
        return _holds(self.module, self.file)

    def path(self) -> str:
        """The module that is imported."""
        inner = self.file.removesuffix(".py").removesuffix("__init__").replace("/", ".")
        return f"{self.module}.{inner}" if inner else self.module


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


FLASH2 = Package(
    "flash-attn", "flash_attn", "flash_attn_interface.py", "pip install flash-attn --no-build-isolation"
)
FLASH3 = Package(
    "flash-attn-3",
    "flash_attn_interface",
    "",
    "pip install tokenspeed-fa3 (forward only), or build it from the `hopper` folder of flash-attention",
    "flash_attn_config",
)
FLASH4 = Package("flash-attn-4", "flash_attn", "cute/interface.py", "pip install --pre flash-attn-4")
FRONTEND = Package("nvidia-cudnn-frontend", "cudnn", "__init__.py", "pip install nvidia-cudnn-frontend")


@dataclass(frozen=True)
class Gate:
    """One row of the table.

    dtypes: what it computes in, as torch's dtypes or by their names.
    majors: major compute capabilities; None means any device, GPU or not.
    step, least: head sizes are multiples of ``step`` and at least ``least``.
    head_dims, backward_dims: the largest head size, forward and backward.
    wide: major compute capabilities that take larger heads, and how large.
    same_width: keys and values must have the same head size.
    backward: can gradients be computed?
    source: the versions whose checks the row states.
    auto: for a registered kernel: may ``auto`` choose it?  Built-in kernels are always ranked.
    substitute: another package that may be installed instead of ``package``.
    entry: for a built-in kernel that ``kernel=`` can name: ``module:object`` in :mod:`fusepass.kernels`.
    """

    kernel: str
    dtypes: tuple[object, ...]
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
    substitute: Package | None = None
    entry: str = ""

    def dtype_names(self) -> tuple[str, ...]:
        """The names of its dtypes, such as "float16"."""
        return tuple(map(dtype_name, self.dtypes))

    def computes_in(self, dtype: object) -> bool:
        """Is this dtype, given as one of torch's or by name, among its dtypes?"""
        return dtype_name(dtype) in self.dtype_names()


def dtype_name(dtype: object) -> str:
    """The name of a dtype, which may be given as one of torch's or by name already."""
    return str(dtype).removeprefix("torch.")


HALF = ("float16", "bfloat16")
_AMPERE = (8, 9, 10, 11, 12)  # and later
_FA2, _FA4 = "flash-attn 2.8.3, and its folder hopper", "flash-attn-4 4.0.0b36"
_CUDNN = "torch 2.11, cuDNN 9.19, frontend 1.32"
_FLEX, _FLEX4 = "torch 2.11, Triton and C++", "torch 2.11, flash-attn-4 4.0.0b36"

#: In order of preference, which decides where nothing has been measured.
BUILT_IN: tuple[Gate, ...] = (
    Gate("flash3", HALF, (9,), FLASH3, 8, 8, 256, 256, same_width=True, source=_FA2, entry="flash:FLASH3"),
    Gate("flash4", HALF, (9, 10, 11), FLASH4, 8, 8, 256, 256, source=_FA4, entry="flash:FLASH4"),
    Gate("flash2", HALF, _AMPERE, FLASH2, 8, 8, 256, 256, same_width=True, source=_FA2, entry="flash:FLASH2"),
    Gate("cudnn", HALF, _AMPERE, None, 8, 8, 128, 128, ((9, 256),), source=_CUDNN, entry="cudnn:CUDNN"),
    Gate("flex", ("float32", *HALF), None, None, 1, 16, 512, 256, source=_FLEX, entry="flex:FLEX"),
    Gate("flex_flash", HALF, (9, 10), FLASH4, 8, 8, 256, 256, source=_FLEX4, entry="flex:FLEX_FLASH"),
    Gate("fp8", HALF, (9,), FRONTEND, 128, 128, 128, None, (), True, False, source=_CUDNN, substitute=FLASH3),
)  # fmt: skip

#: By name; the kernels that other packages register are added.
GATES: dict[str, Gate] = {gate.kernel: gate for gate in BUILT_IN}


__all__ = [
    "BUILT_IN", "FLASH2", "FLASH3", "FLASH4", "FRONTEND", "GATES", "HALF", "Gate", "Package", "dtype_name",
]  # fmt: skip
