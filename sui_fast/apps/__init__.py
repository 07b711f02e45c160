"""Questions about a data set, answered from scores and kernels."""

from .mislabeled import Mislabeled, find_mislabeled

__all__ = ["Mislabeled", "find_mislabeled"]
