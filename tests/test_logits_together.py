"""Cross-entropy leaves all logits moved together alone, and validation sees them: directions of their own."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import sui_fast
from sui_fast.jacobians.data import Known, as_samples
from sui_fast.losses import Rooted
from sui_fast.spectra import RANK_FOR, anchored_sketch_map, beside_directions, nystrom_map, subspace_map


class Rows(nn.Module):
    """A layer of attention over the rows of a digit."""

    def __init__(self, k):
        super().__init__()
        self.embed, self.place = nn.Linear(8, 16), nn.Parameter(0.1 * torch.randn(8, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, k)

    def forward(self, x):
        return self.head(self.block(self.embed(x.view(-1, 8, 8)) + self.place).mean(1))


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16).float(), torch.tensor(data.target % 3)


@pytest.mark.parametrize("method", list(RANK_FOR))
def test_fsi_of_an_encoder_with_the_cross_entropy(method):
    """It correlated 0.992 (sketch), 0.994 and 0.999 here, 0.76, 0.92 and 0.97 for a larger one; unwarned."""
    torch.manual_seed(0)
    model, (x, y) = Rows(3).eval(), digits()
    train, val, common = (x[:200], y[:200]), (x[1000:1080], y[1000:1080]), dict(reg=0.05, progress=False)
    exact = sui_fast.score(model, train, val, loss="cross_entropy", method="dense", **common)
    rank = math.ceil(RANK_FOR[method] * exact.diagnostics["effective_dimension"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = sui_fast.score(model, train, val, loss="cross_entropy", method=method, rank=rank, **common)
    for name in ("si", "fsi"):
        assert spearmanr(exact[name], found[name])[0] > 0.9995, name


@pytest.mark.parametrize("method", ["nystrom", "subspace"])
def test_full_rank_is_exact_with_the_cross_entropy(method):
    torch.manual_seed(0)
    model, (x, y) = Rows(3).eval(), digits()
    common = dict(loss="cross_entropy", reg=0.01, measures=("si", "fsi", "loo_residual"), progress=False)
    train, val = (x[:40], y[:40]), (x[100:150], y[100:150])
    exact = sui_fast.score(model.double(), *((a.double(), b) for a, b in (train, val)), method="dense", **common)
    found = sui_fast.score(model.float(), train, val, method=method, rank=80, **common)
    for name in found.values:
        np.testing.assert_allclose(found[name], exact[name], rtol=2e-3, atol=1e-6)


def test_every_map_keeps_the_directions_beside_exactly():
    torch.manual_seed(0)
    model, (x, _) = Rows(3).eval().double(), digits()
    x = x[:60].double()
    samples = as_samples(x, with_targets=None).beside(model(x).detach())
    both, trained = (
        sui_fast.jacobian(model, samples, outputs=Rooted("cross_entropy", None, whole)) for whole in (True, False)
    )
    beside = beside_directions(both, 2)
    torch.testing.assert_close(beside @ beside.T, torch.eye(len(beside)).double())
    alone = both.rows().view(60, 3, -1)[:, 2]
    rest = alone - (alone @ beside.T) @ beside
    assert float(rest.square().sum()) < 0.05 * float(alone.square().sum())
    sketched = anchored_sketch_map(both, torch.ones(60, 2).double(), 400, count=64)
    maps = [nystrom_map(trained, 20, 0, beside), sketched]
    maps.append(subspace_map(lambda: [(0, trained)], 120, 20, beside=beside))
    for fmap in maps:
        z = fmap.features(both).view(60, 3, -1)[:, 2]
        wanted = (alone @ beside.T).square().sum(1)  # all of the length that lies along them, and a little more
        assert bool((z.square().sum(1) > 0.999 * wanted).all())


def test_the_sum_of_the_logits_joins_the_rows():
    model, x = nn.Linear(5, 4), torch.randn(7, 5)
    samples = Known(x, model(x).detach().double())
    f = model(x)
    rooted = Rooted("cross_entropy", None, whole=True)(model, samples)
    torch.testing.assert_close(rooted[:, :3], Rooted("cross_entropy", None)(model, samples))
    torch.testing.assert_close(rooted[:, 3], f.sum(1) / 2)
