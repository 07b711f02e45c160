"""Keeping few samples: drop the least informative, step by step, as the information of the rest changes."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm

from .._errors import ArgumentError, complaint, one_of
from ..jacobians import as_samples
from ..measures import suggested_label
from ..review import Review, read_review
from ..scores import Scores
from ..targets import loss_targets
from .features import FeatureProblem, shrinking_problem
from .results import NAMES, Result

METHODS = ("iterative", "one-shot")
_RESCALE = 0.75  # the regularisation follows the shrinking set whenever this share is left


@dataclass(frozen=True, eq=False)
class Summary(Result):
    """The samples to keep.

    Attributes:
        ids: of the kept samples, in the order of the data. kept: their numbers.
        order: numbers of all samples, those to drop first in front (before them what a review dropped); ``at(m)`` keeps
            the last m.
        information: of each sample when it was dropped, or last computed, in nats [n].
        labels: classes of all samples [n], after the review, or None. method, by: how it was chosen.
        accuracy: {kept samples: validation accuracy of the linearised model retrained on them}, where there is one.
        reviewed_out: numbers of the samples that a review dropped.
        reg: of the mean loss, as given or found; None where only scores were ranked. Train with it on what is kept:
            ``reg="auto"`` anew would be misled, for the kept samples are the hard ones.
        rank: of the sketch that stood for the kernel; None for an exact one.
    """

    title: ClassVar[str] = "Summary of the training set"
    ids: np.ndarray
    kept: np.ndarray
    order: np.ndarray
    information: np.ndarray
    labels: np.ndarray | None
    method: str
    by: str
    all_ids: np.ndarray
    accuracy: dict[int, float]
    reviewed_out: np.ndarray
    reg: float | None
    rank: int | None

    def at(self, m: int) -> np.ndarray:
        """Numbers of the m samples that are kept at that size (m at least ``len(kept)``), ascending."""
        least, most = len(self.kept), len(self.order) - len(self.reviewed_out)
        if not isinstance(m, int | np.integer) or not least <= m <= most:
            got, todo = repr(m), "Summarize to fewer samples for smaller sizes."
            raise ArgumentError(complaint("m", f"a number from {least} to {most}", got, todo))
        return np.sort(self.order[len(self.order) - m :])

    def summary(self) -> str:
        n, name = len(self.order), NAMES[self.by]
        text = f"{len(self.kept)} of {n} samples kept, {self.method}, least {name} dropped first."
        if self.rank is not None:
            text += f" Information from a sketch of rank {self.rank}."
        if len(self.reviewed_out):
            text += f" {len(self.reviewed_out)} of those left out were dropped by the review."
        if self.labels is not None:
            classes, counts = np.unique(self.labels[self.kept], return_counts=True)
            text += " Per class: " + ", ".join(f"{c}: {m}" for c, m in zip(classes, counts, strict=True)) + "."
        if self.accuracy:
            first, last = max(self.accuracy), min(self.accuracy)
            text += (
                f" Validation accuracy of the linearised model: {self.accuracy[last]:.3f} with {last} samples, "
                f"{self.accuracy[first]:.3f} with {first}."
            )
        return text

    def columns(self) -> dict[str, np.ndarray]:
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = np.arange(len(place))
        found: dict[str, Any] = {"id": self.all_ids, "kept": np.isin(np.arange(len(place)), self.kept)}
        if self.labels is not None:
            found["label"] = self.labels
        return {**found, "dropped_at": place, "information": self.information}

    def _draw(self, ax) -> None:
        if self.accuracy:
            sizes = sorted(self.accuracy)
            ax.plot(np.array(sizes) / len(self.order), [self.accuracy[m] for m in sizes], marker=".")
            ax.set(xlabel="share of the samples kept", ylabel="validation accuracy, linearised model")
        else:
            ax.plot(np.maximum(self.information[self.order[len(self.reviewed_out) :]], 1e-300))
            ax.set(xlabel="samples in the order of dropping", ylabel=f"{NAMES[self.by]} then, nats", yscale="log")


def summarize(
    model: torch.nn.Module | Scores,
    train=None,
    val=None,
    m: int | float = 0.2,
    *,
    method: str = "iterative",
    by: str | None = None,
    step: float = 0.05,
    quota: str | dict[int, int] | None = None,
    reg: float | str = "auto",
    rank: int | None = None,
    review: Review | str | os.PathLike | None = None,
    progress: bool = True,
    **arguments,
) -> Summary:
    """Choose m samples to keep by dropping the least informative.

    "iterative" drops ``step`` of the samples that are left, computes the information of the rest in their absence and
    goes on. The inverse kernel is down-dated for that, not computed again (``loo/downdate.py``); with each quarter of
    the samples gone, lambda of the mean loss is adapted to the smaller set at the price of one factorisation.
    "one-shot" ranks once; samples that stand for each other then leave together, so below one half it warns.

    Args:
        model, train, val: as in ``score``. For "one-shot" a ``Scores`` is enough.
        m: samples to keep, or their share (of those the review left) where it is below 1.
        by: "fsi" (default where val is given) or "si".
        step: share of the remaining samples that leave between two looks.
        quota: per class, the samples that must stay: {class: samples}, "equal" or "proportional" shares of m.
        rank: of a sketch in place of the exact kernel: n k r float32 numbers in memory, each look costs what ``score``
            does after its features. None: the exact kernel up to 32,000 rows (samples x outputs), beyond them 1024.
        review: decisions of a person, from ``read_review``, or the CSV file that the report exports: samples it drops
            are not used, those it relabels count with their new label.
        reg: of the mean loss; "auto": that with the smallest error of models trained on m random samples, judged on the
            others. Few samples need more of it than all of them, where the leave-one-out error of ``score`` has its
            minimum: with that one the choice is made for a model that nearly interpolates.
        progress, arguments: of ``score``: loss, time, lr, dynamics, convention, outputs, params, batch_size, dtype.
    Returns:
        Summary. The same arguments give the same samples; ties go to the later sample.
    Raises:
        As ``score``; ArgumentError for an m or a quota that cannot be; DataError for a review of other data.
    """
    one_of("method", method, METHODS)
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < 1:
        raise ArgumentError(complaint("step", "a share between 0 and 1", repr(step), "Pass 0.05, say."))
    if by is None:
        by = "fsi" if val is not None or isinstance(model, Scores) and "fsi" in model.values else "si"
    one_of("by", by, ("si", "fsi"))
    problem = remaining = scores = None
    if review is not None and not isinstance(review, Review):
        if not isinstance(review, str | os.PathLike):
            todo = "Pass sui_fast.read_review('review.csv')."
            raise ArgumentError(complaint("review", "a Review or the path of its file", repr(review), todo))
        review = read_review(review)
    if isinstance(model, Scores):
        scores = model
        if method != "one-shot" or train is not None:
            got, todo = f"Scores and method={method!r}", "Pass model and data, or method='one-shot'."
            raise ArgumentError(complaint("model", "a model for the iterative method", got, todo))
        if review is not None and (review.decisions == "relabel").any():
            got, todo = "Scores of the old labels and a review with new ones", "Pass model and data, with review=."
            raise ArgumentError(complaint("review", "no new labels beside Scores", got, todo))
        ids, labels = scores.ids, scores.labels
        used = _used(review, ids)
    else:
        if train is None:
            raise ArgumentError(complaint("train", "the training data", None, "Pass (inputs, targets)."))
        if by == "fsi" and val is None:
            raise ArgumentError(complaint("val", "validation samples for 'fsi'", None, "Pass val=..., or by='si'."))
        samples = as_samples(train, with_targets=True, argument="train")
        ids, used = samples.ids, _used(review, samples.ids)
        clean = samples if review is None else review.clean(samples)
        m = _size(m, len(used))
        automatic = isinstance(reg, str) and reg == "auto"
        common = dict(reg=0.0 if automatic else reg, rank=rank, progress=progress, **arguments)
        problem = shrinking_problem(model, clean, val, **common)
        if automatic:
            problem.choose_reg_for(m)
        labels = None
        if problem.labels is not None:
            labels = loss_targets(arguments.get("loss", "mse"), samples.targets, problem.goal.k)[1].cpu().numpy().copy()
            labels[used] = problem.labels.cpu().numpy()
        remaining = problem.remaining()
    n = len(used)
    m = _size(m, n)
    own = None if labels is None else labels[used]
    least = _quota(quota, own, m)
    if method == "one-shot" and 2 * m < n:
        warnings.warn(
            f"sui_fast: one-shot summaries below 50% ({m} of {n} here) drop samples together with those that make them "
            "redundant; use method='iterative'",
            RuntimeWarning,
            stacklevel=2,
        )
    dropped: list[np.ndarray] = []
    information = np.full(n, np.nan)
    kept, base = np.arange(n), n
    bar = tqdm(total=n - m, desc="summarize", delay=2, leave=False, disable=not progress)
    while len(kept) > m or not dropped:
        if remaining is not None:
            if len(kept) <= _RESCALE * base:
                remaining.rescale()
                base = len(kept)
            value = remaining.sqnorm(by == "fsi").cpu().numpy() / 2
        else:
            value = scores[by][used[kept]]
        information[kept] = value
        count = len(kept) - m
        if method == "iterative":
            count = min(count, max(1, int(step * len(kept))))
        out = _lowest(value, kept, count, own, least)
        dropped.append(kept[out])
        kept = np.setdiff1d(kept, dropped[-1])
        if remaining is not None and method == "iterative" and count:
            remaining.drop(dropped[-1])
        bar.update(count)
        if not count:
            break
    bar.close()
    last = kept[np.argsort(information[kept], kind="stable")]
    order = np.concatenate([*dropped, last])
    reviewed_out = np.setdiff1d(np.arange(len(ids)), used)
    found = np.full(len(ids), np.nan)
    found[used] = information
    return Summary(
        ids=ids[used[kept]],
        kept=used[kept],
        order=np.concatenate([reviewed_out, used[order]]),
        information=found,
        labels=labels,
        method=method,
        by=by,
        all_ids=ids,
        accuracy=_accuracies(problem, order, m),
        reviewed_out=reviewed_out,
        reg=None if problem is None else problem.reg,
        rank=problem.rank if isinstance(problem, FeatureProblem) else None,
    )


def _used(review: Review | None, ids: np.ndarray) -> np.ndarray:
    """Numbers of the samples that the review leaves."""
    return np.arange(len(ids)) if review is None else np.flatnonzero(review.stays(ids))


def _size(m, n: int) -> int:
    if isinstance(m, float | np.floating) and 0 < m < 1:
        return max(1, round(float(m) * n))
    if isinstance(m, bool) or not isinstance(m, int | np.integer) or not 1 <= m <= n:
        got, todo = repr(m), "Pass the number of samples to keep, or a share below 1."
        raise ArgumentError(complaint("m", f"a whole number from 1 to {n}, or a share between 0 and 1", got, todo))
    return int(m)


def _quota(quota, labels: np.ndarray | None, m: int) -> dict[int, int]:
    """Samples of each class that must stay."""
    if quota is None:
        return {}
    if labels is None:
        raise ArgumentError(complaint("quota", "None for targets that name no class", repr(quota), "Drop it."))
    classes, counts = (x.tolist() for x in np.unique(labels, return_counts=True))
    held = dict(zip(classes, counts, strict=True))
    if isinstance(quota, str) and quota == "equal":
        share = {c: m // len(classes) for c in classes}
        return {c: min(held[c], share[c]) for c in classes}
    if isinstance(quota, str) and quota == "proportional":
        return {c: m * held[c] // len(labels) for c in classes}
    good = isinstance(quota, dict) and all(c in held and 0 <= count <= held[c] for c, count in quota.items())
    if not good or sum(quota.values()) > m:
        what = f"'equal', 'proportional' or {{class: samples}} with at most {m} samples in all, no more than there are"
        raise ArgumentError(complaint("quota", what, repr(quota), f"The classes hold {held}."))
    return dict(quota)


def _lowest(value: np.ndarray, kept: np.ndarray, count: int, labels, least: dict[int, int]) -> np.ndarray:
    """Positions of the ``count`` lowest values that may leave, lowest first; of ties the later sample leaves first."""
    order = np.lexsort((-kept, value))
    if not least:
        return order[:count]
    own = labels[kept]
    free = {c: int((own == c).sum()) - minimum for c, minimum in least.items()}
    out = []
    for position in order:
        if len(out) == count:
            break
        c = int(own[position])
        if free.get(c, 1) > 0:
            free[c] = free.get(c, 1) - (c in free)
            out.append(position)
    return np.array(out, dtype=np.int64)


def _accuracies(problem, order: np.ndarray, m: int) -> dict[int, float]:
    """Of the linearised model trained on the mean loss of the kept samples, at up to eight sizes."""
    if problem is None or problem.val_labels is None:
        return {}
    n = len(order)
    sizes = np.unique(np.geomspace(m, n, 8).round().astype(int))
    right, middle = problem.val_labels.cpu(), 0.5 if problem.goal.kind == "mse" else 0.0
    found = {}
    for size in sizes.tolist():
        f = problem.predictions(np.sort(order[n - size :]), convention="mean").cpu()
        found[size] = float((suggested_label(f, middle) == right).double().mean())
    return found
