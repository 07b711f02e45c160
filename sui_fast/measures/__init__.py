"""Information: quadratic forms of the effect of a removal."""

from .information import MEASURES, UNITS, class_margin, information, suggested_label
from .neighbours import feature_neighbours, input_neighbours, kernel_neighbours
from .sgd import SgdNoise, sgd_information, sgd_noise

__all__ = [
    "MEASURES",
    "UNITS",
    "SgdNoise",
    "class_margin",
    "feature_neighbours",
    "information",
    "input_neighbours",
    "kernel_neighbours",
    "sgd_information",
    "sgd_noise",
    "suggested_label",
]
