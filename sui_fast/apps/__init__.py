"""Questions about a data set, answered from scores and kernels."""

from .mislabeled import Mislabeled, find_mislabeled
from .summary import Summary, summarize

__all__ = ["Mislabeled", "Summary", "find_mislabeled", "summarize"]
