"""Samples of a kind that is rare or made up, ranked by what they teach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .._errors import ArgumentError, complaint, number, whole
from .._waiting import waited_for
from ..measures import information
from .kernel import LinearProblem, linear_problem
from .results import NAMES, Result, auroc, average_precision, check_truth, count_axis, ranks


@dataclass(frozen=True, eq=False)
class Ranking(Result):
    """Samples by how much they look like what is searched for.

    Attributes:
        ids, labels: of the samples; labels None where targets name no class. value: larger is more suspect [n].
        order: numbers, most suspect first. measures: {name: [n]} that were computed. by: what ``value`` is.
        truth, auroc, aupr: where the truth was given. aurocs: {measure: AUROC} of the single measures.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    value: np.ndarray
    order: np.ndarray
    measures: dict[str, np.ndarray]
    by: str
    truth: np.ndarray | None
    auroc: float | None
    aupr: float | None
    aurocs: dict[str, float]

    def summary(self) -> str:
        first = ", ".join(str(x) for x in self.ids[self.order[:10]])
        text = f"Ranked by {self.by}; most suspect: {first}."
        if self.auroc is not None:
            single = ", ".join(f"{name} {value:.3f}" for name, value in self.aurocs.items())
            text += f" Against the truth: AUROC {self.auroc:.3f}, AUPR {self.aupr:.3f} (alone: {single})."
        return text

    def columns(self) -> dict[str, np.ndarray]:
        found = {"id": self.ids, **({} if self.labels is None else {"label": self.labels}), "value": self.value}
        found |= self.measures
        if self.truth is not None:
            found["truth"] = self.truth
        return {name: column[self.order] for name, column in found.items()}

    def _draw(self, ax) -> None:
        positive = self.value > 0
        value = np.log10(np.where(positive, self.value, self.value[positive].min() if positive.any() else 1.0))
        edges = np.linspace(value.min(), value.max() + 1e-9, 41)
        if self.truth is None:
            ax.hist(value, edges)
        else:
            ax.hist([value[~self.truth], value[self.truth]], edges, stacked=True, label=("others", "searched for"))
            ax.legend()
        ax.set(xlabel=f"log10 of {self.by}")
        count_axis(ax)


@dataclass(frozen=True, eq=False)
class Undersampled(Ranking):
    """``Ranking`` with the clusters inside the classes.

    Attributes:
        cluster: of each sample, numbered over all classes [n]. clusters: rows (cluster, class, samples, mean value),
            the most undersampled first.
    """

    title: ClassVar[str] = "Undersampled parts of classes"
    cluster: np.ndarray
    clusters: list[tuple[int, int, int, float]]

    def summary(self) -> str:
        number, label, size, mean = self.clusters[0]
        times = mean / max(float(self.value.mean()), 1e-300)
        where = "" if self.labels is None else f" of class {label}"
        return (
            f"Most undersampled: cluster {number}{where}, {size} samples, on average {times:.1f} "
            f"times the value of all. {super().summary()}"
        )

    def columns(self) -> dict[str, np.ndarray]:
        return {**super().columns(), "cluster": self.cluster[self.order]}


@dataclass(frozen=True, eq=False)
class Adversarial(Ranking):
    """``Ranking`` of samples that may have been made to mislead."""

    title: ClassVar[str] = "Suspected adversarial samples"


