"""Kernels: each says which specifications it refuses, and why, and writes itself into a graph.

The list is in order of preference.  ``reference``, plain mathematics, closes it: unasked it serves training only.
"""

from __future__ import annotations

from fusepass.kernels.base import Kernel, Refused, Target
from fusepass.kernels.flex import FLEX
from fusepass.kernels.reference import REFERENCE
from fusepass.kernels.sdpa import SDPA

KERNELS: tuple[Kernel, ...] = (SDPA, FLEX, REFERENCE)
BY_NAME: dict[str, Kernel] = {k.name: k for k in KERNELS}

__all__ = ["BY_NAME", "FLEX", "KERNELS", "REFERENCE", "SDPA", "Kernel", "Refused", "Target"]
