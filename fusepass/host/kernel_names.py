"""What `kernel=` takes: the names of fusepass's own kernels, and those of other packages.

A package names a module, or a function in one, under the entry point group `fusepass.kernels`; the
environment variable `FUSEPASS_KERNELS` holds names of modules, separated by commas.  Each process loads both
when it first asks for a kernel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any

from fusepass.host.faults import first_line, strict
from fusepass.host.libraries import BUILT_IN

log = logging.getLogger("fusepass")

#: Fusepass's kernels, except the reference: PyTorch's SDPA, then those of the table in alphabetical order.
LIBRARIES = ("sdpa", *sorted(gate.kernel for gate in BUILT_IN if gate.entry))
KERNELS = ("auto", "autotune", *LIBRARIES, "reference")

GROUP, VARIABLE = "fusepass.kernels", "FUSEPASS_KERNELS"

#: The kernels that other packages have registered, by name, in order of registration.  The table is here so
#: that options can be checked without loading any kernel.
REGISTERED: dict[str, Any] = {}
_looked: set[str] = set()


def accepted_kernels() -> tuple[str, ...]:
    """What `kernel=` takes: `KERNELS`, and those of other packages."""
    look_for_packages()
    return (*KERNELS, *REGISTERED)


def look_for_packages() -> None:
    """Load what is named by entry points and by the environment variable, once per process; warn about what
    fails."""
    named = os.environ.get(VARIABLE, "")
    if GROUP not in _looked:
        _looked.add(GROUP)
        for point in metadata.entry_points(group=GROUP):
            _load(f"entry point {point.name!r} ({point.value})", point.load)
    for module in filter(None, (part.strip() for part in named.split(","))):
        if module not in _looked:
            _looked.add(module)
            _load(f"{VARIABLE} names {module!r}", partial(import_module, module))


def _load(what: str, load: Callable[[], object]) -> None:
    try:
        loaded = load()
        if callable(loaded):
            loaded()
    except Exception as error:
        if strict():
            raise
        log.warning("fusepass: %s: its kernels are not available: %s", what, first_line(error), exc_info=True)


__all__ = [
    "GROUP", "KERNELS", "LIBRARIES", "REGISTERED", "VARIABLE", "accepted_kernels", "look_for_packages",
]  # fmt: skip
