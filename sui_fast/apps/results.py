"""What every application returns: a frozen record with a title, sentences, columns and a plot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from .._errors import ArgumentError, complaint

NAMES = {"si": "SI", "fsi": "F-SI", "loo_margin": "margin"}  # of measures, in sentences


@dataclass(frozen=True, eq=False)
class Result:
    """Base of the results: ``title``, ``summary()``, ``columns()``, ``table``, ``plot(ax)``."""

    title: ClassVar[str] = ""

    def summary(self) -> str:
        """What was found, in a few sentences of plain text."""
        raise NotImplementedError

    def columns(self) -> dict[str, np.ndarray]:
        """The numbers behind it, arrays of one length by name."""
        raise NotImplementedError

    def _draw(self, ax) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.title}\n{self.summary()}"

    @property
    def table(self) -> pa.Table:
        """``columns()`` as a pyarrow table."""
        return pa.table({name: pa.array(column) for name, column in self.columns().items()})

    def to_pandas(self):
        """``columns()`` as a pandas DataFrame (pandas must be installed)."""
        return self.table.to_pandas()

    def plot(self, ax=None):
        """Draw with matplotlib (extra ``report``).

        Args:
            ax: axes to draw on; a path to write a picture to; None: a figure of its own.
        Returns:
            The matplotlib figure.
        """
        path = ax if isinstance(ax, str | os.PathLike) else None
        if ax is None or path is not None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                got, todo = "matplotlib is not installed", "pip install 'sui-fast[report]'."
                raise ArgumentError(complaint("plot", "matplotlib", got, todo)) from error
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            ax = figure.add_subplot()
        self._draw(ax)
        ax.set_title(self.title)
        if path is not None:
            ax.figure.savefig(path, dpi=150)
        return ax.figure


def count_axis(ax) -> None:
    """Numbers of samples upwards, few and many both seen: logarithmic from 1 on, ticks as people write them."""
    most = ax.get_ylim()[1]
    ticks = [0, *(m * 10**e for e in range(int(np.log10(max(most, 1))) + 1) for m in (1, 2, 5) if m * 10**e <= most)]
    ax.set(ylabel="samples", yscale="symlog", ylim=(0, most * 1.1))
    ax.set_yticks(ticks, [f"{t:d}" for t in ticks], minor=False)
    ax.set_yticks([], minor=True)


def plain(text: Any) -> str:
    """Text of the user's for matplotlib, which reads dollars as mathematics and cannot draw half a surrogate pair."""
    return str(text).encode("utf-8", "replace").decode().replace("$", r"\$")


def auroc(value: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive has a larger value than a negative; ties count half, nan where one kind is missing."""
    value, positive = np.asarray(value), np.asarray(positive, dtype=bool)
    p, n = positive.sum(), (~positive).sum()
    if not p or not n:
        return float("nan")
    _, place, counts = np.unique(value, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def average_precision(value: np.ndarray, positive: np.ndarray) -> float:
    """Area under precision against recall: sum of precision at every recall step, ties taken together."""
    value, positive = np.asarray(value), np.asarray(positive, dtype=bool)
    if not positive.any():
        return float("nan")
    order = np.argsort(-value, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(value[order]) != 0, True))
    found = np.cumsum(positive[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / positive.sum())


def check_truth(truth: Any, n: int, argument: str = "truth") -> np.ndarray | None:
    """A mark per sample, bool [n], or None."""
    if truth is None:
        return None
    marks = truth.detach().cpu().numpy() if hasattr(truth, "detach") else np.asarray(truth)
    if marks.shape != (n,) or marks.dtype.kind not in "biuf":
        got = f"{marks.dtype} of shape {list(marks.shape)}"
        raise ArgumentError(complaint(argument, f"one mark per sample, bool [{n}]", got, "Mark the samples to find."))
    return marks.astype(bool)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; nan for constant or fewer than two values."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation, ties at their mean rank."""
    return correlation(ranks(a), ranks(b))


def ranks(x: np.ndarray) -> np.ndarray:
    """Rank of each value from 1, ties at their mean rank."""
    _, place, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
