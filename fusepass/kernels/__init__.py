"""Kernels: each says which specifications it refuses, and why, and writes itself into a graph.

The list is in order of preference where nothing has been measured; :mod:`fusepass.select` ranks them where
something has.  ``reference``, plain mathematics, closes the list: unasked it serves
training, and short sequences on a CPU.
"""

from __future__ import annotations

from fusepass.kernels.base import Kernel, Refused, Target
from fusepass.kernels.cudnn import CUDNN
from fusepass.kernels.flash import FLASH2, FLASH3, FLASH4
from fusepass.kernels.flex import FLEX, FLEX_FLASH
from fusepass.kernels.fp8 import FP8
from fusepass.kernels.reference import REFERENCE
from fusepass.kernels.sdpa import SDPA

KERNELS: tuple[Kernel, ...] = (SDPA, FLASH3, FLASH4, FLASH2, CUDNN, FLEX, FLEX_FLASH, REFERENCE)
BY_NAME: dict[str, Kernel] = {k.name: k for k in KERNELS}


def rounds(name: str) -> bool:
    """Does the kernel of a name round more than the dtype does?"""
    return any(k.rounds for k in (*KERNELS, FP8) if k.name == name)


__all__ = [
    "BY_NAME", "CUDNN", "FLASH2", "FLASH3", "FLASH4", "FLEX", "FLEX_FLASH",
    "FP8", "KERNELS", "REFERENCE", "SDPA",
    "Kernel", "Refused", "Target", "rounds",
]  # fmt: skip
