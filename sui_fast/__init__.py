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
    SpectrumError,
    StabilityError,
    StoreError,
    SuiError,
)
from .doctor import doctor
from .jacobians import Jacobian, jacobian, ntk
from .loo import Removal, leave_one_out
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
    "ModelError",
    "Jacobian",
    "Plan",
    "Removal",
    "Review",
    "Scores",
    "SpectrumError",
    "StabilityError",
    "StoreError",
    "SuiError",
    "TrainingScores",
    "compare",
    "doctor",
    "explain",
    "jacobian",
    "leave_one_out",
    "ntk",
    "outputs",
    "plan",
    "read_review",
    "score",
    "use_backend",
]
