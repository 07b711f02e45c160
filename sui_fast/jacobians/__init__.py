"""The Jacobian engine: the only room that knows models."""

from .data import Samples, as_samples
from .engine import jacobian, ntk, sketches
from .jacobian import Jacobian

__all__ = ["Jacobian", "Samples", "as_samples", "jacobian", "ntk", "sketches"]
