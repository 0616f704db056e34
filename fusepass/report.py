"""What the pass did, as data: the collector and the records, at a stable path."""

from fusepass.reports.collector import Collector, collect
from fusepass.reports.report import GraphReport, SiteReport

__all__ = ["Collector", "GraphReport", "SiteReport", "collect"]
