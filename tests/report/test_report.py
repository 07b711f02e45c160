"""The report as a file: well formed, self-contained, within its size; thumbnails, payload, reviews, comparison."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import HOSTILE, make_scores

import sui_fast
from sui_fast import ArgumentError, DataError, Scores, read_review
from sui_fast.measures import input_neighbours, kernel_neighbours
from sui_fast.previews import as_images
from sui_fast.report.payload import dumps, payload, rows_shown
from sui_fast.report.sections import number, three_digits
from sui_fast.report.thumbnails import png, sprites

VOID = ("meta", "img", "br", "input", "line", "circle")


class Strict(HTMLParser):
    """Keeps every tag and fails on one that is closed without having been opened."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.data = [], [], None

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if (
            self.seen
            and self.seen[-1] == ("script", {"type": "application/json", "id": "data"})
            and self.open[-1] == "script"
        ):
            self.data = (self.data or "") + text


def parse(page):
    parser = Strict()
    parser.feed(page)
    assert not parser.open
    return parser.seen, json.loads(parser.data)


def draw(scores, tmp_path, **more):
    return scores.report(tmp_path / "report.html", **more).read_text(encoding="utf-8")


class Result:
    """A result of an application, as apps make them."""

    title = "Groups & sources"

    def summary(self):
        return "two <groups>\nfound"

    def columns(self):
        return {"name": np.array(["a", "b"]), "si": np.array([1.5, 2.5e-7]), "short": np.array([1])}

    def plot(self):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([1, 2])
        return figure


