"""A person's decisions about samples, as the report exports them: keep, drop, or give another label."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._errors import ArgumentError, DataError, complaint

COLUMNS = ("id", "decision", "label", "new_label")
DECISIONS = ("keep", "relabel", "drop")


@dataclass(frozen=True)
class Review:
    """Decisions of a review, one entry per decided sample.

    Attributes:
        ids: numpy [d], integers where all of them are, else text.
        decisions: "keep", "relabel" or "drop", numpy [d].
        labels, new_labels: label before and after, numpy [d], integers where all of them are, else text; the two are
            equal but for "relabel".
    """

    ids: np.ndarray
    decisions: np.ndarray
    labels: np.ndarray
    new_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        counts = ", ".join(f"{(self.decisions == what).sum()} {what}" for what in DECISIONS)
        return f"Review({len(self)} decisions: {counts})"

    def apply(self, ids: Sequence | np.ndarray, labels: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which samples stay, and the labels they have now.

        Args:
            ids: of all samples, [n]. labels: of all samples, [n]; not changed.
        Returns:
            kept bool [n] (samples without a decision stay) and labels [n], a copy with the new ones.
        Raises:
            DataError: a decided id is not among ``ids``, or not once only.
        """
        ids, labels = np.asarray(ids), np.array(labels)
        if len(ids) != len(labels):
            raise ArgumentError(complaint("labels", f"one per id ({len(ids)})", len(labels), "Align them."))
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(ids.tolist()):
            rows.setdefault(str(name), []).append(row)
        kept = np.ones(len(ids), dtype=bool)
        if not (labels.dtype.kind in "iu" and self.new_labels.dtype.kind in "iu"):
            labels = labels.astype(str).astype(object)
        for name, what, new in zip(self.ids.tolist(), self.decisions, self.new_labels.tolist(), strict=True):
            found = rows.get(str(name), [])
            if len(found) != 1:
                got = f"{name!r} {len(found)} times"
                raise DataError(complaint("ids", "every reviewed id once", got, "Pass the data that were reviewed."))
            if what == "drop":
                kept[found[0]] = False
            elif what == "relabel":
                labels[found[0]] = new
        return kept, labels.astype(str) if labels.dtype == object else labels


def read_review(path: str | os.PathLike) -> Review:
    """Read the CSV file that the report's "Export" button writes (columns id, decision, label, new_label).

    Args:
        path: the file.
    Returns:
        Review; ``review.apply(ids, labels)`` gives which samples stay, and their labels.
    Raises:
        DataError: another header, an unknown decision, a short line, or an id decided twice (with the line).
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != COLUMNS:
        got = ",".join(lines[0]) if lines else "an empty file"
        raise DataError(complaint("path", f"a CSV file with the header {','.join(COLUMNS)}", got, "Export it again."))
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line]
    seen: set[str] = set()
    for number, line in rows:
        if len(line) != len(COLUMNS) or line[1] not in DECISIONS or line[0] in seen:
            what = f"an id once, one of {', '.join(DECISIONS)}, and {len(COLUMNS)} fields"
            raise DataError(complaint("path", what, f"{','.join(line)!r} at row {number}", "Export the review again."))
        seen.add(line[0])
    columns = [np.array([line[i] for _, line in rows], dtype=str) for i in range(len(COLUMNS))]
    return Review(_numbers(columns[0]), columns[1], *_same_kind(columns[2], columns[3]))


def _numbers(texts: np.ndarray) -> np.ndarray:
    """Integers where every text is one as Python writes it, so that "007" stays a name."""
    try:
        numbers = [int(text) for text in texts]
        return np.array(numbers, dtype=np.int64) if [str(x) for x in numbers] == texts.tolist() else texts
    except (ValueError, OverflowError):
        return texts


def _same_kind(labels: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = _numbers(labels), _numbers(new)
    return (first, second) if first.dtype.kind == second.dtype.kind else (labels, new)
