"""Ops: tensors in, tensors out, one formula each; declared once, with kernels behind them."""

from ._backends import BACKENDS
from ._explain import backends, explain, self_test
from ._op import OPS, use_backend
from .forms import product_sqnorm, triangular_sqnorm
from .gram import ntk_gram, ntk_gram_sum
from .products import jvp, vjp
from .removal import converged_removal, rational_removal, rational_sums
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
    "product_sqnorm",
    "rational_removal",
    "rational_sums",
    "self_test",
    "sketch",
    "triangular_sqnorm",
    "use_backend",
    "vjp",
]