def test_sections_and_nothing_from_elsewhere(tmp_path):
    page = draw(make_scores(), tmp_path)
    seen, data = parse(page)
    for title in ("Distribution", "Most informative by F-SI", "Suspected label errors", "Classes", "Run card"):
        assert title in page
    assert not re.search(r'(href|src|url)\s*[=(]\s*["\']?(https?:)?//', page)
    assert not any(name.startswith("on") or name == "style" for _, attributes in seen for name in attributes)
    policy = next(a["content"] for tag, a in seen if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert data["ids"][0] == "100" and len(data["columns"]) == 3


def test_untrusted_text_is_escaped(tmp_path):
    names = np.array(HOSTILE * 2)
    scores = make_scores(len(names), ids=names, labels=names, suggested=names, settings={h: h for h in HOSTILE})
    page = draw(scores, tmp_path, title=HOSTILE[0], class_names=None)
    seen, data = parse(page)
    assert sum(tag == "script" for tag, _ in seen) == 2 and not any(tag == "img" for tag, _ in seen)
    assert data["ids"][:6] == [h for h in HOSTILE][:6] and "\u2028" not in page.split("</main>")[1]


@given(st.text(max_size=30))
@settings(max_examples=60)
def test_json_survives_in_a_script(text):
    inside = dumps([text.encode("utf-8", "replace").decode()])
    assert (
        not set("<>&\u2028\u2029") & set(inside) and json.loads(inside)[0] == text.encode("utf-8", "replace").decode()
    )


def test_results_of_applications_are_sections(tmp_path):
    pytest.importorskip("matplotlib")
    page = draw(make_scores(), tmp_path, sections=[Result()])
    seen, _ = parse(page)
    assert "Groups &amp; sources" in page and "two &lt;groups&gt;\nfound" in page and "2.50e-7" in page
    assert sum(tag == "img" and a["src"].startswith("data:image/png;base64,") for tag, a in seen) == 1
    with pytest.raises(ArgumentError, match="sections: .*plot"):
        draw(make_scores(), tmp_path, sections=["nothing"])


def test_texts_and_class_names_must_fit(tmp_path):
    scores = make_scores(10)
    page = draw(scores, tmp_path, class_names=["ant", "bee", "cat"])
    assert parse(page)[1]["names"] == ["ant", "bee", "cat"][: len(parse(page)[1]["names"])] and ">ant<" in page
    for bad in (dict(class_names=["ant"]), dict(texts=["one"])):
        with pytest.raises(ArgumentError, match="class_names|texts"):
            draw(scores, tmp_path, **bad)


def test_many_long_texts_are_cut_and_many_rows_are_drawn_from(tmp_path):
    scores = make_scores(10_000, inputs="texts", texts=["\u4e2d" * 900] * 10_000)
    path = scores.report(tmp_path / "r.html")
    assert path.stat().st_size < 5_000_000
    _, data = parse(path.read_text(encoding="utf-8"))
    assert data["cut"] and len(data["texts"][0]) == data["cut"] + 1
    many = make_scores(50_000, inputs="texts", texts=None)
    rows = rows_shown(many)
    assert len(rows) == 20_000 and np.isin(many.values["si"].argsort()[-100:], rows).all()
    assert "shows 20000 of them" in draw(many, tmp_path)


def test_run_card_tells_warnings_and_how_to_repeat(tmp_path):
    scores = make_scores(5)
    scores.settings.update(measures=["si"], reg=0.1, time=None, method="sketch", dtype="float32", grouped=False)
    scores.diagnostics.update(rank_wanted=512, features=64, versions={"torch": "2.9"}, warnings=["be careful"])
    page = draw(scores, tmp_path)
    assert "rank=512 would serve" in page and "be careful" in page and "2.9" in page
    assert "sui_fast.score(model, train, reg=0.1, measures=[&#x27;si&#x27;], method=&#x27;sketch&#x27;, " in page
    scores.settings["grouped"] = True
    assert "<dt>groups</dt>" in draw(scores, tmp_path) and "5 groups of training samples" in draw(scores, tmp_path)
    scores.diagnostics["command"] = "sui-fast score a:b"
    assert "<pre tabindex=0>sui-fast score a:b</pre>" in draw(scores, tmp_path)


@pytest.mark.parametrize(
    "x, text",
    [
        (3, "3"),
        (12_345, "12\u202f345"),
        (0.5, "0.5"),
        (1.23e-6, "1.23e-6"),
        (None, "none"),
        (True, "yes"),
        (float("nan"), "nan"),
        ([1, 2], "1, 2"),
    ],
)
def test_numbers_are_readable(x, text):
    assert number(x) == text


def test_scores_file_keeps_what_a_report_shows(tmp_path):
    before = make_scores(20, inputs="images")
    before.neighbours = input_neighbours(before.inputs, before.labels)
    after = Scores.load(before.save(tmp_path / "s.parquet"))
    assert list(after.values) == list(before.values) and (after.suggested == before.suggested).all()
    for name, rows in before.neighbours.items():
        assert np.array_equal(after.neighbours[name], rows)
    assert np.array_equal(as_images(after.inputs), as_images(before.inputs))
    assert parse(draw(after, tmp_path))[1] == parse(draw(before, tmp_path))[1]
    rows = make_scores(20, inputs="rows")
    assert np.allclose(Scores.load(rows.save(tmp_path / "r.parquet")).inputs, rows.inputs, atol=1e-6)
    texts = make_scores(20, inputs="texts")
    assert Scores.load(texts.save(tmp_path / "t.parquet")).texts == texts.texts
    assert Scores.load(texts.save(tmp_path / "t.parquet", previews=False)).texts is None
    some = before.select(np.array([3, 1, 7]))
    same = some.neighbours["same"]
    assert same.shape == (3, 3) and set(same.ravel()) <= {-1, 0, 1, 2}
    known = same >= 0
    assert (some.labels[same[known]] == np.repeat(some.labels, 3).reshape(3, 3)[known]).all()


def test_kernel_neighbours_against_brute_force():
    import torch

    rng = np.random.default_rng(0)
    n, k = 30, 3
    jac = rng.normal(size=(n, k, 11))
    jac[4] = 0
    labels = rng.integers(0, 3, n)
    flat = jac.reshape(n * k, -1)
    found = kernel_neighbours(torch.from_numpy(flat @ flat.T), k, torch.from_numpy(labels), most=2)
    rows = jac.reshape(n, -1)
    norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
    cosine = rows @ rows.T / norms[:, None] / norms
    for i in range(n):
        for name, mask in (("other", labels != labels[i]), ("same", (labels == labels[i]) & (np.arange(n) != i))):
            best = np.flatnonzero(mask)[np.argsort(-cosine[i, mask], kind="stable")[:2]]
            assert np.allclose(cosine[i, found[name][i]], cosine[i, best], atol=1e-6)
            assert np.allclose(found[f"{name}_similarity"][i], cosine[i, best], atol=1e-6)
    alone = kernel_neighbours(torch.eye(2, dtype=torch.float64), 1, torch.tensor([0, 1]))
    assert alone["same"].tolist() == [[-1], [-1]] and alone["other"].tolist() == [[1], [0]]


def test_feature_neighbours_are_those_of_the_kernel():
    import torch

    from sui_fast.measures import feature_neighbours

    rng = torch.Generator().manual_seed(0)
    z, labels = torch.randn(50, 2, 7, generator=rng, dtype=torch.float64), torch.arange(50) % 3
    kernel = kernel_neighbours(z.reshape(100, 7) @ z.reshape(100, 7).T, 2, labels)
    suspects = np.array([31, 4, 20])
    found = feature_neighbours(lambda: iter(z.split(8)), z.shape, labels, suspects)
    for name, rows in kernel.items():
        assert np.allclose(found[name][suspects], rows[suspects], atol=1e-5)
    assert (np.delete(found["other"], suspects, 0) == -1).all()
    assert feature_neighbours(lambda: iter(z.split(8)), z.shape, labels, suspects[:0]) is None


def test_texts_of_a_hugging_face_dataset_are_shown():
    import torch

    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"sentence {i}" for i in range(6)], "x": np.eye(6, 3).tolist(), "label": [0, 1] * 3}
    data = datasets.Dataset.from_dict(rows).with_format("torch", columns=["x", "label"])
    run = dict(measures=("si",), reg=0.1, outputs=lambda model, batch: model(batch["x"]), progress=False)
    for train in (data, torch.utils.data.DataLoader(data, batch_size=4)):
        assert sui_fast.score(torch.nn.Linear(3, 2), train, **run).texts == rows["text"]


