"""Functions of the eigenvalues in few numbers: intervals, and an orthonormal basis of the functions on each.

The functions 1 / (s - p) of all poles p, on an interval whose ends differ by a factor of three, nearly lie in a space
of 8 to 15 dimensions. Letters: r eigenvalues, v basis functions of all intervals, j an interval, r_j and v_j its share.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

_RATIO = 3.0  # of the ends of an interval
_FEW = 16  # eigenvalues that are an interval together, each with a function of its own
_SKETCH = 48  # random combinations of the functions from which a basis is taken; about 16 suffice


class Bases:
    """One basis for each interval.

    Attributes:
        columns: eigenvalues of every interval, slices. basis: [v_j, r_j] of every interval. places: of its functions
        among the v of all intervals, slices. size: v.
    """

    def __init__(self, columns: list[slice], basis: list[Tensor]):
        self.columns, self.basis = columns, basis
        ends = list(accumulate(map(len, basis), initial=0))
        self.places = [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
        self.size = ends[-1]

    @classmethod
    def of(cls, functions: Tensor, s: Tensor, nearest: float, tolerance: float) -> Bases:
        """Of functions [f, r] of the eigenvalues s, ascending; ``nearest``: the smallest modulus of a pole."""
        top, low = float(s[-1]), max(nearest / 64, float(s[-1]) * 1e-15)
        edges = top / _RATIO ** np.arange(max(1, int(np.ceil(np.log(top / low) / np.log(_RATIO)))))
        every = np.unique([0, *np.searchsorted(s.cpu().numpy(), edges[1:]), len(s)]).tolist()[::-1]
        cuts = every[:1]
        for cut, beyond in pairwise(every[1:]):
            if cuts[-1] - beyond > _FEW:
                cuts.append(cut)
        cuts = [0, *reversed(cuts)]
        columns = [slice(*pair) for pair in zip(cuts[:-1], cuts[1:], strict=True)]
        mix = _mix(functions)
        return cls(columns, [_leading_rows(functions[:, part], mix, tolerance) for part in columns])

    def inner(self, x: Tensor) -> Tensor:
        """Coefficients [..., v] of functions x [..., r]."""
        return torch.cat([mm(x[..., part], basis.T) for part, basis in zip(self.columns, self.basis, strict=True)], -1)


def _leading_rows(functions: Tensor, mix: Tensor, tolerance: float) -> Tensor:
    """Orthonormal rows that hold every function, a row [f, x], up to 100 times the tolerance relative to its own size.

    They are taken from combinations, mix [., f]; the identity where these leave a function out, or where x is small.
    """
    if functions.shape[1] > _FEW:
        size = functions.abs().amax(1)
        size = torch.where(size > 0, size, 1.0)
        _, values, rows = torch.linalg.svd((mix / size) @ functions, full_matrices=False)
        rows = rows[values > tolerance * values[0]]
        left_out = (functions - (functions @ rows.T) @ rows).abs_().amax(1)
        if bool((left_out <= 100 * tolerance * size).all()):
            return rows
    return torch.eye(functions.shape[1], dtype=functions.dtype, device=functions.device)


def _mix(functions: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(_SKETCH, len(functions), generator=rng, dtype=torch.float64).to(functions)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [..., x] times b [x, y] as one product of two matrices."""
    return (a.reshape(a.shape[:-1].numel(), a.shape[-1]) @ b).view(*a.shape[:-1], b.shape[1])
