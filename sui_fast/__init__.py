"""sui_fast: how much does each training sample teach my model?

Smooth unique information of samples (Harutyunyan et al., ICLR 2021), exact and fast, from a linearised network.
"""

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
from .scores import Scores
from .scoring import plan, score
from .training import TrainingScores

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CoverageError",
    "DataError",
    "ModelError",
    "Jacobian",
    "Plan",
    "Removal",
    "Scores",
    "SpectrumError",
    "StabilityError",
    "StoreError",
    "SuiError",
    "TrainingScores",
    "doctor",
    "explain",
    "jacobian",
    "leave_one_out",
    "ntk",
    "plan",
    "score",
    "use_backend",
]
