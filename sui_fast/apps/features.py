"""The linearised problem of low rank, in memory: features in place of a kernel of all samples.

    Theta = Z Z^T,  Z [n k, r]

Training on the samples that are left needs Z^T Z and Z^T r0 over them, sums from which the others are taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError, complaint, whole
from ..footprint import PORTION
from ..jacobians import as_samples
from ..jacobians.engine import predict
from ..loo import make_filter
from ..losses import Goal
from ..planning import DEFAULT_RANK
from ..probing import warn_of_rank
from ..processes import Source
from ..spectra import FeatureSpectrum, Moments, feature_spectrum
from ..streaming import LowRank, features_of, fit_map, joined
from .kernel import MOST_ROWS, LinearProblem, best_reg, linear_problem, refuse_certainty, take_aim


@dataclass
class FeatureProblem:
    """What a shrinking training set asks of ``LinearProblem``, from a sketch.

    Attributes:
        held: of the training samples, "features" [n, k, r] float32, "residual" [n, k] and, of anchored sketches,
            "missed" [n, k, k], float64.
        seen: "features" [m, k', r] of the validation samples, or None; outputs: theirs [m, k'].
        goal, val_labels, training, convention, reg: as in ``LinearProblem``.
    """

    held: dict[str, Tensor]
    seen: dict[str, Tensor] | None
    outputs: Tensor | None
    goal: Goal
    val_labels: Tensor | None
    training: dict[str, Any]
    convention: str
    device: torch.device
    reg: float = 0.0

    @property
    def n(self) -> int:
        return len(self.held["features"])

    @property
    def k(self) -> int:
        return self.held["features"].shape[1]

    @property
    def rank(self) -> int:
        return self.held["features"].shape[2]

    @property
    def labels(self) -> Tensor | None:
        return self.goal.labels

    def pieces(self, samples: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """What is held of these samples, portion by portion."""
        step = max(1, PORTION // (self.k * self.rank))
        for begin in range(0, len(samples), step):
            part = torch.from_numpy(samples[begin : begin + step])
            yield {name: x[part].to(self.device) for name, x in self.held.items()}

    def sums(self, samples: np.ndarray) -> Moments:
        """Z^T Z and Z^T r0 over these samples; rows where there are fewer of them than columns."""
        sums = Moments(self.rank, self.device, len(samples) * self.k < self.rank)
        for piece in self.pieces(samples):
            sums.add(piece["features"], piece["residual"])
        return sums

    @cached_property
    def seen_sums(self) -> Moments:
        features = self.seen["features"]
        sums = Moments(self.rank, self.device, features.shape[0] * features.shape[1] < self.rank)
        sums.add(features.to(self.device))
        return sums

    def choose_reg_for(self, m: int) -> None:
        """As ``LinearProblem.choose_reg_for``."""
        reg = best_reg(m, self.learn, self.held["residual"].to(self.device), self.training)
        if reg is None:
            got, todo = f"{self.n}", "Pass more samples, or drop rank=."
            raise ArgumentError(complaint("train", "at least two samples for reg='auto' with rank=", got, todo))
        self.reg = reg

    def learn(self, inside: np.ndarray, others: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """As ``part_error_curve`` asks."""
        spectrum = feature_spectrum(self.sums(inside))
        reach = spectrum.turn * spectrum.s
        cross = [piece["features"].flatten(0, 1).to(torch.float64) @ reach for piece in self.pieces(others)]
        return spectrum.s, spectrum.gain, torch.cat(cross)

    def remaining(self) -> RemainingFeatures:
        """The shrinking training set; warns where the sketch is too small for the regularisation."""
        found, phi = RemainingFeatures(self), make_filter(self.n, reg=self.reg, **self.training)
        s = found.spectrum.s.cpu().numpy()
        warn_of_rank("sketch", self.rank, float((s * phi(s)).sum()), self.n * self.k)
        return found

    def predictions(self, kept: np.ndarray, convention: str) -> Tensor:
        """f on the validation data, [m, k'], after training on the kept samples."""
        spectrum = feature_spectrum(self.sums(kept))
        phi = make_filter(self.n, reg=self.reg, **self.training).without(self.n - len(kept), self.n, convention)
        scale = torch.from_numpy(phi(spectrum.s.cpu().numpy())).to(spectrum.gain)
        moved = (spectrum.turn * spectrum.s) @ torch.where(torch.isfinite(scale), scale * spectrum.gain, 0.0)
        return self.outputs.to(torch.float64) + (self.seen["features"].to(moved) @ moved)


class RemainingFeatures:
    """As ``loo.Remaining``: a training set that shrinks, and what each sample that is left adds to it."""

    def __init__(self, problem: FeatureProblem):
        self._problem, self._base = problem, problem.n
        self.kept = np.arange(problem.n)
        self._sums: Moments | None = None

    def rescale(self) -> None:
        """From here on lambda and eta are those of the mean loss over the samples now left; sums are made anew."""
        self._base, self._sums = len(self.kept), None

    def drop(self, samples: np.ndarray) -> None:
        """Take samples (by number) out of the training set."""
        self.kept = np.setdiff1d(self.kept, samples)
        few = len(self.kept) * self._problem.k < self._problem.rank
        if few or self._sums is None or self._sums.rows is not None:
            self._sums = None
            return
        for piece in self._problem.pieces(np.asarray(samples)):
            self._sums.add(piece["features"], piece["residual"], sign=-1)

    @property
    def spectrum(self) -> FeatureSpectrum:
        """Of the samples that are left."""
        if self._sums is None:
            self._sums = self._problem.sums(self.kept)
        return feature_spectrum(self._sums)

    def sqnorm(self, seen: bool) -> Tensor:
        """||dw||^2, or with ``seen`` the mean ||df||^2, of leaving out each kept sample, in the order of ``kept``."""
        problem, spectrum = self._problem, self.spectrum
        whole = make_filter(self._base, reg=problem.reg, **problem.training)
        phi = whole.without(self._base - len(self.kept), self._base, problem.convention)
        moment = spectrum.moment(problem.seen_sums) if seen else None
        solver = LowRank(
            (), spectrum, problem.k, moment=moment, convention=problem.convention, groups=None, device=problem.device
        )
        found = (solver.removal(piece, phi) for piece in problem.pieces(self.kept))
        return torch.cat([x.prediction_sqnorm if seen else x.weight_sqnorm for x in found])


def shrinking_problem(
    model: torch.nn.Module, train, val=None, *, reg: float | str, rank: int | None, **arguments
) -> LinearProblem | FeatureProblem:
    """``linear_problem``, or that of a sketch where a rank is asked for or the kernel would have too many rows."""
    samples = as_samples(train, with_targets=True, argument="train")
    if rank is None:
        options = {name: arguments[name] for name in ("outputs", "params", "batch_size") if name in arguments}
        k = predict(model, samples.slice(0, 1), **options).shape[1]
        if samples.n * (k - (arguments.get("loss") == "cross_entropy")) > MOST_ROWS:
            rank = DEFAULT_RANK
    if rank is None:
        return linear_problem(model, samples, val, reg=reg, **arguments)
    rank = whole("rank", rank, 1)
    if isinstance(reg, str):
        raise ArgumentError(complaint("reg", "a number >= 0 or 'auto'", repr(reg), "Choose one."))
    start = take_aim(model, samples, val, reg=reg, **{"dtype": None, **arguments})
    source = Source(model, start.inputs, {**start.common, "outputs": start.trained}, 0, samples.n)
    fmap = fit_map(source, start.goal, "sketch", rank, start.seed, None)
    held = joined(features_of(source, fmap, start.goal, 0, start.progress))
    seen = outputs = None
    if start.probes is not None:
        probes = Source(model, start.probes, start.common, 0, start.probes.n)
        seen = joined(features_of(probes, fmap, None, 0, start.progress))
        outputs = predict(model, start.probes, progress=start.progress, **start.common)
    size = torch.linalg.vector_norm(held["features"], dim=2).double().square()
    refuse_certainty(size, held["residual"], start.goal)
    return FeatureProblem(
        held, seen, outputs, start.goal, start.val_labels, start.training, start.convention, source.device, float(reg)
    )
