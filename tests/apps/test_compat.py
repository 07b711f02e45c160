"""compat="iclr2021": the authors' definitions."""

import numpy as np
import pytest
import torch
from problems import blobs, network

from sui_fast import ArgumentError, jacobian, leave_one_out, overlap, score
from sui_fast.spectra import project, projection_matrix


def test_convention(problem):
    model, train, val = problem
    common = dict(time=50, lr=0.05, reg=0.01)
    a, b = (score(model, train, val, **common, **x) for x in ({"compat": "iclr2021"}, {"convention": "iclr2021"}))
    assert (a["si"] == b["si"]).all() and (a["fsi"] == b["fsi"]).all()
    assert not np.allclose(a["si"], score(model, train, val, **common)["si"])
    one = overlap(model, train, val, [(0, 1)], reg=0.01, compat="iclr2021", progress=False)
    assert np.isclose(one.first[0], score(model, train, val, reg=0.01, compat="iclr2021")["fsi"][0])


@pytest.mark.parametrize("kind", ["random-subset", "very-sparse"])
def test_projections_keep_products_on_average(kind):
    model = network(1, width=300)  # one parameter above 1000 entries, three below
    x, _ = blobs(4, 2)
    jac = jacobian(model, x)
    true = jac.gram().numpy()
    draws = []
    for seed in range(60):
        matrix = projection_matrix(jac, kind, 200, seed)
        rows = project(jac, matrix)
        assert torch.allclose(rows, jac.rows() @ matrix.to_dense())
        draws.append((rows @ rows.T).numpy())
    error = np.abs(np.mean(draws, 0) - true) / (np.std(draws, 0) / 60**0.5 + 1e-12 * true.max())
    assert error.max() < 4.5
    if kind == "random-subset":
        per = {name: jac.columns(name) for name in jac.parameter_names}
        picked = matrix.indices()[0].numpy()
        counts = {name: ((picked >= c.start) & (picked < c.stop)).sum() for name, c in per.items()}
        assert all(counts[name] == min(200, c.stop - c.start) for name, c in per.items())
        assert len(set(picked)) == len(picked)


def test_scores_of_projected_gradients():
    model, (x, y) = network(1, width=300), blobs(30, 2)
    options = dict(compat="iclr2021", method="random-subset", rank=100, seed=3, reg=0.01)
    found = score(model, (x[:20], y[:20]), x[20:], **options)
    jac, probe = jacobian(model, x[:20]), jacobian(model, x[20:])
    matrix = projection_matrix(jac, "random-subset", 100, 3)
    a, b = project(jac, matrix), project(probe, matrix)
    residual = y[:20].double()[:, None] - jac.outputs
    want = leave_one_out(a @ a.T, residual, reg=0.01, cross_ntk=b @ a.T, convention="iclr2021")
    assert np.allclose(found["si"], want.weight_sqnorm / 2, rtol=1e-9, atol=0)
    assert np.allclose(found["fsi"], want.prediction_sqnorm / 2, rtol=1e-9, atol=0)
    assert found.settings["compat"] == "iclr2021"


def test_bad_combinations():
    model, train = network(1), blobs(8, 2)
    with pytest.raises(ArgumentError, match="compat"):
        score(model, train, measures="si", compat="iclr2020")
    with pytest.raises(ArgumentError, match="convention"):
        score(model, train, measures="si", compat="iclr2021", convention="mean")
    with pytest.raises(ArgumentError, match="method"):
        score(model, train, measures="si", method="random-subset")
