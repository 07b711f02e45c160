"""What samples share: overlap of pairs and of groups, and who makes a sample redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .._errors import ArgumentError, complaint, number, whole
from .._waiting import waited_for
from ..loo import make_blocks
from .detection import sample_kernel
from .influence import pick_samples
from .kernel import LinearProblem, linear_problem
from .results import NAMES, Result


@dataclass(frozen=True, eq=False)
class Overlap(Result):
    """Information of two sets of samples, alone and together.

    Attributes:
        pairs: what was compared, list of (first, second). by: "si" or "fsi".
        first, second, joint: information of leaving out the one, the other, both, in nats [p].
        overlap: first + second - joint [p]. Negative: each makes the other redundant (what both know counts only
            when both are gone); positive: their effects on the model oppose each other when both leave.
    """

    title: ClassVar[str] = "Overlap of information"
    pairs: list[tuple]
    by: str
    first: np.ndarray
    second: np.ndarray
    joint: np.ndarray

    @property
    def overlap(self) -> np.ndarray:
        return self.first + self.second - self.joint

    def summary(self) -> str:
        most = int(np.argmin(self.overlap))
        kind = "most stand in for each other" if self.overlap[most] < 0 else "overlap least"
        return (
            f"{len(self.pairs)} pairs by {NAMES[self.by]}. Those that {kind}: {self.pairs[most][0]} and "
            f"{self.pairs[most][1]}, {self.joint[most]:.3g} nats together, {self.first[most]:.3g} and "
            f"{self.second[most]:.3g} alone."
        )

    def columns(self) -> dict[str, np.ndarray]:
        names = [[str(x) for x in side] for side in zip(*self.pairs, strict=True)]
        found = {"first": np.array(names[0]), "second": np.array(names[1])}
        values = {"information_first": self.first, "information_second": self.second, "joint": self.joint}
        return {**found, **values, "overlap": self.overlap}

    def _draw(self, ax) -> None:
        ax.scatter(self.first + self.second, self.joint)
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
        ax.set(xlabel="sum of the two, nats", ylabel="together, nats")


@dataclass(frozen=True, eq=False)
class Redundancy(Result):
    """Which samples make a sample redundant.

    Attributes:
        samples: numbers of the samples asked about [c]; information: theirs, nats [c].
        partners: numbers of the samples that stand in for each, most first [c, q].
        information_without: what losing the sample adds once that partner is lost, SI({i, j}) - SI(j) in nats [c, q].
        ids: of all samples. by: "si" or "fsi".
    """

    title: ClassVar[str] = "Redundant samples and their stand-ins"
    samples: np.ndarray
    information: np.ndarray
    partners: np.ndarray
    information_without: np.ndarray
    ids: np.ndarray
    by: str

    def summary(self) -> str:
        lines = [
            f"{self.ids[i]} ({value:.3g} nats) is told by {self.ids[j[0]]} (without it {more[0]:.3g})"
            for i, value, j, more in zip(
                self.samples[:5], self.information, self.partners, self.information_without, strict=False
            )
        ]
        return "; ".join(lines) + "."

    def columns(self) -> dict[str, np.ndarray]:
        repeat = self.partners.shape[1]
        return {
            "id": np.repeat(self.ids[self.samples], repeat),
            "information": np.repeat(self.information, repeat),
            "partner": self.ids[self.partners.ravel()],
            "information_without": self.information_without.ravel(),
        }

    def _draw(self, ax) -> None:
        ax.scatter(self.information, self.information_without[:, 0])
        ax.set(xlabel="information, nats", ylabel="information once the first stand-in is gone")
        ax.set(xscale="log", yscale="log")


def _two_each(pairs) -> list[tuple]:
    try:
        found = [(first, second) for first, second in pairs]
        hash(tuple(found))
    except (TypeError, ValueError):
        todo = "Pass [(0, 1), ...]; for sets of samples name them by groups=."
        raise ArgumentError(complaint("pairs", "pairs of numbers or labels", repr(pairs)[:80], todo)) from None
    return found


@waited_for
def overlap(
    model: torch.nn.Module,
    train,
    val=None,
    pairs=None,
    *,
    groups=None,
    by: str | None = None,
    reg: float | str = "auto",
    sigma: float = 1.0,
    **arguments,
) -> Overlap:
    """Information of pairs of samples, or of groups, alone and together.

    ::

        overlap = SI(i) + SI(j) - SI({i, j})

    Args:
        model, train, val: as in ``score``.
        pairs: (i, j) sample numbers, [p, 2]; with ``groups`` pairs of their labels (default: all pairs of labels).
        groups: one label per sample [n]: a class, a batch, a source.
        by: "fsi" (default where val is given) or "si".
        reg, sigma, arguments: of ``score``.
    Returns:
        Overlap.
    """
    sigma = number("sigma", sigma, positive=True)
    problem = linear_problem(model, train, val, reg=reg, **arguments)
    if groups is None:
        numbers = np.array(_two_each(pairs)) if pairs is not None else np.zeros(0)
        if numbers.ndim != 2 or numbers.shape[1] != 2 or not len(numbers):
            got = "None" if pairs is None else f"shape {list(numbers.shape)}"
            raise ArgumentError(complaint("pairs", "pairs of sample numbers [p, 2]", got, "Pass [(0, 1), ...]."))
        pick_samples(numbers.ravel(), problem.n, "pairs")
        named = [tuple(pair) for pair in numbers.tolist()]
        members = {i: np.array([i]) for i in np.unique(numbers).tolist()}
    else:
        blocks = make_blocks(problem.n, problem.k, groups)
        members = dict(zip(blocks.labels.tolist(), blocks.samples, strict=True))
        keys = list(members)
        named = [(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :]]
        if pairs is not None:
            named = _two_each(pairs)
        unknown = [x for pair in named for x in pair if x not in members]
        if unknown or not named:
            got = repr(unknown[0]) if unknown else "none"
            raise ArgumentError(complaint("pairs", f"pairs of {keys}", got, "Choose from the groups."))
    by = which(by, problem)
    keys = list(members)
    unions = [np.union1d(members[a], members[b]) for a, b in named]
    sqnorm = problem.without([*(members[key] for key in keys), *unions])[by == "fsi"] / (2 * sigma**2)
    alone = dict(zip(keys, sqnorm, strict=False))
    first, second = (np.array([alone[pair[side]] for pair in named]) for side in (0, 1))
    return Overlap(named, by, first, second, sqnorm[len(keys) :])


@waited_for
def redundancy(
    model: torch.nn.Module,
    train,
    val=None,
    samples=10,
    *,
    partners: int = 5,
    candidates: int = 20,
    by: str | None = None,
    reg: float | str = "auto",
    sigma: float = 1.0,
    **arguments,
) -> Redundancy:
    """For samples of low information: which others carry the same, so that only losing both would hurt.

    For the ``candidates`` nearest by the kernel what the sample adds to the information of the pair is computed
    exactly, SI({i, j}) - SI(j); those that raise it most are its stand-ins. (Squared distances do not add up: it is not
    what removing i would do to a model trained without j, and may be negative.)

    Args:
        model, train, val: as in ``score``.
        samples: how many of the least informative, or sample numbers. partners: stand-ins named for each.
        candidates: nearest samples that are tried. by, reg, sigma, arguments: as in ``overlap``.
    Returns:
        Redundancy.
    """
    sigma = number("sigma", sigma, positive=True)
    partners, candidates = whole("partners", partners, 1), whole("candidates", candidates, 1)
    problem = linear_problem(model, train, val, reg=reg, **arguments)
    if problem.n < 2:
        raise ArgumentError(complaint("train", "at least two samples", "one", "Pass more of them."))
    by = which(by, problem)
    removal = problem.removal()
    sqnorm = removal.prediction_sqnorm if by == "fsi" else removal.weight_sqnorm
    alone = sqnorm.cpu().numpy() / (2 * sigma**2)
    if isinstance(samples, int | np.integer) and not isinstance(samples, bool):
        chosen = np.argsort(alone, kind="stable")[: max(1, min(int(samples), problem.n))]
    else:
        chosen = pick_samples(samples, problem.n)
    kernel = np.abs(sample_kernel(problem)[chosen])
    kernel[np.arange(len(chosen)), chosen] = -1
    near = np.argsort(-kernel, axis=1, kind="stable")[:, : max(1, min(candidates, problem.n - 1))]
    sets = [np.array([i, j]) for i, row in zip(chosen, near, strict=True) for j in row]
    joint = problem.without(sets)[by == "fsi"].reshape(near.shape) / (2 * sigma**2)
    gain = joint - alone[near]
    order = np.argsort(-gain, axis=1, kind="stable")[:, :partners]
    return Redundancy(
        samples=chosen,
        information=alone[chosen],
        partners=np.take_along_axis(near, order, 1),
        information_without=np.take_along_axis(gain, order, 1),
        ids=problem.samples.ids,
        by=by,
    )


def which(by: str | None, problem: LinearProblem) -> str:
    by = ("si" if problem.cross is None else "fsi") if by is None else by
    if not isinstance(by, str) or by not in ("si", "fsi") or by == "fsi" and problem.cross is None:
        raise ArgumentError(complaint("by", "'si', or 'fsi' with val", repr(by), "Pass val=..., or by='si'."))
    return by
