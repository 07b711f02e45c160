"""Removal at many times at once against one time after the other."""

import numpy as np
import pytest
import torch

from sui_fast import StabilityError
from sui_fast.loo import make_blocks, make_filter, remove_at_times, remove_from_spectrum, times
from sui_fast.spectra import dense_spectrum


def problem(n: int, k: int, probes: int, seed: int = 0):
    """A kernel with eigenvalues over six decades, two samples alike and one without gradient; and a residual."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n * k + probes * k, n * k, generator=rng, dtype=torch.float64)
    rows *= torch.logspace(0, -3, n * k, dtype=torch.float64)
    rows[:k] = rows[k : 2 * k]
    rows[2 * k : 3 * k] = 0.0
    train = rows[: n * k]
    return train @ train.T, rows[n * k :] @ train.T, torch.randn(n, k, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(
    "n, k, options",
    [
        (150, 1, {}),
        (150, 1, {"convention": "mean", "reg": 1e-3}),
        (60, 1, {"dynamics": "flow", "convention": "iclr2021"}),
        (60, 3, {"reg": 1e-4}),
        (60, 3, {"dynamics": "flow", "convention": "mean", "reg": 1e-5}),
        (1, 2, {}),
    ],
)
def test_many_times_equal_single_ones(n, k, options, through, monkeypatch):
    monkeypatch.setattr(times, "is_shorter", lambda _: through)
    theta, cross, r0 = problem(max(n, 3), k, 20)
    theta, cross, r0 = theta[: n * k, : n * k], cross[:, : n * k], r0[:n]
    convention, reg, dynamics = (options.get(*x) for x in (("convention", "sum"), ("reg", 0.0), ("dynamics", "gd")))
    spectrum, idle = dense_spectrum(theta), (theta == 0).all(1)
    lr = 0.9 * n / spectrum.top
    when = [0, 1, 2, 17, 40, 100, 1000, 20_000, 10**6, 10**9]
    filters = [make_filter(n, reg=reg, time=float(t), lr=lr, dynamics=dynamics) for t in when]
    common = dict(cross=cross, convention=convention, idle=idle)
    weights, predictions = remove_at_times(spectrum, filters, r0, **common)
    only, none = remove_at_times(spectrum, filters, r0, **dict(common, cross=None))
    assert none is None
    np.testing.assert_allclose(only, weights, rtol=1e-10)
    for place, phi in enumerate(filters):
        one = remove_from_spectrum(spectrum, phi, r0, blocks=make_blocks(n, k), as_numpy=False, **common)
        np.testing.assert_allclose(weights[place], one.weight_sqnorm, rtol=1e-8, atol=1e-300)
        np.testing.assert_allclose(predictions[place], one.prediction_sqnorm, rtol=1e-8, atol=1e-300)


def test_a_divergent_step_is_named():
    theta, cross, r0 = problem(20, 1, 5)
    spectrum = dense_spectrum(theta)
    common = dict(cross=cross, convention="sum", idle=(theta == 0).all(1))
    with pytest.raises(StabilityError, match="lr"):
        remove_at_times(spectrum, [make_filter(20, time=t, lr=41 / spectrum.top) for t in (1.0, 10.0)], r0, **common)


def test_the_price_is_that_of_few_predictions_not_of_one_per_time():
    """Bases hold far fewer functions than there are eigenvectors, and each what it must."""
    theta, _, r0 = problem(200, 1, 5)
    spectrum = dense_spectrum(theta)
    filters = [make_filter(200, time=float(t), lr=200 / spectrum.top) for t in np.geomspace(1, 1e5, 30).round()]
    fits = times.fit_rationals(filters, spectrum.top)
    several = times._Times(spectrum, [(f, f) for f in filters], fits, r0, None, "sum", (theta == 0).all(1))
    bases = several.bases
    assert sum(basis.numel() for basis in bases.basis) < 15 * 200
    for columns, basis in zip(bases.columns, bases.basis, strict=True):
        values = torch.from_numpy(np.stack([fit(spectrum.s[columns].numpy()) for fit in fits]))
        left = values - (values @ basis.T) @ basis
        assert float((left.abs().amax(1) / values.abs().amax(1)).max()) < 1e-10


def test_every_time_is_that_of_training_without_the_sample():
    """Against the definition: the spectrum of the others' kernel, one sample after the other."""
    n, k, probes = 40, 2, 6
    theta, cross, r0 = problem(n, k, probes)
    spectrum, idle = dense_spectrum(theta), (theta == 0).all(1)
    filters = [make_filter(n, time=float(t), lr=n / spectrum.top) for t in (1, 2, 5, 30, 400, 10**4, 10**6)]
    weights, predictions = remove_at_times(spectrum, filters, r0, cross=cross, convention="sum", idle=idle)
    for place, phi in enumerate(filters):
        whole = trained(theta, r0.reshape(-1), phi)
        for sample in (x for x in range(n) if x != 2):  # whose gradient is zero
            kept = torch.arange(n * k) // k != sample
            change = -whole.clone()
            change[kept] += trained(theta[kept][:, kept], r0.reshape(-1)[kept], phi)
            np.testing.assert_allclose(weights[place, sample], change @ theta @ change, rtol=1e-6)
            moved = (cross @ change).square().sum() / probes
            np.testing.assert_allclose(predictions[place, sample], moved, rtol=1e-6)


def trained(theta: torch.Tensor, r0: torch.Tensor, phi) -> torch.Tensor:
    """Dual weights at the end of the training."""
    s, u = torch.linalg.eigh(theta)
    return u @ (torch.from_numpy(phi(s.clamp(min=0).numpy())) * (u.T @ r0))


def test_one_step_alone():
    """No pole at any time."""
    theta, cross, r0 = problem(20, 1, 5)
    spectrum, idle = dense_spectrum(theta), (theta == 0).all(1)
    phi, common = make_filter(20, time=1.0, lr=20 / spectrum.top), dict(cross=cross, convention="mean", idle=idle)
    weights, predictions = remove_at_times(spectrum, [phi], r0, **common)
    one = remove_from_spectrum(spectrum, phi, r0, blocks=make_blocks(20, 1), as_numpy=False, **common)
    np.testing.assert_allclose(weights[0], one.weight_sqnorm, rtol=1e-10)
    np.testing.assert_allclose(predictions[0], one.prediction_sqnorm, rtol=1e-10)
