"""The page: one file, no request, no script but its own. What comes from the data is escaped, in HTML and in JSON."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from .._errors import ArgumentError, complaint, path_of
from ..previews import extra_columns
from . import sections as parts
from .payload import dumps, payload, rows_shown, text_of

if TYPE_CHECKING:
    from ..scores import Scores

_HERE = Path(__file__).parent
_LOOKED_AT = 64  # samples
_SCRIPTS = ("state.js", "plots.js", "table.js", "review.js", "main.js")


def write_report(
    scores: Scores,
    path: str | os.PathLike,
    *,
    title: str,
    sections: Sequence[Any] = (),
    texts: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write the report of a run as one offline HTML file.

    Args:
        scores: at least one measure. path: the file. title: heading. sections: results of applications, or one.
        texts: text of each sample. class_names: a name per class.
    Returns:
        the path.
    """
    path, sections = path_of("path", path), [sections] if hasattr(sections, "summary") else sections
    texts = None if texts is None else list(texts)
    if texts is not None and len(texts) != len(scores):
        raise ArgumentError(complaint("texts", f"one per sample ({len(scores)})", len(texts), "Align them."))
    rows = rows_shown(scores)
    shown = scores if len(rows) == len(scores) else scores.select(rows)
    some = None if texts is None else [texts[i] for i in rows]
    data = payload(shown, texts=some, class_names=class_names)
    names = dict(zip(data["classes"], data["names"], strict=True))
    note = "" if len(rows) == len(scores) else f" The page shows {len(rows)} of them: the extremes and a random rest."
    what = "groups of training samples" if scores.settings.get("grouped") else "training samples"
    lead = (
        f"What each of {len(scores)} {what} alone tells the model: its weights (SI) and its predictions (F-SI).{note}"
    )
    named = len(set(map(text_of, scores.ids.tolist()))) == len(scores)
    if not named:
        lead += " Some ids occur more than once: there is no review, as a decision would not say which one is meant."
    found = [("Suspected label errors", "suspects", _SUSPECTS)] if scores.labels is not None else []
    ranking = next(c["name"] for c in data["columns"] if c["key"] == data["start"]["sort"])
    found.append(("Most and least informative", "gallery", _GALLERY.format(first=parts.safe(ranking))))
    if scores.labels is not None and len(scores):
        found.append(("Classes", "classes", parts.classes(scores, names)))
    found += _applications(sections)
    found.append(("Run card", "card", parts.run_card(scores)))
    extras = extra_columns({"input": scores.inputs, "text": scores.texts})
    kept = [column[:_LOOKED_AT].to_pylist() for _, column in extras]
    return write_page(path, title, lead, parts.tiles(scores), found, {**data, "review": named}, kept)


def _applications(results: Sequence[Any]) -> list[tuple[str, str, str]]:
    return [
        (title, f"section-{number}", body) for number, (title, body) in enumerate(map(parts.application, results), 1)
    ]


def write_page(
    path: str | os.PathLike,
    title: str,
    lead: str,
    tiles: str,
    sections: Sequence[tuple[str, str, str]],
    data: dict,
    kept: Any = None,
) -> Path:
    """Write one page.

    Args:
        path: the file. title, lead: text. tiles: HTML. sections: (title, id, HTML) after the explorer.
        data: for the script, as ``payload`` makes it. kept: what a file of the scores keeps of some samples, by which
            decisions about other data with the same ids and labels are told apart.
    Returns:
        the path.
    """
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    body = "".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = "(() => {\n'use strict';\n" + body + "})();\n"
    key = repr((title, data["ids"], data["labels"], data["classes"], kept))
    json = dumps({**data, "key": hashlib.sha256(key.encode()).hexdigest()[:16]})
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = "".join(
        f'<section id="{parts.safe(name)}" aria-labelledby="{parts.safe(name)}-title">'
        f'<h2 id="{parts.safe(name)}-title">{parts.safe(heading)}</h2>{html}</section>'
        for heading, name, html in sections
    )
    links = "".join(f'<a href="#{parts.safe(name)}">{parts.safe(heading)}</a>' for heading, name, _ in sections)
    page = Template((_HERE / "report.html").read_text(encoding="utf-8")).substitute(
        policy=policy, title=parts.safe(title), style=style, lead=parts.safe(lead), tiles=tiles, sections=body,
        links=links, data=json, script=script,
    )  # fmt: skip
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_SUSPECTS = """<p>The model trained without the sample contradicts its label. Beside each: the nearest samples of
another class, which speak against the label.</p>
<div class=bar><button type=button id=review-suspects class=primary>Review them one by one</button>
<span id=suspect-count></span></div><ul class=suspects id=suspect-list></ul>
<button type=button id=more-suspects hidden>Show more</button>"""
_GALLERY = """<p>High: what the model would miss most, rare, hard or wrongly labelled samples. Low: what the others
already teach, typical or duplicated ones.</p>
<div class=bar><label>by <select id=gallery-by></select></label></div>
<h3 id=most-title>Most informative by {first}</h3><ul class=strip id=most></ul>
<h3 id=least-title>Least informative by {first}</h3><ul class=strip id=least></ul>"""
