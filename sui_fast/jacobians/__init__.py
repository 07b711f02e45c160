"""The Jacobian engine: the only room that knows models."""

from .anchored import Anchors, goes_by_kernel, make_anchors, project, sketched_anchors
from .capture import Evaluator
from .data import Samples, as_samples, to_device
from .engine import jacobian, ntk, portions, sketches
from .jacobian import Jacobian

__all__ = [
    "Anchors",
    "Evaluator",
    "Jacobian",
    "Samples",
    "as_samples",
    "goes_by_kernel",
    "jacobian",
    "make_anchors",
    "ntk",
    "portions",
    "project",
    "sketched_anchors",
    "sketches",
    "to_device",
]
