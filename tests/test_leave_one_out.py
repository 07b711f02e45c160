"""``leave_one_out`` against real refits in extended precision (tests/oracle.py), for every sample."""

from functools import cache

import numpy as np
import pytest
import torch
from oracle import Problem, Refits, make_problem, relative_error

from sui_fast import leave_one_out

SHAPES = {(1, "N<d"): (12, 24), (1, "N>d"): (16, 8), (3, "N<d"): (8, 36), (3, "N>d"): (10, 12), (10, "N>d"): (5, 20)}
TIMES = [1, 50, 2000, 200_000, None]


@cache
def problem(k: int, shape: str, duplicates: str, same: bool = False) -> Problem:
    n, d = SHAPES[k, shape]
    return make_problem(n, k, d, duplicates, seed=k, same=same)


def stable_lr(case: Problem, reg: float, product: float) -> float:
    """Learning rate of the mean loss with lr lambda_max = product."""
    n = len(case.residual)
    return product / (case.lambda_max / n + reg)


def run(case: Problem, **arguments):
    return leave_one_out(
        case.ntk,
        case.residual,
        outputs=case.residual.shape[1],
        cross_ntk=case.cross_ntk,
        groups=case.groups,
        **arguments,
    )


def compare(got, want: Refits, tolerance: float = 1e-8) -> None:
    # The weights themselves carry about 1e-12 of their size, so a change below 1e-10 of them may be lost in rounding.
    zero = 1e-24 * float((want.w**2).sum())
    assert relative_error(got.weight_sqnorm, want.weight_sqnorm, zero) < tolerance
    assert relative_error(got.prediction_sqnorm, want.prediction_sqnorm, zero) < tolerance
    change = want.prediction_change.astype(np.float64)
    assert np.shape(got.prediction_change) == change.shape
    assert np.abs(got.prediction_change - change).max() <= tolerance * np.abs(change).max()
    loo = want.loo_residual.astype(np.float64)
    assert np.abs(got.loo_residual - loo).max() <= tolerance * np.abs(loo).max()
    leverage = want.leverage.astype(np.float64)
    assert np.abs(got.leverage - leverage).max() <= tolerance * max(1.0, leverage.max())


