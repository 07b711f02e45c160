"""Real data and the two models of the figures."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn


@pytest.fixture(scope="session")
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16).float(), torch.tensor(data.target)


def mlp(outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))


def cnn(outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, outputs),
    )  # fmt: skip


@pytest.fixture(params=["mlp", "cnn"])
def network(request, digits):
    """(name, builder of the model by outputs, inputs of 1000 digits)."""
    x = digits[0][:1000]
    return (request.param, mlp, x) if request.param == "mlp" else (request.param, cnn, x.view(-1, 1, 8, 8))
