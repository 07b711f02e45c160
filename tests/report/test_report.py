"""The report: self-contained, escaped, complete, within its size."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sui_fast import Scores
from sui_fast.report.draw import thumbnail


class Strict(HTMLParser):
    """Counts tags and fails on one that is closed without having been opened."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "line", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("line", "rect", "circle", "img"):
            return
        if tag == "tr" and self.open[-1] in ("td", "th"):
            self.open.pop()
        assert self.open.pop() == tag


def draw(tmp_path, n=30, **more):
    rng = np.random.default_rng(0)
    values = {"si": rng.random(n), "fsi": rng.random(n) ** 6, "loo_margin": rng.normal(size=n)}
    more = {"labels": rng.integers(0, 3, n), "inputs": rng.random((n, 1, 8, 8)), **more}
    scores = Scores(
        more.pop("ids", np.arange(n)),
        values,
        more.pop("settings", {"reg": 0.1}),
        {"method": "dense", "coverage": 1.0, "seconds": {"kernel": 1.0}},
        **more,
    )
    return scores.report(tmp_path / "report.html").read_text()


def parse(page):
    parser = Strict()
    parser.feed(page)
    assert not parser.open
    return parser.seen


def test_sections_and_nothing_from_elsewhere(tmp_path):
    page = draw(tmp_path)
    seen = parse(page)
    for title in (
        "Distribution",
        "Most informative by F-SI",
        "Least informative by SI",
        "Suspected label errors",
        "Classes",
        "Run card",
    ):
        assert title in page
    assert sum(tag == "circle" for tag, _ in seen) == 30 and sum(tag == "svg" for tag, _ in seen) == 3
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in seen if tag == "img")
    assert not re.search(r'(href|src|url)\s*[=(]\s*["\']?(https?:)?//', page)


def test_untrusted_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    page = draw(tmp_path, ids=np.array([evil] * 30), settings={evil: evil}, labels=None)
    assert "<script" not in page and "&lt;script&gt;" in page
    parse(page)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0, 0.0], [1e-300, 1e300], [5.0, 5.0]])
def test_degenerate_values_are_drawn(tmp_path, values):
    page = Scores(np.arange(len(values)), {"si": values, "fsi": values}, {}, {}).report(tmp_path / "r.html").read_text()
    assert "nan" not in page.split("<main>")[1].lower().replace("nanat", "") and "inf" not in re.findall(
        r'"(\w+)"', page
    )
    parse(page)


def test_ten_thousand_samples_stay_small(tmp_path):
    assert len(draw(tmp_path, n=10_000)) < 5_000_000


def test_single_measure_and_no_inputs(tmp_path):
    page = Scores(np.arange(3), {"leverage": [0.1, 0.2, 0.3]}, {}, {}).report(tmp_path / "r.html").read_text()
    assert "Most informative" in page
    parse(page)


def test_thumbnail_is_a_png_of_the_image():
    import base64
    import zlib

    image = np.arange(12.0).reshape(3, 4)
    data = base64.b64decode(thumbnail(image, least=4).split(",")[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    start = data.index(b"IDAT")
    raw = zlib.decompress(data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")])
    rows = np.frombuffer(raw, np.uint8).reshape(3, 5)[:, 1:]
    assert (rows == np.round(image * 255 / 11)).all()
    assert thumbnail(np.zeros(5)) is None and thumbnail(np.zeros((4, 5, 5))) is None
