"""What the page's script is given: columns, classes, neighbours, texts and thumbnails, within a number of bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import ArgumentError, complaint
from ..measures import input_neighbours
from ..previews import image_shape
from .thumbnails import sprites

if TYPE_CHECKING:
    from ..scores import Scores

MOST_ROWS = 20_000
MOST_BYTES = 4_700_000  # of the data: a page stays below 5 MB
_MOST_PIXELS, _MOST_TEXT, _LONGEST_TEXT = 3_000_000, 2_500_000, 4_000
_MOST_FEATURES, _MOST_PRODUCTS, _MOST_SUSPECTS = 64, 2e10, 300
NAMES = {
    "si": "SI",
    "fsi": "F-SI",
    "loo_margin": "margin",
    "loo_residual": "LOO residual",
    "leverage": "leverage",
    "si_langevin": "SI (Langevin)",
    "si_sgd": "SI (SGD)",
}
ABOUT = {
    "si": "information about the final weights that only this sample gives",
    "fsi": "information about the predictions on the validation samples that only this sample gives",
    "loo_margin": "how clearly the model trained without the sample predicts its label; negative: it disagrees",
    "loo_residual": "distance between target and prediction of the model trained without the sample",
    "leverage": "how far the model's output at the sample follows its own target",
    "si_langevin": "information about the final weights, Langevin noise",
    "si_sgd": "information about the final weights, noise of SGD at its steady state",
}
_FIRST = ("si", "fsi", "loo_margin")
_PLAIN = ("", "outputs", "units of the targets")  # units that say nothing new in a heading
PREFIXES = {-15: "f", -12: "p", -9: "n", -6: "\u00b5", -3: "m", 0: "", 3: "k", 6: "M"}


def text_of(x: Any) -> str:
    """Text that UTF-8 can carry, whatever is given."""
    return str(x).encode("utf-8", "replace").decode()


def column(key: str, values: np.ndarray, unit: str = "", *, exponent: int | None = None, **more: Any) -> dict[str, Any]:
    """One column of numbers: what it is called, how it is shown, and its values with six digits."""
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    exponent = exponent_of(values) if exponent is None and unit == "nats" else exponent or 0
    positive = finite[finite > 0]
    low, high = np.quantile(positive, [0.01, 0.99]) if len(positive) else (1.0, 1.0)
    spread = (finite >= 0).all() and high > 30 * low
    return {
        "key": key,
        "name": NAMES.get(key, text_of(key)),
        "unit": "" if unit in _PLAIN else PREFIXES[exponent] + text_of(unit),
        "exponent": exponent,
        "log": bool(spread),
        "about": ABOUT.get(key, ""),
        "values": [float(f"{x:.6g}") if math.isfinite(x) else None for x in values.tolist()],
        **more,
    }


def exponent_of(values: np.ndarray) -> int:
    """Power of ten, a multiple of three, by which most of the values are numbers between 1 and 1000."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes):
        return 0
    exponent = 3 * math.floor(math.log10(np.median(sizes)) / 3)
    return exponent if exponent in PREFIXES else 0


def suspects_of(scores: Scores) -> np.ndarray:
    """Rows whose label the model trained without them contradicts, the clearest first."""
    if scores.labels is None:
        return np.zeros(0, dtype=np.int64)
    if "loo_margin" in scores.values:
        margin = scores["loo_margin"]
        rows = np.flatnonzero(margin < 0)
        return rows[np.argsort(margin[rows], kind="stable")]
    if scores.suggested is None:
        return np.zeros(0, dtype=np.int64)
    by = next((n for n in ("loo_residual", "fsi", "si") if n in scores.values), scores.default_measure)
    rows = np.flatnonzero(scores.suggested != scores.labels)
    return rows[np.argsort(-scores[by][rows], kind="stable")]


def rows_shown(scores: Scores) -> np.ndarray:
    """All rows, or, where they are too many for a page, the extremes of every measure and a random rest."""
    n = len(scores)
    if n <= MOST_ROWS:
        return np.arange(n)
    share = MOST_ROWS // (4 * max(len(scores.values), 1))
    ends = [np.argsort(v, kind="stable") for v in scores.values.values()]
    first = np.concatenate([*(e[:share] for e in ends), *(e[-share:] for e in ends), suspects_of(scores)[:share]])
    chosen = np.zeros(n, dtype=bool)
    chosen[first] = True
    rest = np.random.default_rng(0).permutation(np.flatnonzero(~chosen))
    chosen[rest[: MOST_ROWS - chosen.sum()]] = True
    return np.flatnonzero(chosen)


