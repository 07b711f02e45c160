"""Two score files of the same samples: do they rank them alike, and which samples moved?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import ArgumentError, DataError, complaint
from ..apps.results import plain
from ..scores import Scores
from . import sections as parts
from .page import write_page
from .payload import NAMES, column, exponent_of, payload, rows_shown, text_of


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side, one row per sample that both scored.

    Attributes:
        measure: the measure that ranks. names: of the two runs.
        a, b: Scores of the common samples, in the order of A.
        pearson, spearman: {measure: correlation over the common samples with finite values; nan where undefined}.
        move: (rank in B - rank in A) / (n - 1), [n], between -1 and 1; ranks ascend with the measure.
        only_a, only_b: ids that the other run lacks. relabelled: common samples whose labels differ.
    """

    measure: str
    names: tuple[str, str]
    a: Scores = field(repr=False)
    b: Scores = field(repr=False)
    pearson: dict[str, float]
    spearman: dict[str, float]
    move: np.ndarray = field(repr=False)
    only_a: np.ndarray = field(repr=False)
    only_b: np.ndarray = field(repr=False)
    relabelled: int = 0

    def __len__(self) -> int:
        return len(self.a)

    @property
    def title(self) -> str:
        """Names of both runs."""
        return f"{self.names[0]} against {self.names[1]}"

    def movers(self, m: int = 20) -> np.ndarray:
        """Ids of the m samples whose rank changed most, the largest change first."""
        return self.a.ids[np.argsort(-np.abs(self.move), kind="stable")[:m]]

    def columns(self) -> dict[str, np.ndarray]:
        """id, the measure in both runs, and the move."""
        a, b = self.a[self.measure], self.b[self.measure]
        return {"id": self.a.ids, f"{self.measure} A": a, f"{self.measure} B": b, "move": self.move}

    def summary(self) -> str:
        """What was found, in a few sentences of plain text."""
        lines = [f"{len(self)} common samples; {len(self.only_a)} only in A, {len(self.only_b)} only in B"]
        if self.relabelled:
            lines[0] += f"; {self.relabelled} with another label"
        for name in self.spearman:
            lines.append(f"{name}: Spearman {self.spearman[name]:.4f}, Pearson {self.pearson[name]:.4f}")
        largest = np.argsort(-np.abs(self.move), kind="stable")[:5]
        moved = ", ".join(f"{self.a.ids[i]} ({100 * self.move[i]:+.0f}%)" for i in largest)
        lines.append(f"largest moves by {self.measure}, in percent of the ranks: {moved}")
        return "\n".join(lines)

    def plot(self):
        """Scatter of the two runs, a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 4.2))
        axes = figure.add_subplot()
        axes.scatter(self.a[self.measure], self.b[self.measure], s=8, alpha=0.7)
        axes.set_xlabel(f"{self.measure}, {plain(self.names[0])}")
        axes.set_ylabel(f"{self.measure}, {plain(self.names[1])}")
        return figure

    def report(self, path: str | os.PathLike, *, class_names: Sequence[str] | None = None) -> Path:
        """Write one self-contained HTML file: correlations, scatter, samples by the size of their move, classes."""
        rows = _rows(self)
        a, b, move = self.a.select(rows), self.b.select(rows), self.move[rows]
        shared = [self.measure, *(name for name in self.spearman if name != self.measure)]
        cols = []
        for name in shared:
            unit = self.a.units.get(name, "")
            exponent = exponent_of(np.concatenate([self.a[name], self.b[name]])) if unit == "nats" else 0
            for letter, side in (("A", a), ("B", b)):
                made = column(name, side[name], unit, exponent=exponent)
                cols.append({**made, "key": f"{letter} {name}", "name": f"{made['name']} {letter}"})
            logs = all(c["log"] for c in cols[-2:])
            cols[-2]["log"] = cols[-1]["log"] = logs
        about = "change of the rank from A to B, in percent of all ranks"
        cols.insert(2, {**column("move", 100 * move, about=about, absolute=True), "unit": "%"})
        start = {
            "x": f"A {self.measure}", "y": f"B {self.measure}", "hist": "move", "sort": "move", "descending": True,
            "diagonal": True,
        }  # fmt: skip
        data = payload(a, cols, class_names=class_names, suspects=np.zeros(0, dtype=np.int64), start=start)
        data["suggested"] = None
        names = dict(zip(data["classes"], data["names"], strict=True))
        sections = [("Agreement", "agreement", self._agreement())]
        if self.a.labels is not None and len(self.a):
            sections.append(("Classes", "classes", self._classes(names)))
        for letter, run in (("A", self.a), ("B", self.b)):
            sections.append((f"Run card of {letter}", f"card-{letter.lower()}", parts.run_card(run)))
        lead = f"A is {self.names[0]}, B is {self.names[1]}. {len(self)} samples are in both"
        lead += ", of which the page shows " + (f"{len(rows)}." if len(rows) < len(self) else "all.")
        return write_page(path, self.title, lead, self._tiles(), sections, {**data, "review": False})

    def _tiles(self) -> str:
        cells = [
            ("common samples", len(self), ""),
            (f"Spearman, {NAMES.get(self.measure, self.measure)}", self.spearman[self.measure], "of the ranks"),
            (f"Pearson, {NAMES.get(self.measure, self.measure)}", self.pearson[self.measure], "of the values"),
            ("median move", f"{100 * np.median(np.abs(self.move)):.1f}%" if len(self) else "\u2013", "of all ranks"),
            ("largest move", f"{100 * np.abs(self.move).max():.0f}%" if len(self) else "\u2013", "of all ranks"),
            ("only in A", len(self.only_a), ""),
            ("only in B", len(self.only_b), ""),
        ]
        return parts.figures(cells)

    def _agreement(self) -> str:
        lines = []
        tops = [share for share in (0.01, 0.05, 0.1, 0.2) if share * len(self) >= 1]
        for name in self.spearman:
            x, y = self.a[name], self.b[name]
            overlap = []
            for share in tops:
                m = int(share * len(self))
                both = np.intersect1d(np.argsort(-x, kind="stable")[:m], np.argsort(-y, kind="stable")[:m])
                overlap.append(f"<td>{len(both) / m:.0%}</td>")
            lines.append(
                f"<tr><th scope=row>{parts.safe(NAMES.get(name, name))}</th><td>{self.spearman[name]:.4f}</td>"
                f"<td>{self.pearson[name]:.4f}</td>{''.join(overlap)}</tr>"
            )
        heads = "".join(f"<th scope=col>common in the top {share:.0%}</th>" for share in tops)
        note = f"<p>{self.relabelled} samples have another label in B.</p>" if self.relabelled else ""
        return (
            f"{note}<div class=wide><table class=plain><thead><tr><th scope=col>measure</th><th scope=col>Spearman</th>"
            f"<th scope=col>Pearson</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )

    def _classes(self, names: dict[str, str]) -> str:
        v = {letter: side[self.measure] for letter, side in (("A", self.a), ("B", self.b))}
        both = np.concatenate([v["A"], v["B"]])
        exponent = exponent_of(both) if self.a.units.get(self.measure) == "nats" else 0
        place = parts.positions(both, bool((both[np.isfinite(both)] >= 0).all() and (both > 0).any()))
        lines = []
        for value in np.unique(self.a.labels)[:200]:
            rows = self.a.labels == value
            title = parts.safe(names.get(text_of(value), text_of(value)))
            cells = "".join(parts.median_and_bar(place, x[rows], exponent) for x in v.values())
            within = _correlation(_ranks(v["A"][rows]), _ranks(v["B"][rows]))
            lines.append(
                f"<tr><th scope=row>{title}</th><td>{rows.sum()}</td>{cells}<td>{within:.3f}</td>"
                f"<td>{_signed(100 * np.mean(self.move[rows]))}%</td></tr>"
            )
        unit = parts.unit_of(self.a, self.measure, exponent)
        heads = "".join(
            f"<th scope=col>median {parts.safe(unit)} {letter}</th><th scope=col class=bars>10% to 90%</th>"
            for letter in v
        )
        return (
            f"<div class=wide><table class=plain><thead><tr><th scope=col>class</th><th scope=col>samples</th>{heads}"
            "<th scope=col>Spearman within</th><th scope=col>mean move</th></tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )


def compare(
    a: Scores | str | os.PathLike,
    b: Scores | str | os.PathLike,
    *,
    measure: str | None = None,
    names: tuple[str, str] | None = None,
) -> Comparison:
    """Put two runs side by side, sample by sample.

    Args:
        a, b: Scores, or files that ``Scores.save`` wrote.
        measure: the one that ranks; default: F-SI where both have it, else their first common one.
        names: of the two runs; default: the file names.
    Returns:
        Comparison; ``.report(path)`` draws it.
    Raises:
        DataError: no common ids, or an id twice. ArgumentError: no common measure, or not the one asked for.
    """
    if names is not None and not (isinstance(names, list | tuple) and [type(x) for x in names] == [str, str]):
        raise ArgumentError(complaint("names", "two names", repr(names), "Pass ('first', 'second')."))
    runs = [x if isinstance(x, Scores) else Scores.load(x) for x in (a, b)]
    given = names or tuple("AB"[i] if isinstance(x, Scores) else Path(x).name for i, x in enumerate((a, b)))
    keys = [np.array([text_of(x) for x in run.ids.tolist()], dtype=str) for run in runs]
    for name, key in zip("ab", keys, strict=True):
        if len(np.unique(key)) < len(key):
            twice = next(x for x in key.tolist() if (key == x).sum() > 1)
            raise DataError(complaint(name, "every id once", f"{twice!r} twice", "Give the samples ids of their own."))
    _, at_a, at_b = np.intersect1d(*keys, return_indices=True)
    if not len(at_a):
        got = f"ids as {keys[0][:2].tolist()} and {keys[1][:2].tolist()}"
        raise DataError(complaint("a, b", "scores of common samples", got, "Compare runs over the same data set."))
    order = np.argsort(at_a)
    left, right = runs[0].select(at_a[order]), runs[1].select(at_b[order])
    shared = [name for name in left.values if name in right.values]
    measure = ("fsi" if "fsi" in shared else next(iter(shared), None)) if measure is None else measure
    if not isinstance(measure, str) or measure not in shared:
        got = f"{', '.join(runs[0].values)} and {', '.join(runs[1].values)}"
        expected = "one that both runs have"
        raise ArgumentError(complaint("measure", expected, f"{measure!r} of {got}", "Score it in both."))
    pearson, spearman = {}, {}
    for name in shared:
        fine = np.isfinite(left[name]) & np.isfinite(right[name])
        x, y = left[name][fine], right[name][fine]
        pearson[name], spearman[name] = _correlation(x, y), _correlation(_ranks(x), _ranks(y))
    move = (_ranks(right[measure]) - _ranks(left[measure])) / max(len(left) - 1, 1)
    differ = 0
    if left.labels is not None and right.labels is not None:
        differ = int((left.labels.astype(str) != right.labels.astype(str)).sum())
    rest = [np.setdiff1d(np.arange(len(key)), at) for key, at in zip(keys, (at_a, at_b), strict=True)]
    return Comparison(
        measure, tuple(map(text_of, given)), left, right, pearson, spearman, move,
        runs[0].ids[rest[0]], runs[1].ids[rest[1]], differ,
    )  # fmt: skip


def _rows(c: Comparison) -> np.ndarray:
    everything = Scores(c.a.ids, {"a": c.a[c.measure], "b": c.b[c.measure], "move": c.move}, {}, {})
    return rows_shown(everything)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 0 .. n - 1, ties share their mean; NaN last."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse.ravel()] if len(x) else np.zeros(0)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; nan where a side does not vary."""
    if len(x) < 2:
        return float("nan")
    x, y = _centred(x), _centred(y)
    size = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / size, -1.0, 1.0)) if size > 0 else float("nan")


def _signed(value: float) -> str:
    """One digit after the point and a sign, but for zero."""
    text = f"{value:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "\u2212")


def _centred(x: Any) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    scale = np.abs(x).max()
    x = x / scale if scale > 0 else x
    return x - x.mean()
