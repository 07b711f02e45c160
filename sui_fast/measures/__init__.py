"""Information: quadratic forms of the effect of a removal."""

from .information import MEASURES, UNITS, information, loo_margin, suggested_label
from .neighbours import feature_neighbours, input_neighbours, kernel_neighbours
from .sgd import sgd_information

__all__ = [
    "MEASURES",
    "UNITS",
    "feature_neighbours",
    "information",
    "input_neighbours",
    "kernel_neighbours",
    "loo_margin",
    "sgd_information",
    "suggested_label",
]
