"""Kernels: each says which specifications it refuses, and why, and writes itself into a graph.

``KERNELS`` is in order of preference, for use where nothing has been measured; :mod:`fusepass.selection`
ranks kernels where something has.  PyTorch's SDPA comes first, then the table of libraries
(:mod:`fusepass.host.libraries`), whose rows say where their kernels are.  ``reference``, plain mathematics,
comes last: unless it is requested it serves only training, short sequences on a CPU, and compiled sites that
round scores or weights.  FP8 is not in the list, because ``precision=`` asks for it.

Kernels of other packages (:func:`fusepass.register_kernel`) are not in the list; :func:`named` finds these
too.  Their authors find what they need here: :class:`Gate` and :class:`Takes` to declare what a kernel takes,
the modifiers of a specification, and helpers that lay out the tensors of a :class:`Site` with a
:class:`Builder`.
"""

from __future__ import annotations

from pkgutil import resolve_name

from fusepass.host.libraries import BUILT_IN, Gate, Package
from fusepass.kernels import registry
from fusepass.kernels.base import (
    Kernel,
    Operands,
    Refused,
    Target,
    after_weights,
    conjunction,
    operands,
    row_operand,
    scaled,
    score_operand,
    visible,
)
from fusepass.kernels.fp8 import FP8
from fusepass.kernels.reference import REFERENCE
from fusepass.kernels.sdpa import SDPA
from fusepass.rules.site import Site
from fusepass.specification.attention import (
    Attention,
    Band,
    Bias,
    Dropout,
    KeyPadding,
    Mask,
    Scale,
    ScaleBy,
    Sink,
    SoftCap,
)
from fusepass.specification.takes import Takes
from fusepass.writing.emit import Builder

_LIBRARIES: list[Kernel] = [resolve_name(f"{__name__}.{gate.entry}") for gate in BUILT_IN if gate.entry]
KERNELS: tuple[Kernel, ...] = (SDPA, *_LIBRARIES, REFERENCE)
BY_NAME: dict[str, Kernel] = {k.name: k for k in KERNELS}


def named(name: str) -> Kernel | None:
    """The kernel of a name, built in or registered; None for names such as "auto", which choose a kernel."""
    if name in BY_NAME or name in ("auto", "autotune"):
        return BY_NAME.get(name)
    registration = registry.registered().get(name)
    return None if registration is None else registration.kernel


def rounds(name: str) -> bool:
    """Does the kernel of this name round more than its dtype does?"""
    kernel = FP8 if name == FP8.name else named(name)
    return kernel is not None and kernel.rounds


__all__ = [
    "BY_NAME", "FP8", "KERNELS", "REFERENCE", "SDPA", "named", "rounds",
    "Kernel", "Refused", "Target", "Gate", "Package", "Takes", "Site", "Builder", "Operands",
    "operands", "scaled", "after_weights", "score_operand", "row_operand", "visible", "conjunction",
    "Attention", "Scale", "ScaleBy", "SoftCap", "Bias", "Mask", "Band", "KeyPadding", "Sink", "Dropout",
]  # fmt: skip
