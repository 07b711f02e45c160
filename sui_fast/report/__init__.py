"""The report: one self-contained HTML file, drawn from Scores alone; and the comparison of two."""

from .compare import Comparison, compare
from .page import write_report

__all__ = ["Comparison", "compare", "write_report"]
