"""Sections that need no script: key figures, classes, the run card, results of applications. Everything is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import ArgumentError, complaint
from ..losses import LOSSES
from .payload import NAMES, PREFIXES, exponent_of, suspects_of, text_of

if TYPE_CHECKING:
    from ..scores import Scores

_MOST_CLASSES, _MOST_LINES = 100, 200
_ORDER = (
    "method", "form", "method_reason", "rank", "features", "effective_dimension", "condition", "coverage",
    "error_estimate", "samples", "outputs", "parameters", "initial_mse", "loo_mse", "peak_bytes",
)  # fmt: skip
_APART = ("seconds", "versions", "warnings", "command", "reg_curve")
_NO_ARGUMENTS = ("grouped", "dtype", "dtypes", "params", "loss", "projection")


def safe(x: Any) -> str:
    """Text for HTML, between tags or in a quoted attribute."""
    return escape(text_of(x), quote=True)


def number(x: Any) -> str:
    """A number as people read it: three or four digits, thousands set apart; other things as text."""
    if isinstance(x, bool | np.bool_) or x is None:
        return {True: "yes", False: "no"}.get(None if x is None else bool(x), "none")
    if isinstance(x, int | np.integer):
        return f"{int(x):,}".replace(",", "\u202f") if abs(int(x)) >= 10_000 else str(int(x))
    if isinstance(x, float | np.floating):
        x = float(x)
        if not math.isfinite(x):
            return str(x)
        return f"{x:.4g}" if 1e-3 <= abs(x) < 1e6 or x == 0 else f"{x:.2e}".replace("e-0", "e-").replace("e+0", "e")
    if isinstance(x, dict):
        return ", ".join(f"{text_of(name)} {number(value)}" for name, value in x.items())
    if isinstance(x, list | tuple):
        shown = ", ".join(map(number, x[:12]))
        return f"{shown}, \u2026 ({len(x)})" if len(x) > 12 else shown
    return text_of(x)


def tiles(scores: Scores) -> str:
    """Key figures at the top."""
    details, settings = scores.diagnostics, scores.settings
    found: list[tuple[str, Any, str]] = [("groups" if settings.get("grouped") else "samples", len(scores), "")]
    if scores.labels is not None:
        found.append(("classes", len(np.unique(scores.labels)), ""))
    if scores.labels is not None and ("loo_margin" in scores.values or scores.suggested is not None):
        share = len(suspects_of(scores)) / max(len(scores), 1)
        found.append(("suspected labels", len(suspects_of(scores)), f"{share:.1%} of the samples"))
    if "method" in details:
        exact = "exact" if details["method"] == "dense" else f"rank {number(details.get('features', ''))}"
        found.append(("method", details["method"], exact))
    if "effective_dimension" in details:
        found.append(("effective dimension", details["effective_dimension"], "of the kernel"))
    if "reg" in settings:
        found.append(("regularisation", settings["reg"], "of the mean loss"))
    if "loo_mse" in details:
        found.append(("left-out error", details["loo_mse"], "mean squared"))
    return figures(found)


def figures(cells: Sequence[tuple[str, Any, str]]) -> str:
    """Key figures: (name, value, note)."""
    inside = "".join(
        f"<div><dt>{safe(name)}</dt><dd>{safe(number(value))}</dd><dd class=note>{safe(note)}</dd></div>"
        for name, value, note in cells
    )
    return f"<dl class=tiles>{inside}</dl>"


def three_digits(value: float) -> str:
    """Three digits, zeros at the end among them, so that columns of numbers read alike; no exponent up to 1e5."""
    return f"{value:.0f}" if 999 < abs(value) < 1e5 else f"{value:#.3g}".rstrip(".")


def median_and_bar(place, v: np.ndarray, exponent: int) -> str:
    """Two cells of a table, of the values that are finite."""
    v = v[np.isfinite(v)]
    median = three_digits(np.median(v) / 10.0**exponent) if len(v) else "\u2013"
    return f"<td>{median}</td><td class=bars>{bar(place, v)}</td>"


def unit_of(scores: Scores, name: str, exponent: int) -> str:
    """Name of a measure with its unit, as in F-SI (\u00b5nats)."""
    known = NAMES.get(name, text_of(name))
    return f"{known} ({PREFIXES[exponent]}nats)" if scores.units.get(name) == "nats" else known


def classes(scores: Scores, names: dict[str, str]) -> str:
    """Samples per class, and where the middle 80% and the median of each measure lie."""
    labels = np.asarray(scores.labels)
    values, counts = np.unique(labels, return_counts=True)
    shown = values if len(values) <= _MOST_CLASSES else values[np.sort(np.argsort(-counts)[:_MOST_CLASSES])]
    measures = [n for n in ("fsi", "si", "loo_margin") if n in scores.values] or list(scores.values)[:2]
    heads, frames = [], {}
    for name in measures:
        v, unit = scores[name], scores.units.get(name, "")
        exponent = exponent_of(v) if unit == "nats" else 0
        log = bool((v[np.isfinite(v)] >= 0).all() and (v > 0).any())
        frames[name] = (exponent, positions(v, log))
        heads.append(f"<th scope=col>median {safe(unit_of(scores, name, exponent))}</th>")
        heads.append("<th scope=col class=bars>10% to 90%</th>")
    ranked = np.where(np.isfinite(scores[measures[0]]), scores[measures[0]], 0.0)
    lines = []
    for value in shown:
        rows = labels == value
        cells = []
        for name in measures:
            exponent, place = frames[name]
            cells.append(median_and_bar(place, scores[name][rows], exponent))
        share = ranked[rows].sum() / (ranked.sum() or 1.0)
        cells.append(f"<td>{share:.1%}</td>" if measures[0] != "loo_margin" else "<td>\u2013</td>")
        title = names.get(text_of(value), text_of(value))
        lines.append(f"<tr><th scope=row>{safe(title)}</th><td>{rows.sum()}</td>{''.join(cells)}</tr>")
    note = f"<p>The {_MOST_CLASSES} largest of {len(values)} classes.</p>" if len(shown) < len(values) else ""
    first = safe(NAMES.get(measures[0], measures[0]))
    return (
        f"{note}<div class=wide><table class=plain><thead><tr><th scope=col>class</th><th scope=col>samples</th>"
        f"{''.join(heads)}<th scope=col>share of all {first}</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def positions(values: np.ndarray, log: bool):
    """A function from values to places between 0 and 100 along the range of all of them."""
    finite = values[np.isfinite(values)]
    finite = finite[finite > 0] if log else finite
    ends = (np.quantile(finite, [0.005, 0.995]) if len(finite) else np.array([0.0, 1.0])).astype(float)
    low, high = np.log10(ends) if log else ends
    span = high - low if high > low else 1.0

    def place(v: np.ndarray) -> np.ndarray:
        v = np.log10(np.maximum(v, 10.0**low)) if log else v
        return np.clip(100 * (v - low) / span, 0, 100)

    return place


def bar(place, v: np.ndarray) -> str:
    if not len(v):
        return ""
    low, middle, high = place(np.quantile(v, [0.1, 0.5, 0.9]))
    return (
        '<svg viewBox="0 0 104 10" width="104" height="10" aria-hidden="true">'
        '<line class="rail" x1="2" x2="102" y1="5" y2="5"/>'
        f'<line class="span" x1="{low + 2:.1f}" x2="{max(high, low + 1) + 2:.1f}" y1="5" y2="5"/>'
        f'<circle class="mid" cx="{middle + 2:.1f}" cy="5" r="3.4"/></svg>'
    )


def warnings_of(scores: Scores) -> list[str]:
    """What a reader must know before trusting the numbers."""
    details = scores.diagnostics
    found = [text_of(x) for x in details.get("warnings") or []]
    wanted, features = details.get("rank_wanted"), details.get("features")
    if isinstance(wanted, int) and isinstance(features, int) and wanted > features:
        found.append(f"The rank {features} is small for this regularisation; rank={wanted} would serve.")
    coverage = details.get("coverage")
    if isinstance(coverage, float) and coverage < 1:
        found.append(f"The parameters that were scored are {coverage:.0%} of the trainable ones.")
    error = details.get("error_estimate")
    if isinstance(error, float) and error > 0.05:
        found.append(f"The kernel is an approximation with an estimated relative error of {error:.2g}.")
    bad = {name: int((~np.isfinite(v)).sum()) for name, v in scores.values.items()}
    names = {name: NAMES.get(name, text_of(name)) for name in bad}
    found += [f"{names[name]} is not finite for {count} samples." for name, count in bad.items() if count]
    return found


def run_card(scores: Scores) -> str:
    """Settings, diagnostics, versions, warnings, and the command to repeat."""
    details, settings = scores.diagnostics, scores.settings
    first = [name for name in _ORDER if name in details]
    rest = [name for name in details if name not in first and name not in _APART]
    seconds = details.get("seconds")
    notes = warnings_of(scores)
    warned = "".join(f"<li>{safe(text)}</li>" for text in notes)
    command = command_of(scores)
    tables = [
        _pairs("Settings", settings),
        _pairs("Diagnostics", {text_of(name).replace("_", " "): details[name] for name in first + rest}),
        _pairs("Seconds", seconds if isinstance(seconds, dict) else {}),
        _pairs("Versions", details.get("versions") if isinstance(details.get("versions"), dict) else {}),
    ]
    return (
        (f"<div class=warning role=note><b>Mind</b><ul>{warned}</ul></div>" if notes else "<p>No warnings.</p>")
        + (f"<h3>To repeat</h3><pre tabindex=0>{safe(command)}</pre>" if command else "")
        + f"<div class=cards>{''.join(tables)}</div>"
    )


def command_of(scores: Scores) -> str | None:
    """The command of the run, or the call that its settings stand for."""
    command, settings = scores.diagnostics.get("command"), scores.settings
    if command:
        return text_of(command)
    if "measures" not in settings:
        return None
    if settings.get("projection"):
        settings = settings | dict(zip(("method", "rank"), settings["projection"], strict=True))
    given = [f"{name}={value!r}" for name, value in settings.items() if value is not None and name not in _NO_ARGUMENTS]
    loss = settings.get("loss")
    if loss is not None:  # a function of the user's own goes by its name
        given.append(f"loss={loss!r}" if loss in LOSSES else f"loss={text_of(loss)}")
    params = text_of(settings.get("params"))
    if params not in ("None", "trainable"):
        given.append("params='all'" if params == "all" else f"params={params if params[0] == '[' else '...'}")
    if str(settings.get("dtype", "")) in ("float32", "float64"):
        given.append(f"dtype=torch.{settings['dtype']}")
    if settings.get("grouped"):
        given.append("groups=groups")
    data = "model, train, val" if "fsi" in settings["measures"] else "model, train"
    return f"sui_fast.score({data}, {', '.join(given)})"


def _pairs(title: str, pairs: dict[str, Any]) -> str:
    lines = "".join(
        f"<tr><th scope=row>{safe(name)}</th><td>{safe(number(value))}</td></tr>" for name, value in pairs.items()
    )
    return f"<div><h3>{safe(title)}</h3><table class=pairs><tbody>{lines}</tbody></table></div>" if lines else ""


def application(result: Any) -> tuple[str, str]:
    """Title and body of the result of an application: what it found, its plot and its columns.

    Args:
        result: anything with title: str, summary() -> str, columns() -> {name: array}, plot() -> matplotlib figure.
    """
    missing = [name for name in ("title", "summary", "columns", "plot") if not hasattr(result, name)]
    if missing:
        todo = "Pass the result of an application, as find_mislabeled returns."
        got = f"{type(result).__name__} without {', '.join(missing)}"
        raise ArgumentError(complaint("sections", "results with title, summary, columns and plot", got, todo))
    title = text_of(result.title() if callable(result.title) else result.title)
    summary = f"<p class=summary>{safe(result.summary())}</p>"
    return title, summary + _picture(result, title) + _columns(result.columns())


def _picture(result: Any, title: str) -> str:
    try:
        figure = result.plot()
    except Exception as error:
        if not isinstance(error, ImportError) and not isinstance(error.__cause__, ImportError):
            raise
        return "<p>The plot needs matplotlib: pip install matplotlib.</p>"
    figure = getattr(figure, "figure", figure)
    if figure is None:
        return ""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    _close(figure)
    return (
        f'<img class=plot alt="Plot: {safe(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(file.getvalue()).decode()}">'
    )


def _close(figure: Any) -> None:
    """Take the figure off pyplot's list, where it is on it."""
    from matplotlib import pyplot

    pyplot.close(figure)


def _columns(columns: dict[str, Any]) -> str:
    arrays = {text_of(name): _cells(values) for name, values in columns.items()}
    if not arrays:
        return ""
    length = max(map(len, arrays.values()))
    shown = min(length, _MOST_LINES)
    head = "".join(f"<th scope=col>{safe(name)}</th>" for name in arrays)
    lines = []
    for i in range(shown):
        cells = "".join(f"<td>{safe(number(v[i]))}</td>" if i < len(v) else "<td></td>" for v in arrays.values())
        lines.append(f"<tr>{cells}</tr>")
    more = f"the first {shown} of {length} rows" if shown < length else f"{length} rows"
    return (
        f'<details{" open" if length <= 12 else ""}><summary>Table, {more}</summary><div class="wide tall">'
        f"<table class=plain><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _cells(values: Any) -> Sequence[Any]:
    array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    return [array.item()] if array.ndim == 0 else array.tolist()
