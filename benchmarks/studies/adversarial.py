"""FGSM and PGD examples mixed into the training set of digits: AUROC of finding them."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

from benchmarks.studies._data import digits, fit, mlp, table
from sui_fast import detect_adversarial
from sui_fast.apps.results import auroc

N, SHARE, WIDTH = 400, 0.1, 256


def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, steps: int) -> torch.Tensor:
    """FGSM (one step of epsilon) or PGD (steps of epsilon / 4, projected), in the maximum norm."""
    step, moved = epsilon if steps == 1 else epsilon / 4, x.clone()
    for _ in range(steps):
        moved.requires_grad_()
        loss = nn.functional.cross_entropy(model(moved), y)
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + step * gradient.sign()
        moved = (x + (moved - x).clamp(-epsilon, epsilon)).clamp(0, 1)
    return moved.detach()


def one(epsilon: float, steps: int, seed: int) -> list[float]:
    x, y = digits(seed, only=(1, 4, 7, 9))
    y = torch.searchsorted(torch.tensor([1, 4, 7, 9]), y)
    train, clean = x[:N].clone(), y[:N]
    victim = fit(mlp(WIDTH, 4, seed), train, clean, seed)
    marked = np.zeros(N, dtype=bool)
    marked[np.random.default_rng(seed).permutation(N)[: int(SHARE * N)]] = True
    train[marked] = attack(victim, train[marked], clean[marked], epsilon, steps)
    fooled = float((victim(train[marked]).argmax(1) != clean[marked]).double().mean())
    found = detect_adversarial(mlp(WIDTH, 4, seed + 1), (train, clean), x[N:], truth=marked, progress=False)
    trained = fit(mlp(WIDTH, 4, seed + 1), train, clean, seed)
    loss = nn.functional.cross_entropy(trained(train), clean, reduction="none").detach().numpy()
    values = [found.auroc, *(found.aurocs[name] for name in ("leverage", "loo_residual", "fsi", "si"))]
    return [fooled, *values, auroc(loss, marked)]


def main(seeds: int = 2) -> None:
    rows = []
    for name, steps in (("FGSM", 1), ("PGD, 10 steps", 10)):
        for epsilon in (0.1, 0.2, 0.3):
            values = np.mean([one(epsilon, steps, seed) for seed in range(seeds)], 0)
            rows.append([f"{name}, epsilon {epsilon}", f"{values[0]:.0%}", *values[1:].tolist()])
    table(
        "Adversarial examples",
        ["attack", "fooled", "surprise (default)", "leverage", "leave-one-out residual", "F-SI", "SI", "training loss"],
        rows,
        f"AUROC; digits 1, 4, 7, 9, n = {N}, {SHARE:.0%} of the training samples attacked with their true labels kept, "
        f"against another MLP-{WIDTH} trained on the clean ones; mean of {seeds} seeds. "
        "`python -m benchmarks.studies.adversarial`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