@waited_for
def find_undersampled(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    truth=None,
    clusters: int = 8,
    neighbours: int = 10,
    reg: float | str = "auto",
    sigma: float = 1.0,
    seed: int = 0,
    **arguments,
) -> Undersampled:
    """Find unlabelled sub-classes that have too few samples: their members are informative, and alike.

    ::

        a_i     = F-SI_i (1 - mean likeness of its nearest samples of the same class)
        value_i = a, averaged twice over a sample and its nearest

    Likeness is the kernel divided by the lengths of both. A hard sample on its own is informative too; the means tell a
    rare kind from it, and where samples are rare the nearest are far. Each class is clustered by the kernel (k-means on
    its leading eigenvectors). Chosen on digits: held out, AUROC was 0.95 there on average, but 0.37 to 0.94 on kinds of
    wine and breast cancer, where a rare kind need not be hard (benchmarks/studies/README.md).

    Args:
        model, train, val: as in ``score``; without val SI takes the place of F-SI.
        truth: members of the rare kind, bool [n], for AUROC.
        clusters: in each class. neighbours: averaged over; 0: F-SI as it is.
        reg, arguments: of ``score``: loss, time, lr, dynamics, convention, outputs, params, batch_size, dtype,
            progress.
        seed: of k-means.
    Returns:
        Undersampled.
    Source: Harutyunyan et al., ICLR 2021, section 6 (under-sampled sub-classes).
    """
    for name, value, least in (("clusters", clusters, 1), ("neighbours", neighbours, 0), ("seed", seed, 0)):
        whole(name, value, least)
    sigma = number("sigma", sigma, positive=True)
    problem = linear_problem(model, train, val, reg=reg, **arguments)
    measures = _measures(problem, sigma)
    by = "fsi" if "fsi" in measures else "si"
    kernel = sample_kernel(problem)
    labels = np.zeros(problem.n, dtype=np.int64) if problem.labels is None else problem.labels.cpu().numpy()
    value, cluster, count = measures[by].copy(), np.zeros(problem.n, dtype=np.int64), 0
    rows: list[tuple[int, int, int, float]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        block = kernel[members][:, members]
        if neighbours:
            others = block - np.diag(np.full(len(members), np.inf))
            near = np.argsort(-others, axis=1, kind="stable")[:, : min(neighbours, len(members) - 1)]
            near = np.column_stack([np.arange(len(members)), near])
            alone = value[members] * np.maximum(1 - _nearest(others, neighbours), 0)
            value[members] = alone[near].mean(1)[near].mean(1)
        own = _cluster(block, min(clusters, len(members)), seed)
        cluster[members] = own + count
        for c in np.unique(own):
            inside = members[own == c]
            rows.append((int(c + count), int(label), len(inside), float(value[inside].mean())))
        count += int(own.max()) + 1
    rows.sort(key=lambda row: -row[3])
    name = f"{NAMES[by]} over {neighbours} neighbours" if neighbours else NAMES[by]
    return Undersampled(**_ranking(problem, value, measures, name, truth), cluster=cluster, clusters=rows)


@waited_for
def detect_adversarial(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    truth=None,
    by: str | None = None,
    neighbours: int = 10,
    reg: float | str = "auto",
    sigma: float = 1.0,
    **arguments,
) -> Adversarial:
    """Rank samples of a training set by how much they look made to mislead.

    ::

        surprise_i = mean rank, in [0, 1], of
            the leverage                    how much of the sample the others do not span
            remoteness_i = - mean likeness of its nearest samples
            misplacement_i = mean likeness of its nearest of other classes minus that of its nearest of its own

    Likeness is the kernel divided by the lengths of both; the rank of the misplacement counts as 1/2 at least. Without
    classes the leave-one-out residual (a target that the others contradict) takes its place.

    Args:
        model, train, val: as in ``score``.
        truth: adversarial samples, bool [n], for AUROC.
        by: "surprise" (default), or one of "fsi", "si", "leverage", "loo_residual", "loo_margin", "remoteness",
            "misplacement".
        neighbours: nearest samples that remoteness and misplacement look at.
        reg, arguments: as in ``find_undersampled``.
    Returns:
        Adversarial.
    Source: Harutyunyan et al., ICLR 2021, section 6 (adversarial examples).
    """
    whole("neighbours", neighbours, 1)
    sigma = number("sigma", sigma, positive=True)
    problem = linear_problem(model, train, val, reg=reg, **arguments)
    measures = _measures(problem, sigma)
    by = "surprise" if by is None else by
    likeness = sample_kernel(problem)
    np.fill_diagonal(likeness, -np.inf)
    measures["remoteness"], last = -_nearest(likeness, neighbours), "loo_residual"
    if problem.labels is not None:
        labels = problem.labels.cpu().numpy()
        own = labels[:, None] == labels
        inside, outside = (_nearest(np.where(where, likeness, -np.inf), neighbours) for where in (own, ~own))
        measures["misplacement"], last = outside - inside, "misplacement"
    parts = [ranks(measures[name]) / problem.n for name in ("leverage", "remoteness", last)]
    if last == "misplacement":
        parts[2] = np.maximum(parts[2], 0.5)  # to lie among one's own clears nobody: made samples may form a cluster
    measures["surprise"] = np.mean(parts, 0)
    if not isinstance(by, str) or by not in measures:
        got, todo = repr(by), "Choose one; 'fsi' needs val, 'loo_margin' classes."
        raise ArgumentError(complaint("by", f"one of {', '.join(measures)}", got, todo))
    value = -measures[by] if by == "loo_margin" else measures[by]
    return Adversarial(**_ranking(problem, value, measures, by, truth))


def _measures(problem: LinearProblem, sigma: float) -> dict[str, np.ndarray]:
    removal = problem.removal()
    found = {"si": information(removal.weight_sqnorm, sigma)}
    if problem.cross is not None:
        found["fsi"] = information(removal.prediction_sqnorm, sigma)
    found["leverage"] = removal.leverage
    found["loo_residual"] = problem.goal.slope(slice(None), removal.loo_residual).square().sum(1).sqrt()
    if problem.labels is not None:
        found["loo_margin"] = problem.goal.margin(slice(None), removal.loo_residual)
    return {name: column.cpu().numpy() for name, column in found.items()}


def _ranking(problem: LinearProblem, value, measures, by: str, truth) -> dict:
    marks = check_truth(truth, problem.n)
    aurocs = {}
    if marks is not None:
        aurocs = {name: auroc(-x if name == "loo_margin" else x, marks) for name, x in measures.items()}
    return dict(
        ids=problem.samples.ids,
        labels=None if problem.labels is None else problem.labels.cpu().numpy(),
        value=value,
        order=np.argsort(-value, kind="stable"),
        measures=measures,
        by=by,
        truth=marks,
        auroc=None if marks is None else auroc(value, marks),
        aupr=None if marks is None else average_precision(value, marks),
        aurocs=aurocs,
    )


def _nearest(likeness: np.ndarray, count: int) -> np.ndarray:
    """Mean of the ``count`` largest of each row, of those that are finite; 0 where there are none."""
    count = min(count, likeness.shape[1])
    largest = np.partition(likeness, likeness.shape[1] - count, axis=1)[:, -count:]
    found = np.isfinite(largest)
    return np.where(found, largest, 0.0).sum(1) / np.maximum(found.sum(1), 1)


def sample_kernel(problem: LinearProblem) -> np.ndarray:
    """Likeness of samples, tr Theta_ij / sqrt(tr Theta_ii tr Theta_jj), [n, n]."""
    n, k = problem.n, problem.k
    trace = problem.theta.view(n, k, n, k).diagonal(dim1=1, dim2=3).sum(2).cpu().numpy()
    scale = np.sqrt(np.where(trace.diagonal() > 0, trace.diagonal(), 1.0))
    return trace / scale[:, None] / scale


def _cluster(kernel: np.ndarray, count: int, seed: int, rounds: int = 100, starts: int = 5) -> np.ndarray:
    """k-means on the leading eigenvectors of a centred kernel; the best of a few starts."""
    centred = kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
    s, u = np.linalg.eigh(centred)
    features = (u * np.sqrt(np.maximum(s, 0)))[:, -max(2 * count, 2) :]
    rng = np.random.default_rng(seed)
    best = (np.inf, np.zeros(len(kernel), dtype=np.int64))
    for _ in range(starts):
        centres = [features[rng.integers(len(features))]]
        while len(centres) < count:
            distance = np.min([((features - c) ** 2).sum(1) for c in centres], 0)
            total = distance.sum()
            share = distance / total if total > 0 else np.full(len(features), 1 / len(features))
            centres.append(features[rng.choice(len(features), p=share)])
        middle, own = np.array(centres), None
        for _ in range(rounds):
            distance = ((features[:, None] - middle) ** 2).sum(2)
            now = distance.argmin(1)
            if own is not None and (now == own).all():
                break
            own = now
            middle = np.array([features[own == c].mean(0) if (own == c).any() else middle[c] for c in range(count)])
        spread = distance.min(1).sum()
        if spread < best[0]:
            best = (spread, np.unique(own, return_inverse=True)[1])
    return best[1]
