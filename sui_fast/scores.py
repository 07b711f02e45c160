"""Scores: one row per sample, a column per measure, with settings and diagnostics; Parquet in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ._errors import ArgumentError, DataError, complaint, path_of, whole
from .previews import extra_columns, is_extra, read_extras

_MAGIC = b"sui_fast.scores"
_FORMAT = 1


class Scores:
    """Result of ``score``.

    Attributes:
        ids: id of each sample (or group), numpy [n].
        values: {measure: float64 [n]}; ``scores["si"]`` for short.
        settings: arguments of the run. diagnostics: method, rank, effective dimension, condition, coverage, seconds ...
        units: {measure: unit}.
        labels: class of each sample, int64 [n], or None.
        inputs: small inputs for the report [n, ...], or None; a file keeps pictures in 8 bits, numbers in float32.
        left_out: predictions of the model trained without each sample [n, k], with "loo_margin"; not saved.
        texts: text of each sample for the report, list of n, or None.
        suggested: class that the model trained without the sample gives it, int64 [n], or None.
        neighbours: {"other", "same"}: the nearest samples of another and of the same class by the kernel, row numbers
            int64 [n, q], -1 where there are fewer; {"other_similarity", "same_similarity"}: at most 1; or None.
        candidates: Scores of samples that were not trained on, where ``score`` was given some, or None; saved apart.
    """

    def __init__(
        self,
        ids: np.ndarray,
        values: dict[str, np.ndarray],
        settings: dict[str, Any],
        diagnostics: dict[str, Any],
        *,
        units: dict[str, str] | None = None,
        labels: np.ndarray | None = None,
        inputs: np.ndarray | None = None,
        texts: Sequence[str] | None = None,
        suggested: np.ndarray | None = None,
        neighbours: dict[str, np.ndarray] | None = None,
        left_out: np.ndarray | None = None,
    ):
        self.ids = np.asarray(ids)
        self.values = {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}
        self.settings, self.diagnostics, self.units = settings, diagnostics, units or {}
        self.labels, self.inputs, self.left_out = labels, inputs, left_out
        self.texts = None if texts is None else list(map(str, texts))
        self.suggested, self.neighbours = suggested, neighbours
        self.candidates: Scores | None = None
        extras = {"texts": self.texts, "inputs": inputs, "suggested": suggested, **(neighbours or {})}
        for name, column in extras.items():
            if column is not None and len(column) != len(self.ids):
                raise ArgumentError(complaint(name, f"one entry per id ({len(self.ids)})", len(column), "Align them."))
        for name, column in {**self.values, "labels": labels}.items():
            if column is not None and np.shape(column) != (len(self.ids),):
                raise ArgumentError(
                    complaint(
                        name, f"one value per id ({len(self.ids)})", f"shape {list(np.shape(column))}", "Align them."
                    )
                )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, measure: str) -> np.ndarray:
        if not isinstance(measure, str) or measure not in self.values:
            raise ArgumentError(
                complaint(
                    "measure", f"one of {', '.join(self.values)}", repr(measure), "Ask score() for it with measures=."
                )
            )
        return self.values[measure]

    def __repr__(self) -> str:
        parts = [f"{name} {column.min():.3g}..{column.max():.3g}" for name, column in self.values.items() if len(self)]
        return f"Scores({len(self)} rows: {', '.join(parts)}; {self.diagnostics.get('form', '')})"

    @property
    def table(self) -> pa.Table:
        """pyarrow table: id, label where known, one float64 column per measure with its unit as field metadata."""
        columns, fields = [pa.array(self.ids)], [pa.field("id", pa.array(self.ids).type)]
        if self.labels is not None:
            columns.append(pa.array(self.labels))
            fields.append(pa.field("label", columns[-1].type))
        for name, column in self.values.items():
            columns.append(pa.array(column))
            fields.append(pa.field(name, pa.float64(), metadata={"unit": self.units.get(name, "")}))
        about = {
            "format": _FORMAT,
            "settings": self.settings,
            "diagnostics": self.diagnostics,
            "scale": "SI = ||dw||^2 / (2 sigma^2), F-SI = mean ||df||^2 / (2 sigma^2), in nats",
        }
        schema = pa.schema(fields, metadata={_MAGIC: json.dumps(about, default=str).encode()})
        return pa.Table.from_arrays(columns, schema=schema)

    def to_pandas(self):
        """The table as a pandas DataFrame (pandas must be installed)."""
        return self.table.to_pandas()

    def to_datasets(self, dataset, prefix: str = ""):
        """A Hugging Face Dataset with a column per measure added; rows in the order of the scores.

        Args:
            dataset: what was scored. prefix: of the new columns' names.
        Raises:
            ArgumentError: another number of rows, or a column of that name.
        """
        if not hasattr(dataset, "add_column") or len(dataset) != len(self):
            got = f"{len(dataset)} rows" if hasattr(dataset, "add_column") else type(dataset).__name__
            todo = "Pass the data set that was scored."
            raise ArgumentError(complaint("dataset", f"a Hugging Face Dataset of {len(self)} rows", got, todo))
        taken = [prefix + name for name in self.values if prefix + name in dataset.column_names]
        if taken:
            got = f"{taken[0]!r}, which is there"
            raise ArgumentError(complaint("prefix", "names that are free", got, "Pass another one."))
        for name, column in self.values.items():
            dataset = dataset.add_column(prefix + name, column)
        return dataset

    def save(self, path: str | os.PathLike, *, previews: bool = True) -> Path:
        """Write the table with settings and units to a Parquet file; the file appears whole or not at all.

        Args:
            path: the file. previews: also keep what a report shows of the samples: small pictures, numbers or texts.
        Returns:
            the path.
        """
        path = path_of("path", path)
        table = self.table
        extras = {"suggested": self.suggested, **(self.neighbours or {})}
        if previews:
            extras.update(input=self.inputs, text=self.texts)
        for field, column in extra_columns(extras):
            if field.name not in table.column_names:
                table = table.append_column(field, column)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            pq.write_table(table, temporary, write_page_checksum=True)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Scores:
        """Read what ``save`` wrote.

        Raises:
            DataError: not a Parquet file, not written by sui_fast, or damaged.
        """
        path = path_of("path", path)
        try:
            path.open("rb").close()  # of a file that is not there pyarrow tells the name alone
            table = pq.read_table(path, page_checksum_verification=True)
            about = json.loads((table.schema.metadata or {})[_MAGIC])
            units = {
                field.name: (field.metadata or {}).get(b"unit", b"").decode()
                for field in table.schema
                if field.name not in ("id", "label") and not is_extra(field)
            }
            ids = _numpy(table["id"])
            values = {name: _numpy(table[name]) for name in units}
            labels = _numpy(table["label"]) if "label" in table.column_names else None
            return cls(
                ids, values, about["settings"], about["diagnostics"], units=units, labels=labels, **read_extras(table)
            )
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                complaint("path", "a Parquet file written by Scores.save", f"{path} ({error})", "Score the data again.")
            ) from error

    def top(self, m: int, by: str | None = None) -> Scores:
        """The m rows with the largest value of a measure (default "fsi", else the first), largest first."""
        return self._ranked(m, by, -1)

    def bottom(self, m: int, by: str | None = None) -> Scores:
        """The m rows with the smallest value of a measure (default "fsi", else the first), smallest first."""
        return self._ranked(m, by, 1)

    def _ranked(self, m: int, by: str | None, direction: int) -> Scores:
        m = whole("m", m)
        column = self[self.default_measure if by is None else by]
        return self.select(np.argsort(direction * column, kind="stable")[:m])

    @property
    def default_measure(self) -> str:
        """The measure that ranks rows unless another is named."""
        return "fsi" if "fsi" in self.values else next(iter(self.values))

    def select(self, rows: np.ndarray) -> Scores:
        """The rows with the given numbers, in that order."""
        return Scores(
            self.ids[rows],
            {name: column[rows] for name, column in self.values.items()},
            self.settings,
            self.diagnostics,
            units=self.units,
            labels=None if self.labels is None else self.labels[rows],
            inputs=None if self.inputs is None else self.inputs[rows],
            left_out=None if self.left_out is None else self.left_out[rows],
            texts=None if self.texts is None else [self.texts[row] for row in np.arange(len(self))[rows]],
            suggested=None if self.suggested is None else self.suggested[rows],
            neighbours=None if self.neighbours is None else _renumbered(self.neighbours, len(self), rows),
        )

    def report(
        self,
        path: str | os.PathLike,
        *,
        title: str = "Unique information of samples",
        sections: Sequence[Any] = (),
        texts: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Path:
        """Write one self-contained HTML file: distributions, samples to sort, filter and review, classes, run card.

        Args:
            path: the file. title: heading.
            sections: results of applications, or one, each with a title, summary(), columns() and plot().
            texts: text of each sample, [n]; default: ``texts``. class_names: a name per class, in the order of labels.
        Returns:
            the path.
        """
        from .report import write_report  # the room to the right: drawn only when asked for

        return write_report(self, path, title=title, sections=sections, texts=texts, class_names=class_names)


def _renumbered(neighbours: dict[str, np.ndarray], n: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Neighbours of some rows, numbered as those rows are; -1 where a neighbour is not among them."""
    rows = np.arange(n)[rows]
    place = np.full(n + 1, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    return {name: found[rows] if "similarity" in name else place[found[rows]] for name, found in neighbours.items()}


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return (
        column.to_numpy(zero_copy_only=False) if not pa.types.is_string(column.type) else np.array(column.to_pylist())
    )
