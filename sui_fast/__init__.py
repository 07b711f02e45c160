"""sui_fast: how much does each training sample teach my model?

Smooth unique information of samples (Harutyunyan et al., ICLR 2021), exact and fast, from a linearised network.
"""

from . import outputs
from ._errors import (
    ArgumentError,
    BackendError,
    CoverageError,
    DataError,
    ModelError,
    ProcessError,
    SpectrumError,
    StabilityError,
    StoreError,
    SuiError,
)
from .apps import (
    compare_sources,
    detect_adversarial,
    find_mislabeled,
    find_undersampled,
    influence_functions,
    information_curves,
    overlap,
    redundancy,
    summarize,
    validate_linearization,
)
from .doctor import doctor
from .jacobians import Jacobian, jacobian, ntk
from .loo import Removal, leave_one_out
from .merging import merge
from .ops import explain, use_backend
from .planning import Plan
from .report import Comparison, compare
from .review import Review, read_review
from .scores import Scores
from .scoring import plan, score
from .training import TrainingScores

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "Comparison",
    "CoverageError",
    "DataError",
    "Jacobian",
    "ModelError",
    "Plan",
    "ProcessError",
    "Removal",
    "Review",
    "Scores",
    "SpectrumError",
    "StabilityError",
    "StoreError",
    "SuiError",
    "TrainingScores",
    "compare",
    "compare_sources",
    "detect_adversarial",
    "doctor",
    "explain",
    "find_mislabeled",
    "find_undersampled",
    "influence_functions",
    "information_curves",
    "jacobian",
    "leave_one_out",
    "merge",
    "ntk",
    "outputs",
    "overlap",
    "plan",
    "read_review",
    "redundancy",
    "score",
    "summarize",
    "use_backend",
    "validate_linearization",
]
