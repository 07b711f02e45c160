"""The command line and the demo's parts."""

import inspect

import numpy as np
import pyarrow.parquet as pq
import pytest

import sui_fast
from sui_fast.cli import _parser, main
from sui_fast.demo import auroc, digits_problem

TASK = """
import torch
def build():
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    return torch.nn.Linear(3, 2), (x, torch.arange(8) % 2), (x[:4], torch.arange(4) % 2)
def broken():
    return 1
def wide():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    return model, (torch.randn(30, 3), torch.arange(30) % 5), None
def twice(model, batch):
    return 2 * model(batch)
def huber(outputs, targets):
    return torch.nn.functional.smooth_l1_loss(outputs, targets, reduction="none", beta=100.0).sum(1)
def numbers():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2)), None
def new():
    return torch.ones(3, 3), torch.tensor([0, 1, 1])
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
    (task / "texts.txt").write_text("\n".join(f"line\u2028{i}" for i in range(8)) + "\n", encoding="utf-8")
    more = ["--texts", "texts.txt", "--class-names", "cat", "dog", "--title", "Cats & dogs"]
    assert main(["report", "a.parquet", *more]) == 0
    page = (task / "report.html").read_text()
    assert "<title>Cats &amp; dogs</title>" in page and r"line\u20287" in page and ">dog<" in page
    assert main(["report", "a.parquet", "--class-names", "cat"]) == 2 and "class_names" in capsys.readouterr().err
    assert main(["compare", "a.parquet", "b.parquet", "-o", "c.html", "--measure", "si"]) == 0
    out = capsys.readouterr().out
    assert "8 common samples" in out and "si: Spearman" in out and (task / "c.html").exists()


def test_every_argument_of_score_has_an_option():
    options = vars(_parser().parse_args(["score", "a:b"]))
    known = {"model": "source", "train": "source", "val": "source", "resume": "no_resume", "progress": "no_progress"}
    for name in inspect.signature(sui_fast.score).parameters:
        assert known.get(name, name) in options, name


def run_score(task, *arguments, source="my_task:build"):
    assert main(["score", source, "--measures", "si", "--out", "out.parquet", *map(str, arguments)]) == 0
    return sui_fast.Scores.load("out.parquet")


@pytest.mark.filterwarnings("ignore:sui_fast")
def test_options_do_what_the_arguments_do(task, monkeypatch):
    monkeypatch.syspath_prepend(str(task))
    import my_task as given

    (task / "groups.txt").write_text("a\nb\nb\na\nc\nc\na\nb\n")
    (task / "numbers.txt").write_text("\n".join("01201201"))
    low = ["--method", "sketch", "--rank", 16]
    cases = [
        (["--loss", "cross_entropy"], dict(loss="cross_entropy"), "build"),
        (["--loss", "my_task:huber"], dict(loss=given.huber), "numbers"),
        (["--outputs", "my_task:twice"], dict(outputs=given.twice), "build"),
        (["--dtype", "float32"], dict(dtype=given.torch.float32), "build"),
        (["--groups", "groups.txt"], dict(groups=list("abbaccab")), "build"),
        (["--groups", "numbers.txt"], dict(groups=[0, 1, 2, 0, 1, 2, 0, 1]), "build"),
        (["--convention", "mean"], dict(convention="mean"), "build"),
        (["--compat", "iclr2021"], dict(compat="iclr2021"), "build"),
        ([*low, "--sketch", "sjlt", "--seed", 3], dict(method="sketch", rank=16, sketch="sjlt", seed=3), "build"),
        (
            ["--output-mode", "top", "--output-rank", 2, "--loss", "cross_entropy", "--no-progress"],
            dict(output_mode="top", output_rank=2, loss="cross_entropy"),
            "wide",
        ),
    ]
    for arguments, same, function in cases:
        found = run_score(task, "--reg", "0.1", *arguments, source=f"my_task:{function}")
        want = sui_fast.score(*getattr(given, function)(), reg=0.1, measures=("si",), **same)
        assert np.array_equal(found["si"], want["si"]), arguments
        assert np.array_equal(found.ids, want.ids)
        for name in set(same) - {"loss", "rank", "outputs", "groups", "dtype", "output_rank"}:
            assert found.settings[name] == same[name]
    plain = run_score(task, "--reg", "0.1")
    assert not np.array_equal(plain["si"], run_score(task, "--reg", "0.1", "--outputs", "my_task:twice")["si"])


def test_candidates_are_written_apart(task, capsys):
    found = run_score(task, "--reg", "0.1", "--candidates", "my_task:new", "--candidates-out", "new.parquet")
    assert "wrote new.parquet" in capsys.readouterr().out
    import my_task

    want = sui_fast.score(*my_task.build(), reg=0.1, measures=("si",), candidates=my_task.new())
    new = sui_fast.Scores.load("new.parquet")
    assert np.array_equal(new["si"], want.candidates["si"]) and len(new) == 3
    assert np.array_equal(found["si"], want["si"])


@pytest.mark.filterwarnings("ignore:sui_fast")
def test_plan_and_a_store_that_resumes(task, capsys):
    assert main(["plan", "my_task:build", "--method", "sketch", "--rank", "16"]) == 0
    assert "method sketch, rank 16" in capsys.readouterr().out
    assert main(["plan", "my_task:build", "--loss", "cross_entropy", "--reg", "0.1", "--part", "1/2"]) == 2
    assert "'sketch' or 'nystrom' with part=" in capsys.readouterr().err
    assert main(["plan", "my_task:build", "--loss", "cross_entropy", "--reg", "0.1", "--measures", "si"]) == 0
    assert "8 rows" in capsys.readouterr().out
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
        ["score", "my_task:build", "--loss", "wrong"],
        ["score", "my_task:build", "--loss", "my_task:nothing"],
        ["score", "my_task:build", "--outputs", "my_task"],
        ["score", "my_task:build", "--candidates", "no_such_module:f"],
        ["score", "my_task:build", "--groups", "missing.txt"],
        ["score", "my_task:build", "--sketch", "sjlt"],
        ["score", "my_task:build", "--method", "sketch", "--sketch", "gauss"],
        ["plan", "my_task:build", "--outputs", "my_task:nothing"],
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


def test_validate(task, capsys):
    few = ["--samples", "3", "--time", "20", "--lr", "0.1", "--no-progress"]
    assert main(["validate", "my_task:build", *few, "--out", "v.parquet", "--plot", "v.png"]) == 0
    said = capsys.readouterr().out
    assert "3 of 8 samples left out by real retraining" in said and (task / "v.png").stat().st_size > 1000
    columns = pq.read_table("v.parquet").to_pydict()
    assert columns["linear_weights"] == pytest.approx(columns["real_weights"], rel=1e-4)  # the model is linear
    assert main(["validate", "my_task:numbers", *few]) == 2
    assert "val: expected" in capsys.readouterr().err


def test_files_that_cannot_be_written_or_read(task, capsys, monkeypatch):
    monkeypatch.setattr("sui_fast.cli.score", lambda *_, **__: pytest.fail("scored before the files were looked at"))
    for option in ("--out", "--report", "--candidates-out"):
        assert main(["score", "my_task:build", option, "nowhere/file"]) == 2
        assert f"{option}: expected a file in a folder that can be written" in capsys.readouterr().err
    assert main(["validate", "my_task:build", "--plot", "nowhere/v.png"]) == 2
    assert main(["report", "nowhere.parquet"]) == 2
    assert "No such file or directory: 'nowhere.parquet'" in capsys.readouterr().err
