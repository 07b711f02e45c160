"""Methods of low rank with float32 models, whose kernels have few eigenvalues above the rounding of float32."""

import warnings

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import sui_fast

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(16, 4, 37, dropout=0.0, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


def digits(n):
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor((data.target > 4) * 1)
    return (x[:n], y[:n]), (x[n : n + 60], y[n : n + 60])


@pytest.mark.parametrize("method, rank, reg", [("nystrom", 180, 1e-3), ("subspace", 70, 1e-3), ("subspace", 300, 1e-5)])
@pytest.mark.filterwarnings("error:sui_fast")
def test_small_eigenvalues_are_not_lost_to_rounding(method, rank, reg):
    train, val = digits(300)
    exact = sui_fast.score(Encoder(), train, val, reg=reg, method="dense", progress=False)
    found = sui_fast.score(Encoder(), train, val, reg=reg, method=method, rank=rank, progress=False)
    assert found.diagnostics["features"] >= rank
    for name in ("si", "fsi"):
        assert spearmanr(exact[name], found[name])[0] > 0.995, name


def test_what_is_lost_to_rounding_all_the_same_is_warned_of():
    train, val = digits(700)
    for reg, told in ((1e-3, False), (1e-6, True)):
        about = dict(reg=reg, rank=350, method="subspace", progress=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sui_fast.score(Encoder(), train, val, **about)
        assert any("lost to rounding" in str(x.message) for x in caught) == told


def test_a_sketch_wider_than_an_exact_kernel_names_what_is_exact():
    train, _ = digits(60)
    with pytest.warns(RuntimeWarning, match="method='nystrom', which is exact at rank 60"):
        sui_fast.score(Encoder(), train, reg=1e-5, rank=16, method="sketch", measures=("si",), progress=False)
