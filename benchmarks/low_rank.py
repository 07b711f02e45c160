"""Accuracy of the low-rank methods against the exact scores, on digits.

    python -m benchmarks.low_rank [--samples 1000] [--outputs 1 10] [--networks mlp cnn] [--seed 0]
    python -m benchmarks.low_rank --trials 200 --samples 300      the promise of the error estimate

One row per network, number of outputs and training: the effective dimension, and the Spearman correlation of SI and
F-SI with the exact ones at rank = 2 x (subspace), 5 x (nystrom) and 40 x (sketch) the effective dimension.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings

import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import sui_fast
from sui_fast.jacobians.data import as_samples
from sui_fast.losses import Squared
from sui_fast.probing import drawn, kernel_error
from sui_fast.spectra import RANK_FOR
from sui_fast.streaming import Processes, Source, fit_map

TRAINING = {
    "reg 0.1": dict(reg=0.1),
    "reg 0.01": dict(reg=0.01),
    "t 2000": dict(time=2000, lr=0.01),
    "t 2000, reg 0.01": dict(time=2000, lr=0.01, reg=0.01),
}


def problem(network: str, n: int, k: int, seed: int):
    """(model, train, val): digits below 5 against the others (k = 1), or all ten."""
    data, rng = load_digits(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=rng)
    x, digit = torch.tensor(data.data / 16)[order], torch.tensor(data.target)[order]
    y = digit if k == 10 else (digit < 5) * 1
    torch.manual_seed(seed)
    if network == "cnn":
        x = x.view(-1, 1, 8, 8)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, k),
        )  # fmt: skip
    else:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, k))
    return model, (x[:n].float(), y[:n]), (x[n : n + 300].float(), y[n : n + 300])


def trials(network: str, n: int, k: int, count: int) -> None:
    """How often the error of the kernel lies below its estimate: random samples, weights, ranks and draws."""
    held = dict.fromkeys(RANK_FOR, 0)
    for seed in range(count):
        model, (x, y), _ = problem(network, n, k, seed)
        source, jac = Source(model, as_samples((x, y), with_targets=True), {}, 0, n), sui_fast.jacobian(model, x)
        targets = torch.nn.functional.one_hot(y, k).double() if k > 1 else y[:, None].double()
        exact, goal = jac.gram().double(), Squared(targets, None)
        for method in held:
            fmap = fit_map(source, goal, method, 8 + 7 * seed % 60, seed, Processes())
            z = fmap.features(jac).flatten(0, 1).double()
            held[method] += float((exact - z @ z.T).norm() / exact.norm()) <= kernel_error(n, drawn(source, fmap, seed))
    print(f"{network}, k = {k}, n = {n}: the estimate held in", held, f"of {count} trials", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--training", nargs="+", default=list(TRAINING))
    parser.add_argument("--methods", nargs="+", default=list(RANK_FOR))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.trials:
        for network, k in itertools.product(a.networks, a.outputs):
            trials(network, a.samples, k, a.trials)
        return
    names = [f"{method}, {RANK_FOR[method]:g} x" for method in a.methods]
    print(f"| network, outputs, training | effective dimension | {' | '.join(names)} |")
    print("|---|---|" + "---|" * len(names))
    for network in a.networks:
        for k in a.outputs:
            model, train, val = problem(network, a.samples, k, a.seed)
            for title in a.training:
                training, cells = TRAINING[title], []
                exact = sui_fast.score(model, train, val, method="dense", **training)
                edf = exact.diagnostics["effective_dimension"]
                for method in a.methods:
                    rank = math.ceil(RANK_FOR[method] * edf)
                    start = time.process_time()
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        found = sui_fast.score(model, train, val, method=method, rank=rank, **training)
                    both = [float(spearmanr(exact[name], found[name])[0]) for name in ("si", "fsi")]
                    cells.append(f"{both[0]:.4f}, {both[1]:.4f} (r = {rank}, {time.process_time() - start:.0f} s)")
                print(f"| {network}, k = {k}, {title} | {edf:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
