"""Table 1 of the paper on digits, 4 against 9: real retraining, the linearised model, influence functions."""

from __future__ import annotations

import sys

import torch
from torch import nn

from benchmarks.studies._data import cnn, digits, fit, mlp, table
from sui_fast import validate_linearization

N, STEPS, LEFT_OUT, REG = 200, 1000, 20, 0.01


def pretrained(seed: int) -> nn.Module:
    """A CNN trained on the other eight digits, with a new last layer for one output."""
    x, y = digits(seed, images=True, only=(0, 1, 2, 3, 5, 6, 7, 8))
    model = fit(cnn(10, seed, channels=16), x, y, seed, epochs=30)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model[-1] = nn.Linear(model[-1].in_features, 1)
    return model


def main(left_out: int = LEFT_OUT, steps: int = STEPS) -> None:
    seed, rows = 0, []
    networks = {
        "MLP-1024 from scratch": (mlp(1024, 1, seed), False),
        "CNN from scratch": (cnn(1, seed, channels=16), True),
        "CNN pretrained on other digits": (pretrained(seed), True),
    }
    for name, (model, images) in networks.items():
        x, y = digits(seed, images=images, only=(4, 9))
        y = (y == 9).long()
        for reg in (0.0, REG):
            found = validate_linearization(
                model, (x[:N], y[:N]), x[N:], samples=left_out, time=steps, reg=reg, progress=False
            )
            row = [f"{name}, reg = {reg}"]
            for kind in ("linear", "influence"):
                for space in ("weights", "predictions"):
                    value = found.correlations[kind][space]
                    row.append(f"{value['pearson']:.3f} / {value['spearman']:.3f}")
            seconds = found.seconds
            rows.append([*row, f"{found.speedup:.0f}", f"{seconds['linear']:.2f}", f"{seconds['real']:.0f}"])
            print(rows[-1], flush=True)
    table(
        "Table 1",
        ["network", "linearised, weights", "predictions", "influence functions, weights", "predictions",
         "times faster than influence functions", "seconds, all samples", f"seconds of retraining, {left_out}"],
        rows,
        f"Pearson / Spearman correlation with real retraining ({steps} steps of full-batch gradient descent on the "
        f"mean loss, {left_out} of {N} samples left out). Influence functions by conjugate gradient at the trained "
        f"weights. `python -m benchmarks.studies.table1`",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
