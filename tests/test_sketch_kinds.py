"""Kinds of sketch through score(): unbiased over the whole gradient for every shape of layer, and part of the run."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import sui_fast
from sui_fast.ops.sketching import KINDS
from sui_fast.spectra.store import Store, read_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:sui_fast")


class Tokens(nn.Module):
    """Embedding, attention, layer norm, tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)

    def forward(self, tokens):
        x = self.block(self.embed(tokens))
        return nn.functional.linear(x, self.embed.weight).mean(1)[:, :2]


def tokens(n):
    return torch.randint(0, 9, (n, 5))


LAYERS = {  # every module gives two outputs
    "wide linear": (lambda: nn.Linear(12, 2), lambda n: torch.randn(n, 12).double()),
    "linear over positions": (
        lambda: nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Flatten(), nn.Linear(35, 2, bias=False)),
        lambda n: torch.randn(n, 5, 3).double(),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2),
            nn.Flatten(), nn.Linear(16, 2),
        ),
        lambda n: torch.randn(n, 2, 5, 5).double(),
    ),
    "tokens": (Tokens, tokens),
}  # fmt: skip


def features(folder):
    held = folder / "train-0000-of-0001"
    with Store(held, read_fingerprint(held), write=False) as store:
        return torch.cat([shard["features"] for shard in store]).double().flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_inner_products_of_whole_gradients_are_kept_on_average(tmp_path, name, kind):
    torch.manual_seed(0)
    model, x = LAYERS[name][0]().double(), LAYERS[name][1](4)
    exact, sketched, scored = sui_fast.ntk(model, x), [], []
    jac = sui_fast.jacobian(model, x)
    for seed in range(250):
        z = jac.sketch(24, seed, kind).flatten(0, 1)
        sketched.append(z @ z.T)
    for seed in range(5):
        store = tmp_path / str(seed)
        common = dict(method="sketch", sketch=kind, rank=400, store=store, progress=False)
        found = sui_fast.score(model, (x, torch.arange(4) % 2), reg=0.1, measures=("si",), seed=seed, **common)
        assert found.settings["sketch"] == kind
        z = features(store)
        scored.append(z @ z.T)
    mean, spread = torch.stack(sketched).mean(0), torch.stack(sketched).std(0) / 250**0.5
    assert float(((mean - exact) / (spread + 1e-12)).abs().max()) < 5
    assert float((torch.stack(scored).mean(0) - exact).norm() / exact.norm()) < 0.12


def problem():
    torch.manual_seed(0)
    x, y = torch.randn(120, 10).double(), torch.arange(120) % 2
    return nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1)).double(), (x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_follow_the_exact_ones(kind):
    exact = sui_fast.score(*problem(), reg=0.1, measures=("si",), progress=False)
    found = sui_fast.score(*problem(), reg=0.1, measures=("si",), method="sketch", sketch=kind, rank=800)
    assert spearmanr(exact["si"], found["si"])[0] > 0.97
    assert found.diagnostics["features"] >= 800


def test_kinds_differ_and_a_store_of_another_kind_is_refused(tmp_path):
    columns = {}
    common = dict(reg=0.1, measures=("si",), method="sketch", rank=64)
    for kind in KINDS:
        columns[kind] = sui_fast.score(*problem(), sketch=kind, store=tmp_path / kind, **common)["si"]
    assert len({column.tobytes() for column in columns.values()}) == len(KINDS)
    assert np.array_equal(columns["tensor"], sui_fast.score(*problem(), **common)["si"])  # the default
    for kind in KINDS:
        again = sui_fast.score(*problem(), sketch=kind, store=tmp_path / kind, **common)
        assert np.array_equal(again["si"], columns[kind])
    with pytest.raises(sui_fast.StoreError, match="sketch was 'sjlt', is 'two_sided'"):
        sui_fast.score(*problem(), sketch="two_sided", store=tmp_path / "sjlt", **common)


def test_parts_keep_their_kind(tmp_path):
    common = dict(measures=("si",), progress=False)
    for number in (1, 2):
        settings = dict(method="sketch", sketch="sjlt", rank=50, seed=2)
        assert sui_fast.score(*problem(), store=tmp_path, part=(number, 2), **settings, **common) is None
    merged = sui_fast.merge(*problem(), store=tmp_path, reg=0.1, **common)
    assert merged.settings["sketch"] == "sjlt"
    whole = sui_fast.score(*problem(), reg=0.1, **settings, **common)
    np.testing.assert_allclose(merged["si"], whole["si"], rtol=1e-10)
    with pytest.raises(sui_fast.StoreError, match="sketch was 'sjlt', is 'tensor'"):
        sui_fast.merge(*problem(), store=tmp_path, reg=0.1, sketch="tensor", **common)


def test_kinds_are_checked_and_planned():
    with pytest.raises(sui_fast.ArgumentError, match="sketch: expected one of 'tensor', 'sjlt'"):
        sui_fast.score(*problem(), measures=("si",), method="sketch", sketch="gauss")
    for method in ("auto", "dense", "nystrom", "subspace"):
        with pytest.raises(sui_fast.ArgumentError, match="sketch.*method='sketch'"):
            sui_fast.score(*problem(), measures=("si",), method=method, sketch="sjlt")
    with pytest.raises(sui_fast.ArgumentError, match="sketch"):
        sui_fast.plan(*problem(), method="dense", sketch="sjlt")
    fast, slow = (sui_fast.plan(*problem(), method="sketch", sketch=kind) for kind in ("two_sided", "rademacher"))
    assert fast.sketch == "two_sided" and "method sketch (rademacher), rank 1024" in str(slow)
    assert sui_fast.plan(*problem(), method="nystrom", rank=16).sketch is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sui_fast.plan(*problem(), method="sketch")


def test_a_rank_far_too_small_keeps_the_order_of_the_weights():
    """Rows of a sketch that are longer than the gradients must not take all of ||dw||^2 away."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16), torch.tensor((data.target % 2) * 2.0 - 1)[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)).double()
    common = dict(reg=1e-3, measures=("si",), progress=False)
    exact = sui_fast.score(model, (x[:500], y[:500]), method="dense", **common)["si"]
    with pytest.warns(RuntimeWarning, match="rank 64 is small"):
        found = sui_fast.score(model, (x[:500], y[:500]), method="sketch", rank=64, **common)["si"]
    assert (found > 0).all()
    assert spearmanr(exact, found)[0] > 0.6
