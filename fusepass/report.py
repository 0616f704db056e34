"""What the pass did, as data: the collector and the records, under a path that stays the same."""

from fusepass.reports.collector import Collector, collect
from fusepass.reports.report import GraphReport, SiteReport

__all__ = ["Collector", "GraphReport", "SiteReport", "collect"]
