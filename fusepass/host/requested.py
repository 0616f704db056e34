"""Kernels requested by name: one that serves no site of the first graph with attention causes a warning.

The warning comes once per request, with the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

log = logging.getLogger("fusepass")

#: How many reasons a warning gives.
_SHOWN = 3


class Outcome(Protocol):
    """The outcome of one site, as in :class:`fusepass.reports.report.SiteReport`."""

    @property
    def fused(self) -> bool: ...
    @property
    def kernel(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...


class Requested:
    """The outcome of one request: one call of `torch.compile`, `fuse`, `enable` or the like.

    Graphs are compiled one after another, and it is not known how many will follow.  So the first graph that
    has attention sites decides whether there is a warning; later graphs are not looked at.
    """

    def __init__(self) -> None:
        self.settled = False

    def see(self, kernel: str, sites: Sequence[Outcome], is_last: bool = False) -> None:
        """Look at the sites of one more graph for which `kernel` was requested; warn if it serves none.

        Args:
            kernel: the name that was requested.
            sites: the outcomes of the graph's sites.
            is_last: whether no graph will follow, so that having no sites at all is a reason to warn.
        """
        if self.settled or kernel in ("auto", "autotune") or not (sites or is_last):
            return
        self.settled = True
        if any(site.fused and site.kernel in (kernel, "fp8") for site in sites):
            return
        reasons = list(dict.fromkeys(site.reason or f"it went to '{site.kernel}'" for site in sites))
        more = f" (and {len(reasons) - _SHOWN} more reasons)" if len(reasons) > _SHOWN else ""
        why = "; ".join(reasons[:_SHOWN]) + more or "no attention was found"
        log.warning("fusepass: kernel=%r was requested but serves no attention site: %s", kernel, why)


__all__ = ["Requested"]
