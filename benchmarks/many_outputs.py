"""Scores from a few rows of 100 outputs against those from all: the table of docs/math.md, section 13.

python -m benchmarks.many_outputs
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from sui_fast import score

OUTPUTS, SAMPLES, ROWS, SEEDS = 100, 30, (16, 32, 64), 5


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, OUTPUTS)).double()

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 20).double(), torch.randint(0, OUTPUTS, (n,))

    train, val = data(SAMPLES), data(20)
    print("| mode | " + " | ".join(f"q = {q}" for q in ROWS) + " |\n" + "|---" * (1 + len(ROWS)) + "|")
    for loss, mode in (("cross_entropy", "random"), ("cross_entropy", "top"), ("mse", "random")):
        common = dict(loss=loss, reg=0.01, progress=False)
        true, cells = score(model, train, val, **common), []
        for q in ROWS:
            parts = []
            for name in ("si", "fsi"):
                found = [
                    score(model, train, val, output_mode=mode, output_rank=q, seed=seed, **common)[name]
                    for seed in range(1 if mode == "top" else SEEDS)
                ]
                ranks = np.mean([spearmanr(x, true[name])[0] for x in found])
                errors = np.mean([np.median(abs(x - true[name]) / true[name]) for x in found])
                parts.append(f"{ranks:.2f}, {errors:.2f}")
            cells.append(" / ".join(parts))
        print(f"| {loss}, {mode} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
