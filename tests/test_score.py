"""``score`` as users call it: kinds of data, invariances, edge cases, no side effects."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from sui_fast import ModelError, Scores, SuiError, ntk, score

N, K = 13, 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, generator=GENERATOR)
LABELS = torch.randint(K, (N,), generator=GENERATOR)
PROBE = torch.randn(6, 5, generator=GENERATOR)


def network(k: int = K, width: int = 8, bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(5, width, bias=bias), torch.nn.Tanh(), torch.nn.Linear(width, k, bias=bias)
    )


def run(train=(X, LABELS), val=PROBE, model=None, **arguments) -> Scores:
    return score(model or network(), train, val, progress=False, **{"reg": 0.01, **arguments})


@pytest.fixture(scope="module")
def plain() -> Scores:
    return run()


def same(got: Scores, want: Scores, rtol: float = 1e-9) -> None:
    for name in ("si", "fsi"):
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=1e-30)


def batches(**more):
    return [
        {"x": X[i : i + 4], "labels": LABELS[i : i + 4], **{k: v[i : i + 4] for k, v in more.items()}}
        for i in (0, 4, 8, 12)
    ]


TRAIN = {
    "tensors": lambda: (X, LABELS),
    "one-hot targets": lambda: (X, torch.nn.functional.one_hot(LABELS, K).float()),
    "arrays": lambda: (X.numpy(), LABELS.numpy()),
    "dataset": lambda: TensorDataset(X, LABELS),
    "list of pairs as a dataset": lambda: torch.utils.data.Subset(TensorDataset(X, LABELS), range(N)),
    "loader": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=4),
    "list of batches": lambda: [(X[i : i + 5], LABELS[i : i + 5]) for i in range(0, N, 5)],
}


@pytest.mark.parametrize("kind", TRAIN)
def test_kinds_of_data(kind, plain):
    got = run(TRAIN[kind]())
    same(got, plain)
    np.testing.assert_array_equal(got.ids, np.arange(N))


def from_dict(model, batch):
    return model(batch["x"])


@pytest.mark.parametrize(
    "data", [batches, lambda **m: DataLoader([{"x": x, "labels": c} for x, c in zip(X, LABELS, strict=True)], 4)]
)
def test_dict_batches(data, plain):
    same(run(data(), {"x": PROBE}, outputs=from_dict), plain)


def test_ids_are_kept():
    ids = torch.arange(100, 100 + N)
    got = run(batches(id=ids), {"x": PROBE}, outputs=from_dict)
    np.testing.assert_array_equal(got.ids, ids.numpy())


def test_validation_targets_are_ignored(plain):
    same(run(val=(PROBE, torch.zeros(6, dtype=torch.long))), plain)
    same(run(val=DataLoader(TensorDataset(PROBE, torch.zeros(6)), batch_size=2)), plain)


def test_shuffled_loader_is_refused():
    for loader in (
        DataLoader(TensorDataset(X, LABELS), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(X, LABELS), batch_size=4, drop_last=True),
        DataLoader(TensorDataset(X, LABELS), sampler=torch.utils.data.SubsetRandomSampler(range(N))),
    ):
        with pytest.raises(SuiError, match="train"):
            run(loader)
    with pytest.raises(SuiError, match="val"):
        run(val=DataLoader(TensorDataset(PROBE), batch_size=4, shuffle=True))


@pytest.mark.parametrize("batch_size", [1, 5, 13, 1000])
def test_batch_size_has_no_effect(batch_size, plain):
    same(run(batch_size=batch_size), plain)


def test_permutation_of_the_samples(plain):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    got = run((X[order], LABELS[order]), measures=("si", "fsi", "leverage", "loo_residual", "loo_margin"))
    want = run(measures=("si", "fsi", "leverage", "loo_residual", "loo_margin"))
    for name in want.values:
        np.testing.assert_allclose(got[name], want[name][order.numpy()], rtol=1e-8)


def test_permutation_of_the_outputs(plain):
    model, order = network(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight[order])
        model[2].bias.copy_(model[2].bias[order])
    same(run((X, torch.argsort(order)[LABELS]), model=model), plain)


@pytest.mark.parametrize("time", [None, 100])
def test_groups_are_removed_together(time):
    arguments = dict(time=time, lr=None if time is None else 0.05)
    groups = np.array(["b", "a", "b", "c"] + list("defghijkl"))
    got = run(groups=groups, **arguments)
    singles = run(**arguments)
    assert len(got["si"]) == 12
    labels = [str(x) for x in got.ids]
    assert labels == sorted(set(groups.tolist()))
    np.testing.assert_allclose(got["si"][labels.index("c")], singles["si"][3], rtol=1e-9)
    np.testing.assert_allclose(got["fsi"][labels.index("a")], singles["fsi"][1], rtol=1e-9)
    assert got["si"][labels.index("b")] != pytest.approx(singles["si"][0], rel=1e-3)
    each = run(groups=np.arange(N), **arguments)
    same(each, singles)


def test_duplicates_share_and_share_alike():
    x, labels = torch.cat([X, X[:2]]), torch.cat([LABELS, LABELS[:2]])
    got, alone = run((x, labels)), run()
    np.testing.assert_allclose(got["si"][-2:], got["si"][:2], rtol=1e-8)
    np.testing.assert_allclose(got["fsi"][-2:], got["fsi"][:2], rtol=1e-8)
    assert (got["si"][:2] < alone["si"][:2]).all()


def test_equal_duplicates_carry_nothing_at_convergence():
    x, labels = torch.cat([X[:5], X[:2]]), torch.cat([LABELS[:5], LABELS[:2]])
    got = run((x, labels), model=network(width=16), reg=0.0)
    pair = [0, 1, 5, 6]
    assert got["si"][pair].max() < 1e-15 * got["si"].max()
    assert got["fsi"][pair].max() < 1e-15 * got["fsi"].max()


class Gated(torch.nn.Module):
    """No gradient reaches the weights from a sample of zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(5, K, bias=False)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("time", [None, 1, 100])
