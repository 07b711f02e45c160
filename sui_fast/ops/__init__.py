"""Ops: tensors in, tensors out, one formula each; declared once, with kernels behind them."""

from ._backends import BACKENDS
from ._explain import backends, explain, self_test
from ._op import OPS, use_backend
from .gram import ntk_gram, ntk_gram_sum
from .products import jvp, vjp
from .removal import converged_removal, rational_removal
from .sketching import sketch

__all__ = [
    "BACKENDS",
    "OPS",
    "backends",
    "converged_removal",
    "explain",
    "jvp",
    "ntk_gram",
    "ntk_gram_sum",
    "rational_removal",
    "self_test",
    "sketch",
    "use_backend",
    "vjp",
]
