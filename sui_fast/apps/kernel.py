"""The linearised problem of a model and its data, in memory: kernel, residual, validation kernel, regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError, complaint, one_of, whole
from ..aims import aim
from ..checks import authors_definitions
from ..jacobians import Jacobian, Samples, as_samples, jacobian
from ..loo import (
    CONVENTIONS,
    Remaining,
    Removal,
    leave_one_out,
    loo_error_curve,
    make_blocks,
    make_filter,
    make_sets,
    part_error_curve,
    remove_from_spectrum,
)
from ..losses import Goal, check_loss, is_certain
from ..runs import even_rows, projected_cross, projected_kernel
from ..spectra import Spectrum, dense_spectrum
from ..targets import loss_targets

MOST_ROWS = 32_000  # samples x outputs of an exact kernel


@dataclass
class LinearProblem:
    """Everything that exact answers need, float64.

    Attributes:
        theta: [N, N]; r0: residual at the initial weights [n, k]; reach: Theta(validation, train) [m k', N] or None.
        goal: the loss; where it is not the squared one theta and r0 are those of its square (``losses.py``), with k
            rows per sample in place of k' outputs. labels: classes [n] or None; val_labels: of the validation data.
        reg: of the mean loss, a number. training: time, lr, dynamics. jac, probe: the Jacobians.
    """

    samples: Samples
    jac: Jacobian
    probe: Jacobian | None
    theta: Tensor
    reach: Tensor | None
    goal: Goal
    val_labels: Tensor | None
    training: dict[str, Any]
    convention: str
    reg: float = 0.0

    @property
    def n(self) -> int:
        return self.jac.n

    @property
    def k(self) -> int:
        return self.jac.k

    @property
    def labels(self) -> Tensor | None:
        return self.goal.labels

    @cached_property
    def r0(self) -> Tensor:
        return self.goal.residual(slice(None), self.jac.outputs)

    @cached_property
    def cross(self) -> Tensor | None:
        """``reach`` as the solver takes it."""
        return None if self.reach is None else even_rows(self.reach, self.probe.n, self.k)

    def cross_of(self, chosen: np.ndarray) -> Tensor:
        """``cross`` of some validation samples, bool [m]."""
        rows = torch.from_numpy(np.repeat(chosen, self.probe.k)).to(self.reach.device)
        return even_rows(self.reach[rows], int(chosen.sum()), self.k)

    @cached_property
    def spectrum(self) -> Spectrum:
        return dense_spectrum(self.theta)

    @cached_property
    def idle(self) -> Tensor:
        return (self.theta == 0).all(1)

    def choose_reg(self, reg: float | str) -> None:
        """Set ``reg``; "auto": the one with the smallest exact leave-one-out error."""
        if isinstance(reg, str):
            if reg != "auto":
                raise ArgumentError(complaint("reg", "a number >= 0 or 'auto'", repr(reg), "Choose one."))
            blocks = make_blocks(self.n, self.k)
            regs, errors = loo_error_curve(
                self.spectrum, self.r0, blocks, self.idle, convention=self.convention, error=self.goal.error,
                **self.training,
            )  # fmt: skip
            reg = float(regs[errors.argmin()])
        make_filter(self.n, reg=reg, **self.training)
        self.reg = float(reg)

    def choose_reg_for(self, m: int) -> None:
        """Set ``reg`` to that with the smallest error on the others of training on m random samples, at most 90%."""
        return self.choose_reg(best_reg(m, self.learn, self.r0, self.training) or "auto")

    def learn(self, inside: np.ndarray, others: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """As ``part_error_curve`` asks of samples by number."""
        rows, rest = self.rows(inside), self.rows(others)
        spectrum = dense_spectrum(self.theta[rows][:, rows])
        return spectrum.s, spectrum.u.T @ self.r0.reshape(-1)[rows], self.theta[rest][:, rows] @ spectrum.u

    def removal(self, groups=None, cross: Tensor | None = None, **changed) -> Removal:
        """Of every sample or group, from the spectrum where there is one; seen by ``cross`` in place of its own."""
        training, cross = {**self.training, **changed}, self.cross if cross is None else cross
        if "spectrum" not in self.__dict__ and training["time"] is None:
            return leave_one_out(
                self.theta, self.r0, reg=self.reg, cross_ntk=cross, groups=groups, convention=self.convention,
                **training,
            )  # fmt: skip
        phi = make_filter(self.n, reg=self.reg, **training)
        return remove_from_spectrum(
            self.spectrum, phi, self.r0, cross=cross, blocks=make_blocks(self.n, self.k, groups),
            convention=self.convention, as_numpy=False, idle=self.idle,
        )  # fmt: skip

    def without(self, sets: list[np.ndarray], cross: Tensor | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """||dw||^2 and mean ||df||^2 (None without validation data) of leaving out each of these sets of samples."""
        cross = self.cross if cross is None else cross
        phi = make_filter(self.n, reg=self.reg, **self.training)
        found = remove_from_spectrum(
            self.spectrum, phi, self.r0, cross=cross, blocks=make_sets(self.n, self.k, sets),
            convention=self.convention, as_numpy=True, idle=self.idle,
        )  # fmt: skip
        return found.weight_sqnorm, None if cross is None else found.prediction_sqnorm

    def remaining(self) -> Remaining:
        """The shrinking training set."""
        common = dict(reg=self.reg, convention=self.convention, cross=self.cross)
        return Remaining(self.theta, self.r0, **common, **self.training)

    def predictions(self, kept: np.ndarray | None = None, convention: str | None = None) -> Tensor:
        """f on the validation data, [m, k], after training on the kept samples (default: on all)."""
        rows = slice(None) if kept is None else self.rows(kept)
        theta, r0 = self.theta[rows][:, rows], self.r0.reshape(-1)[rows]
        phi = make_filter(self.n, reg=self.reg, **self.training)
        if kept is not None:
            phi = phi.without(self.n - len(kept), self.n, convention or self.convention)
        alpha = None
        if phi.converged and phi.shift > 0:
            shifted = theta.clone()
            shifted.diagonal().add_(phi.shift)
            factor, info = torch.linalg.cholesky_ex(shifted)
            alpha = torch.cholesky_solve(r0[:, None], factor)[:, 0] if int(info) == 0 else None
        if alpha is None:  # also where the shift is less than the rounding of the kernel
            spectrum = self.spectrum if kept is None else dense_spectrum(theta)
            gain = spectrum.u.T @ r0
            scale = torch.from_numpy(phi(spectrum.s.cpu().numpy())).to(gain)
            alpha = spectrum.u @ torch.where(torch.isfinite(scale), scale * gain, 0.0)
        moved = (self.reach[:, rows] @ alpha).reshape(-1, self.probe.k)
        return self.probe.outputs.to(torch.float64) + moved

    def rows(self, samples: np.ndarray) -> Tensor:
        """Kernel rows of samples."""
        rows = (np.asarray(samples)[:, None] * self.k + np.arange(self.k)).ravel()
        return torch.from_numpy(rows).to(self.theta.device)


@dataclass
class Aim:
    """What every linearised problem begins with.

    Attributes:
        model, samples: as given. goal: of the training. inputs, trained: samples and outputs of its Jacobian.
        probes: validation samples or None, of val_labels, or None.
        common: options of ``jacobian``. training: time, lr, dynamics. convention, projection: of the solver.
        seed, progress: as given.
    """

    model: torch.nn.Module
    samples: Samples
    goal: Goal
    inputs: Samples
    trained: Any
    probes: Samples | None
    val_labels: Tensor | None
    common: dict[str, Any]
    training: dict[str, Any]
    convention: str
    projection: tuple[str, int | None] | None
    seed: int
    progress: bool


def take_aim(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    most: int | None = None,
    reg: float | str = "auto",
    time: float | None = None,
    lr: float | None = None,
    dynamics: str = "gd",
    loss="mse",
    convention: str = "sum",
    compat: str | None = None,
    method: str = "dense",
    rank: int | None = None,
    seed: int = 0,
    outputs=None,
    params="trainable",
    batch_size: int = 64,
    dtype: torch.dtype | None = torch.float64,
    progress: bool = True,
) -> Aim:
    """Check the arguments, which are those of ``score``, and find what is trained for; most: rows of the kernel."""
    check_loss(loss)
    convention, method, rank, projection = authors_definitions(compat, convention, method, rank)
    one_of("convention", convention, CONVENTIONS)
    seed = whole("seed", seed)
    if not isinstance(method, str) or method not in ("dense", "auto") or rank is not None:
        got, todo = repr(method), "score() has methods of low rank; these answers need the whole kernel."
        raise ArgumentError(complaint("method", "'dense', or with compat one of the authors' projections", got, todo))
    training = dict(time=time, lr=lr, dynamics=dynamics)
    make_filter(1, reg=0.0 if isinstance(reg, str) else reg, **training)
    samples = as_samples(train, with_targets=True, argument="train")
    common = dict(outputs=outputs, params=params, batch_size=batch_size, dtype=dtype)
    first = jacobian(model, samples.slice(0, 1), **common)
    each = first.k - (loss == "cross_entropy")
    if most is not None and samples.n * each > most:
        got = f"{samples.n} samples x {each} outputs"
        todo = "Pass fewer samples, or outputs= with fewer outputs; score() and summarize() have low rank."
        raise ArgumentError(complaint("train", f"at most {most} rows of an exact kernel", got, todo))
    targets = loss_targets(loss, samples.targets, first.k)
    goal, inputs, trained = aim(model, loss, samples, targets, first.device, common, progress)
    probes = val_labels = None
    if val is not None:
        probes = as_samples(val, with_targets=None, argument="val")
        if probes.targets is not None:
            val_labels = loss_targets(loss, probes.targets, first.k, "val")[1]
    return Aim(
        model, samples, goal, inputs, trained, probes, val_labels, common, training, convention, projection, seed,
        progress,
    )  # fmt: skip


def linear_problem(model: torch.nn.Module, train, val=None, *, reg: float | str = "auto", **arguments) -> LinearProblem:
    """The exact kernel problem; arguments as in ``take_aim``.

    Raises:
        ArgumentError: more rows than an exact kernel can have, a loss that is certain of some samples; as ``score``
            otherwise.
    """
    start = take_aim(model, train, val, reg=reg, most=MOST_ROWS, **arguments)
    common, progress = start.common, start.progress
    jac = jacobian(start.model, start.inputs, progress=progress, **{**common, "outputs": start.trained}).wide()
    theta, features = projected_kernel(jac, start.projection, start.seed, progress)
    probe = reach = None
    if start.probes is not None:
        probe = jacobian(start.model, start.probes, progress=progress, **common).wide()
        reach = projected_cross(probe, jac, features, progress)
    problem = LinearProblem(
        start.samples, jac, probe, theta, reach, start.goal, start.val_labels, start.training, start.convention
    )
    refuse_certainty(theta.diagonal(), problem.r0, start.goal)
    problem.choose_reg(reg)
    return problem


def best_reg(m: int, learn, r0: Tensor, training: dict[str, Any]) -> float | None:
    """That with the least ``part_error_curve`` of m samples, at most 90% of all; None for a single sample."""
    n = len(r0)
    m = min(m, int(0.9 * n))
    if m < 1:
        return None
    repeats = int(np.clip((n / m) ** 3, 2, 5))  # the price of one spectrum of all samples, or two
    regs, errors = part_error_curve(learn, r0, m, repeats=repeats, **training)
    return float(regs[errors.argmin()])


def refuse_certainty(size: Tensor, r0: Tensor, goal: Goal) -> None:
    """Raises ArgumentError where the loss is certain of a sample; size: diagonal of the kernel."""
    if is_certain(size, r0, goal):
        got = "a sample predicted with certainty (curvature of its loss below 1e-8 of the largest)"
        todo = "Start from weights that are less sure, or use loss='mse'; score() takes such samples with reg > 0."
        raise ArgumentError(complaint("loss", "predictions short of certainty", got, todo))
