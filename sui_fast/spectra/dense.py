"""Exact spectrum of a kernel matrix: one guarded eigendecomposition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import SpectrumError, complaint

_LAPACK_LIMIT = 32_000  # rows: the workspace of the divide-and-conquer driver outgrows 32-bit integers above this


@dataclass(frozen=True)
class Spectrum:
    """Theta = u diag(s) u^T.

    Attributes:
        u: rows of the eigenvectors, float64 [N, r]; all of them and square where the spectrum is exact, a shard of the
            rows where it is of low rank.
        s: eigenvalues in ascending order, float64 [r], >= 0.
        error: ||Theta u - u s|| / ||Theta|| (Frobenius), measured on four vectors of signs.
        complete: whether the columns of u span everything.
    """

    u: Tensor
    s: Tensor
    error: float
    complete: bool = True

    @property
    def rank(self) -> int:
        """Number of positive eigenvalues."""
        return int((self.s > 0).sum())

    @property
    def top(self) -> float:
        """Largest eigenvalue (0 for an empty or zero kernel)."""
        return float(self.s[-1]) if len(self.s) else 0.0

    def effective_dimension(self, shift: float) -> float:
        """sum_l s_l / (s_l + shift): how many directions the regularisation lets through."""
        s = self.s[self.s > 0]
        return float((s / (s + shift)).sum())

    def condition(self, shift: float = 0.0) -> float:
        """(s_max + shift) / (s_min + shift), s_min over the positive eigenvalues where shift = 0."""
        if self.rank == 0:
            return 1.0
        low = float(self.s[0]) + shift if shift > 0 else float(self.s[self.s > 0][0])
        return (self.top + shift) / low


def dense_spectrum(ntk: Tensor, precision: float = 2.0**-52) -> Spectrum:
    """Eigendecomposition of a symmetric positive semi-definite matrix, checked.

    The matrix is symmetrised and scaled to unit size, solved in float64 and verified: ||Theta u - u s|| and the loss of
    orthogonality must be of the size of rounding, else the solve is repeated on the CPU. Eigenvalues below
    N precision s_max are rounding and become exactly 0; negative ones beyond ten times that are an error.

    Args:
        ntk: finite float64 [N, N].
        precision: relative rounding of the entries; that of float32 where the kernel was computed in it.
    Returns:
        Spectrum with a square u.
    Raises:
        SpectrumError: too many rows for LAPACK, not positive semi-definite, or no accurate solution.
    """
    size = ntk.shape[0]
    if size > _LAPACK_LIMIT:
        raise SpectrumError(
            complaint(
                "ntk",
                f"at most {_LAPACK_LIMIT} rows (samples x outputs) for an exact eigendecomposition",
                f"{size} rows",
                "Use the low-rank route (a spectrum of few features), score fewer samples or outputs at once, or use a "
                "converged run with reg > 0, which needs no eigendecomposition.",
            )
        )
    symmetric = (ntk + ntk.T) / 2
    scale = float(symmetric.abs().max()) if size else 0.0
    if scale == 0.0:
        return Spectrum(torch.eye(size, dtype=ntk.dtype, device=ntk.device), ntk.new_zeros(size), 0.0)
    symmetric /= scale
    tolerance = 50 * size * torch.finfo(ntk.dtype).eps
    for device in dict.fromkeys([ntk.device, torch.device("cpu")]):
        try:
            s, u = torch.linalg.eigh(symmetric.to(device))
        except RuntimeError:  # LinAlgError is one; GPU drivers also fail with plain runtime errors
            continue
        s, u = s.to(ntk.device), u.to(ntk.device)
        error, skew = _faults(symmetric, s, u)
        if max(error, skew) <= tolerance:
            break
    else:
        raise SpectrumError(
            complaint(
                "ntk",
                f"an eigendecomposition accurate to {tolerance:.1e}",
                "a solver that failed or was less accurate on every device",
                "Check the kernel for extreme scales, or add regularisation.",
            )
        )
    floor = max(float(s[-1]), 0.0) * size * precision
    if float(s[0]) < -10 * floor:
        raise SpectrumError(
            complaint(
                "ntk",
                "a positive semi-definite matrix J J^T",
                f"smallest eigenvalue {float(s[0]) * scale:.3e} against a largest of {float(s[-1]) * scale:.3e}",
                "Compute the kernel in float64 (dtype=torch.float64), or check that it is symmetric and complete.",
            )
        )
    return Spectrum(u, torch.where(s > floor, s, 0.0) * scale, error)


def _faults(a: Tensor, s: Tensor, u: Tensor) -> tuple[float, float]:
    """||(a u - u s) x|| / ||a|| and the largest entry of (u^T u - 1) x over four fixed vectors of signs x, in place of
    the matrices: full products would only repeat the work, and the squares have the same mean."""
    periods = torch.tensor([1, 3, 7, 31], device=u.device)
    signs = 1.0 - 2.0 * (torch.arange(len(u), device=u.device)[:, None] // periods % 2).to(u.dtype)
    mixed = u @ signs
    error = torch.linalg.norm(a @ mixed - u @ (s[:, None] * signs)) / (torch.linalg.norm(a) * len(periods) ** 0.5)
    return float(error), float((u.T @ mixed - signs).abs().max()) / len(u) ** 0.5
