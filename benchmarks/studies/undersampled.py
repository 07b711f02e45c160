"""Even against odd digits with one even digit reduced to 5% of its class: is the rare digit found without its label?"""

from __future__ import annotations

import sys

import numpy as np
import torch

from benchmarks.studies._data import digits, mlp, table
from sui_fast import find_undersampled

RARE, OTHERS, VALIDATION = 15, 75, 300


def one(rare: int, seed: int) -> list[float]:
    """AUROC of F-SI, SI, and the mean over neighbours; of the best of the three first clusters: purity and recall."""
    x, y = digits(seed)
    first = y[:-VALIDATION].numpy()
    keep = np.concatenate([np.flatnonzero(first == d)[: RARE if d == rare else OTHERS] for d in range(10)])
    truth = first[keep] == rare
    val = x[-VALIDATION:], y[-VALIDATION:] % 2
    found = find_undersampled(mlp(512, 1, seed), (x[keep], y[keep] % 2), val, truth=truth, clusters=8, progress=False)
    best = max((found.cluster == number for number, *_ in found.clusters[:3]), key=lambda inside: truth[inside].mean())
    return [found.aurocs["si"], found.aurocs["fsi"], found.auroc, truth[best].mean(), truth[best].sum() / truth.sum()]


def main(seeds: int = 5) -> None:
    rows = []
    for rare in (0, 2, 4, 6, 8):
        rows.append([rare, *np.mean([one(rare, seed) for seed in range(seeds)], 0).tolist()])
    table(
        "Undersampled sub-classes",
        ["rare digit", "SI", "F-SI", "F-SI over neighbours (default)", "purity of its cluster", "recall of it"],
        rows,
        f"AUROC of {RARE} members of the rare digit among {RARE + 9 * OTHERS} samples; the last two columns: the best "
        f"of the three clusters named first. Mean of {seeds} seeds. `python -m benchmarks.studies.undersampled`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
