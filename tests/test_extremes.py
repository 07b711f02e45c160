"""Numbers too large or too small for their dtype: the right scores, or an error that names the sample."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sui_fast
from sui_fast import planning

LOW = ("nystrom", "subspace", "sketch")
COMMON = dict(measures=("si", "loo_residual", "leverage"), progress=False)
pytestmark = pytest.mark.filterwarnings("ignore:sui_fast. rank")


def linear(scale=1.0, k=1, dtype=torch.float32, n=60):
    """Outputs of zero: scores at inputs times c and reg times c^2 are those at c = 1 but for the units of SI."""
    torch.manual_seed(0)
    model = nn.Linear(5, k, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    x = (torch.randn(n, 5, dtype=torch.float64) * scale).to(dtype)
    return model, (x, torch.randn(n, k, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("method", LOW)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e17, 1e30])
def test_scores_do_not_hang_on_the_scale(method, scale):
    want = sui_fast.score(*linear(k=2, dtype=torch.float64), method="dense", reg=0.1, **COMMON)
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64 or 1e-18 < scale < 1e18:
            model, data = linear(scale, 2, dtype)
            found = sui_fast.score(model, data, method=method, rank=240, reg=0.1 * scale**2, **COMMON)
            tolerance = 0.1 if method == "sketch" else 1e-4
            for name, unit in (("si", scale**2), ("loo_residual", 1.0), ("leverage", 1.0)):
                worst = np.abs(found[name] * unit - want[name]).max() / want[name].max()
                assert worst < tolerance, (name, dtype)


@pytest.mark.parametrize("method", LOW)
def test_gradients_out_of_range_are_named_by_their_sample(method):
    run = lambda model, data, val=None, **more: sui_fast.score(  # noqa: E731
        model, data, val, method=method, rank=16, reg=0.1, progress=False, **{"measures": ("si",), **more}
    )
    model, (x, y) = linear()
    huge = x.clone()
    huge[7] *= 1e25
    with pytest.raises(sui_fast.DataError, match=r"train: .*torch.float32, got an overflow at sample 7\. .*float64"):
        run(model, (huge, y))
    assert np.isfinite(run(model, (huge, y), dtype=torch.float64)["si"]).all()
    wide, beyond = linear(dtype=torch.float64), x[:20].double()
    beyond[7] *= 1e60
    with pytest.raises(sui_fast.DataError, match="val: .* in that of torch.float32, got an overflow at sample 7"):
        run(*wide, (beyond, y[:20].double()), measures=("fsi",))
    with pytest.raises(sui_fast.DataError, match=r"train: .*\(sample [0-9]+\) and less, which vanish"):
        run(model, (x * 1e-25, y))
    folded = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))  # the square of one factor, times nothing
    with pytest.raises(sui_fast.DataError, match="an overflow at sample [0-9]+"):
        run(folded, (x * 1e25, y))
    with pytest.raises(sui_fast.SuiError, match="zero"):
        run(nn.Sequential(nn.Linear(5, 8), nn.Threshold(1e30, 0.0), nn.Linear(8, 1, bias=False)), (x, y))


@pytest.mark.parametrize("method", ("dense", *LOW))
@pytest.mark.parametrize("k", [1, 10])
def test_poor_data_have_finite_scores_or_a_named_error(method, k):
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.arange(20) % max(k, 2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, k))
    data = {
        "constant": (torch.ones(20, 5), y), "zero": (torch.zeros(20, 5), y), "twice": (x.repeat(2, 1), y.repeat(2)),
        "one": (x[:1], y[:1]), "fitted": (x, model(x).detach()), "tiny": (x * 1e-38, y), "large": (x * 1e10, y),
        "certain": (x * 1e18, y),
    }  # fmt: skip
    for name, train in data.items():
        for loss in ("mse", "cross_entropy" if k > 1 else "binary_cross_entropy")[: 1 if name == "fitted" else 2]:
            for val, reg in ((None, 0.1), (train[0][:4], 0.1), (None, "auto")):
                given = dict(loss=loss, reg=reg, measures=("si", "leverage", *(["fsi"] if val is not None else [])))
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        found = sui_fast.score(model, train, val, method=method, progress=False, **given)
                except sui_fast.SuiError as error:
                    assert name == "certain", error
                else:
                    assert all(np.isfinite(column).all() for column in found.values.values()), (name, given)


def test_what_lapack_refuses_has_a_name(monkeypatch):
    def refuse(*_):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)
    with pytest.raises(sui_fast.SpectrumError, match="can be solved with, got no convergence"):
        sui_fast.score(*linear(), method="sketch", rank=16, reg=0.1, **COMMON)


def test_the_choice_of_a_method_names_the_sample_too(monkeypatch):
    monkeypatch.setitem(planning.DENSE_ROWS, "cpu", 10)
    model, (x, y) = linear()
    x[7] *= 1e25
    with pytest.raises(sui_fast.DataError, match="overflow at sample 7"):
        sui_fast.score(model, (x, y), reg=0.1, **COMMON)


@pytest.mark.parametrize("method", LOW)
def test_residuals_that_features_do_not_tell_are_warned_of(method):
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1, bias=False).double(), torch.randn(60, 5, dtype=torch.float64)
    y = x[:, :1] + torch.randn(60, 1)
    with pytest.warns(RuntimeWarning, match="float32 features tell"):
        sui_fast.score(model, (x * 1e10, y), method=method, rank=60, **COMMON)
    with warnings.catch_warnings(record=True) as heard:
        sui_fast.score(model, (x, y), method=method, rank=60, **COMMON)
    assert not any("features tell" in str(w.message) for w in heard)


def test_a_regularisation_below_the_rounding_of_the_kernel_still_predicts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(24, 6) * 1e10, torch.arange(24) % 3
    found = sui_fast.summarize(model, (x, y), (x[:6], y[:6]), 5, reg=0.1, progress=False)
    assert len(found.kept) == 5
