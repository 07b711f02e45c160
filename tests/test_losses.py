"""Losses other than the squared one against explicit Gauss-Newton steps in weight space, with autograd in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, hessian, jacrev

from sui_fast import SuiError, score
from sui_fast.losses import Logistic, Softmax

N, M = 11, 5
GENERATOR = torch.Generator().manual_seed(1)
X, PROBE = torch.randn(N, 4, generator=GENERATOR), torch.randn(M, 4, generator=GENERATOR)
MEASURES = ("si", "fsi", "si_langevin", "leverage", "loo_residual")


def network(k: int, scale: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, k))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def half_squared(f, y):
    return 0.5 * (f - y).square().sum(1)


def softplus_huber(f, y):
    return (2 * F.softplus(f - y) - (f - y)).sum(1)


def cross_entropy(f, y):
    return F.cross_entropy(f, y, reduction="none", label_smoothing=0.1)


LOSS = {  # what score is given, outputs, targets, the loss of one sample
    "cross_entropy": ("cross_entropy", 3, torch.arange(N) % 3, lambda f, y: F.cross_entropy(f[None], y[None])),
    "two classes": ("cross_entropy", 2, torch.arange(N) % 2, lambda f, y: F.cross_entropy(f[None], y[None])),
    "soft labels": (
        "cross_entropy", 3, torch.softmax(X[:, :3].double(), 1), lambda f, y: F.cross_entropy(f[None], y[None])
    ),
    "one logit": (
        "binary_cross_entropy", 1, torch.arange(N) % 2,
        lambda f, y: F.binary_cross_entropy_with_logits(f, y[None].double()),
    ),
    "many logits": (
        "binary_cross_entropy", 3, (X[:, :3] > 0).long(),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y.double(), reduction="sum"),
    ),
    "function": (softplus_huber, 2, X[:, :2].double(), lambda f, y: softplus_huber(f[None], y[None])[0]),
    "function of classes": (cross_entropy, 3, torch.arange(N) % 3, lambda f, y: cross_entropy(f[None], y[None])[0]),
}  # fmt: skip


class Newton:
    """Explicit steps: w without b - w0 = phi(H_-b) (minus the gradient without b), H = sum J^T W J."""

    def __init__(self, model, y, loss):
        model = model.double()
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        names = list(parameters)

        def rows(x):
            found = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
            return torch.cat([found[name].flatten(2) for name in names], 2).detach()

        self.j, self.probe = rows(X.double()), rows(PROBE.double())
        self.f0, self.y, self.loss = model(X.double()).detach(), y, loss
        self.w = torch.stack([hessian(loss)(f, t) for f, t in zip(self.f0, y, strict=True)])
        self.g = torch.stack([jacrev(loss)(f, t) for f, t in zip(self.f0, y, strict=True)])

    def step(self, removed=(), reg=0.01, time=None, lr=None, convention="sum"):
        keep = [i for i in range(N) if i not in removed]
        shift, eta = N * reg, (lr or 0) / N
        if convention != "sum":
            eta = (lr or 0) / len(keep)
        if convention == "mean":
            shift = len(keep) * reg
        h = torch.einsum("nkd,nkl,nle->de", self.j[keep], self.w[keep], self.j[keep])
        pull = -torch.einsum("nkd,nk->d", self.j[keep], self.g[keep])
        s, u = torch.linalg.eigh(h)
        x = s.clamp_min(0) + shift
        if time is None:
            phi = torch.where(x > 1e-12 * x[-1], 1 / x, 0.0)
        else:
            phi = torch.where(x > 1e-300, -torch.expm1(time * torch.log1p(-eta * x)) / x, eta * time)
        return u @ (phi * (u.T @ pull)), h + shift * torch.eye(len(h)).double()

    def scores(self, blocks, **training):
        whole, h = self.step(**training)
        found = {name: [] for name in MEASURES if name != "leverage"}
        for block in blocks:
            without, _ = self.step(block, **training)
            change = without - whole
            found["si"].append(float(change @ change) / 2)
            found["fsi"].append(float((self.probe @ change).square().sum(1).mean()) / 2)
            found["si_langevin"].append(float(change @ h @ change) / 2)
            slopes = [jacrev(self.loss)(self.f0[i] + self.j[i] @ without, self.y[i]) for i in block]
            found["loo_residual"].append(float(torch.stack(slopes).norm()))
        return found


@pytest.mark.parametrize("kind", LOSS)
@pytest.mark.parametrize(
    "training",
    [
        dict(reg=0.01),
        dict(reg=0.01, convention="mean"),
        dict(reg=0.0, time=60, lr=0.3),
        dict(reg=0.02, time=60, lr=0.3, convention="iclr2021"),
    ],
    ids=str,
)
def test_leave_one_out_is_a_newton_step(kind, training):
    loss, k, y, one = LOSS[kind]
    want = Newton(network(k), y, one).scores([[i] for i in range(N)], **training)
    got = score(network(k), (X, y), PROBE, loss=loss, measures=MEASURES, progress=False, **training)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-8, err_msg=name)
    assert got["leverage"].sum() == pytest.approx(got.diagnostics["effective_dimension"], rel=1e-8)


@pytest.mark.parametrize("scale", [10, 30, 100, 1000, 30_000])
@pytest.mark.parametrize("kind", ["cross_entropy", "one logit"])
@pytest.mark.parametrize(
    "training", [dict(reg=0.01), dict(reg=0.01, convention="mean"), dict(time=9, lr=1e-5, reg=0.0)], ids=str
)
def test_predictions_with_certainty(scale, kind, training):
    """Probabilities of exp(-3e5), for and against the label: the explicit step divides by none of them."""
    loss, k, y, one = LOSS[kind]
    groups = np.arange(N) // 2
    for removed in (None, groups):
        blocks = [[i] for i in range(N)] if removed is None else [np.flatnonzero(groups == g) for g in range(6)]
        want = Newton(network(k, scale), y, one).scores(blocks, **training)
        got = score(
            network(k, scale), (X, y), PROBE, loss=loss, measures=MEASURES, groups=removed, progress=False, **training
        )
        for name in want:
            atol = 1e-8 * np.max(np.abs(want[name])) + 1e-12 * np.max(want["si"]) * (name == "si_langevin")
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=atol, err_msg=name)


def test_certainty_without_regularisation_is_an_error():
    loss, k, y, _ = LOSS["cross_entropy"]
    with pytest.raises(SuiError, match="reg > 0"):
        score(network(k, 1000), (X, y), PROBE, loss=loss, progress=False)
    got = score(network(k, 1000), (X, y), PROBE, loss=loss, reg="auto", progress=False)
    assert np.isfinite(got["si"]).all() and got.diagnostics["loo_loss"] > 0


def test_groups_leave_together():
    loss, k, y, one = LOSS["cross_entropy"]
    groups = np.arange(N) // 3
    want = Newton(network(k), y, one).scores([np.flatnonzero(groups == g) for g in range(4)])
    got = score(network(k), (X, y), PROBE, loss=loss, measures=MEASURES, reg=0.01, groups=groups, progress=False)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-8, err_msg=name)


def test_candidates_join_by_a_newton_step():
    loss, k, y, one = LOSS["cross_entropy"]
    newton = Newton(network(k), y, one)
    new = [0, 4]
    old = [i for i in range(N) if i not in new]
    got = score(
        network(k), (X[old], y[old]), PROBE, loss=loss, reg=0.01 * N / len(old), candidates=(X[new], y[new]),
        measures=("si", "fsi", "loo_residual"), progress=False,
    ).candidates  # fmt: skip
    before, _ = newton.step(new)
    for row, i in enumerate(new):
        change = newton.step([j for j in new if j != i])[0] - before
        assert got["si"][row] == pytest.approx(float(change @ change) / 2, rel=1e-8)
        assert got["fsi"][row] == pytest.approx(float((newton.probe @ change).square().sum(1).mean()) / 2, rel=1e-8)
        slope = jacrev(one)(newton.f0[i] + newton.j[i] @ before, y[i])
        assert got["loo_residual"][row] == pytest.approx(float(slope.norm()), rel=1e-8)


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
@pytest.mark.parametrize("kind", ["cross_entropy", "many logits", "function"])
def test_low_rank(method, kind):
    loss, k, y, _ = LOSS[kind]
    arguments = dict(loss=loss, measures=(*MEASURES,), reg=0.05, progress=False)
    want = score(network(k), (X, y), PROBE, **arguments)
    rank = 800 if method == "sketch" else 64
    got = score(network(k), (X, y), PROBE, method=method, rank=rank, **arguments)
    for name in want.values:
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error < (0.3 if method == "sketch" else 1e-4), name


def test_automatic_regularisation_minimises_the_left_out_loss():
    loss, k, y, one = LOSS["cross_entropy"]
    newton = Newton(network(k), y, one)
    for method in (dict(), dict(method="subspace", rank=64)):
        got = score(network(k), (X, y), PROBE, loss=loss, reg="auto", progress=False, **method)
        curve = got.diagnostics["reg_curve"]
        for number in (8, 16, 24):
            reg = curve["reg"][number]
            left_out = [newton.f0[i] + newton.j[i] @ newton.step([i], reg=reg)[0] for i in range(N)]
            want = float(torch.stack([one(f, t) for f, t in zip(left_out, y, strict=True)]).mean())
            assert curve["loo_error"][number] == pytest.approx(want, rel=1e-6 if not method else 1e-3)
        assert got.settings["reg"] == curve["reg"][int(np.argmin(curve["loo_error"]))]
        assert got.diagnostics["loo_loss"] == pytest.approx(min(curve["loo_error"]), rel=1e-9)


def test_margin_of_the_left_out_logits():
    loss, k, y, one = LOSS["cross_entropy"]
    newton = Newton(network(k), y, one)
    got = score(network(k), (X, y), loss=loss, measures=("loo_margin",), reg=0.01, progress=False)
    for i in range(N):
        f = newton.f0[i] + newton.j[i] @ newton.step([i])[0]
        others = [f[c] for c in range(k) if c != y[i]]
        assert got["loo_margin"][i] == pytest.approx(float(f[y[i]] - max(others)), rel=1e-7)
    assert "nats" in got.units["loo_margin"]


def test_a_function_that_is_the_squared_loss():
    y = torch.randn(N, 2, generator=GENERATOR)
    want = score(network(2), (X, y), PROBE, measures=MEASURES, reg=0.01, progress=False)
    got = score(network(2), (X, y), PROBE, measures=MEASURES, reg=0.01, loss=half_squared, progress=False)
    for name in want.values:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-9, err_msg=name)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), k=st.integers(2, 9), spread=st.sampled_from([0.0, 1.0, 30.0, 300.0, 3000.0]))
def test_softmax_root(seed, k, spread):
    """R^T R = W, R^T r = y - p, and R unroot(x) = x, also where probabilities underflow."""
    rng = torch.Generator().manual_seed(seed)
    f = spread * torch.randn(4, k, generator=rng, dtype=torch.float64)
    y = F.one_hot(torch.randint(k, (4,), generator=rng), k).double()
    found = Softmax(f)
    root = torch.stack([found.root(e.expand(4, k)) for e in torch.eye(k, dtype=torch.float64)], 2)  # [4, k - 1, k]
    p = torch.softmax(f, 1)
    w = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(root.transpose(1, 2) @ root, w, rtol=1e-9, atol=1e-14)
    r = found.residual(y)
    assert torch.isfinite(r).all()
    torch.testing.assert_close(torch.einsum("brk,br->bk", root, r), y - p, rtol=1e-10, atol=1e-14)
    x = torch.randn(4, k - 1, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("brk,bk->br", root, found.unroot(x)), x, rtol=1e-9, atol=1e-9)


def test_logistic_root():
    f = torch.tensor([[-3000.0], [-40.0], [0.3], [50.0], [2000.0]], dtype=torch.float64)
    for y in (0.0, 1.0, 0.3):
        found = Logistic(f)
        pull = found.root(torch.ones_like(f)) * found.residual(torch.full_like(f, y))
        torch.testing.assert_close(pull, y - torch.sigmoid(f), rtol=1e-12, atol=1e-15)


BAD = {
    "one output": (dict(loss="cross_entropy"), 1, torch.zeros(N, dtype=torch.long), "loss"),
    "rows that do not sum to 1": (dict(loss="cross_entropy"), 3, torch.ones(N, 3), "train"),
    "class out of range": (dict(loss="cross_entropy"), 3, torch.full((N,), 3), "train"),
    "numbers beyond 1": (dict(loss="binary_cross_entropy"), 1, torch.full((N,), 2.0), "train"),
    "classes for many logits": (dict(loss="binary_cross_entropy"), 3, torch.zeros(N, dtype=torch.long), "train"),
    "a mean": (dict(loss=lambda f, y: (f - y).square().mean()), 2, torch.zeros(N, 2), "loss"),
    "not convex": (dict(loss=lambda f, y: torch.cos(f).sum(1)), 2, torch.zeros(N, 2), "convex"),
    "no curvature": (dict(loss=lambda f, y: (f - y).abs().sum(1)), 2, torch.zeros(N, 2), "slope"),
    "fails": (dict(loss=lambda f, y: f @ y), 2, torch.zeros(N, 2), "loss"),
    "unknown": (dict(loss="hinge"), 2, torch.zeros(N, 2), "loss"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_loss_cannot_take(kind):
    arguments, k, y, word = BAD[kind]
    with pytest.raises(SuiError, match=word):
        score(network(k), (X, y), PROBE, progress=False, reg=0.1, **arguments)


def many(k=24, n=30):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, k))
    with torch.no_grad():
        model[2].weight.mul_(3)
    x, probe = torch.randn(n, 6), torch.randn(20, 6)
    y = model(x).argmax(1)
    y[::3] = torch.randint(k, (10,))
    return model, (x, y), probe


def gap(got, want, name):
    return np.median(np.abs(np.log(got[name] / want[name])))


@pytest.mark.parametrize("loss, mode", [("cross_entropy", "random"), ("cross_entropy", "top"), ("mse", "random")])
def test_few_rows_for_many_outputs(loss, mode):
    """Errors shrink with the rows, and all rows are all outputs."""
    model, train, probe = many()
    arguments = dict(loss=loss, reg=0.1, progress=False)
    want = score(model, train, probe, **arguments)
    errors = [
        sum(gap(score(model, train, probe, output_mode=mode, output_rank=rank, **arguments), want, name)
            for name in ("si", "fsi"))
        for rank in (2, 20)
    ]  # fmt: skip
    assert errors[1] < min(0.5, errors[0])
    same = score(model, train, probe, output_mode=mode, output_rank=24, **arguments)
    np.testing.assert_array_equal(same["si"], want["si"])


def test_random_rows_keep_the_gradient():
    """With much regularisation curvature does not count, and SI is the squared gradient, exactly."""
    model, train, probe = many()
    arguments = dict(loss="cross_entropy", reg=1e6, progress=False, measures=("si",))
    want = score(model, train, probe, **arguments)
    for mode in ("random", "top"):
        got = score(model, train, probe, output_mode=mode, output_rank=3, **arguments)
        np.testing.assert_allclose(got["si"], want["si"], rtol=1e-4)


@pytest.mark.filterwarnings("error")
def test_too_few_random_rows_are_named():
    """Scores come out too large where the effective dimension fills the rows, and the warning says so."""
    model, train, _ = many()
    arguments = dict(loss="cross_entropy", measures=("si",), progress=False)
    few = dict(output_mode="random", output_rank=3)
    with pytest.warns(RuntimeWarning, match="output_rank 3 is small"):
        got = score(model, train, reg=1e-3, **few, **arguments)
    assert np.median(got["si"] / score(model, train, reg=1e-3, **arguments)["si"]) > 1.2
    score(model, train, reg=10.0, **few, **arguments)
    score(model, train, reg=1e-3, output_mode="random", output_rank=23, **arguments)  # a basis


def test_margin_of_the_top_logits():
    model, train, probe = many()
    arguments = dict(loss="cross_entropy", reg=0.1, progress=False, measures=("loo_margin",))
    want = score(model, train, **arguments)
    got = score(model, train, output_mode="top", output_rank=20, **arguments)
    assert np.corrcoef(got["loo_margin"], want["loo_margin"])[0, 1] > 0.98
    with pytest.raises(SuiError, match="output_mode"):
        score(model, train, output_mode="random", **arguments)
    with pytest.raises(SuiError, match="output_mode"):
        score(model, train, output_mode="some", **arguments)
