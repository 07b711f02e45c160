"""The projections of the authors' code, parameter by parameter, for comparison with their numbers (compat="iclr2021").

    random-subset   count entries of each parameter, times sqrt(size / count)
    very-sparse     count columns, each the signed sum of about sqrt(size) entries of each parameter (Li et al. 2006)

Both draw from NumPy's legacy generator in the authors' order, so that equal seeds give equal projections.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError, complaint
from ..jacobians import Jacobian

PROJECTIONS = {"random-subset": 2000, "very-sparse": 10_000}  # and the authors' default counts


def projection_matrix(jac: Jacobian, kind: str, count: int | None = None, seed: int = 42) -> Tensor:
    """Sparse [d, r] in the column order of ``jac``.

    Args:
        kind: "random-subset" (r: at most count per parameter) or "very-sparse" (r = count).
    """
    if kind not in PROJECTIONS:
        what = " or ".join(map(repr, PROJECTIONS))
        raise ArgumentError(complaint("method", what, repr(kind), "Choose one."))
    count = PROJECTIONS[kind] if count is None else count
    rng = np.random.RandomState(seed)
    rows, columns, values, used = [], [], [], 0
    for name in jac.parameter_names:
        part = jac.columns(name)
        size = part.stop - part.start
        if kind == "random-subset":
            chosen = min(size, count)
            rows.append(part.start + rng.choice(size, chosen, replace=False))
            columns.append(used + np.arange(chosen))
            values.append(np.full(chosen, (size / chosen) ** 0.5))
            used += chosen
            continue
        chosen = size if size <= 1000 else int(size**0.5)
        for column in range(count):
            rows.append(part.start + rng.choice(size, chosen))
            values.append((2 * rng.randint(2, size=chosen) - 1.0) * (size / chosen / count) ** 0.5)
            columns.append(np.full(chosen, column))
    used = count if kind == "very-sparse" else used
    index = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(columns)]))
    weights = torch.from_numpy(np.concatenate(values)).to(jac.dtype)
    return (
        torch.sparse_coo_tensor(index, weights, (jac.shape[1], used), check_invariants=False).coalesce().to(jac.device)
    )


def project(jac: Jacobian, matrix: Tensor) -> Tensor:
    """Rows of the Jacobian times the matrix, [N, r]."""
    turned = matrix.t().coalesce()
    return torch.cat([torch.sparse.mm(turned, rows.T.contiguous()).T for rows in jac.iter_rows()])
