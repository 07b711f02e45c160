"""The Jacobian engine: the only room that knows models."""

from .anchored import Anchors, goes_by_kernel, make_anchors, project, sketched_anchors
from .capture import Evaluator
from .data import Samples, as_samples, to_device
from .engine import Sketch, jacobian, ntk, portions, sketches
from .jacobian import Jacobian
from .reading import Read, read_samples

__all__ = [
    "Anchors",
    "Evaluator",
    "Jacobian",
    "Read",
    "Samples",
    "Sketch",
    "as_samples",
    "goes_by_kernel",
    "jacobian",
    "make_anchors",
    "ntk",
    "portions",
    "project",
    "read_samples",
    "sketched_anchors",
    "sketches",
    "to_device",
]
