"""The Jacobian engine: the only room that knows models."""

from .data import Samples, as_samples
from .jacobian import Jacobian, jacobian, ntk

__all__ = ["Jacobian", "Samples", "as_samples", "jacobian", "ntk"]
