"""Summaries from a sketch: a shrinking set of features equals the shrinking kernel of these features."""

import numpy as np
import pytest
import torch

from sui_fast import ArgumentError, score, summarize
from sui_fast._errors import SuiError
from sui_fast.apps import features as module
from sui_fast.apps.features import FeatureProblem
from sui_fast.loo import Remaining, part_error_curve
from sui_fast.losses import Squared
from tests.apps.problems import network

pytestmark = pytest.mark.filterwarnings("ignore:sui_fast. rank")


def made(n, k, r, m=6, reg=0.02, convention="sum", **training):
    """A problem of random features, and its kernels."""
    rng = torch.Generator().manual_seed(n + k + r)
    z, seen, r0 = (torch.randn(*shape, generator=rng) for shape in ((n, k, r), (m, k, r), (n, k)))
    z = z / (1 + torch.arange(r))  # eigenvalues that fall
    training = dict(time=None, lr=None, dynamics="gd") | training
    r0 = r0.double()
    held, outputs = {"features": z, "residual": r0}, torch.zeros(m, k)
    goal, device = Squared(r0, None), torch.device("cpu")
    problem = FeatureProblem(held, {"features": seen}, outputs, goal, None, training, convention, device, reg)
    flat = z.flatten(0, 1).double()
    return problem, flat @ flat.T, seen.flatten(0, 1).double() @ flat.T, r0


@pytest.mark.parametrize(
    "training", [{}, dict(time=40, lr=0.05), dict(convention="mean"), dict(reg=0.0, time=9, lr=0.1)]
)
@pytest.mark.parametrize(("n", "k", "r"), [(40, 1, 7), (30, 3, 11), (12, 2, 30)])
def test_a_shrinking_set_of_features_is_that_of_their_kernel(n, k, r, training):
    problem, theta, cross, r0 = made(n, k, r, **training)
    options = dict(problem.training, reg=problem.reg, convention=problem.convention, cross=cross)
    exact, found = Remaining(theta, r0, **options), problem.remaining()
    for step in range(5):
        for seen in (False, True):
            assert torch.allclose(found.sqnorm(seen), exact.sqnorm(seen), rtol=1e-6, atol=1e-12)
        gone = exact.kept[[0, len(exact.kept) // 2]]
        exact.drop(gone), found.drop(gone)
        assert (exact.kept == found.kept).all()
        if step == 3:
            exact.rescale(), found.rescale()


def test_sums_that_lost_samples_are_those_of_the_rest():
    problem, *_ = made(40, 2, 9)
    left = problem.remaining()
    left.sqnorm(False)
    left.drop(np.arange(0, 20, 2))
    rest = problem.sums(left.kept)
    assert left._sums is not None and left._sums.samples == rest.samples == 30
    assert torch.allclose(left._sums.gram, rest.gram, rtol=1e-12)
    assert torch.allclose(left._sums.pull, rest.pull, rtol=1e-12)
    assert np.isclose(left._sums.energy, rest.energy)


@pytest.mark.parametrize(("n", "k", "r"), [(40, 1, 7), (12, 2, 30)])
def test_regularisation_and_predictions_are_those_of_the_kernel(n, k, r):
    problem, theta, cross, r0 = made(n, k, r)

    def learn(inside, others):
        rows, rest = problem_rows(inside, k), problem_rows(others, k)
        s, u = torch.linalg.eigh(theta[rows][:, rows])
        keep = s > 1e-10 * s[-1]
        return s[keep], u[:, keep].T @ r0.reshape(-1)[rows], theta[rest][:, rows] @ u[:, keep]

    settings = dict(problem.training, repeats=2)
    for one, other in zip(*(part_error_curve(f, r0, 8, **settings) for f in (learn, problem.learn)), strict=True):
        assert np.allclose(one, other, rtol=1e-5)
    problem.choose_reg_for(4)
    regs, errors = part_error_curve(problem.learn, r0, 4, **dict(settings, repeats=int(np.clip((n / 4) ** 3, 2, 5))))
    assert problem.reg == regs[errors.argmin()]
    kept = np.array([0, 2, 3, 7, 9, 11])
    rows = problem_rows(kept, k)
    shifted = theta[rows][:, rows] + len(kept) * problem.reg * torch.eye(len(rows))
    alpha = torch.linalg.solve(shifted, r0.reshape(-1)[rows])
    assert torch.allclose(problem.predictions(kept, "mean"), (cross[:, rows] @ alpha).view(-1, k), rtol=1e-5, atol=1e-6)


def problem_rows(samples, k):
    return (torch.from_numpy(np.asarray(samples))[:, None] * k + torch.arange(k)).flatten()


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_a_summary_by_a_sketch_begins_as_the_scores_do(loss):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 6, generator=rng), torch.arange(90) % 3
    model, val = network(3), torch.randn(20, 6, generator=rng)
    common = dict(reg=0.05, loss=loss, seed=3, progress=False)
    with pytest.warns(RuntimeWarning, match="rank 64 is small"):
        scores = score(model, (x, y), val, method="sketch", rank=64, **common)
    with pytest.warns(RuntimeWarning, match="rank 64 is small"):
        found = summarize(model, (x, y), val, 40, rank=64, step=0.1, **common)
    assert found.rank == 64 and "rank 64" in found.summary() and len(found.kept) == 40
    assert np.array_equal(found.order[:9], np.lexsort((-np.arange(90), scores["fsi"]))[:9])
    assert np.allclose(found.information[found.order[:9]], scores["fsi"][found.order[:9]])
    again = summarize(model, (x, y), val, 40, rank=64, step=0.1, **common)
    assert (found.order == again.order).all()
    alone = summarize(model, (x, y), None, 40, rank=64, **common)
    assert alone.by == "si" and alone.rank == 64


def test_a_large_set_is_summarized_by_a_sketch(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=rng), torch.arange(60) % 2
    model = network(1)
    assert summarize(model, (x, y), (x[:9], y[:9]), 0.5, progress=False).rank is None
    monkeypatch.setattr(module, "MOST_ROWS", 59)
    monkeypatch.setattr(module, "DEFAULT_RANK", 32)
    found = summarize(model, (x, y), (x[:9], y[:9]), 0.5, progress=False)
    assert found.rank == 32 and len(found.kept) == 30 and set(found.accuracy) >= {30, 60} and found.reg > 0


def test_bad_ranks_have_names():
    x, y = torch.randn(8, 6), torch.arange(8) % 2
    for bad in (0, -1, 2.5, "many", True):
        with pytest.raises(ArgumentError, match="rank"):
            summarize(network(1), (x, y), None, 4, rank=bad)
    with pytest.raises(ArgumentError, match="reg"):
        summarize(network(1), (x, y), None, 4, rank=4, reg="best")
    with pytest.raises(ArgumentError, match="two samples"):
        summarize(network(1), (x[:1], y[:1]), None, 1, rank=4)
    with pytest.raises(SuiError):
        summarize(network(1), (x * float("nan"), y), None, 4, rank=4)