def test_score_gives_suggestions_and_neighbours():
    import torch

    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = (x[:, 0] > 0).long()
    y[0] = 1 - y[0]
    wrong = int(y[0])
    for model in (torch.nn.Linear(4, 2), torch.nn.Linear(4, 1)):
        scores = sui_fast.score(model, (x, y), measures=("si", "loo_margin"), reg=0.01, progress=False)
        assert ((scores["loo_margin"] < 0) == (scores.suggested != scores.labels)).all()
        assert scores.suggested[0] == 1 - wrong and (scores.labels[scores.neighbours["other"][0]] != wrong).all()
        assert len(scores.diagnostics["model_sha256"]) == 16
        assert scores.inputs.shape == (40, 4) and scores.diagnostics["versions"]["torch"] in torch.__version__
    low = sui_fast.score(
        torch.nn.Linear(4, 2), (x, y), measures=("loo_margin",), reg=1.0, progress=False, method="sketch", rank=256
    )
    doubt = low.suggested != low.labels
    assert ((low["loo_margin"] < 0) == doubt).all() and doubt.any()
    assert (low.neighbours["other"][doubt] >= 0).all() and (low.neighbours["other"][~doubt] == -1).all()


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (3, 5, 6), (5, 6, 3), (4, 5, 6)])
def test_pictures_of_every_layout(shape):
    inputs = np.random.default_rng(0).normal(size=(7, *shape))
    images = as_images(inputs)
    assert images.dtype == np.uint8 and images.shape[:3] == (7, 5, 6) and images.shape[3] in (1, 3)
    assert images.min() == 0 and images.max() == 255
    natural = np.abs(inputs) / np.abs(inputs).max()
    assert np.abs(as_images(natural).astype(int) - as_images(natural * 255)).max() <= 1
    assert as_images(natural).min() == round(255 * natural[:, :3].min() if shape[0] == 4 else 255 * natural.min())
    assert as_images(np.zeros((3, 9))) is None and as_images(np.full((2, 4, 4), np.nan)).max() == 0
    assert as_images(np.random.default_rng(0).random((2, 200, 120))).shape == (2, 50, 30, 1)


