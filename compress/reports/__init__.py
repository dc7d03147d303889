"""Reports for people: one HTML page that needs no network, or Markdown with pictures beside it."""

from compress.reports.report import PruningReport, report

__all__ = ["PruningReport", "report"]
