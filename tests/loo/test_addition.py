"""What a sample would add: equal to removing it from the data set that holds it."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sui_fast
from sui_fast.loo import add_samples, make_filter

MEASURES = ("si", "fsi", "si_langevin", "leverage", "loo_residual", "loo_margin")
SETTINGS = {
    "ridge": dict(reg=0.05),
    "ridgeless": dict(reg=0.0),
    "steps": dict(time=300, lr=0.05),
    "steps with decay": dict(time=300, lr=0.05, reg=0.02),
    "flow": dict(time=40.0, lr=1.0, dynamics="flow"),
}


def problem(k, n, width=12, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, k)).double()
    x = torch.randn(n + 14, 5, dtype=torch.float64)
    y = torch.randint(0, max(k, 2), (n + 14,))
    return model, (x[:n], y[:n]), (x[n : n + 4], y[n : n + 4]), x[n + 4 :]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [20, 120])  # more and fewer parameters (85, 111) than rows
@pytest.mark.parametrize("convention", ["sum", "mean"])
def test_addition_is_removal_from_the_larger_set(setting, k, n, convention):
    model, train, new, val = problem(k, n)
    arguments = SETTINGS[setting]
    found = sui_fast.score(
        model, train, val, candidates=new, measures=MEASURES, convention=convention, progress=False, **arguments
    ).candidates
    for i in (0, 3):
        whole = [torch.cat([old, more[i : i + 1]]) for old, more in zip(train, new, strict=True)]
        share = (n + 1) / n  # the same run with one sample more, in terms of its own mean loss
        same = dict(arguments)
        if convention == "sum":
            same = {name: value / share if name == "reg" else value for name, value in same.items()}
            same = {name: value * share if name == "lr" else value for name, value in same.items()}
        want = sui_fast.score(
            model, tuple(whole), val, measures=MEASURES, convention=convention, progress=False, **same
        )
        for name in MEASURES:
            np.testing.assert_allclose(found[name][i], want[name][n], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
@pytest.mark.parametrize("k", [1, 2])
def test_low_rank_addition_tends_to_the_exact_one(method, k):
    model, train, new, val = problem(k, 120)
    common = dict(candidates=new, measures=MEASURES, reg=0.02, progress=False)
    exact = sui_fast.score(model, train, val, **common).candidates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rank = 1 << 11 if method == "sketch" else 80
        near = sui_fast.score(model, train, val, method=method, rank=rank, **common).candidates
    for name in MEASURES:
        tolerance, floor = (0.2, 0.05) if method == "sketch" else (0.02, 0.01)
        np.testing.assert_allclose(near[name], exact[name], rtol=tolerance, atol=floor * np.abs(exact[name]).max())


def test_a_sample_seen_twice_adds_less_and_one_without_gradient_nothing():
    s, gain = torch.tensor([1.0, 4.0]).double(), torch.tensor([0.3, -1.0]).double()
    rows = torch.tensor([[[0.5, 1.0]], [[0.0, 0.0]]]).double()
    residual = torch.tensor([[1.0], [1.0]]).double()
    for phi in (make_filter(5, reg=0.1), make_filter(5), make_filter(5, time=50, lr=0.2)):
        found = add_samples(rows, torch.zeros(2, 1, 1).double(), residual, s, gain, phi, n=5)
        assert found.weight_sqnorm[0] > 0 and abs(found.weight_sqnorm[1]) < 1e-20
        assert found.leverage[1].abs() < 1e-12 and 0 < found.leverage[0] < 1


def test_rounding_where_nothing_is_unseen_does_not_count():
    """There dual weights are residual / shift: 1e9 squared, times the rounding of zero, made a 400th of the answer."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    share, residual = torch.tensor([0.0, 1e-3, 0.2]).double(), torch.tensor([0.7, -1.0, 0.4]).double()
    unseen, phi = (turn * share) @ turn.T, make_filter(10, reg=1e-10)
    one = torch.ones(1, dtype=torch.float64)
    found = add_samples(torch.zeros(1, 3, 1).double(), unseen[None], (turn @ residual)[None], one, one, phi, n=10)
    want = (share * (residual / (share + 1e-9)).square()).sum()
    torch.testing.assert_close(found.weight_sqnorm[0], want, rtol=1e-6, atol=0)


def test_candidates_are_checked():
    model, train, new, val = problem(2, 20)
    with pytest.raises(sui_fast.ArgumentError, match="si_sgd"):
        sui_fast.score(model, train, val, candidates=new, measures=("si", "si_sgd"))
    with pytest.raises(sui_fast.DataError, match="candidates"):
        sui_fast.score(model, train, val, candidates=new[0], progress=False)
    with pytest.raises(sui_fast.DataError, match="candidates"):
        sui_fast.score(model, train, val, candidates=(new[0], torch.full((4,), 7)), progress=False)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("method", ["nystrom", "subspace", "sketch"])
def test_rounding_of_features_is_nothing_unseen_and_nothing_missed(method, k):
    """Of fewer weights than rows all directions are known: what float32 features leave of them once counted as new."""
    torch.manual_seed(22)
    x, y = torch.randn(80, 5).double(), torch.randn(80, k).double()
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, k)).double()
    train, new, rank = (x[:74], y[:74]), (x[74:], y[74:]), 5000 if method == "sketch" else 200
    for reg in (0.0, 1e-8):
        common = dict(val=train, reg=reg, candidates=new, measures=("si", "fsi", "leverage"), progress=False)
        exact = sui_fast.score(model, train, method="dense", **common)
        found = sui_fast.score(model, train, method=method, rank=rank, **common)
        for name in common["measures"]:
            np.testing.assert_allclose(found[name], exact[name], rtol=1e-3, err_msg=name)
            np.testing.assert_allclose(found.candidates[name], exact.candidates[name], rtol=1e-3, err_msg=name)