@pytest.mark.parametrize("duplicates", ["no", "exact", "near"])
@pytest.mark.parametrize("reg", [0.0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("time", TIMES, ids=lambda t: f"t={t or 'inf'}")
@pytest.mark.parametrize("k, shape", SHAPES, ids=lambda x: f"k={x}" if isinstance(x, int) else x)
def test_against_refits(k, shape, time, reg, duplicates):
    case = problem(k, shape, duplicates)
    lr = None if time is None else stable_lr(case, reg, 1.0)
    compare(run(case, time=time, reg=reg, lr=lr), case.refit(reg=reg, time=time, lr=lr))


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("reg", [0.0, 1e-3])
@pytest.mark.parametrize("time", [50, 2000, None])
def test_conventions(time, reg, convention):
    case = problem(3, "N<d", "near")
    arguments = dict(time=time, reg=reg, lr=None if time is None else stable_lr(case, reg, 1.0), convention=convention)
    compare(run(case, **arguments), case.refit(**arguments))


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("time", [0.5, 50.0, 2e5])
def test_gradient_flow(time, convention):
    case = problem(3, "N>d", "exact")
    arguments = dict(time=time, reg=1e-3, lr=stable_lr(case, 1e-3, 1.0), dynamics="flow", convention=convention)
    compare(run(case, **arguments), case.refit(**arguments))


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("time", [1, 7, 50, 2000])
def test_close_to_the_stability_limit(time, convention):
    case = problem(1, "N>d", "near")
    arguments = dict(time=time, reg=1e-3, lr=stable_lr(case, 1e-3, 1.85), convention=convention)
    compare(run(case, **arguments), case.refit(**arguments))


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("reg", [0.0, 1e-3])
@pytest.mark.parametrize("time", [50, 2000, None])
def test_groups(time, reg, convention):
    case = make_problem(9, 2, 30, "exact", seed=4)
    case.groups = np.array([7, 7, 2, 2, 2, 9, 5, 5, 7])  # rows of scores: 2, 5, 7, 9
    arguments = dict(time=time, reg=reg, lr=None if time is None else stable_lr(case, reg, 1.0), convention=convention)
    got, want = run(case, **arguments), case.refit(**arguments)
    assert np.shape(got.weight_sqnorm) == (4,)
    compare(got, want)


@pytest.mark.parametrize("time", [50, None])
def test_one_group_of_everything_leaves_the_initial_model(time):
    case = make_problem(6, 2, 20, seed=5)
    case.groups = np.zeros(6, int)
    lr = None if time is None else stable_lr(case, 1e-3, 1.0)
    for convention in ("sum", "mean", "iclr2021"):
        got = run(case, time=time, reg=1e-3, lr=lr, convention=convention)
        compare(got, case.refit(time=time, reg=1e-3, lr=lr, convention=convention))
        np.testing.assert_allclose(got.loo_residual, case.residual, rtol=1e-10)


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("time, reg", [(50, 0.0), (50, 0.1), (None, 0.0), (None, 0.1)])
def test_single_sample(time, reg, convention):
    case = make_problem(1, 3, 10, seed=6)
    arguments = dict(time=time, reg=reg, lr=None if time is None else stable_lr(case, reg, 1.0), convention=convention)
    compare(run(case, **arguments), case.refit(**arguments))


@pytest.mark.parametrize("time, reg", [(1, 0.0), (2000, 0.0), (2000, 1e-3), (None, 0.0), (None, 1e-3)])
def test_sample_without_gradient_scores_exactly_zero(time, reg):
    case = make_problem(10, 2, 30, seed=7)
    case.jacobian[6:8] = 0
    got = run(case, time=time, reg=reg, lr=None if time is None else stable_lr(case, reg, 1.0))
    assert got.weight_sqnorm[3] == 0 and got.prediction_sqnorm[3] == 0
    assert (got.prediction_change[3] == 0).all()
    np.testing.assert_allclose(got.loo_residual[3], case.residual[3], rtol=1e-12)
    without = make_problem(10, 2, 30, seed=7)
    keep = np.arange(10) != 3
    rest = Problem(np.delete(without.jacobian, [6, 7], 0), without.residual[keep], without.cross)
    # Under "sum" nothing but the rows changes: n reg and lr / n must be those of ten samples.
    lr = None if time is None else stable_lr(case, reg, 1.0) * 9 / 10
    want = rest.refit(time=time, reg=reg * 10 / 9, lr=lr)
    assert relative_error(np.asarray(got.weight_sqnorm)[keep], want.weight_sqnorm) < 1e-8


@pytest.mark.parametrize("k, shape", [(1, "N<d"), (3, "N<d")])
def test_duplicates_with_equal_labels_score_zero_at_convergence(k, shape):
    case = problem(k, shape, "exact", same=True)
    got = run(case, time=None, reg=0.0)
    n = len(case.residual)
    copies = np.r_[: n // 3, n - n // 3 : n]
    size = float((case.refit().w ** 2).sum())
    assert (got.weight_sqnorm[copies] <= 1e-20 * size).all()
    assert (got.prediction_sqnorm[copies] <= 1e-20 * size).all()
    lr = stable_lr(case, 0.0, 1.0)
    got, want = run(case, time=2000, lr=lr), case.refit(time=2000, lr=lr)
    # On the way there the change of the weights falls below their rounding: compare it on the scale of the weights.
    got, want = np.sqrt(got.weight_sqnorm), np.sqrt(want.weight_sqnorm.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-13 * np.sqrt(size))


@pytest.mark.parametrize("time", [None, 50, 2000])
def test_dual_change_gives_the_weights(time):
    case = problem(3, "N<d", "no")
    arguments = dict(time=time, reg=1e-3, lr=None if time is None else stable_lr(case, 1e-3, 1.0))
    got, want = run(case, **arguments), case.refit(**arguments)
    assert got.dual_change.shape == (len(case.residual), len(case.jacobian))
    dw = got.dual_change @ case.jacobian
    scale = np.sqrt(want.weight_sqnorm.astype(np.float64))
    assert (np.abs(dw - want.dw.astype(np.float64)).max(1) < 1e-8 * scale).all()


@pytest.mark.parametrize("time", [None, 50])
def test_leverage_sums_to_the_effective_dimension(time):
    case, reg = problem(3, "N<d", "no"), 1e-3
    lr = None if time is None else stable_lr(case, reg, 1.0)
    got = run(case, time=time, reg=reg, lr=lr)
    n = len(case.residual)
    s = np.linalg.eigvalsh(case.ntk)
    x = s + n * reg
    shrink = s / x if time is None else s / x * (1 - (1 - lr / n * x) ** time)
    assert got.leverage.sum() == pytest.approx(shrink.sum(), rel=1e-10)
    if time is None:
        assert got.diagnostics["effective_dimension"] == pytest.approx(shrink.sum(), rel=1e-10)


def test_arrays_in_arrays_out():
    case = problem(1, "N<d", "no")
    arguments = dict(time=50, lr=stable_lr(case, 1e-3, 1.0), reg=1e-3)
    flat = leave_one_out(case.ntk, case.residual[:, 0], cross_ntk=case.cross_ntk, **arguments)
    column = run(case, **arguments)
    ntk, residual, cross = (torch.from_numpy(x) for x in (case.ntk, case.residual, case.cross_ntk))
    tensors = leave_one_out(ntk, residual, cross_ntk=cross, **arguments)
    assert isinstance(flat.weight_sqnorm, np.ndarray) and isinstance(tensors.weight_sqnorm, torch.Tensor)
    assert tensors.weight_sqnorm.dtype == torch.float64 and flat.weight_sqnorm.dtype == np.float64
    for name in ("weight_sqnorm", "prediction_sqnorm", "prediction_change", "dual_change", "loo_residual", "leverage"):
        np.testing.assert_array_equal(getattr(flat, name), getattr(column, name))
        np.testing.assert_array_equal(getattr(flat, name), getattr(tensors, name).numpy())


def test_inputs_are_left_alone():
    case = problem(3, "N<d", "no")
    ntk, residual, cross = case.ntk, case.residual.copy(), case.cross_ntk
    before = ntk.copy(), residual.copy(), cross.copy()
    got = leave_one_out(ntk, residual, outputs=3, cross_ntk=cross, reg=1e-3)
    _ = got.weight_sqnorm, got.prediction_sqnorm, got.leverage, got.loo_residual
    for now, then in zip((ntk, residual, cross), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e150])
@pytest.mark.parametrize("time, reg", [(None, 0.0), (None, 1e-3), (2000, 1e-3)])
def test_units_do_not_matter(scale, time, reg):
    """Scaling the kernel, reg and 1 / lr alike multiplies ||dw||^2 by 1 / scale and leaves the predictions alone."""
    case = problem(3, "N<d", "no")
    lr = None if time is None else stable_lr(case, reg, 1.0)
    base = run(case, time=time, reg=reg, lr=lr)
    lr = None if lr is None else lr / scale
    got = leave_one_out(
        case.ntk * scale, case.residual, outputs=3, cross_ntk=case.cross_ntk * scale, time=time, reg=reg * scale, lr=lr
    )
    assert relative_error(got.weight_sqnorm * scale, base.weight_sqnorm) < 1e-8
    assert relative_error(got.prediction_sqnorm, base.prediction_sqnorm) < 1e-8


def test_oracle_is_gradient_descent():
    """The judge judged: steps of gradient descent on the mean loss with a sample really deleted."""
    case, lr, reg = problem(3, "N>d", "near"), 0.7, 0.01
    n, i = len(case.residual), 2
    keep = np.arange(n) != i
    rows, r0 = case.jacobian.reshape(n, 3, -1)[keep].reshape(3 * (n - 1), -1), case.residual[keep].ravel()
    w = np.zeros(rows.shape[1])
    for _ in range(60):
        w -= lr * (rows.T @ (rows @ w - r0) / (n - 1) + reg * w)
    want = case.refit(reg=reg, time=60, lr=lr, convention="mean")
    np.testing.assert_allclose((want.w + want.dw[i]).astype(float), w, atol=1e-14)
    ridge = np.linalg.solve(rows.T @ rows + (n - 1) * reg * np.eye(rows.shape[1]), rows.T @ r0)
    want = case.refit(reg=reg, convention="mean")
    np.testing.assert_allclose((want.w + want.dw[i]).astype(float), ridge, atol=1e-13)
    want = case.refit()
    shortest = np.linalg.lstsq(rows, r0, rcond=None)[0]
    np.testing.assert_allclose((want.w + want.dw[i]).astype(float), shortest, atol=1e-11)
