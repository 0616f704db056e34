"""The forms of a site whose scores are a sum of products, in the order in which to try them.

The sum is written as one product of concatenated features, or as one product with the others stored as
biases.  Concatenated features are copied once, and any kernel reads them.  A stored product takes memory for
every pair of a query and a key; it is written and read, and so is its gradient; and flash kernels take no
such bias.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusepass.rules.site import Site
from fusepass.selection.work import hint

#: A copy of fewer elements takes no longer than its launch.
SMALL = 1 << 16
#: Features are concatenated if that copies at most this many elements for each one that it spares storing.
TRAFFIC = 2.0

Parts = list[tuple[int, Site]]
"""Signs and sites, whose sum is the result."""


def forms(parts: Sequence[tuple[int, Site]]) -> list[Parts]:
    """The forms of a sum of sites, the one that is expected to be faster first."""
    first = [(sign, _preferred(site)[0]) for sign, site in parts]
    second = [(sign, _preferred(site)[-1]) for sign, site in parts]
    return [first] if all(a is b for (_, a), (_, b) in zip(first, second, strict=True)) else [first, second]


def _preferred(site: Site) -> list[Site]:
    if site.apart is None:
        return [site]
    copied = hint(site.copied, site)
    joins = copied <= SMALL or copied <= TRAFFIC * hint(site.spared, site)
    return [site, site.apart] if joins else [site.apart, site]


__all__ = ["Parts", "forms"]
