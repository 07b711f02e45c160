"""The report in a browser: opened from a file, used with mouse and keyboard."""

import time

import numpy as np
import pytest
from made import HOSTILE, make_scores

import sui_fast
from sui_fast import Scores


@pytest.fixture
def page(visit, tmp_path):
    return visit(make_scores().report(tmp_path / "report.html"))


def ids(page):
    return page.locator("#rows td.id").all_inner_texts()


def count(page):
    return page.locator("#count").inner_text()


def first_id(page):
    return page.locator("#detail h3").inner_text()


def decided(page):
    return page.locator("#progress").inner_text()


def reloaded(page):
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    return decided(page)


def export(page, path):
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)
    return sui_fast.read_review(path)


def test_sorting_by_a_click_and_by_the_keyboard(page):
    scores = make_scores()
    assert ids(page)[:5] == [str(i) for i in scores.top(5).ids]
    page.click("#head button[data-key=fsi]")
    assert ids(page)[:5] == [str(i) for i in scores.bottom(5).ids]
    assert page.locator("#head th[aria-sort=ascending]").inner_text().startswith("F-SI")
    page.focus("#head button[data-key=id]")
    page.keyboard.press("Enter")
    assert ids(page)[:3] == ["100", "101", "102"]
    page.keyboard.press("Enter")
    assert ids(page)[:2] == ["159", "158"]
    page.click("#head th:has(button[data-key=loo_margin])", position={"x": 3, "y": 3})  # the whole heading
    assert ids(page)[:5] == [str(i) for i in scores.bottom(5, by="loo_margin").ids]


def test_filters_of_class_score_and_text(page):
    scores = make_scores()
    page.select_option("#class", label="1")
    assert count(page) == f"{(scores.labels == 1).sum()} of 60 samples"
    page.select_option("#hist-by", "si")
    page.fill("#from", "100")
    page.press("#from", "Enter")
    unit = {"\u00b5nats": 1e-6, "mnats": 1e-3, "nats": 1}[page.locator("#range-unit").inner_text()]
    expected = (scores.labels == 1) & (scores["si"] >= 100 * unit)
    assert count(page) == f"{expected.sum()} of 60 samples" and 0 < expected.sum() < (scores.labels == 1).sum()
    page.press("#from", "Escape")
    page.keyboard.press("Escape")
    assert count(page) == "60 samples" and page.input_value("#from") == ""
    page.keyboard.press("/")
    page.keyboard.type("15")
    assert count(page) == "11 of 60 samples" and set(ids(page)) == {"115", *(str(i) for i in range(150, 160))}
    page.fill("#search", "nothing of the kind")
    assert page.is_visible("#nothing") and ids(page) == []
    page.click("#clear")
    page.check("#only-suspects")
    assert count(page) == f"{(scores['loo_margin'] < 0).sum()} of 60 samples"


def test_hover_and_selection_link_plots_and_table(page):
    box = page.locator("#scatter").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    page.mouse.move(box["x"] + 60, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(*middle, steps=4)
    page.mouse.up()
    chips = page.locator("#chips").inner_text()
    left = int(count(page).split()[0])
    assert "SI" in chips and "F-SI" in chips and 0 < left < 60
    shown = {int(x) - 100 for x in ids(page)}
    scores = make_scores()
    low = min(scores["si"][list(shown)])
    page.click("#chips .clear")
    assert count(page) == "60 samples" and low >= 0
    box = page.locator("#hist").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 60)
    assert "samples" in page.locator("#tip").inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + 80, steps=3)
    page.mouse.up()
    left = [int(x) - 100 for x in ids(page)]
    assert 0 < len(left) < 60 and min(scores["fsi"][left]) > np.delete(scores["fsi"], left).max()
    page.mouse.click(box["x"] + 80, box["y"] + 50)
    assert count(page) == "60 samples"
    page.click("#legend button >> nth=2")
    assert count(page) == f"{(scores.labels == 2).sum()} of 60 samples"


def test_scatter_with_the_keyboard_and_tooltip(page):
    page.focus("#scatter")
    page.keyboard.press("ArrowRight")
    before = first_id(page)
    page.keyboard.press("ArrowRight")
    after = first_id(page)
    si = make_scores()["si"]
    order = np.argsort(si, kind="stable")
    place = {str(100 + row): at for at, row in enumerate(order)}
    assert place[after] == min(place[before] + 1, 59)
    box = page.locator("#scatter").bounding_box()
    seen = set()
    for step in range(30):
        page.mouse.move(box["x"] + box["width"] * (0.3 + 0.02 * step), box["y"] + box["height"] * 0.5)
        if page.is_visible("#tip"):
            seen.add(page.locator("#tip b").inner_text())
    assert seen and seen <= {str(i) for i in range(100, 160)}


