"""How well find_mislabeled knows how many labels are wrong, and how many of those it flags are right after all."""

from __future__ import annotations

import sys

import numpy as np
import torch

from benchmarks.studies._data import add_noise, breast_cancer, digits, mlp, table, wine
from sui_fast import find_mislabeled

N, WIDTH = 200, 256


def four_digits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = digits(seed, only=(1, 4, 7, 9))
    return x, torch.searchsorted(torch.tensor([1, 4, 7, 9]), y)


def two_digits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = digits(seed, only=(4, 9))
    return x, (y == 9).long()


DATA = {
    "wine, 3 outputs": (wine, 3),
    "breast cancer, 1 output": (breast_cancer, 1),
    "digits 4, 9, 1 output": (two_digits, 1),
    "digits 1, 4, 7, 9, 4 outputs": (four_digits, 4),
}


def one(name: str, rate: float, seed: int) -> list[float]:
    load, outputs = DATA[name]
    x, clean = (z[:N] for z in load(seed))
    y, wrong = add_noise(clean, rate, "uniform", max(outputs, 2), seed)
    model = mlp(WIDTH, outputs, seed, inputs=x.shape[1])
    found = find_mislabeled(model, (x, y), truth=wrong, progress=False)
    flagged = found.flagged
    real = float((~wrong[flagged]).mean()) if flagged.any() else 0.0
    return [found.noise_rate, found.error_rate, real, float(wrong[flagged].sum() / wrong.sum()), found.auroc]


def main(seeds: int = 3) -> None:
    rows = []
    for name in DATA:
        for rate in (0.05, 0.1, 0.2, 0.3):
            values = np.mean([one(name, rate, seed) for seed in range(seeds)], 0)
            rows.append([name, f"{rate:.0%}", *(f"{v:.1%}" for v in values[:4]), f"{values[4]:.3f}"])
    table(
        "Wrong labels, estimates",
        ["data", "noise", "noise estimated", "errors among flagged, estimated", "and real", "wrong labels flagged",
         "AUROC"],
        rows,
        f"At most {N} samples, MLP-{WIDTH}, uniform noise, defaults (flagged: as many as keep the estimated errors "
        f"below 20%); mean of {seeds} seeds. `python -m benchmarks.studies.noise`",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
