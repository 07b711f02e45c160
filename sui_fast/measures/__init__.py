"""Information: quadratic forms of the effect of a removal."""

from .information import MEASURES, UNITS, class_margin, information
from .sgd import sgd_information

__all__ = ["MEASURES", "UNITS", "class_margin", "information", "sgd_information"]