def test_sprites_hold_every_tile():
    images = np.random.default_rng(0).integers(0, 256, (1030, 4, 5, 3), dtype=np.uint8)
    found = sprites(images, 1 << 22)
    assert (found["width"], found["height"], len(found["sheets"]), found["place"]) == (5, 4, 2, None)
    sheet = decode(found["sheets"][0])
    for tile in (0, 31, 32, 1023):
        row, column = divmod(tile, found["row"])
        assert (sheet[row * 4 : row * 4 + 4, column * 5 : column * 5 + 5] == images[tile]).all()
    few = sprites(
        np.random.default_rng(0).integers(0, 256, (3000, 64, 64, 3), dtype=np.uint8), 60_000, np.arange(3000)[::-1]
    )
    assert sum(map(len, few["sheets"])) < 80_000 and few["place"][0] == -1 and few["place"][2999] >= 0
    assert sprites(np.zeros((5, 3)), 1 << 20) is None


def decode(uri):
    data = base64.b64decode(uri.split(",")[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    start = data.index(b"IDAT")
    raw = zlib.decompress(data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")])
    return np.frombuffer(raw, np.uint8).reshape(height, -1)[:, 1:].reshape(height, width, -1)


def test_png_is_the_picture():
    image = np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    assert (decode(png(image)) == image).all()


def test_payload_scales_units_and_keeps_missing_values():
    data = payload(Scores(np.arange(3), {"si": [1e-6, np.nan, 3e-6]}, {}, {}, units={"si": "nats"}))
    assert data["columns"][0]["unit"] == "\u00b5nats" and data["columns"][0]["values"] == [1e-6, None, 3e-6]


@pytest.mark.filterwarnings("error")
def test_decisions_are_those_about_these_data(tmp_path):
    """A key for the same data scored again or read from a file; another for other classes, as these go by number."""

    def key(scores, **more):
        page = scores.report(tmp_path / "r.html", **more).read_text()
        return re.search(r'"key":"([0-9a-f]{16})"', page)[1]

    first, second = (make_scores(4, labels=np.array([0, 1, 0, 1]), suggested=np.array([0, c, 0, 1])) for c in (2, 3))
    assert key(first) != key(second)
    for kind in ("images", "rows", "texts"):
        plain = dict(inputs=kind, labels=None, suggested=None)
        scores, other = make_scores(8, **plain), make_scores(8, seed=1, **plain)
        other.texts = other.texts and [text + "s" for text in other.texts]
        again = make_scores(8, **plain)
        again.values["si"] = again.values["si"] * 2
        loaded = Scores.load(scores.save(tmp_path / "s.parquet"))
        assert key(scores) == key(again) == key(loaded) == key(loaded, texts=["a"] * 8) != key(other)


@pytest.mark.parametrize(("value", "text"), [(1170.4, "1170"), (999.2, "999"), (0.5, "0.500"), (123456.0, "1.23e+05")])
def test_three_digits_without_exponents(value, text):
    assert three_digits(value) == text


CSV = "id,decision,label,new_label\r\n"


def test_reviews_are_read_and_applied(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(CSV + "3,keep,0,0\r\n5,relabel,0,2\r\n7,drop,1,1\r\n")
    review = read_review(path)
    assert review.ids.tolist() == [3, 5, 7] and "1 relabel" in repr(review)
    kept, labels = review.apply([7, 5, 3, 1], [1, 0, 0, 0])
    assert kept.tolist() == [False, True, True, True] and labels.tolist() == [1, 2, 0, 0]
    assert review.apply([7, 5, 3], [1.0, 0.0, 0.0])[1].tolist() == [1.0, 2.0, 0.0]
    path.write_text(CSV + '007,relabel,"a,b","c\nd"\r\n')
    review = read_review(path)
    kept, labels = review.apply(["007", "8"], ["a,b", "e"])
    assert kept.all() and labels.tolist() == ["c\nd", "e"]
    path.write_text(CSV)
    assert len(read_review(path)) == 0
    with pytest.raises(DataError, match="reviewed id"):
        review.apply(["8"], ["e"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "id,decision\r\n",
        CSV + "1,maybe,0,0\r\n",
        CSV + "1,keep\r\n",
        CSV + "1,relabel,0,\r\n",
        CSV + "1,keep,0,0\r\n1,drop,0,0\r\n",
    ],
)
def test_reviews_that_are_none(tmp_path, text):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(DataError, match="path: expected"):
        read_review(tmp_path / "r.csv")


def test_a_review_cleans_the_data_that_score_takes(tmp_path):
    import torch

    (tmp_path / "r.csv").write_text(CSV + "2,relabel,0,2\r\n0,drop,1,1\r\n3,keep,1,1\r\n")
    review = read_review(tmp_path / "r.csv")
    x, y = torch.arange(10.0).reshape(5, 2), torch.tensor([1, 0, 0, 1, 2])
    for targets in (y, torch.nn.functional.one_hot(y, 3).double()):
        clean = review.clean((x, targets))
        found = clean.targets.argmax(1) if clean.targets.ndim == 2 else clean.targets
        assert clean.ids.tolist() == [1, 2, 3, 4] and found.tolist() == [0, 2, 1, 2]
        assert torch.equal(next(clean.batches(10)), x[1:])
    assert y.tolist() == [1, 0, 0, 1, 2]
    scores = sui_fast.score(torch.nn.Linear(2, 3), clean, measures=("si",), reg=0.1, progress=False)
    assert scores.ids.tolist() == [1, 2, 3, 4] and scores.labels.tolist() == [0, 2, 1, 2]
    (tmp_path / "r.csv").write_text(CSV + "2,relabel,0,cat\r\n")
    with pytest.raises(DataError, match="new_label"):
        read_review(tmp_path / "r.csv").clean((x, y))


def test_compare_aligns_by_id(tmp_path):
    from scipy import stats

    a, b = make_scores(50), make_scores(50, seed=1)
    b.ids = b.ids[::-1] + 10
    found = sui_fast.compare(a.save(tmp_path / "a.parquet"), b.save(tmp_path / "b.parquet"))
    assert (
        found.names == ("a.parquet", "b.parquet") and len(found) == 40 and len(found.only_a) == len(found.only_b) == 10
    )
    place = {i: row for row, i in enumerate(b.ids.tolist())}
    common = [i for i in a.ids.tolist() if i in place]
    x, y = a["fsi"][[i - 100 for i in common]], b["fsi"][[place[i] for i in common]]
    assert found.spearman["fsi"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.pearson["fsi"] == pytest.approx(stats.pearsonr(x, y).statistic)
    move = (stats.rankdata(y) - stats.rankdata(x)) / 39
    assert (
        np.allclose(found.move, move)
        and found.movers(3).tolist() == np.array(common)[np.argsort(-abs(move))[:3]].tolist()
    )
    page = found.report(tmp_path / "c.html").read_text(encoding="utf-8")
    parse(page)
    assert "Run card of B" in page and "10 only in A" in found.summary()
    assert found.plot() is not None and set(found.columns()) == {"id", "fsi A", "fsi B", "move"}
    same = sui_fast.compare(a, a)
    assert same.spearman["si"] == pytest.approx(1) and not same.move.any()


def test_compare_refuses_what_has_nothing_in_common():
    a = make_scores(5)
    with pytest.raises(DataError, match="common"):
        sui_fast.compare(a, make_scores(5, ids=np.arange(5) + 1000))
    with pytest.raises(DataError, match="twice"):
        sui_fast.compare(a, make_scores(5, ids=np.zeros(5, int)))
    with pytest.raises(ArgumentError, match="measure"):
        sui_fast.compare(a, a, measure="leverage")