@pytest.mark.parametrize("reg", [0.0, 0.01])
def test_samples_without_gradient(time, reg):
    arguments = dict(model=Gated(), time=time, reg=reg, lr=None if time is None else 0.05)
    x, labels = X.clone(), LABELS.clone()
    x[4] = 0
    got = run((x, labels), **arguments)
    assert got["si"][4] == 0 and got["fsi"][4] == 0
    assert (np.delete(got["si"], 4) > 0).all()
    # Under "sum" only n reg and lr / n notice one more sample; with both held the others keep their scores.
    keep = np.arange(N) != 4
    arguments |= dict(reg=reg * N / (N - 1), lr=None if time is None else 0.05 * (N - 1) / N)
    want = run((x[keep], labels[keep]), **arguments)
    np.testing.assert_allclose(got["si"][keep], want["si"], rtol=1e-8)
    np.testing.assert_allclose(got["fsi"][keep], want["fsi"], rtol=1e-8)


@pytest.mark.parametrize("convention", ["sum", "mean", "iclr2021"])
@pytest.mark.parametrize("time", [None, 100])
@pytest.mark.parametrize("reg", [0.0, 0.01])
def test_single_sample_is_compared_with_the_initial_model(reg, time, convention):
    got = run((X[:1], LABELS[:1]), reg=reg, time=time, lr=None if time is None else 0.05, convention=convention)
    model = network().double()
    outputs = model(X[:1].double())[0]
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()), retain_graph=True)])
            for f in outputs
        ]
    )
    s, u = torch.linalg.eigh(rows @ rows.T)
    x = s + reg
    phi = 1 / x if time is None else (1 - (1 - 0.05 * x) ** time) / x
    r0 = torch.nn.functional.one_hot(LABELS[0], K).double() - outputs.detach()
    w = rows.T @ (u @ (phi * (u.T @ r0)))
    assert got["si"][0] == pytest.approx(float(w @ w / 2), rel=1e-9)
    assert np.isfinite(got["fsi"]).all()


def test_threads_share_a_model():
    """Several at once give the scores of one; the last to leave puts the mode back."""
    model = torch.nn.Sequential(network(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, K)).train()
    calls = [dict(), dict(method="sketch", rank=16), dict(time=20, lr=0.1), dict(loss="cross_entropy")]
    want = [run(model=model, **call)["fsi"] for call in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: run(model=model, **call)["fsi"], 3 * calls))
    assert all(np.array_equal(a, b) for a, b in zip(got, 3 * want, strict=True))
    assert all(module.training for module in model.modules())


def test_threads_meet_in_a_model_not_seen_before():
    """The proof puts other tensors in the places of its parameters: none may look at them meanwhile."""
    want = run(model=network(width=24), method="sketch", rank=16)["si"]
    for _ in range(4):
        model, start = network(width=24), threading.Barrier(3)

        def score(_, model=model, start=start):
            start.wait(10)
            return run(model=model, method="sketch", rank=16)["si"]

        with ThreadPoolExecutor(3) as pool:
            assert all(np.array_equal(got, want) for got in pool.map(score, range(3)))


