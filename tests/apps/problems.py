"""Small networks and data."""

import numpy as np
import torch
from torch import nn


def network(outputs: int = 1, seed: int = 0, inputs: int = 6, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def blobs(n: int, classes: int, seed: int = 0, inputs: int = 6, spread: float = 0.5):
    """Gaussian clouds, one a class."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((classes, inputs)) * 1.5
    labels = rng.integers(0, classes, n)
    return torch.from_numpy(centres[labels] + spread * rng.standard_normal((n, inputs))), torch.from_numpy(labels)