def test_keyboard_review_undo_and_export(page, tmp_path):
    scores = make_scores()
    order = [int(i) for i in scores.top(60).ids]
    assert first_id(page) == str(order[0])
    page.keyboard.press("k")
    assert first_id(page) == str(order[1])
    page.keyboard.press("d")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("d")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert first_id(page) == str(order[2])
    page.keyboard.press("l")
    other = next(c for c in (0, 1, 2) if c != scores.labels[order[2] - 100])
    page.select_option("#new-label", str(other))
    page.keyboard.press("Enter")
    assert decided(page).startswith("4 decided: 1 keep, 1 relabel, 2 drop")
    page.keyboard.press("u")
    assert decided(page).startswith("3 decided: 1 keep, 0 relabel, 2 drop") and first_id(page) == str(order[2])
    page.select_option("#new-label", str(other))
    page.click("#detail button[data-decide=relabel]")
    review = export(page, tmp_path / "review.csv")
    found = dict(zip(review.ids.tolist(), review.decisions.tolist(), strict=True))
    assert found == {order[0]: "keep", order[1]: "drop", order[2]: "relabel", order[3]: "drop"}
    kept, labels = review.apply(scores.ids, scores.labels)
    assert (~kept).sum() == 2 and not kept[order[1] - 100] and labels[order[2] - 100] == other
    assert (labels != scores.labels).sum() == 1
    pandas = pytest.importorskip("pandas").read_csv(tmp_path / "review.csv")
    assert (
        pandas.columns.tolist() == ["id", "decision", "label", "new_label"] and pandas.dtypes["new_label"].kind == "i"
    )
    assert reloaded(page).startswith("4 decided")  # they outlive the page
    page.select_option("#decision", "drop")
    assert sorted(map(int, ids(page))) == sorted([order[1], order[3]])


def test_decisions_outlive_a_reload_that_finds_nothing_on_disk(page):
    """As Chromium does while it writes what was kept: the tab has a copy, and what is undone is gone from both."""
    page.keyboard.press("k")
    page.keyboard.press("d")
    page.evaluate("localStorage.clear()")
    assert reloaded(page).startswith("2 decided: 1 keep, 0 relabel, 1 drop")
    page.keyboard.press("d")
    page.evaluate("sessionStorage.clear()")
    assert reloaded(page).startswith("2 decided: 0 keep, 0 relabel, 2 drop")  # as in a new tab
    page.keyboard.press("k")
    page.keyboard.press("u")
    assert reloaded(page).startswith("2 decided: 0 keep, 0 relabel, 2 drop")
    page.evaluate("Object.keys(localStorage).forEach(key => localStorage.setItem(key, '[1'))")
    assert reloaded(page).startswith("Nothing decided")


def test_suspects_are_reviewed_one_by_one(page, tmp_path):
    scores = make_scores()
    suspects = [int(i) for i in scores.bottom((scores["loo_margin"] < 0).sum(), by="loo_margin").ids]
    assert page.locator("#suspect-list > li").count() == min(12, len(suspects))
    page.click("#suspect-list > li >> nth=1 >> button.relabel")
    page.click("#review-suspects")
    assert count(page) == f"{len(suspects)} of 60 samples" and first_id(page) == str(suspects[0])
    page.keyboard.press("r")
    review = export(page, tmp_path / "r.csv")
    assert sorted(review.ids.tolist()) == sorted(suspects[:2])
    assert (review.new_labels == scores.suggested[review.ids - 100]).all() and (
        review.labels != review.new_labels
    ).all()
    page.click("[data-all=drop]")
    assert decided(page).startswith(f"{len(suspects)} decided: 0 keep, 0 relabel")
    page.keyboard.press("Control+z")
    assert decided(page).startswith("2 decided")