def test_model_is_left_as_found():
    model = torch.nn.Sequential(network(8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, K))
    model[1].eval()
    list(model.parameters())[0].requires_grad_(False)
    list(model.parameters())[1].grad = torch.ones_like(list(model.parameters())[1])
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    ids = [id(p) for p in model.parameters()]
    rng = torch.get_rng_state()
    run(model=model)
    with pytest.raises(SuiError):
        run((X, LABELS + 100), model=model)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    assert ids == [id(p) for p in model.parameters()]
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    grads = [p.grad for p in model.parameters()]
    assert torch.equal(grads[1], torch.ones_like(grads[1])) and grads[0] is None and all(g is None for g in grads[2:])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_gradient_mode(mode, plain):
    model = network()
    with mode():
        same(run(model=model), plain)


class Casting(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize("reg", [0.0, 0.1, "auto"])
@pytest.mark.parametrize("time", [None, 300])
def test_factors_in_float32_make_a_kernel_in_float64(reg, time):
    torch.manual_seed(0)
    x, y, probes = torch.randn(40, 6), torch.arange(40) % 2, torch.randn(5, 6)  # 7 parameters: rank 7 of 40
    casting, plain = Casting(6, 1), torch.nn.Linear(6, 1)
    plain.load_state_dict(casting.state_dict())
    common = dict(reg=reg, time=time, lr=None if time is None else 0.1, progress=False)
    with pytest.raises(ModelError, match=r"pass dtype=torch\.float32"):
        score(casting, (x, y), probes, **common)
    narrow = score(casting, (x, y), probes, dtype=torch.float32, **common)
    wide = score(plain, (x, y), probes, **common)
    for name in ("si", "fsi"):
        np.testing.assert_allclose(narrow[name], wide[name], rtol=1e-4)


def test_frozen_parameters_do_not_count(plain):
    model = network()
    model[0].requires_grad_(False)
    frozen = run(model=model)
    chosen = run(params=["2.weight", "2.bias"])
    same(frozen, chosen)
    same(run(model=model, params="all"), plain)
    assert (frozen["si"] != plain["si"]).all()


def test_repeats_exactly(plain):
    again = run()
    for name in ("si", "fsi"):
        np.testing.assert_array_equal(again[name], plain[name])


def test_one_output_takes_labels_and_numbers():
    binary = (LABELS > 0).long()
    model = network(1)
    want = run((X, binary.double()[:, None]), model=model)
    same(run((X, binary), model=model), want)
    same(run((X, binary.float()), model=model), want)


def test_scores_table_round_trip(plain, tmp_path):
    path = tmp_path / "scores.parquet"
    plain.save(path)
    loaded = Scores.load(path)
    np.testing.assert_array_equal(loaded["si"], plain["si"])
    np.testing.assert_array_equal(np.asarray(loaded.ids), np.asarray(plain.ids))
    assert loaded.settings["reg"] == plain.settings["reg"]


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 7),
    k=st.integers(1, 3),
    reg=st.sampled_from([0.0, 1e-3, 1.0]),
    time=st.sampled_from([None, 1, 30]),
    convention=st.sampled_from(["sum", "mean", "iclr2021"]),
)
def test_properties(seed, n, k, reg, time, convention):
    """Finite, non-negative, inverse to sigma^2, and equivariant to a permutation, for any small problem."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 5, generator=generator), torch.randn(n, k, generator=generator)
    arguments = dict(model=network(k), reg=reg, time=time, lr=None if time is None else 0.01, convention=convention)
    got = run((x, y), **arguments)
    for name in ("si", "fsi"):
        assert np.isfinite(got[name]).all() and (got[name] >= 0).all()
    half = run((x, y), sigma=2.0, **arguments)
    np.testing.assert_allclose(half["si"] * 4, got["si"], rtol=1e-12)
    turned = run((x.flip(0), y.flip(0)), **arguments)
    np.testing.assert_allclose(turned["si"][::-1], got["si"], rtol=1e-5, atol=1e-12 * got["si"].max())


def test_a_parameter_without_dimensions_counts():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.linear = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Linear(3, 1)

        def forward(self, x):
            return torch.tanh(self.scale * self.linear(x))

    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(6, 3, dtype=torch.float64)
    rows = []
    for i in range(6):
        gradients = torch.autograd.grad(model(x[i : i + 1])[0, 0], list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert torch.allclose(torch.as_tensor(ntk(model, x)), expected, rtol=1e-10)
