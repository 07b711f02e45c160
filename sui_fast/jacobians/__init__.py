"""The Jacobian engine: the only room that knows models."""

from .capture import Evaluator
from .data import Samples, as_samples, to_device
from .engine import jacobian, ntk, sketches
from .jacobian import Jacobian

__all__ = ["Evaluator", "Jacobian", "Samples", "as_samples", "jacobian", "ntk", "sketches", "to_device"]
