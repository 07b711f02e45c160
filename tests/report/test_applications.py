"""Results of every kind of application in one page, drawn from a real run; what they carry of the data is escaped."""

import html
import json

import numpy as np
import pytest
import torch
from made import HOSTILE, make_scores
from test_report import draw, parse

import sui_fast
from sui_fast import ArgumentError, Scores
from sui_fast.report.sections import command_of


class Network(torch.nn.Module):
    def __init__(self, k=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, k)).double()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def data():
    """Three clouds with hostile ids: train as rows with ids, val, and the model."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    x = torch.from_numpy(3 * np.eye(3, 4)[labels] + 0.4 * rng.standard_normal((60, 4)))
    y = torch.from_numpy(labels)
    y[:3] = (y[:3] + 1) % 3
    ids = [*HOSTILE, *(f"row {i}" for i in range(40 - len(HOSTILE)))]
    train = [{"x": x[:40], "target": y[:40], "id": ids}]
    return Network(), train, (x[:40], y[:40]), (x[40:], y[40:])


def results(data):
    model, train, pairs, val = data
    marks = np.arange(40) < 3
    x, y = pairs
    common = dict(reg=0.01, progress=False)
    sources = {HOSTILE[0]: (x[:20], y[:20]), HOSTILE[2]: (x[20:], y[20:])}
    binary = (x, (y > 0).long()), (val[0], (val[1] > 0).long())
    return [
        sui_fast.find_mislabeled(model, train, val, truth=marks, **common),
        sui_fast.summarize(model, train, val, 0.5, **common),
        sui_fast.summarize(model, (x, x[:, :3]), None, 0.5, **common),
        sui_fast.information_curves(model, train, val, points=4, progress=False),
        sui_fast.compare_sources(model, sources, {HOSTILE[5]: val, HOSTILE[6]: val, "$x_{$": val}, **common),
        sui_fast.find_undersampled(model, train, val, truth=marks, **common),
        sui_fast.detect_adversarial(model, train, val, truth=marks, **common),
        sui_fast.overlap(model, train, val, [(0, 1), (2, 3)], **common),
        sui_fast.redundancy(model, train, val, **common),
        sui_fast.validate_linearization(Network(1), *binary, samples=3, time=20, progress=False),
    ]


def test_all_in_one_page(data, tmp_path):
    pytest.importorskip("matplotlib")
    model, train, _, val = data
    scores = sui_fast.score(model, train, val, measures=("si", "fsi", "loo_margin"), reg=0.01, progress=False)
    found = results(data)
    page = draw(scores, tmp_path, sections=found)
    seen, payload = parse(page)
    links = [a["href"] for tag, a in seen if tag == "a"]
    for number, result in enumerate(found, 1):
        assert html.escape(result.title) in page and f"#section-{number}" in links
    assert sum(tag == "img" and a["src"].startswith("data:image/png;base64,") for tag, a in seen) == len(found)
    assert sum(tag == "script" for tag, _ in seen) == 2 and not any(
        "onerror" in a or "onmouseover" in a for _, a in seen
    )
    assert HOSTILE[0] in payload["ids"] and json.dumps(payload)


def test_dollars_and_half_surrogates_are_drawn(data, tmp_path):
    pytest.importorskip("matplotlib")
    scores = sui_fast.score(data[0], data[1], measures=("si",), reg=0.01, progress=False)
    compared = sui_fast.compare(scores, scores)
    object.__setattr__(compared, "names", ("$x_{$", "\ud800"))
    compared.plot().savefig(tmp_path / "compared.png")
    assert (tmp_path / "compared.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "asked",
    [
        dict(reg="auto", measures=("si", "loo_margin")),
        dict(reg=0.1, method="sketch", rank=12, sketch="sjlt"),
        dict(reg=0.1, compat="iclr2021", method="very-sparse", rank=10),
        dict(reg=0.1, output_mode="random", output_rank=2, loss="cross_entropy", params=["2.weight"]),
        dict(time=50, lr=0.1, dtype=torch.float32, sigma=2.0, convention="mean", groups=np.arange(20) % 4),
    ],
)
@pytest.mark.filterwarnings("ignore:sui_fast.*rank")
def test_the_call_to_repeat_gives_the_scores_again(asked, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    x, y = torch.randn(20, 6), torch.arange(20) % 5
    names = dict(sui_fast=sui_fast, torch=torch, model=model, train=(x, y), val=x[:4], groups=asked.get("groups"))
    first = sui_fast.score(model, (x, y), x[:4], progress=False, **asked)
    again = eval(command_of(Scores.load(first.save(tmp_path / "s.parquet"))), names)
    assert list(again.values) == list(first.values)
    for name, values in first.values.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:sui_fast.*cannot tell")
def test_one_section_and_any_sequence_of_texts(tmp_path):
    scores = make_scores(5)
    found = sui_fast.find_mislabeled(scores)
    page = scores.report(tmp_path / "r.html", sections=found, texts=(f"text {i}" for i in range(5))).read_text()
    assert found.title in page and "text 4" in page
    with pytest.raises(ArgumentError, match="path: expected"):
        scores.report(None)
