"""Kernels that are asked for by name: one that serves no site at all is warned of once, with the reason."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusepass.host.config import Options
    from fusepass.reports.report import GraphReport

log = logging.getLogger("fusepass")

#: Reasons that are given in a warning.
_SHOWN = 3


class Requested:
    """What became of one request, over all graphs that it was made for.

    A request is one call of `torch.compile`, `fuse`, `enable` or the like. Graphs are compiled one after
    another, so the first in which the kernel serves no site is warned of, unless it served one before.
    """

    def __init__(self) -> None:
        self.settled = False

    def see(self, options: Options, report: GraphReport, whole: bool = False) -> None:
        """Look at one more graph; with `whole` there will be no others."""
        if self.settled or options.kernel in ("auto", "autotune") or not (report.sites or whole):
            return
        self.settled = True
        if any(site.fused and site.kernel in (options.kernel, "fp8") for site in report.sites):
            return
        reasons = list(dict.fromkeys(site.reason or f"it went to '{site.kernel}'" for site in report.sites))
        more = f" (and {len(reasons) - _SHOWN} more reasons)" if len(reasons) > _SHOWN else ""
        why = "; ".join(reasons[:_SHOWN]) + more or "no attention was found"
        log.warning("fusepass: kernel=%r was asked for and serves no attention site: %s", options.kernel, why)


__all__ = ["Requested"]