def test_neighbours_speak_against_the_label(page):
    near = page.locator("#detail .near").first.inner_text()
    label = page.locator("#detail .about .tag").first.inner_text()
    assert near and all(line.strip() != label for line in near.split("\n")[1::3])
    before = first_id(page)
    page.click("#detail .neighbour >> nth=0")
    assert first_id(page) != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_narrow_windows_and_contrast(visit, tmp_path, scheme):
    page = visit(make_scores().report(tmp_path / "r.html"), color_scheme=scheme, viewport={"width": 800, "height": 900})
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    ratio = """() => {
      const linear = x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
      const parse = c => c.match(/[\\d.]+/g).slice(0, 3).map(linear);
      const light = c => { const [r, g, b] = parse(c); return .2126 * r + .7152 * g + .0722 * b; };
      const page = getComputedStyle(document.body), soft = getComputedStyle(document.querySelector('.lead'));
      const pair = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
      return [pair(page.color, page.backgroundColor), pair(soft.color, page.backgroundColor)]; }"""
    assert min(page.evaluate(ratio)) > 4.5
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for _ in range(2 if scheme == "light" else 1):
        page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate(wide) == 0


def test_every_control_has_a_name(page):
    unnamed = """() => [...document.querySelectorAll('button, input, select, [role=img], [tabindex="0"]')].filter(e =>
      !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.click("#close-help")


def test_hostile_text_does_not_execute(visit, tmp_path):
    n = 4 * len(HOSTILE)
    text = np.array(HOSTILE * 4, dtype=object)
    ids_ = np.array([f"{i} {x}" for i, x in enumerate(text)])
    names = np.array(HOSTILE * 4)

    class Result:
        title = HOSTILE[1]

        def summary(self):
            return HOSTILE[2]

        def columns(self):
            return {HOSTILE[0]: names, "n": np.arange(n)}

        def plot(self):
            return None

    scores = make_scores(
        n, inputs="texts", ids=ids_, labels=names, suggested=names[::-1], texts=text, settings={h: h for h in HOSTILE}
    )
    scores.values[HOSTILE[1]] = scores.values.pop("si")
    page = visit(scores.report(tmp_path / "r.html", title=HOSTILE[1], sections=[Result()]))
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    page.keyboard.press("k")
    page.keyboard.press("r")
    page.click("#suspect-list button.relabel >> nth=0")
    box = page.locator("#scatter").bounding_box()
    for step in range(20):
        page.mouse.move(box["x"] + box["width"] * step / 20, box["y"] + box["height"] * 0.8)
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == HOSTILE[1]
    review = export(page, tmp_path / "review.csv")
    clean = [str(i).encode("utf-8", "replace").decode() for i in ids_]
    assert len(review) >= 2 and all(i in clean for i in review.ids.tolist())


def test_ten_thousand_samples_are_quick_and_small(visit, tmp_path):
    n = 10_000
    rng = np.random.default_rng(1)
    scores = make_scores(n, inputs="images", labels=rng.integers(0, 10, n), suggested=rng.integers(0, 10, n))
    scores.inputs = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)  # noise: nothing compresses worse
    scores.neighbours = {
        f"{name}{kind}": rng.integers(0, n, (n, 3)) / (1 if not kind else n)
        for name in ("other", "same")
        for kind in ("", "_similarity")
    }
    scores.neighbours = {k: v.astype(np.int64) if "similarity" not in k else v for k, v in scores.neighbours.items()}
    path = scores.report(tmp_path / "r.html")
    assert path.stat().st_size < 5_000_000
    page = visit(path)
    start = time.perf_counter()
    for key in ("si", "id", "loo_margin"):
        page.click(f"#head button[data-key={key}]")
    page.fill("#search", "99")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.focus("#table")
    page.keyboard.press("End")
    assert time.perf_counter() - start < 8  # about 1 s alone on a slow core
    assert page.locator("#rows tr").count() < 60
    assert page.locator("#rows tr.current").count() == 1 and count(page) == "10000 samples"
    page.evaluate("document.querySelector('#scroll').scrollTop = 200000")
    page.wait_for_timeout(100)
    assert page.locator("#rows tr[aria-rowindex='4550']").count() == 1


def test_texts_rows_and_no_classes(visit, tmp_path):
    page = visit(make_scores(inputs="texts").report(tmp_path / "t.html"))
    page.fill("#search", "apple")
    assert count(page) == "9 of 60 samples" and "apple tree" in page.locator("#detail .whole").inner_text()
    page = visit(make_scores(inputs="rows", labels=None, suggested=None).report(tmp_path / "r.html"))
    assert len(page.locator("#detail .whole").inner_text().split()) == 5
    wide = make_scores(inputs="rows", labels=None, suggested=None)
    wide.inputs = np.ones((60, 99))
    assert visit(wide.report(tmp_path / "w.html")).locator("#detail .whole").inner_text().endswith("1.00  \u2026 (99)")
    assert not page.is_visible("#class") and not page.is_visible("#only-suspects")
    page.keyboard.press("r")
    assert decided(page).startswith("Nothing")  # a new label must be typed first
    page.keyboard.type("1.5")
    page.keyboard.press("Enter")
    assert decided(page).startswith("1 decided: 0 keep, 1 relabel")


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-300, 1e300], [5.0, 5.0], [np.nan, np.inf, 1.0], [-1.0, 2.0]])
def test_degenerate_values_are_drawn(visit, tmp_path, values):
    page = visit(Scores(np.arange(len(values)), {"si": values, "fsi": values}, {}, {}).report(tmp_path / "r.html"))
    for key in ("si", "fsi", "id", "decision"):
        page.click(f"#head button[data-key={key}]")
    assert len(ids(page)) == len(values) and "NaN" not in page.locator("#explore").inner_text()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(visit, tmp_path, n):
    page = visit(make_scores(60).select(np.arange(n)).report(tmp_path / "r.html"))
    assert count(page) == f"{n} samples"
    for key in "kdru":
        page.keyboard.press(key)
    page.keyboard.press("ArrowDown")
    page.focus("#scatter")
    page.keyboard.press("ArrowRight")
    assert len(ids(page)) == n


def test_what_a_spreadsheet_would_run_is_marked_and_read_back(visit, tmp_path):
    names = ["=cmd|' /C calc'!A0", "+HYPERLINK(1)", "'=SUM(1)", "@a", "-1", "plain ="]
    page = visit(make_scores(6, ids=np.array(names)).report(tmp_path / "r.html"))
    page.click("#review-bar [data-all=drop]")
    assert export(page, tmp_path / "r.csv").ids.tolist() == names
    cells = [line.split(",")[0] for line in (tmp_path / "r.csv").read_text().splitlines()[1:]]
    assert cells == ["'" + name for name in names[:3]] + names[3:]


def test_ids_that_repeat_are_not_reviewed(visit, tmp_path):
    page = visit(make_scores(40, ids=np.arange(40) // 2).report(tmp_path / "r.html"))
    assert "Some ids occur more than once" in page.locator(".lead").inner_text()
    page.keyboard.press("k")
    for hidden in ("#export", "#review-suspects", "#detail .decide", "#suspect-list .decide >> nth=0"):
        assert not page.is_visible(hidden)


def test_one_class_leaves_nothing_to_relabel_to(visit, tmp_path):
    page = visit(make_scores(8, labels=np.zeros(8, int), suggested=None).report(tmp_path / "r.html"))
    for key in "rd":
        page.keyboard.press(key)
    assert decided(page) == "1 decided: 0 keep, 0 relabel, 1 drop" and not page.is_visible("#new-label")


def test_runs_without_finite_values_are_compared(visit, tmp_path):
    a, b = make_scores(60), make_scores(60)
    a.values["fsi"][a.labels == 1] = np.nan
    b.values["fsi"][:2] = [np.inf, -np.inf]
    visit(sui_fast.compare(a, b).report(tmp_path / "c.html"))  # the page complains of attributes that are no numbers
    page = visit(b.report(tmp_path / "r.html"))
    assert "nan" not in page.locator("#classes ~ div, section#classes").first.inner_text()


def test_numbers_of_an_axis_leave_room_for_its_name(visit, tmp_path):
    scores = make_scores(60)
    scores.values["fsi"] *= 10.0 ** np.arange(60).clip(0, 5)
    page = visit(scores.report(tmp_path / "r.html"))
    ink = page.evaluate("""() => {
        const canvas = document.querySelector('#scatter'), wide = 24, found = Array(wide).fill(false);
        const pixels = canvas.getContext('2d').getImageData(0, 0, wide, canvas.height - 50).data;
        pixels.forEach((v, i) => { if (v) found[(i >> 2) % wide] = true; });
        return found;
    }""")
    assert ink.index(False, ink.index(True)) < 20  # a gap beside the name


def test_compare_in_the_browser(visit, tmp_path):
    a, b = make_scores(60), make_scores(60)
    b.values["fsi"] = b.values["fsi"] * np.random.default_rng(2).random(60)
    found = sui_fast.compare(a, b)
    page = visit(found.report(tmp_path / "c.html"))
    assert ids(page)[:5] == [str(i) for i in found.movers(5)]
    assert not page.is_visible("#export") and f"{found.spearman['fsi']:.4g}" in page.locator(".tiles").inner_text()
    page.keyboard.press("k")
    page.click("#legend button >> nth=0")
    assert count(page) == f"{(a.labels == 0).sum()} of 60 samples"
