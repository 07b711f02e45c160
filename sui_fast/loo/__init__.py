"""Leave-one-out: what changes when samples are removed."""

from .addition import Addition, add_samples, add_to_kernel
from .blocks import make_blocks, make_sets, shard_blocks
from .downdate import Remaining
from .filters import CONVENTIONS, TrainingFilter
from .regularisation import loo_error_curve, part_error_curve
from .removal import Removal
from .solve import check_stability, leave_one_out, make_filter, remove_from_spectrum
from .spectral import SpectralRemoval
from .times import remove_at_times
from .weighted import WeightedProblem, WeightedRemoval

__all__ = [
    "CONVENTIONS",
    "Addition",
    "Remaining",
    "Removal",
    "SpectralRemoval",
    "TrainingFilter",
    "WeightedProblem",
    "WeightedRemoval",
    "add_samples",
    "add_to_kernel",
    "check_stability",
    "leave_one_out",
    "loo_error_curve",
    "part_error_curve",
    "make_blocks",
    "make_filter",
    "make_sets",
    "remove_at_times",
    "remove_from_spectrum",
    "shard_blocks",
]
