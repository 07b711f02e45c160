"""Which labels are wrong: the margin of each sample under the model trained without it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .._errors import ArgumentError, complaint
from .._waiting import waited_for
from ..processes import processes_of
from ..scores import Scores
from ..scoring import score
from .results import NAMES, Result, auroc, average_precision, check_truth, count_axis

_SHARPNESS = np.geomspace(0.5, 60.0, 41)  # grid of the calibration
_TYPICAL, _SPREAD = 6.0, 0.3  # of the sharpness and its logarithm: a margin of one half is 95% sure
_DECIDED = 0.8  # lead of the first class, in the median, to which outputs are scaled: wrong labels shrink it
_MOST_SCALE = 4.0  # outputs that decide next to nothing stay undecided
_PRIOR = 5.0  # samples a class by which confusion is drawn towards equal chances


@dataclass(frozen=True, eq=False)
class Mislabeled(Result):
    """Samples by how likely their label is wrong; arrays in the order of the data.

    Attributes:
        ids, labels: of the samples, as given. order: sample numbers, most suspicious first.
        margin: of the given label under the model trained without the sample; negative: it disagrees.
        second_opinion: F-SI in nats (SI where no validation data were given), large for wrong labels; by: its name.
        suggested: class that the model without the sample predicts, or None where it is unknown.
        probability: that the label is wrong, given the noise rate estimated from all margins.
        flagged: whether the margin is at most ``threshold``, bool [n].
        error_rate: estimated share of the flagged whose label is right all the same.
        noise_rate: estimated share of wrong labels among all.
        auroc, aupr: of the margin, where the truth was given; auroc_second: of the second opinion.
    """

    title: ClassVar[str] = "Wrong labels by leave-one-out margin"
    ids: np.ndarray
    labels: np.ndarray
    order: np.ndarray
    margin: np.ndarray
    second_opinion: np.ndarray
    by: str
    suggested: np.ndarray | None
    probability: np.ndarray
    flagged: np.ndarray
    threshold: float
    error_rate: float
    noise_rate: float
    truth: np.ndarray | None = None
    auroc: float | None = None
    aupr: float | None = None
    auroc_second: float | None = None

    @property
    def rank(self) -> np.ndarray:
        """Place of each sample, 0 for the most suspicious."""
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = np.arange(len(place))
        return place

    @property
    def fsi(self) -> np.ndarray | None:
        """F-SI, where validation data were given."""
        return self.second_opinion if self.by == "fsi" else None

    def summary(self) -> str:
        n, flagged = len(self.ids), int(self.flagged.sum())
        text = f"{flagged or 'None'} of {n} labels flagged"
        if flagged:
            right = f"about {self.error_rate:.0%} of these are expected to be right"
            text += f" (margin at most {self.threshold:.3g}); {right}"
        elif self.noise_rate * n >= 1:
            text += ": none surely enough for the error rate asked for; the order ranks them all the same"
        text += f". Estimated share of wrong labels: {self.noise_rate:.1%}."
        if self.auroc is not None:
            text += (
                f" Against the truth: AUROC {self.auroc:.4f}, AUPR {self.aupr:.4f}"
                f" ({NAMES[self.by]} alone: AUROC {self.auroc_second:.4f})."
            )
        return text

    def columns(self) -> dict[str, np.ndarray]:
        found = dict(id=self.ids, label=self.labels, margin=self.margin, probability=self.probability)
        found |= {self.by: self.second_opinion, "flagged": self.flagged}
        if self.suggested is not None:
            found["suggested"] = self.suggested
        if self.truth is not None:
            found["truth"] = self.truth
        return {name: column[self.order] for name, column in found.items()}

    def _draw(self, ax) -> None:
        edges = np.linspace(self.margin.min(), self.margin.max() + 1e-12, 41)
        marked = self.flagged if self.truth is None else self.truth
        names = ("not flagged", "flagged") if self.truth is None else ("right", "wrong")
        ax.hist([self.margin[~marked], self.margin[marked]], edges, stacked=True, label=names)
        ax.axvline(self.threshold, color="black", linestyle="--", linewidth=1, label="threshold")
        ax.set(xlabel="leave-one-out margin of the given label")
        count_axis(ax)
        ax.legend()


@waited_for
def find_mislabeled(
    model: torch.nn.Module | Scores,
    train=None,
    val=None,
    *,
    truth=None,
    error_rate: float = 0.2,
    reg: float | str = "auto",
    **arguments,
) -> Mislabeled:
    """Rank samples by the exact leave-one-out margin of their label, with F-SI as a second opinion.

    ::

        margin_i = f_-i(x_i)[label] - max over the other classes                (k = 1: (2 label - 1)(2 f_-i(x_i) - 1))
        P(true = c | given = y) ~ p_c T_cy,   p = softmax(b f_-i(x_i))

    with f in units in which its median lead is that of a decided model, as wrong labels shrink all leads. The
    confusion T of true with given classes maximises the likelihood of the given labels; over the sharpness b the
    posterior is averaged (in two classes the labels alone tell little about it). As f_-i never saw the label of i, that
    likelihood is honest, and nothing is trained anew.

    Args:
        model, train, val: as in ``score``, with classes as targets; or a ``Scores`` with "loo_margin" as the only one
            (read from a file: estimates by the given class against the best other, without the confusion of classes).
        truth: which labels are wrong, bool [n], for AUROC and AUPR.
        error_rate: flag as many as keep the estimated share of right labels among the flagged below this.
        reg: as in ``score``; "auto" as too much regularisation hides what single labels do.
        arguments: further arguments of ``score``.
    Returns:
        Mislabeled.
    Raises:
        As ``score``; ArgumentError where there are no classes.
    Source: docs/math.md, section 5 (leave-one-out residual); Northcutt et al. 2021 for the noise model.
    """
    given = isinstance(model, Scores)
    with processes_of("dense" if given else arguments.get("method"), arguments.get("part")).together():
        if isinstance(error_rate, bool) or not isinstance(error_rate, int | float) or not 0 <= error_rate < 1:
            raise ArgumentError(complaint("error_rate", "a share in [0, 1)", repr(error_rate), "Pass 0.1, say."))
        if given and (train is not None or val is not None or arguments):
            raise ArgumentError(complaint("train", "nothing beside Scores", "more", "Pass the scores alone."))
        if not given and train is None:
            raise ArgumentError(complaint("train", "the training data", None, "Pass (inputs, targets)."))
    scores = model
    if not given:
        measures = ("loo_margin", "si" if val is None else "fsi")
        more = arguments.get("measures", ())
        arguments["measures"] = (*measures, *(more if isinstance(more, list | tuple | set) else [more]))
        scores = score(model, train, val, reg=reg, **arguments)
    margin, labels = scores["loo_margin"], scores.labels
    if labels is None:
        got, todo = "numbers that name no class", "Pass integer classes."
        raise ArgumentError(complaint("train", "classes as targets", got, todo))
    by = next((name for name in ("fsi", "si") if name in scores.values), "loo_margin")
    second = scores[by] if by != "loo_margin" else -margin
    left_out = scores.left_out
    if left_out is None:  # only the margin is known: two classes, the given one against the best other
        outputs, own = np.stack([1 - margin, 1 + margin], 1) / 2, np.ones(len(labels), dtype=np.int64)
    elif left_out.shape[1] == 1:
        outputs, own = np.concatenate([1 - left_out, left_out], 1), labels
    else:
        outputs, own = left_out, labels
    _warn_of_chance(margin, labels)
    probability, noise = label_error_probability(outputs, own)
    order = np.lexsort((-second, margin))
    expected = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero((expected <= error_rate) & (margin[order] < 0))
    count = int(good[-1]) + 1 if len(good) else 0
    threshold = float(margin[order[count - 1]]) if count else float(min(margin.min(), 0.0)) - 1e-9
    flagged = margin <= threshold
    marks = check_truth(truth, len(margin))
    return Mislabeled(
        ids=scores.ids,
        labels=labels,
        order=order,
        margin=margin,
        second_opinion=second,
        by=by,
        suggested=scores.suggested if left_out is None else outputs.argmax(1),
        probability=probability,
        flagged=flagged,
        threshold=threshold,
        error_rate=float((1 - probability[flagged]).mean()) if flagged.any() else 0.0,
        noise_rate=noise,
        truth=marks,
        auroc=None if marks is None else auroc(-margin, marks),
        aupr=None if marks is None else average_precision(-margin, marks),
        auroc_second=None if marks is None else auroc(second, marks),
    )


def _warn_of_chance(margin: np.ndarray, labels: np.ndarray) -> None:
    """Of a model that knows no more about labels than which one is the most common."""
    agree, most = float((margin > 0).mean()), float(np.unique(labels, return_counts=True)[1].max() / len(labels))
    if agree <= most:
        warnings.warn(
            f"sui_fast: trained without a sample the model predicts its label for {agree:.0%} of them, and {most:.0%} "
            "have the most common one: it cannot tell which are wrong; pass a better model, or more samples",
            RuntimeWarning,
            stacklevel=4,
        )


def label_error_probability(outputs: np.ndarray, labels: np.ndarray, steps: int = 60) -> tuple[np.ndarray, float]:
    """P(label is wrong) [n] and the noise rate, from the likelihood of the given labels (``find_mislabeled``).

    Args:
        outputs: left-out predictions [n, k], k >= 2. labels: given classes [n].
    """
    n, k = outputs.shape
    ranked = np.sort(outputs, axis=1)
    lead = float(np.median(ranked[:, -1] - ranked[:, -2]))
    shifted = (outputs - ranked[:, -1:]) * min(_DECIDED / max(lead, 1e-300), _MOST_SCALE)
    given = np.eye(k)[labels]
    same, other = np.eye(k), (1 - np.eye(k)) / (k - 1)
    totals, found = [], []
    for sharpness in _SHARPNESS:
        weight = np.exp(sharpness * shifted)
        weight /= weight.sum(1, keepdims=True)
        confusion = 0.9 * same + 0.1 * other  # [true, given]
        for _ in range(steps):  # expectation maximisation
            joint = weight * confusion[:, labels].T  # [n, true]
            likelihood = np.maximum(joint.sum(1, keepdims=True), 1e-300)
            counts = (joint / likelihood).T @ given
            noise = 1 - np.trace(counts) / n
            prior = _PRIOR * ((1 - noise) * same + noise * other)
            confusion = (counts + prior) / (counts + prior).sum(1, keepdims=True)
        total = np.log(likelihood).sum() + (prior * np.log(np.maximum(confusion, 1e-300))).sum()
        totals.append(total - np.log(sharpness / _TYPICAL) ** 2 / (2 * _SPREAD**2))
        found.append(1 - joint[np.arange(n), labels] / likelihood[:, 0])
    share = np.exp(np.array(totals) - max(totals))
    probability = share @ np.array(found) / share.sum()
    return probability, float(probability.mean())
