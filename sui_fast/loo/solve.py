"""leave_one_out on arrays: checks, choice of the solver by regime, Removal."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from .._errors import ArgumentError, StabilityError, complaint, number, one_of
from ..spectra import Spectrum, dense_spectrum
from .arrays import as_tensor, is_torch, precision_of
from .blocks import make_blocks
from .dual import DualRemoval
from .filters import CONVENTIONS, DYNAMICS, TrainingFilter
from .removal import Removal
from .spectral import SpectralRemoval

METHODS = ("auto", "dual", "spectral")
# The dual form takes ||dw||^2 as a difference; where the estimate of what that costs is larger, the spectrum is used.
CHOLESKY_ROUNDING = 2e-9
_SMALLEST_REG = 1e-300  # its inverse overflows below
_RIDGELESS_CONDITION = 1e10  # without regularisation nothing cancels: the spectrum is needed only for a singular kernel


def leave_one_out(
    ntk,
    residual,
    *,
    outputs: int = 1,
    reg: float = 0.0,
    time: float | None = None,
    lr: float | None = None,
    dynamics: str = "gd",
    cross_ntk=None,
    groups=None,
    convention: str = "sum",
    method: str = "auto",
) -> Removal:
    """Exact effect of leaving out each sample on a linearised network, for all samples at once.

    ::

        D_i = phi_-i(Theta_-i) r0_-i - phi(Theta) r0          (zero at the removed rows of the first term)
        ||dw_i||^2 = D_i^T Theta D_i                          df_i(x) = Theta(x, X) D_i

    with phi the training filter: ridge solution, gradient descent or gradient flow (docs/math.md).

    Args:
        ntk: Theta = J J^T, [N, N] with N = n * outputs; row i * outputs + c is output c of sample i.
        residual: targets minus initial outputs, [n, outputs] or [N].
        outputs: k, outputs per sample (taken from a two-dimensional residual).
        reg: lambda' of the mean loss plus lambda'/2 ||w - w0||^2, >= 0.
        time: steps ("gd") or time ("flow") of training; None or infinity: trained to convergence.
        lr: step size of the mean loss; needed by "gd" at finite time, 1 by default for "flow".
        dynamics: "gd" or "flow".
        cross_ntk: Theta(X_val, X), [m * outputs, N]; gives the prediction changes.
        groups: one label per sample, [n]; samples with equal labels are removed together.
        convention: what else changes when a sample leaves: "sum" (nothing), "mean" (lr / (n - 1) and (n - 1) reg, as
            in retraining on the mean loss) or "iclr2021" (lr / (n - 1), the authors' code).
        method: "auto", "spectral" (eigendecomposition) or "dual" (Cholesky, converged only).
    Returns:
        Removal, with NumPy arrays where the inputs are NumPy, else torch tensors.
    Raises:
        ArgumentError, StabilityError, SpectrumError.
    Source: Harutyunyan et al., ICLR 2021, section 5; docs/math.md, sections 3 to 6.
    """
    as_numpy = not is_torch(ntk, residual, cross_ntk)
    theta, r0, cross = check_arrays(ntk, residual, outputs, cross_ntk)
    n, k = r0.shape
    phi = make_filter(n, reg=reg, time=time, lr=lr, dynamics=dynamics)
    one_of("convention", convention, CONVENTIONS)
    one_of("method", method, METHODS)
    if method == "dual" and not phi.converged:
        raise ArgumentError(
            complaint(
                "method",
                "'spectral' or 'auto' at finite time",
                "'dual'",
                "The dual form holds only for training to convergence (time=None).",
            )
        )
    blocks, idle = make_blocks(n, k, groups), (theta == 0).all(1)
    dual_fits = phi.converged and len(blocks) > 1 and (convention != "mean" or phi.shift == 0)
    if method == "dual" and not dual_fits:
        raise ArgumentError(
            complaint(
                "method",
                "'spectral' or 'auto' for this call",
                "'dual'",
                "The dual form needs an unchanged regularisation (convention 'sum' or 'iclr2021') and two blocks.",
            )
        )
    if dual_fits and method != "spectral":
        found = cholesky_inverse(theta, phi.shift)
        if found is not None:
            removal = DualRemoval(found[0], phi.shift, found[1], blocks, r0, cross, as_numpy, idle)
            if method == "dual" or sound(removal, theta, phi.shift, found[1]):
                return removal
            del removal
        del found
        if method == "dual":
            raise ArgumentError(
                complaint(
                    "method",
                    "a positive definite ntk + n * reg for 'dual'",
                    "a singular one",
                    "Use method='spectral', or reg > 0.",
                )
            )
    return remove_from_spectrum(
        dense_spectrum(theta, precision_of(ntk)),
        phi,
        r0,
        cross=cross,
        blocks=blocks,
        convention=convention,
        as_numpy=as_numpy,
        idle=idle,
    )


def sound(removal: DualRemoval, theta: Tensor, shift: float, condition: float) -> bool:
    """Whether rounding leaves what a Cholesky factor gives enough digits."""
    if shift == 0:
        return condition <= _RIDGELESS_CONDITION
    if removal.rounding <= CHOLESKY_ROUNDING:
        return True
    few = condition * torch.finfo(theta.dtype).eps <= CHOLESKY_ROUNDING
    return few and removal.rounding_by_rows(theta.diagonal()) <= CHOLESKY_ROUNDING


def remove_from_spectrum(
    spectrum: Spectrum,
    phi: TrainingFilter,
    r0: Tensor,
    *,
    cross: Tensor | None,
    blocks,
    convention: str,
    as_numpy: bool,
    idle: Tensor,
) -> SpectralRemoval:
    """The same from a spectrum in hand; ``idle`` marks rows of the kernel that are exactly zero, bool [N]."""
    check_stability(phi, spectrum.top, len(r0))
    return SpectralRemoval(spectrum, phi, convention, blocks, r0, cross, as_numpy, idle)


def make_filter(
    n: int, *, reg: float = 0.0, time: float | None = None, lr: float | None = None, dynamics: str = "gd"
) -> TrainingFilter:
    """The training filter of the summed loss from the arguments of the mean loss: lambda = n reg, eta = lr / n."""
    one_of("dynamics", dynamics, DYNAMICS)
    reg = number("reg", reg)
    reg = reg if reg > _SMALLEST_REG else 0.0
    lr = lr if lr is None else number("lr", lr)
    time = math.inf if time is None else number("time", time, infinite=True)
    if time == math.inf:
        return TrainingFilter(shift=n * reg)
    if dynamics == "gd":
        if time != int(time):
            raise ArgumentError(
                complaint(
                    "time",
                    "a whole number of steps for dynamics='gd'",
                    time,
                    "Round it, or use dynamics='flow' for continuous time.",
                )
            )
        if lr is None:
            raise ArgumentError(
                complaint(
                    "lr",
                    "the step size of the mean loss for gradient descent at finite time",
                    None,
                    "Pass lr=..., or time=None for training to convergence.",
                )
            )
    return TrainingFilter(shift=n * reg, eta=(1.0 if lr is None else lr) / n, time=time, dynamics=dynamics)


def check_stability(phi: TrainingFilter, top: float, n: int) -> None:
    """Raises StabilityError where gradient descent on all n samples diverges."""
    if phi.converged or phi.dynamics != "gd" or phi.time == 0:
        return
    step = phi.eta * (top + phi.shift)
    if step >= 2:
        lr = phi.eta * n
        raise StabilityError(
            complaint(
                "lr",
                f"a stable step size, below {2 * lr / step:.6g} = 2 / (largest curvature of the mean loss)",
                f"{lr:.6g}",
                "Lower lr; training with this one diverges, so no score exists.",
            )
        )


def check_arrays(ntk, residual, outputs: int, cross_ntk) -> tuple[Tensor, Tensor, Tensor | None]:
    """Theta [N, N], r0 [n, k] and cross [m k, N] or None, checked for shapes, symmetry, finiteness and devices."""
    theta, r0 = as_tensor(ntk, "ntk"), as_tensor(residual, "residual")
    if theta.ndim != 2 or theta.shape[0] != theta.shape[1]:
        raise ArgumentError(
            complaint(
                "ntk",
                "a square matrix [N, N]",
                f"shape {list(theta.shape)}",
                "Rows and columns are (sample, output) pairs of the training set.",
            )
        )
    if isinstance(outputs, bool) or not isinstance(outputs, Integral) or outputs < 1:
        raise ArgumentError(complaint("outputs", "a whole number >= 1", repr(outputs), "Pass the outputs per sample."))
    if r0.ndim == 2 and outputs in (1, r0.shape[1]):
        outputs = r0.shape[1]
    elif r0.ndim != 1 or r0.numel() % outputs:
        raise ArgumentError(
            complaint(
                "residual",
                f"shape [n, {outputs}] or [n * {outputs}]",
                f"shape {list(r0.shape)}",
                "One row per sample, one column per output.",
            )
        )
    if r0.numel() == 0:
        raise ArgumentError(
            complaint(
                "residual",
                "at least one sample and one output",
                f"shape {list(r0.shape)}",
                "There is nothing to remove from an empty training set.",
            )
        )
    r0 = r0.reshape(-1, outputs)
    if theta.shape[0] != r0.numel():
        raise ArgumentError(
            complaint(
                "residual",
                f"as many entries as ntk has rows ({theta.shape[0]})",
                r0.numel(),
                "ntk has n * outputs rows; pass outputs=k if the residual is flat.",
            )
        )
    cross = None if cross_ntk is None else as_tensor(cross_ntk, "cross_ntk")
    if cross is not None and (
        cross.ndim != 2 or cross.shape[1] != len(theta) or not len(cross) or len(cross) % outputs
    ):
        raise ArgumentError(
            complaint(
                "cross_ntk",
                f"shape [m * {outputs}, {len(theta)}] with m >= 1",
                f"shape {list(cross.shape)}",
                "Rows are (validation sample, output) pairs.",
            )
        )
    devices = {str(x.device) for x in (theta, r0, cross) if x is not None}
    if len(devices) > 1:
        raise ArgumentError(
            complaint(
                "residual", "all arrays on one device", " and ".join(sorted(devices)), "Move them to the same device."
            )
        )
    skew = float((theta - theta.T).abs().max())
    if skew > 1e-6 * float(theta.abs().max()):
        raise ArgumentError(
            complaint(
                "ntk",
                "a symmetric matrix",
                f"entries that differ by {skew:.3e} from their mirror",
                "Pass Theta = J J^T of the training set with itself.",
            )
        )
    return theta, r0, cross


def cholesky_inverse(theta: Tensor, shift: float) -> tuple[Tensor, float] | None:
    """(Theta + shift I)^-1 and its condition number in the 1-norm, or None where there is no Cholesky factor."""
    shifted = theta.clone()
    shifted.diagonal().add_(shift)
    size = float(torch.linalg.matrix_norm(shifted, 1))
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0 or size == 0.0:
        return None
    inverse = torch.cholesky_inverse(factor)
    return inverse, size * float(torch.linalg.matrix_norm(inverse, 1))
