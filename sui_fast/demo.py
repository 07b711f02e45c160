"""The main job on real data: which digits teach a small network most, and which carry a wrong label."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .scores import Scores
from .scoring import score

SEED = 0
NOISE = 0.1  # share of training labels replaced by another class
PRETRAIN, TRAIN, VAL = 800, 600, 300


def digits_problem(seed: int = SEED) -> tuple[nn.Module, tuple, tuple, np.ndarray]:
    """A pretrained network, noisy training and clean validation samples of scikit-learn's digits.

    Returns:
        model (10 outputs), (inputs, labels) for training with NOISE of the labels flipped, (inputs, labels) for
        validation, and which labels were flipped, bool [600].
    """
    from sklearn.datasets import load_digits  # only the demo needs scikit-learn

    data = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.target))
    images = torch.from_numpy(data.images[order] / 16).float()[:, None]
    labels = torch.from_numpy(data.target[order])
    first, train, val = np.split(np.arange(PRETRAIN + TRAIN + VAL), [PRETRAIN, PRETRAIN + TRAIN])
    model = pretrain(images[first], labels[first], seed)
    noisy = labels[train].clone()
    flipped = np.zeros(TRAIN, dtype=bool)
    flipped[rng.permutation(TRAIN)[: int(NOISE * TRAIN)]] = True
    shift = torch.from_numpy(rng.integers(1, 10, TRAIN))
    noisy[flipped] = (noisy[flipped] + shift[flipped]) % 10
    return model, (images[train], noisy), (images[val], labels[val]), flipped


def pretrain(images: torch.Tensor, labels: torch.Tensor, seed: int, epochs: int = 15) -> nn.Module:
    """A convolutional network of about 10,000 parameters, trained on one-hot squared loss with Adam."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        target = nn.functional.one_hot(labels, 10).float()
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                (0.5 * (model(images[batch]) - target[batch]).square().sum(1).mean()).backward()
                optimizer.step()
    return model.eval()


def auroc(score_of: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive has a larger score than a negative; ties count half."""
    _, rank, counts = np.unique(score_of, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[rank]
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def run_demo(out: str | Path = "demo_out", *, reg: float = 0.05, progress: bool = True) -> Scores:
    """Score the digits, print what was found, write scores.parquet and report.html.

    Args:
        out: folder for the two files. reg: regularisation of the mean loss. progress: show bars.
    Returns:
        Scores of the 600 training samples.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, train, val, flipped = digits_problem()
    pretrained = time.perf_counter() - start
    size = sum(p.numel() for p in model.parameters())
    print(f"digits: {TRAIN} training samples ({flipped.sum()} labels flipped, seed {SEED}), {VAL} validation samples")
    print(f"model: CNN with {size} parameters, pretrained on {PRETRAIN} other digits, linearised, 10 outputs, exact")
    scores = score(
        model, train, val, reg=reg, progress=progress, measures=("si", "fsi", "leverage", "loo_residual", "loo_margin")
    )
    print(
        "seconds: "
        + ", ".join(
            f"{name} {value:.1f}"
            for name, value in {"pretraining": pretrained, **scores.diagnostics["seconds"]}.items()
        )
    )
    for title, rows in (("most", scores.top(10)), ("least", scores.bottom(10))):
        print(f"\n{title} informative by F-SI\n  sample  label  flipped        SI      F-SI  margin")
        for i, label, si, fsi, margin in zip(
            rows.ids, rows.labels, rows["si"], rows["fsi"], rows["loo_margin"], strict=True
        ):
            print(f"  {i:6d}  {label:5d}  {'yes' if flipped[i] else '':7}  {si:9.3g}  {fsi:8.3g}  {margin:6.2f}")
    found = {"F-SI": auroc(scores["fsi"], flipped), "leave-one-out margin": auroc(-scores["loo_margin"], flipped)}
    print("\nAUROC of finding the flipped labels: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    scores.diagnostics["auroc_flipped"] = found
    print(f"wrote {scores.save(out / 'scores.parquet')}")
    print(f"wrote {scores.report(out / 'report.html', title='Unique information of digits')}")
    print(f"all in {time.perf_counter() - start:.0f} s")
    return scores
