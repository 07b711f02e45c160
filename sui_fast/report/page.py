"""The page: sections in the order in which questions come up. Everything from the data is escaped."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .draw import histogram, scatter, thumbnail

if TYPE_CHECKING:
    from ..scores import Scores

_MOST_POINTS = 10_000
_STYLE = Path(__file__).with_name("report.css")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>
<p>How much each of {n} training samples informs the final weights (SI) and the predictions (F-SI) of the linearised
network, in nats, by exact leave-one-out removal.</p>
{sections}</main></body></html>
"""
_NAMES = {
    "si": "SI",
    "fsi": "F-SI",
    "loo_margin": "margin",
    "loo_residual": "LOO residual",
    "leverage": "leverage",
    "si_langevin": "SI (Langevin)",
    "si_sgd": "SI (SGD)",
}


def write_report(scores: Scores, path: str | os.PathLike, *, title: str) -> Path:
    """Write the report of a run as one offline HTML file.

    Args:
        scores: at least one measure. path: the file. title: heading.
    Returns:
        the path.
    """
    sections = [_figures(scores)]
    ranks = [name for name in ("fsi", "si") if name in scores.values] or [scores.default_measure]
    for name in ranks:
        sections.append(
            _gallery(
                scores.top(18, by=name),
                f"Most informative by {_NAMES[name]}",
                "What the model would miss most: rare, hard or wrongly labelled samples.",
            )
        )
        sections.append(
            _gallery(
                scores.bottom(18, by=name),
                f"Least informative by {_NAMES[name]}",
                "What the other samples already teach: typical or duplicated ones.",
            )
        )
    if "loo_margin" in scores.values:
        suspects = scores.bottom(24, by="loo_margin")
        suspects = suspects.select(np.flatnonzero(suspects["loo_margin"] < 0))
        if len(suspects):
            sections.append(
                _gallery(
                    suspects,
                    "Suspected label errors",
                    "The model trained without the sample contradicts its label (negative margin).",
                )
            )
    if scores.labels is not None and len(scores):
        sections.append(_classes(scores))
    sections.append(_run_card(scores))
    page = _PAGE.format(title=escape(title), style=_STYLE.read_text(), n=len(scores), sections="".join(sections))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _figures(scores: Scores) -> str:
    positive = [name for name in ("si", "fsi") if name in scores.values] or [
        name for name in scores.values if name != "loo_margin"
    ][:1]
    cards = [
        histogram(scores[name], f"{_NAMES[name]} ({scores.units.get(name, '')})") for name in positive if len(scores)
    ]
    note = ""
    if {"si", "fsi"} <= set(scores.values) and len(scores):
        shown = scores
        if len(scores) > _MOST_POINTS:
            shown = scores.select(np.sort(np.random.default_rng(0).permutation(len(scores))[:_MOST_POINTS]))
            note = f"<p>The scatter shows {_MOST_POINTS} of {len(scores)} samples, drawn at random.</p>"
        titles = [_caption(shown, i) for i in range(len(shown))]
        cards.append(scatter(shown["si"], shown["fsi"], "SI", "F-SI", shown.labels, titles))
    return (
        f'<h2>Distribution</h2>{note}<div class="row">'
        + "".join(f'<div class="card">{c}</div>' for c in cards)
        + "</div>"
    )


def _caption(scores: Scores, i: int) -> str:
    label = "" if scores.labels is None else f", label {scores.labels[i]}"
    return f"{scores.ids[i]}{label}: " + ", ".join(f"{_NAMES[n]} {v[i]:.3g}" for n, v in scores.values.items())


def _gallery(rows: Scores, title: str, note: str) -> str:
    cells = []
    for i in range(len(rows)):
        image = None if rows.inputs is None else thumbnail(rows.inputs[i])
        picture = f'<img alt="" src="{image}">' if image else ""
        label = "" if rows.labels is None else f" · label <b>{escape(str(rows.labels[i]))}</b>"
        lines = "".join(
            f"<br>{_NAMES[name]} {column[i]:.3g}"
            for name, column in rows.values.items()
            if name in ("si", "fsi", "loo_margin")
        )
        cells.append(
            f'<div class="sample" title="{escape(_caption(rows, i))}">{picture}<b>{escape(str(rows.ids[i]))}</b>'
            f"{label}{lines}</div>"
        )
    return f'<h2>{escape(title)}</h2><p>{escape(note)}</p><div class="samples">{"".join(cells)}</div>'


def _classes(scores: Scores) -> str:
    head = "".join(f"<th>median {escape(_NAMES[name])}</th><th>mean</th>" for name in scores.values)
    body = []
    for label in np.unique(scores.labels):
        rows = scores.labels == label
        cells = "".join(
            f"<td>{np.median(v[rows]):.3g}</td><td>{v[rows].mean():.3g}</td>" for v in scores.values.values()
        )
        body.append(f"<tr><td>{escape(str(label))}</td><td>{rows.sum()}</td>{cells}</tr>")
    return (
        f'<h2>Classes</h2><div class="wide card"><table><tr><th>class</th><th>samples</th>{head}</tr>{"".join(body)}'
        "</table></div>"
    )


def _run_card(scores: Scores) -> str:
    first = (
        "method",
        "form",
        "rank",
        "effective_dimension",
        "condition",
        "coverage",
        "error_estimate",
        "samples",
        "outputs",
        "parameters",
        "initial_mse",
        "loo_mse",
        "peak_bytes",
    )
    details = scores.diagnostics
    rows = [(name.replace("_", " "), details[name]) for name in first if name in details]
    rows += [(f"seconds, {name}", value) for name, value in (details.get("seconds") or {}).items()]
    rows += [(f"setting: {name}", value) for name, value in scores.settings.items()]
    lines = "".join(f"<tr><td>{escape(str(name))}</td><td>{escape(_text(value))}</td></tr>" for name, value in rows)
    return f'<h2>Run card</h2><div class="wide card"><table>{lines}</table></div>'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
