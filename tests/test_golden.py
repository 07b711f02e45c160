"""Golden values of the authors' formulas, in float64: arrays alone, and end to end from the network."""

import numpy as np
import pytest
import torch
from oracle import relative_error

from sui_fast import (
    detect_adversarial,
    find_mislabeled,
    find_undersampled,
    information_curves,
    jacobian,
    leave_one_out,
    ntk,
    overlap,
    score,
    summarize,
)

TIMES = {"t2000_disc": 2000, "tinf": None}


def network(golden) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))
    state = {str(name): torch.from_numpy(golden[f"param__{name}"]) for name in golden["param_names"]}
    model.load_state_dict(state)
    return model.double()


def split(golden, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(golden[f"x_{part}"]).double(), torch.from_numpy(golden[f"y_{part}"])


@pytest.fixture(params=TIMES)
def run(request, golden):
    """(name of the setting, Removal)."""
    removal = leave_one_out(
        golden["ntk"],
        golden["y_train"] - golden["train_init_preds"],
        reg=float(golden["l2_per_mean_loss"]),
        time=TIMES[request.param],
        lr=float(golden["lr"]),
        cross_ntk=golden["test_train_ntk"],
        convention="iclr2021",
    )
    return request.param, removal


def test_scores_from_the_kernel(golden, run):
    name, removal = run
    assert relative_error(removal.weight_sqnorm, golden[f"{name}__weight_q"]) < 1e-8
    assert relative_error(removal.prediction_sqnorm, golden[f"{name}__test_q"]) < 1e-8


def test_change_vectors(golden, run):
    name, removal = run
    chosen = golden["change_samples"]
    want = golden[f"{name}__test_change"]
    got = removal.prediction_change[chosen]
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-8 * np.abs(want).max()
    x, _ = split(golden, "train")
    rows = jacobian(network(golden), x, dtype=torch.float64)
    rows = rows.rows(0, rows.shape[0]).numpy()
    order = [f"{name}" for name in golden["param_names"]]
    assert order == [name for name, _ in network(golden).named_parameters()]
    change = removal.dual_change[chosen] @ rows
    want = golden[f"{name}__weight_change"]
    assert np.abs(change - want).max() < 1e-8 * np.abs(want).max()


def test_kernel_of_the_network(golden):
    model, (train, _), (val, _) = network(golden), split(golden, "train"), split(golden, "val")
    for got, want in ((ntk(model, train, dtype=torch.float64), "ntk"), (ntk(model, val, train), "test_train_ntk")):
        want = golden[want]
        assert np.abs(got.numpy() - want).max() < 1e-12 * np.abs(want).max()
    features = jacobian(model, train, dtype=torch.float64)
    np.testing.assert_allclose(features.outputs.numpy(), golden["train_init_preds"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(features.rows(0, 5).numpy(), golden["jac_train_first5"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TIMES)
def test_score_end_to_end(golden, name):
    scores = score(
        network(golden),
        split(golden, "train"),
        split(golden, "val"),
        reg=float(golden["l2_per_mean_loss"]),
        time=TIMES[name],
        lr=float(golden["lr"]),
        convention="iclr2021",
        progress=False,
    )
    assert relative_error(scores["si"], golden[f"{name}__weight_q"] / 2) < 1e-8
    assert relative_error(scores["fsi"], golden[f"{name}__test_q"] / 2) < 1e-8


def test_other_conventions_differ(golden):
    """The factor 1 + O(1/n) in the step or the regularisation is of the size of the effect itself."""
    arguments = dict(reg=1e-3, time=2000, lr=0.1)
    residual = golden["y_train"] - golden["train_init_preds"]
    for convention in ("sum", "mean"):
        got = leave_one_out(golden["ntk"], residual, convention=convention, **arguments).weight_sqnorm
        assert relative_error(got, golden["t2000_disc__weight_q"]) > 1e-2


def test_applications_with_the_authors_definitions(golden):
    """compat="iclr2021" beyond ``score``: every application that holds scores holds the golden ones."""
    model, train, val = network(golden), split(golden, "train"), split(golden, "val")
    common = dict(compat="iclr2021", reg=float(golden["l2_per_mean_loss"]), progress=False)
    step = dict(time=2000, lr=float(golden["lr"]))
    weights, predictions = golden["t2000_disc__weight_q"] / 2, golden["t2000_disc__test_q"] / 2
    curves = information_curves(model, train, val, times=[2000], lr=step["lr"], **common)
    assert relative_error(curves.si[0], weights) < 1e-8 and relative_error(curves.fsi[0], predictions) < 1e-8
    for app in (detect_adversarial, find_undersampled):
        found = app(model, train, val, **step, **common).measures
        assert relative_error(found["si"], weights) < 1e-8 and relative_error(found["fsi"], predictions) < 1e-8
    pairs = overlap(model, train, val, [(0, 1), (5, 119)], **step, **common)
    assert relative_error(pairs.first, predictions[[0, 5]]) < 1e-8
    assert relative_error(pairs.second, predictions[[1, 119]]) < 1e-8
    once = summarize(model, train, val, 100, method="one-shot", **step, **common)
    assert list(once.order[:20]) == list(np.argsort(predictions)[:20])
    wrong = find_mislabeled(model, train, val, **step, **common)
    assert relative_error(wrong.fsi, predictions) < 1e-8
