"""Digits, networks and tables that the studies share."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import nn

README = Path(__file__).with_name("README.md")


def digits(seed: int = 0, *, images: bool = False, only=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in [0, 1] and classes of scikit-learn's digits in a random order; ``only`` some classes."""
    data = load_digits()
    keep = np.isin(data.target, range(10) if only is None else only)
    x, y = data.images[keep] / 16, data.target[keep]
    order = np.random.default_rng(seed).permutation(len(y))
    x = torch.from_numpy(x[order]).float()
    return (x[:, None] if images else x.flatten(1)), torch.from_numpy(y[order])


def breast_cancer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """30 measurements of 569 tumours, each in [0, 1], and whether they are benign."""
    return _shuffled(load_breast_cancer(), seed)


def wine(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """13 measurements of 178 wines, each in [0, 1], and their 3 cultivars."""
    return _shuffled(load_wine(), seed)


def _shuffled(data, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = np.random.default_rng(seed).permutation(len(data.target))
    low, high = data.data.min(0), data.data.max(0)
    x = torch.from_numpy(((data.data - low) / (high - low))[order]).float()
    return x, torch.from_numpy(data.target[order]).long()


def mlp(width: int, outputs: int, seed: int = 0, depth: int = 1, inputs: int = 64) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def cnn(outputs: int, seed: int = 0, channels: int = 32) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * channels, outputs),
        )


def fit(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int = 0, epochs: int = 60, lr: float = 1e-3, decay=0.0
) -> nn.Module:
    """Adam on cross-entropy (integer classes, k > 1) or half the squared error; returns the model."""
    classes = not y.is_floating_point()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                out = model(x[batch])
                if classes:
                    nn.functional.cross_entropy(out, y[batch]).backward()
                else:
                    (0.5 * (out - y[batch]).square().sum(1).mean()).backward()
                optimizer.step()
    return model.eval()


def add_noise(labels: torch.Tensor, rate: float, kind: str, classes: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """(noisy labels, which were changed): "uniform" over the other classes, or "by class", always to the next one."""
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[rng.permutation(len(labels))[: round(rate * len(labels))]] = True
    shift = torch.from_numpy(rng.integers(1, classes, len(labels)) if kind == "uniform" else np.ones(len(labels), int))
    return torch.where(torch.from_numpy(wrong), (labels + shift) % classes, labels), wrong


@contextmanager
def stopwatch():
    """A list that receives the seconds of the block."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def table(title: str, header: list[str], rows: list[list], note: str = "") -> str:
    """Print a Markdown table and put it into README.md under its title."""
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells]]
    text = "\n".join(lines) + (f"\n\n{note}" if note else "")
    print(f"{title}\n\n{text}\n", flush=True)
    parts = README.read_text().split("\n## ") if README.exists() else ["# Studies\n"]
    kept = [part for part in parts if not part.startswith(title + "\n")]
    README.write_text("\n## ".join([kept[0], *sorted([*kept[1:], f"{title}\n\n{text}\n"])]))
    return text
