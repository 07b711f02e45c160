"""How much scores depend on the network: width, depth, seed, architecture and training time (the paper's appendix)."""

from __future__ import annotations

import sys

import torch

from benchmarks.studies._data import cnn, digits, fit, mlp, table
from sui_fast import information_curves
from sui_fast.apps.results import rank_correlation

N, VALIDATION, WIDTH, STEPS = 300, 200, 1024, 2000
TIMES = (10, 100, 1000, STEPS, 10_000, 100_000)


def main(seed: int = 0) -> None:
    x, y = digits(seed, images=True, only=(4, 9))
    n = min(N, len(x) - 50)
    y = (y == 9).long()
    others = digits(seed, images=True, only=(0, 1, 2, 3, 5, 6, 7, 8))

    def curves(model, images=False):
        z = x if images else x.flatten(1)
        common = dict(times=TIMES, lr=lr, dynamics="flow", progress=False)
        return information_curves(model, (z[:n], y[:n]), z[n : n + VALIDATION], **common)

    def flat_pretrained():
        model = fit(mlp(WIDTH, 10, seed), others[0].flatten(1), others[1], seed, epochs=20)
        model[-1] = mlp(WIDTH, 1, seed)[-1]
        return model

    lr = 0.01
    reference = curves(mlp(WIDTH, 1, seed))
    place = TIMES.index(STEPS)
    rows = []

    def compare(what: str, found, at: int = place) -> None:
        values = [rank_correlation(a[at], b[place]) for a, b in ((found.si, reference.si), (found.fsi, reference.fsi))]
        rows.append([what, *values])

    for width in (64, 256, 4096):
        compare(f"width {width}", curves(mlp(width, 1, seed)))
    for depth in (2, 3):
        compare(f"depth {depth}", curves(mlp(WIDTH, 1, seed, depth=depth)))
    for other in (1, 2, 3):
        compare(f"seed {other}", curves(mlp(WIDTH, 1, seed + other)))
    compare("CNN", curves(cnn(1, seed), images=True))
    compare("pretrained on the other digits", curves(flat_pretrained()))
    for at, time in enumerate(TIMES):
        if at != place:
            compare(f"{time} steps", reference, at)
    table(
        "Dependence",
        ["changed", "SI", "F-SI"],
        rows,
        f"Spearman correlation of the scores of {n} digits, 4 against 9, with those of an MLP of one hidden layer of "
        f"{WIDTH}, seed {seed}, gradient flow for as long as {STEPS} steps of lr {lr}. "
        "`python -m benchmarks.studies.dependence`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
