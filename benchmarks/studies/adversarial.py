"""FGSM and PGD examples mixed into training sets of digits and of breast cancer: AUROC of finding them."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.studies._data import breast_cancer, digits, fit, mlp, table
from sui_fast import detect_adversarial
from sui_fast.apps.results import auroc

SHARE, WIDTH = 0.1, 256
MEASURES = ("leverage", "remoteness", "misplacement", "loo_residual", "fsi", "si")
DATA = {"digits 1, 4, 7, 9": ((1, 4, 7, 9), 400), "digits 3, 8": ((3, 8), 250), "breast cancer": (None, 300)}


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


def load(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Inputs in [0, 1], classes, and how many samples to train on."""
    digit, n = DATA[name]
    if digit is None:
        return *breast_cancer(seed), n
    x, y = digits(seed, only=digit)
    return x, torch.searchsorted(torch.tensor(digit), y), n


def one(name: str, epsilon: float, steps: int, seed: int) -> list[float]:
    x, y, n = load(name, seed)
    train, clean, classes = x[:n].clone(), y[:n], int(y.max()) + 1
    network = partial(mlp, WIDTH, classes, inputs=x.shape[1])
    victim = fit(network(seed=seed), train, clean, seed)
    marked = np.zeros(n, dtype=bool)
    marked[np.random.default_rng(seed).permutation(n)[: int(SHARE * n)]] = True
    train[marked] = attack(victim, train[marked], clean[marked], epsilon, steps)
    fooled = float((victim(train[marked]).argmax(1) != clean[marked]).double().mean())
    found = detect_adversarial(network(seed=seed + 1), (train, clean), x[n:], truth=marked, progress=False)
    trained = fit(network(seed=seed + 1), train, clean, seed)
    loss = nn.functional.cross_entropy(trained(train), clean, reduction="none").detach().numpy()
    return [fooled, found.auroc, *(found.aurocs[measure] for measure in MEASURES), auroc(loss, marked)]


def main(seeds: int = 2) -> None:
    rows = []
    for name in DATA:
        for attacker, steps in (("FGSM", 1), ("PGD, 10 steps", 10)):
            for epsilon in (0.1, 0.2, 0.3):
                values = np.mean([one(name, epsilon, steps, seed) for seed in range(seeds)], 0)
                rows.append([name, f"{attacker}, epsilon {epsilon}", f"{values[0]:.0%}", *values[1:].tolist()])
    names = ["leverage", "remoteness", "misplacement", "leave-one-out residual", "F-SI", "SI", "training loss"]
    table(
        "Adversarial examples",
        ["data", "attack", "fooled", "surprise (default)", *names],
        rows,
        f"AUROC; n = {', '.join(str(n) for _, n in DATA.values())}; {SHARE:.0%} of the training samples attacked with "
        f"their true labels kept, against another MLP-{WIDTH} trained on the clean ones; mean of {seeds} seeds. "
        "`python -m benchmarks.studies.adversarial`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
