"""Methods of low rank where the samples are fewer than the columns: exact, and nothing to warn of."""

import os
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import sui_fast


@pytest.mark.parametrize("method, samples, rank", [("subspace", 1, 16), ("subspace", 2, 16), ("nystrom", 40, 300)])
def test_all_directions_of_a_few_samples(method, samples, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 4), nn.Tanh(), nn.Linear(4, 3))
    train, val = (torch.randn(samples, 13), torch.arange(samples) % 3), torch.randn(15, 13)
    exact = sui_fast.score(model, train, val, reg=0.1, method="dense", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sui_fast.score(model, train, val, reg=0.1, method=method, rank=rank, progress=False)
    for name in ("si", "fsi"):
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-4)


def test_plan_of_subspace_counts_what_products_with_several_outputs_hold():
    peaks = []
    for k in (1, 2):
        model = nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, k))
        train = torch.randn(1000, 30), torch.arange(1000) % 2
        peaks.append(sui_fast.plan(model, train, method="subspace", rank=256).peak_bytes)
    columns, largest = 256 + 128 + 96, 200 * 100
    assert peaks[1] - peaks[0] > 1.5 * 4 * columns * largest  # vjp holds three of its results, but no new basis then


@pytest.mark.parametrize(
    "settings, rows",
    [
        (dict(loss="cross_entropy"), 19),
        (dict(loss="cross_entropy", output_mode="random", output_rank=4), 4),
        (dict(output_mode="random", output_rank=4), 4),
        (dict(loss="cross_entropy", output_mode="top", output_rank=3), 3),
    ],
)
def test_plan_counts_the_rows_of_a_sample_as_score_does(settings, rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 20))
    train, common = (torch.randn(40, 5), torch.arange(40) % 20), dict(settings, measures=("si",), reg=1.0)
    planned = sui_fast.plan(model, train, **common)
    found = sui_fast.score(model, train, progress=False, **common)
    assert planned.method == found.diagnostics["method"] and planned.rank == 40 * rows
    assert planned.reason == found.diagnostics["method_reason"]
    low = [sui_fast.plan(model, train, **given, method="sketch", rank=16) for given in (common, dict(reg=1.0))]
    assert low[0].disk_bytes * 20 == pytest.approx(low[1].disk_bytes * rows)


def test_plan_counts_groups_and_candidates():
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 1))
    train, common = (torch.randn(4000, 30), torch.randn(4000, 1)), dict(method="sketch", rank=256, reg=0.1)
    plain, grouped, new = (
        sui_fast.plan(model, train, store="unused", **common, **more).peak_bytes
        for more in ({}, dict(groups=np.arange(4000) // 4), dict(candidates=train))
    )
    assert min(grouped, new) - plain > 12 * 256 * 4000


def test_a_rank_whose_sums_do_not_fit_memory_is_refused():
    model, train = nn.Linear(3, 1), (torch.randn(30, 3), torch.randn(30, 1))
    for call in (sui_fast.plan, sui_fast.score):
        with pytest.raises(sui_fast.ArgumentError, match="rank: expected columns whose sums fit"):
            call(model, train, method="sketch", rank=10**12, measures=("si",))


@pytest.mark.parametrize("method, rank", [("nystrom", 2), ("sketch", 19)])
@pytest.mark.parametrize("training", [dict(reg=50.0), dict(time=1, lr=0.002)], ids=["reg", "time"])
def test_a_regularisation_beyond_the_spectrum_needs_its_directions_all_the_same(method, rank, training):
    """The effective dimension is below one then, and F-SI of as few features as that asks for correlates 0.3 to 0.8."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3))
    train, val = (torch.randn(110, 4), torch.randn(110, 3)), torch.randn(40, 4)
    exact = sui_fast.score(model, train, val, method="dense", progress=False, **training)
    assert exact.diagnostics["effective_dimension"] < 1
    common = dict(method=method, progress=False, **training)
    with pytest.warns(RuntimeWarning, match="is small for an effective dimension of"):
        few = sui_fast.score(model, train, val, rank=rank, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sui_fast.score(model, train, val, rank=few.diagnostics["rank_wanted"], **common)
    assert all(spearmanr(found[name], exact[name])[0] > 0.98 for name in ("si", "fsi"))


@pytest.mark.parametrize("method, rank", [("nystrom", 400), ("subspace", 400), ("sketch", 4096)])
def test_new_samples_outside_of_the_features(method, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 6), nn.Tanh(), nn.Linear(6, 2))
    train, new, val = ((torch.randn(n, 13), torch.arange(n) % 2) for n in (20, 8, 30))
    common = dict(reg=0.05, candidates=new, progress=False)
    exact = sui_fast.score(model, train, val[0], method="dense", **common).candidates["fsi"]
    found = sui_fast.score(model, train, val[0], method=method, rank=rank, **common).candidates["fsi"]
    np.testing.assert_allclose(found, exact, rtol=0.02 if method == "sketch" else 1e-4)


SHARED = textwrap.dedent(
    """
    import os, sys, torch
    import sui_fast
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    train, val = (torch.randn(2, 13).double(), torch.arange(2)), torch.randn(15, 13).double()
    scores = sui_fast.score(model, train, val, reg=0.1, method=sys.argv[1], rank=16, progress=False)
    with open(sys.argv[2] + os.environ.get("RANK", "0"), "w") as file:
        print(*scores["si"], *scores["fsi"], file=file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    """
)


@pytest.mark.parametrize("method", ["sketch", "subspace"])
def test_more_processes_than_samples(tmp_path, method):
    (tmp_path / "script.py").write_text(SHARED)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3")
    for start, name in (((), "one"), (launcher, "many")):
        done = subprocess.run(
            [sys.executable, *start, tmp_path / "script.py", method, str(tmp_path / name)], capture_output=True,
            text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(3):
        np.testing.assert_allclose(np.loadtxt(tmp_path / f"many{rank}"), np.loadtxt(tmp_path / "one0"), rtol=1e-10)
