"""The applications with other losses than the squared one: equal to ``score`` with that loss."""

import numpy as np
import pytest
import torch
from problems import blobs, network

from sui_fast import (
    ArgumentError,
    compare_sources,
    detect_adversarial,
    find_undersampled,
    information_curves,
    overlap,
    redundancy,
    score,
    summarize,
)
from sui_fast.apps.kernel import linear_problem

LOSSES = {"cross_entropy": 3, "binary_cross_entropy": 1}


def close(a, b) -> bool:
    return np.allclose(a, b, rtol=1e-7, atol=0)


@pytest.fixture(params=LOSSES)
def asked(request):
    """Loss, model, training data, validation data."""
    k = LOSSES[request.param]
    x, y = blobs(60, max(k, 2), seed=3, spread=0.9)
    return request.param, network(k, seed=3), (x[:40], y[:40]), (x[40:], y[40:])


def test_rankings_and_curves(asked):
    loss, model, train, val = asked
    common = dict(loss=loss, reg=0.01, progress=False)
    measures = ("si", "fsi", "leverage", "loo_residual", "loo_margin")
    scores = score(model, train, val, measures=measures, **common)
    for app in (detect_adversarial, find_undersampled):
        found = app(model, train, val, **common)
        assert all(close(found.measures[name], scores[name]) for name in measures)
    automatic = detect_adversarial(model, train, val, loss=loss, progress=False)
    chosen = score(model, train, val, measures=measures, loss=loss, reg="auto", progress=False)
    assert close(automatic.measures["loo_margin"], chosen["loo_margin"])
    curves = information_curves(model, train, val, times=[5, 100], lr=0.5, loss=loss, progress=False)
    for place, time in enumerate((5, 100)):
        once = score(model, train, val, loss=loss, time=time, lr=0.5)
        assert close(curves.si[place], once["si"]) and close(curves.fsi[place], once["fsi"])


def test_groups_sources_and_redundancy(asked):
    loss, model, train, val = asked
    common = dict(loss=loss, reg=0.01, progress=False)
    groups = np.repeat([0, 1, 2], [15, 15, 10])
    each, whole = score(model, train, val, **common), score(model, train, val, groups=groups, **common)
    shared = overlap(model, train, val, groups=groups, **common)
    assert close(shared.first, whole["fsi"][[0, 0, 1]]) and close(shared.second, whole["fsi"][[1, 2, 2]])
    both = score(model, train, val, groups=groups == 2, **common)
    assert close(shared.joint[0], both["fsi"][0])
    told = redundancy(model, train, val, 3, **common)
    assert close(told.information, np.sort(each["fsi"])[:3])
    parts = {"a": tuple(z[:25] for z in train), "b": tuple(z[25:] for z in train)}
    sources = compare_sources(model, parts, {"one": tuple(z[:8] for z in val), "two": val}, **common)
    assert close(sources.sample_fsi[:, 1], each["fsi"])
    few = score(model, train, tuple(z[:8] for z in val), **common)
    assert close(sources.sample_fsi[:, 0], few["fsi"])


def test_summaries(asked):
    loss, model, train, val = asked
    found = summarize(model, train, val, 10, loss=loss, progress=False)
    assert len(found.kept) == 10 and found.accuracy[40] > 0.5
    once = summarize(model, train, val, 30, loss=loss, reg=0.01, method="one-shot", progress=False)
    scores = score(model, train, val, loss=loss, reg=0.01)
    assert set(once.order[:10]) == set(np.argsort(scores["fsi"])[:10])


def test_predictions_are_one_newton_step(asked):
    """Weights of the whitened problem minimise the second-order model of the loss: a solve in weight space."""
    loss, model, train, val = asked
    problem = linear_problem(model, train, val, loss=loss, reg=0.01, progress=False)
    plain = linear_problem(model, train, val, reg=0.01, progress=False)
    slope, weight = problem.goal.derivatives()
    j, probe = (x.rows().to(torch.float64) for x in (plain.jac, plain.probe))
    n, k = slope.shape
    blocks = torch.block_diag(*weight)
    hessian = j.T @ blocks @ j + n * 0.01 * torch.eye(j.shape[1], dtype=torch.float64)
    change = torch.linalg.solve(hessian, -j.T @ slope.reshape(-1))
    expected = plain.probe.outputs.to(torch.float64) + (probe @ change).reshape(-1, k)
    assert torch.allclose(problem.predictions(), expected, rtol=1e-7, atol=1e-9)


def test_certain_samples_and_unknown_losses_are_named(asked):
    loss, model, train, val = asked
    with torch.no_grad():
        model[-1].bias.add_(200 * torch.eye(len(model[-1].bias), dtype=torch.float64)[0])
    with pytest.raises(ArgumentError, match="loss"):
        detect_adversarial(model, train, val, loss=loss, reg=0.01, progress=False)
    with pytest.raises(ArgumentError, match="loss"):
        detect_adversarial(model, train, val, loss="hinge", progress=False)
