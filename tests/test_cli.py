"""The command line and the demo's parts."""

import numpy as np
import pytest

import sui_fast
from sui_fast.cli import main
from sui_fast.demo import auroc, digits_problem

TASK = """
import torch
def build():
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    return torch.nn.Linear(3, 2), (x, torch.arange(8) % 2), (x[:4], torch.arange(4) % 2)
def broken():
    return 1
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    (tmp_path / "my_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_score_and_report(task, capsys):
    arguments = ["--reg", "0.1", "--measures", "si", "fsi", "loo_margin"]
    assert main(["score", "my_task:build", "--out", "s.parquet", "--report", "r.html", *arguments]) == 0
    assert "wrote s.parquet" in capsys.readouterr().out
    scores = sui_fast.Scores.load("s.parquet")
    assert list(scores.values) == ["si", "fsi", "loo_margin"] and len(scores) == 8
    assert main(["report", "s.parquet", "-o", "again.html"]) == 0
    page = (task / "again.html").read_text()
    assert "Run card" in page and (task / "r.html").exists()
    assert "sui-fast score my_task:build --out s.parquet --report r.html --reg 0.1" in page  # how to repeat


def test_report_with_texts_and_names_and_compare(task, capsys):
    for reg, out in (("0.1", "a.parquet"), ("1", "b.parquet")):
        assert main(["score", "my_task:build", "--reg", reg, "--out", out]) == 0
    (task / "texts.txt").write_text("\n".join(f"line {i}" for i in range(8)))
    more = ["--texts", "texts.txt", "--class-names", "cat", "dog", "--title", "Cats & dogs"]
    assert main(["report", "a.parquet", *more]) == 0
    page = (task / "report.html").read_text()
    assert "<title>Cats &amp; dogs</title>" in page and "line 7" in page and ">dog<" in page
    assert main(["report", "a.parquet", "--class-names", "cat"]) == 2 and "class_names" in capsys.readouterr().err
    assert main(["compare", "a.parquet", "b.parquet", "-o", "c.html", "--measure", "si"]) == 0
    out = capsys.readouterr().out
    assert "8 common samples" in out and "si: Spearman" in out and (task / "c.html").exists()


@pytest.mark.filterwarnings("ignore:sui_fast")
def test_plan_and_a_store_that_resumes(task, capsys):
    assert main(["plan", "my_task:build", "--method", "sketch", "--rank", "16"]) == 0
    assert "method sketch, rank 16" in capsys.readouterr().out
    run = ["score", "my_task:build", "--reg", "0.1", "--method", "sketch", "--rank", "16", "--store", "store"]
    assert main([*run, "--out", "a.parquet"]) == 0 and main([*run, "--out", "b.parquet"]) == 0
    one, two = sui_fast.Scores.load("a.parquet"), sui_fast.Scores.load("b.parquet")
    assert np.array_equal(one["fsi"], two["fsi"])
    capsys.readouterr()
    assert main([*run, "--seed", "1"]) == 2 and "seed was 0, is 1" in capsys.readouterr().err
    assert main([*run, "--seed", "1", "--no-resume"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "my_task"],
        ["score", "my_task:nothing"],
        ["score", "no_such_module:f"],
        ["score", "my_task:broken"],
        ["score", "my_task:build", "--reg", "x"],
        ["score", "my_task:build", "--reg", "-1"],
        ["score", "my_task:build", "--measures", "wrong"],
        ["report", "missing.parquet"],
        ["compare", "missing.parquet", "missing.parquet"],
    ],
)
def test_errors_take_one_line_and_status_two(task, capsys, arguments):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("sui-fast: ") and "Traceback" not in message


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "reference  live" in out and "rational_removal" in out
    found = sui_fast.doctor(show=False)
    assert found["backends"]["reference"] is None and set(found["self_test"]) >= {"ntk_gram", "jvp", "vjp", "sketch"}
    assert capsys.readouterr().out == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and sui_fast.__version__ in capsys.readouterr().out


def test_auroc():
    assert auroc(np.array([1, 2, 3, 4.0]), np.array([False, False, True, True])) == 1.0
    assert auroc(np.array([1, 1, 1, 1.0]), np.array([False, True, True, False])) == 0.5
    assert auroc(np.array([3, 1, 2.0]), np.array([True, False, False])) == 1.0


def test_demo_finds_flipped_labels_on_a_part():
    model, (x, y), (xv, yv), flipped = digits_problem()
    assert 9_000 < sum(p.numel() for p in model.parameters()) < 11_000 and flipped.sum() == 60
    part = np.r_[np.flatnonzero(flipped)[:15], np.flatnonzero(~flipped)[:85]]
    scores = sui_fast.score(
        model, (x[part], y[part]), (xv[:50], yv[:50]), reg=0.05, progress=False, measures=("fsi", "loo_margin")
    )
    assert auroc(scores["fsi"], flipped[part]) > 0.9 and auroc(-scores["loo_margin"], flipped[part]) > 0.95