def payload(
    scores: Scores,
    columns: list[dict[str, Any]] | None = None,
    *,
    texts: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    suspects: np.ndarray | None = None,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The data of a page.

    Args:
        scores: at most ``MOST_ROWS`` rows. columns: as ``column`` makes them; default: the measures.
        texts: of each row; default: those of the scores. class_names: a name per class.
        suspects: rows, the clearest first. start: what the plots and the table show first.
    Returns:
        what JSON can carry.
    """
    n = len(scores)
    texts = scores.texts if texts is None else texts
    if columns is None:
        names = sorted(scores.values, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        columns = [column(name, scores[name], scores.units.get(name, "")) for name in names]
    suspects = suspects_of(scores) if suspects is None else suspects
    labels, suggested, values, titles = _classes(scores, class_names)
    data: dict[str, Any] = {
        "ids": [text_of(x) for x in scores.ids.tolist()],
        "numeric": scores.ids.dtype.kind in "iuf",
        "columns": columns,
        "labels": labels,
        "suggested": suggested,
        "classes": values,
        "names": titles,
        "suspects": suspects.tolist(),
        "neighbours": _neighbours(scores, suspects),
        "start": start or _start(scores),
    }
    data["inputs"] = _plain_rows(scores.inputs)
    data["features"] = 0 if data["inputs"] is None else int(np.prod(scores.inputs.shape[1:]))
    left = MOST_BYTES - len(dumps(data).encode())
    data["texts"], data["cut"] = _short_texts(texts, max(min(_MOST_TEXT, left), 0))
    left -= len(dumps(data["texts"]).encode())
    ends = [np.argsort(column_["values"] if None not in column_["values"] else np.zeros(n)) for column_ in columns]
    order = np.concatenate([suspects, *(np.stack([e, e[::-1]], 1).ravel()[:2000] for e in ends), np.arange(n)])
    _, first = np.unique(order, return_index=True)
    data["thumbs"] = sprites(scores.inputs, max(min(_MOST_PIXELS, left), 0), order[np.sort(first)].astype(np.int64))
    return data


def dumps(data: Any) -> str:
    """JSON that may stand inside a script element: no character that ends it, in HTML or in JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029\ufeff":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _start(scores: Scores) -> dict[str, Any]:
    measure = scores.default_measure
    x, y = ("si", "fsi") if {"si", "fsi"} <= set(scores.values) else (measure, list(scores.values)[-1])
    return {"x": x, "y": y, "hist": measure, "sort": measure, "descending": True}


def _classes(scores: Scores, class_names: Sequence[str] | None):
    """Class numbers of labels and suggestions, and the classes' values and names."""
    if scores.labels is None:
        return None, None, [], []
    labels = np.asarray(scores.labels)
    suggested = None if scores.suggested is None else np.asarray(scores.suggested)
    both = labels if suggested is None else np.concatenate([labels, suggested])
    classes, number = np.unique(both, return_inverse=True)
    values = [text_of(x) for x in classes.tolist()]
    names = values
    if class_names is not None:
        numbers = classes.tolist() if classes.dtype.kind in "iu" else list(range(len(classes)))
        if len(class_names) <= max(numbers, default=-1) or min(numbers, default=0) < 0:
            todo = "Pass one name per class, in the order of the labels."
            raise ArgumentError(
                complaint("class_names", f"at least {max(numbers, default=0) + 1} names", len(class_names), todo)
            )
        names = [text_of(class_names[i]) for i in numbers]
    number = number.ravel().tolist()
    return number[: len(labels)], None if suggested is None else number[len(labels) :], values, names


def _neighbours(scores: Scores, suspects: np.ndarray) -> dict[str, Any] | None:
    """Neighbours of the run, else those of the inputs; {"by", "other", "same": rows, and their similarities}."""
    found, by, rows = scores.neighbours, "kernel", np.arange(len(scores))
    if found is None:
        inputs = scores.inputs
        if inputs is None or len(inputs) < 2:
            return None
        by = "inputs"
        if float(len(inputs)) ** 2 * (inputs[0].size + 100) > _MOST_PRODUCTS:
            rows = suspects[:_MOST_SUSPECTS]
        if not len(rows):
            return None
        found = input_neighbours(inputs, scores.labels, rows=rows)
    data: dict[str, Any] = {"by": by, "rows": None if len(rows) == len(scores) else rows.tolist()}
    for name in ("other", "same"):
        near = np.asarray(found[name])[:, :3].astype(np.int64)
        data[name] = np.where((near >= 0) & (near < len(scores)), near, -1).tolist()  # a file may say anything
        similar = np.round(100 * np.nan_to_num(np.asarray(found[f"{name}_similarity"], dtype=np.float64)))
        data[f"{name}_similarity"] = similar[:, :3].astype(int).tolist()
    return data


def _plain_rows(inputs: np.ndarray | None) -> list[list[float]] | None:
    """The numbers of inputs that are no pictures, four digits each."""
    if inputs is None or not len(inputs) or image_shape(inputs.shape[1:]) is not None:
        return None
    flat = np.asarray(inputs, dtype=np.float64).reshape(len(inputs), -1)
    most = max(1, min(_MOST_FEATURES, int(1_500_000 / (8 * len(flat)))))
    return [[float(f"{x:.4g}") if math.isfinite(x) else None for x in row] for row in flat[:, :most].tolist()]


def _short_texts(texts: Sequence[str] | None, room: int) -> tuple[list[str] | None, int | None]:
    """The texts, and the number of characters at which the longest were cut so that all fit (None: not cut)."""
    if texts is None:
        return None, None
    whole = [text_of(text) for text in texts]
    longest = max(map(len, whole), default=0)
    for cut in (min(longest, _LONGEST_TEXT), 2000, 1000, 500, 300, 200, 150, 100, 60, 30):
        short = [text if len(text) <= cut else text[:cut] + "\u2026" for text in whole]
        if len(dumps(short).encode()) <= room:
            return short, None if cut >= longest else cut
    return None, None
