"""Information: quadratic forms of the effect of a removal."""

from .information import MEASURES, UNITS, information, loo_margin
from .sgd import sgd_information

__all__ = ["MEASURES", "UNITS", "information", "loo_margin", "sgd_information"]
