"""Questions about a data set, answered from scores and kernels."""

from .curves import Curves, information_curves
from .detection import Adversarial, Undersampled, detect_adversarial, find_undersampled
from .influence import InfluenceFunctions, influence_functions
from .mislabeled import Mislabeled, find_mislabeled
from .results import Result
from .sharing import Overlap, Redundancy, overlap, redundancy
from .sources import Sources, compare_sources
from .summary import Summary, summarize
from .validation import Validation, validate_linearization

__all__ = [
    "Adversarial",
    "Curves",
    "InfluenceFunctions",
    "Mislabeled",
    "Overlap",
    "Redundancy",
    "Result",
    "Sources",
    "Summary",
    "Undersampled",
    "Validation",
    "compare_sources",
    "detect_adversarial",
    "find_mislabeled",
    "find_undersampled",
    "influence_functions",
    "information_curves",
    "overlap",
    "redundancy",
    "summarize",
    "validate_linearization",
]
