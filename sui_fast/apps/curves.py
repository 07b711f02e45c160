"""Information along the training: SI and F-SI at many times from one spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .._errors import ArgumentError, complaint, number, whole
from .._waiting import waited_for
from ..loo import make_filter, remove_at_times
from ..measures import information
from .kernel import linear_problem
from .results import Result


@dataclass(frozen=True, eq=False)
class Curves(Result):
    """Information of every sample at every time.

    Attributes:
        times: steps or time [t]. si, fsi: nats [t, n]; fsi None without validation data. ids, labels: of the samples.
    """

    title: ClassVar[str] = "Information along the training"
    times: np.ndarray
    si: np.ndarray
    fsi: np.ndarray | None
    ids: np.ndarray
    labels: np.ndarray | None

    def summary(self) -> str:
        peak = self.times[np.argmax((self.si if self.fsi is None else self.fsi).mean(1))]
        return f"{len(self.ids)} samples at {len(self.times)} times; the mean is largest at time {peak:g}."

    def columns(self) -> dict[str, np.ndarray]:
        found = {"time": self.times, "si_mean": self.si.mean(1), "si_median": np.median(self.si, 1)}
        if self.fsi is not None:
            found |= {"fsi_mean": self.fsi.mean(1), "fsi_median": np.median(self.fsi, 1)}
        return found

    def _draw(self, ax) -> None:
        values = self.si if self.fsi is None else self.fsi
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
        ax.fill_between(self.times, low, high, alpha=0.3, label="10% to 90% of the samples")
        ax.plot(self.times, middle, label="median")
        ax.plot(self.times, values.mean(1), label="mean")
        ax.set(xlabel="time", ylabel="SI, nats" if self.fsi is None else "F-SI, nats", xscale="log")
        if low.min() > 0:
            ax.set_yscale("log")
        ax.legend()


@waited_for
def information_curves(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    times=None,
    points: int = 30,
    lr: float | None = None,
    dynamics: str = "gd",
    reg: float | str = 0.0,
    sigma: float = 1.0,
    **arguments,
) -> Curves:
    """SI and F-SI at log-spaced times; the kernel and its spectrum are computed once.

    Args:
        model, train, val, lr, dynamics, reg, sigma, arguments: as in ``score``; lr None: the inverse of the largest
            curvature of the mean loss; reg "auto": the best at convergence.
        times: increasing times; default: ``points`` log-spaced ones from 1 to 1e5, with the default lr until
            directions with 1e-4 of the largest eigenvalue have long converged.
    Returns:
        Curves.
    Raises:
        As ``score``; ArgumentError for times that are none.
    """
    sigma, points = number("sigma", sigma, positive=True), whole("points", points, 1)
    if times is not None:
        times = _times(times)
    make_filter(1, time=1, lr=1.0 if lr is None else lr, dynamics=dynamics)  # names what is wrong before the work
    problem = linear_problem(model, train, val, reg=reg, **arguments)
    if lr is None:
        lr = problem.n / max(problem.spectrum.top + problem.n * problem.reg, 1e-300)
    if times is None:
        times = np.geomspace(1, 1e5, points)
    if dynamics == "gd":
        times = np.unique(times.round())
    filters = [make_filter(problem.n, reg=problem.reg, time=t, lr=lr, dynamics=dynamics) for t in times.tolist()]
    weights, predictions = remove_at_times(
        problem.spectrum, filters, problem.r0, cross=problem.cross, convention=problem.convention, idle=problem.idle
    )
    return Curves(
        times=times,
        si=information(weights, sigma).cpu().numpy(),
        fsi=None if predictions is None else information(predictions, sigma).cpu().numpy(),
        ids=problem.samples.ids,
        labels=None if problem.labels is None else problem.labels.cpu().numpy(),
    )


def _times(times) -> np.ndarray:
    try:
        found = np.atleast_1d(np.asarray(times, dtype=np.float64))
    except (TypeError, ValueError):
        found = np.array([np.nan])
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all() or found.min() < 0:
        raise ArgumentError(complaint("times", "finite times >= 0", repr(times), "Pass np.geomspace(1, 1e4, 30)."))
    return found
