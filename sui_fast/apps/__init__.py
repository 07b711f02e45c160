"""Questions about a data set, answered from scores and kernels."""

from .influence import InfluenceFunctions, influence_functions
from .mislabeled import Mislabeled, find_mislabeled
from .summary import Summary, summarize
from .validation import Validation, validate_linearization

__all__ = [
    "InfluenceFunctions",
    "Mislabeled",
    "Summary",
    "Validation",
    "find_mislabeled",
    "influence_functions",
    "summarize",
    "validate_linearization",
]
