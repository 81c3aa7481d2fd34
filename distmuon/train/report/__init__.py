"""The report of a run: ``loss.png``, ``report.html``, and the summary for the terminal."""

from distmuon.train.report.compare import summary_lines
from distmuon.train.report.page import write_report

__all__ = ["summary_lines", "write_report"]
