"""Training filters against step-by-step gradient descent and high precision."""

import mpmath
import numpy as np
import pytest

from sui_fast.loo.filters import TrainingFilter
from sui_fast.loo.rational import fit_rational

FILTERS = {
    "one step": TrainingFilter(eta=1.9, time=1),
    "two steps": TrainingFilter(eta=1.0, time=2),
    "three steps": TrainingFilter(eta=1.9, time=3),
    "20 steps": TrainingFilter(eta=1.9, time=20),
    "50 steps": TrainingFilter(eta=1.0, time=50),
    "2000 steps": TrainingFilter(eta=1.0, time=2000),
    "2001 steps at the edge": TrainingFilter(eta=1.99, time=2001),
    "200000 steps": TrainingFilter(eta=1.0, time=200_000),
    "regularised": TrainingFilter(shift=0.01, eta=1.0, time=2000),
    "flow": TrainingFilter(eta=1.0, time=2000.0, dynamics="flow"),
    "short flow": TrainingFilter(eta=1.0, time=1e-3, dynamics="flow"),
}


def exact(phi: TrainingFilter, x: float) -> mpmath.mpf:
    with mpmath.workdps(60):
        shifted = mpmath.mpf(x) + mpmath.mpf(phi.shift)
        if phi.dynamics == "flow":
            left = mpmath.exp(-mpmath.mpf(phi.eta) * phi.time * shifted)
        else:
            left = (1 - mpmath.mpf(phi.eta) * shifted) ** int(phi.time)
        return (1 - left) / shifted if shifted else mpmath.mpf(phi.eta) * phi.time


@pytest.mark.parametrize("name", FILTERS)
def test_filter_is_exact_to_rounding(name):
    phi = FILTERS[name]
    points = np.concatenate([[0.0, 1.0], np.geomspace(1e-14, 1, 40)])
    error = [abs(float(exact(phi, x) / mpmath.mpf(float(phi(np.array(x)))) - 1)) for x in points]
    assert max(error) < 4e-13  # the worst is eta t eps: rounding of the argument, not of the formula


@pytest.mark.parametrize("name", FILTERS)
def test_remaining_is_what_the_filter_leaves(name):
    phi = FILTERS[name]
    x = np.geomspace(1e-8, 1, 30)
    np.testing.assert_allclose(phi.remaining(x), 1 - x * phi(x), atol=1e-13)


@pytest.mark.parametrize("top", [1.0, 1e4, 1e-5])
@pytest.mark.parametrize("name", FILTERS)
def test_rational_fit_is_relative_and_off_the_interval(name, top):
    phi = FILTERS[name]
    phi = TrainingFilter(phi.shift * top, phi.eta / top, phi.time, phi.dynamics)
    fit = fit_rational(phi, top)
    fresh = top * np.unique(np.concatenate([[0.0], np.geomspace(1e-12, 1, 3001), np.linspace(0, 1, 3001)]))
    assert np.abs(fit(fresh) / phi(fresh) - 1).max() < 2e-11
    assert fit.error < 2e-11
    outside = np.abs(fit.poles.imag) + np.maximum(np.maximum(-fit.poles.real, fit.poles.real - top), 0)
    assert (outside > 0).all()


def test_fit_reports_an_error_it_really_has():
    phi = TrainingFilter(eta=1.0, time=2e8, dynamics="flow")
    fit = fit_rational(phi, 1.0)
    x = np.geomspace(1e-12, 1, 5000)
    assert np.abs(fit(x) / phi(x) - 1).max() <= 2 * fit.error


def test_without_changes_what_the_convention_says():
    phi = TrainingFilter(shift=3.0, eta=0.1, time=7)
    assert phi.without(2, 10, "sum") == phi
    assert phi.without(2, 10, "iclr2021") == TrainingFilter(3.0, 0.1 * 10 / 8, 7)
    mean = phi.without(2, 10, "mean")
    assert mean.eta == pytest.approx(0.125) and mean.shift == pytest.approx(2.4)


def test_settled_only_where_nothing_is_left():
    assert TrainingFilter(shift=1.0).is_settled(0.0, 1.0)
    assert TrainingFilter(eta=0.5, time=1000).is_settled(0.1, 1.0)
    assert not TrainingFilter(eta=0.5, time=1000).is_settled(0.0, 1.0)
    assert not TrainingFilter(eta=1.999, time=1000).is_settled(0.1, 1.0)


@pytest.mark.parametrize("dynamics", ["gd", "flow"])
def test_every_fit_is_good_from_short_to_long_and_to_the_edge(dynamics):
    rng = np.random.default_rng(0)
    grid = np.concatenate(
        [[0.0], np.geomspace(1e-14, 1, 3001), np.linspace(0, 1, 2001), 1 - np.geomspace(1e-12, 1, 500)]
    )
    for reach in (1e-6, 1e-3, 0.3, 1.0, 1.3, 1.9, 1.999):  # step times the largest eigenvalue
        for time in [*range(2, 12), 23, 150, 3001, 10**5, 10**9]:
            top, shift = 10 ** rng.uniform(-8, 8), rng.choice([0.0, 1e-5, 1.0])
            phi = TrainingFilter(shift * top, reach / (top * (1 + shift)), float(time), dynamics)
            fit, x = fit_rational(phi, top), top * grid
            values = phi(x)
            scale = np.maximum(np.abs(values), 0.01 / (x + phi.shift + 1 / (phi.eta * phi.time)))
            error = np.max(np.abs(fit(x) - values) / scale)
            assert error < (1e-12 if reach <= 1 or dynamics == "flow" else 1e-10)
            assert error < 2 * fit.error + 1e-13
            assert len(fit.poles) <= (8 if reach <= 1 or dynamics == "flow" else 16)
