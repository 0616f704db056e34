"""Kernels that are asked for by name: one that serves no site at all is warned of once, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

log = logging.getLogger("fusepass")

#: Reasons that are given in a warning.
_SHOWN = 3


class Outcome(Protocol):
    """What became of one site, as :class:`fusepass.reports.report.SiteReport` says it."""

    @property
    def fused(self) -> bool: ...
    @property
    def kernel(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...


class Requested:
    """What became of one request, over all graphs that it was made for.

    A request is one call of `torch.compile`, `fuse`, `enable` or the like. Graphs are compiled one after
    another, so the first in which the kernel serves no site is warned of, unless it served one before.
    """

    def __init__(self) -> None:
        self.settled = False

    def see(self, kernel: str, sites: Sequence[Outcome], whole: bool = False) -> None:
        """Look at the sites of one more graph, for which `kernel` was asked; with `whole` it is the last."""
        if self.settled or kernel in ("auto", "autotune") or not (sites or whole):
            return
        self.settled = True
        if any(site.fused and site.kernel in (kernel, "fp8") for site in sites):
            return
        reasons = list(dict.fromkeys(site.reason or f"it went to '{site.kernel}'" for site in sites))
        more = f" (and {len(reasons) - _SHOWN} more reasons)" if len(reasons) > _SHOWN else ""
        why = "; ".join(reasons[:_SHOWN]) + more or "no attention was found"
        log.warning("fusepass: kernel=%r was asked for and serves no attention site: %s", kernel, why)


__all__ = ["Requested"]
