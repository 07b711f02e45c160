"""The report: one self-contained HTML file, drawn from Scores alone."""

from .page import write_report

__all__ = ["write_report"]
