"""A person's decisions about samples, as the report exports them: keep, drop, or give another label."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ._errors import ArgumentError, DataError, complaint, path_of
from .jacobians.data import Samples, as_samples

_INERT = re.compile(r"^'(?='*\s*[=+\-@][\s\S]*[(|!\[])")  # the mark on text that a spreadsheet would run as a formula
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
        kept = self.stays(ids)
        if not (labels.dtype.kind in "iuf" and self.new_labels.dtype.kind in "iu"):
            labels = labels.astype(str).astype(object)
        for row, what, new in zip(self._rows(ids), self.decisions, self.new_labels.tolist(), strict=True):
            if what == "relabel":
                labels[row] = new
        return kept, labels.astype(str) if labels.dtype == object else labels

    def stays(self, ids: Sequence | np.ndarray) -> np.ndarray:
        """Which samples were not dropped, bool [n]; ids: of all samples. Raises as ``apply``."""
        ids = np.asarray(ids)
        kept = np.ones(len(ids), dtype=bool)
        kept[np.array(self._rows(ids), dtype=np.int64)[self.decisions == "drop"]] = False
        return kept

    def _rows(self, ids: np.ndarray) -> list[int]:
        """Row of each decision."""
        places: dict[str, list[int]] = {}
        for row, name in enumerate(ids.tolist()):
            places.setdefault(str(name), []).append(row)
        rows = []
        for name in self.ids.tolist():
            found = places.get(str(name), [])
            if len(found) != 1:
                got = f"{name!r} {len(found)} times"
                raise DataError(complaint("ids", "every reviewed id once", got, "Pass the data that were reviewed."))
            rows.append(found[0])
        return rows

    def clean(self, data: Any, argument: str = "train") -> Samples:
        """The data set after the review: without what was dropped, with the new labels.

        Args:
            data: what was scored, as ``score`` takes it; classes as integers or one-hot rows. argument: its name.
        Returns:
            Samples, which ``score`` and the applications take in place of the data set.
        Raises:
            DataError: a decided id is not in the data, every sample was dropped, or a new label names no class.
        """
        samples = as_samples(data, with_targets=True, argument=argument)
        targets, kept = samples.targets.clone(), self.stays(samples.ids)
        for row, what, new in zip(self._rows(samples.ids), self.decisions, self.new_labels.tolist(), strict=True):
            if what == "relabel":
                targets[row] = _target(new, targets[row])
        rows = np.flatnonzero(kept)
        if not len(rows):
            todo = "Keep some of them."
            raise DataError(complaint(argument, "at least one sample that stays", "all dropped", todo))
        some = samples.pick(rows)
        some.targets = targets[torch.from_numpy(rows)]
        return some


def _target(label: Any, old: torch.Tensor) -> torch.Tensor:
    """A new label as a target of the kind that was there: a number, or a one-hot row."""
    try:
        number = float(label) if old.is_floating_point() else int(label)
        if old.ndim and len(old) > 1:
            if not 0 <= number < len(old) or number != int(number):
                raise ValueError(f"no class of {len(old)}")
            return torch.nn.functional.one_hot(torch.tensor(int(number)), len(old)).to(old.dtype)
        return torch.full_like(old, number)
    except ValueError as error:
        todo = "Review with the labels that the data have, not with their names."
        raise DataError(complaint("new_label", "a class number", f"{label!r} ({error})", todo)) from None


def read_review(path: str | os.PathLike) -> Review:
    """Read the CSV file that the report's "Export" button writes (columns id, decision, label, new_label).

    Args:
        path: the file.
    Returns:
        Review; ``review.apply(ids, labels)`` gives which samples stay, and their labels.
    Raises:
        DataError: another header, an unknown decision, a short line, or an id decided twice (with the line).
    """
    try:
        with open(path_of("path", path), newline="", encoding="utf-8-sig") as file:
            lines = [[_INERT.sub("", cell) for cell in line] for line in csv.reader(file)]
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(complaint("path", "a readable CSV file", f"{path} ({error})", "Export it again.")) from None
    if not lines or tuple(lines[0]) != COLUMNS:
        got = ",".join(lines[0]) if lines else "an empty file"
        raise DataError(complaint("path", f"a CSV file with the header {','.join(COLUMNS)}", got, "Export it again."))
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line]
    seen: set[str] = set()
    for number, line in rows:
        bare = len(line) != len(COLUMNS) or line[1] not in DECISIONS or line[1] == "relabel" and not line[3].strip()
        if bare or line[0] in seen:
            what = f"an id once, one of {', '.join(DECISIONS)}, and {len(COLUMNS)} fields, a new label to relabel"
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
