"""Methods of low rank with float32 models, whose kernels have few eigenvalues above the rounding of float32."""

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


@pytest.mark.parametrize("method, rank", [("nystrom", 180), ("subspace", 70)])
@pytest.mark.filterwarnings("error:sui_fast")
def test_small_eigenvalues_are_not_lost_to_rounding(method, rank):
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor((digits.target > 4) * 1)
    train, val = (x[:300], y[:300]), (x[300:360], y[300:360])
    exact = sui_fast.score(Encoder(), train, val, reg=0.001, method="dense", progress=False)
    found = sui_fast.score(Encoder(), train, val, reg=0.001, method=method, rank=rank, progress=False)
    assert found.diagnostics["features"] >= rank
    for name in ("si", "fsi"):
        assert spearmanr(exact[name], found[name])[0] > 0.995, name
