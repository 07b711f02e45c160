"""Wrong labels among digits: find_mislabeled against cleanlab, F-SI alone and the training loss."""

from __future__ import annotations

import sys

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from benchmarks.studies._data import add_noise, digits, fit, mlp, stopwatch, table
from sui_fast import find_mislabeled
from sui_fast.apps.results import auroc

N, VALIDATION, WIDTH = 500, 300, 256


def network_probabilities(x: torch.Tensor, y: torch.Tensor, seed: int) -> np.ndarray:
    """Five-fold out-of-sample probabilities of the MLP."""
    found = np.empty((len(x), 10))
    for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y):
        model = fit(mlp(WIDTH, 10, seed), x[train], y[train], seed)
        with torch.no_grad():
            found[test] = model(x[test]).softmax(1).numpy()
    return found


def one(kind: str, rate: float, seed: int) -> tuple[list[float], list[float]]:
    """AUROC and seconds of every method."""
    x, clean = digits(seed)
    x, val, (clean, _) = x[:N], (x[N : N + VALIDATION], clean[N : N + VALIDATION]), (clean[:N], None)
    y, wrong = add_noise(clean, rate, kind, 10, seed)
    with stopwatch() as own:
        found = find_mislabeled(mlp(WIDTH, 10, seed), (x, y), val, truth=wrong, progress=False)
    with stopwatch() as logistic:
        regression = LogisticRegression(max_iter=1000)
        probability = cross_val_predict(regression, x.numpy(), y.numpy(), cv=5, method="predict_proba")
        cleanlab_logistic = get_label_quality_scores(y.numpy(), probability)
    with stopwatch() as network:
        cleanlab_network = get_label_quality_scores(y.numpy(), network_probabilities(x, y, seed))
    with stopwatch() as loss:
        output = fit(mlp(WIDTH, 10, seed), x, y, seed)(x).detach()
        losses = torch.nn.functional.cross_entropy(output, y, reduction="none").numpy()
    values = [found.auroc, found.auroc_second, *(auroc(-q, wrong) for q in (cleanlab_logistic, cleanlab_network))]
    flagged = found.flagged
    real = float((~wrong[flagged]).mean()) if flagged.any() else 0.0
    return [*values, auroc(losses, wrong), found.aupr, found.noise_rate, found.error_rate, real], [
        *own, *logistic, *network, *loss,
    ]  # fmt: skip


def main(seeds: int = 3) -> None:
    rows, seconds = [], []
    for kind in ("uniform", "by class"):
        for rate in (0.05, 0.1, 0.2):
            found = [one(kind, rate, seed) for seed in range(seeds)]
            values = np.mean([value for value, _ in found], 0)
            seconds += [second for _, second in found]
            rows.append([f"{kind}, {rate:.0%}", *(f"{v:.4f}" for v in values[:6]), *(f"{v:.1%}" for v in values[6:])])
    own, logistic, network, loss = np.median(seconds, 0)
    table(
        "Wrong labels",
        ["noise", "leave-one-out margin", "F-SI alone", "cleanlab, logistic", "cleanlab, same MLP", "training loss",
         "AUPR of the margin", "noise estimated", "errors among flagged, estimated", "and real"],
        rows,
        f"AUROC, digits, n = {N}, 10 outputs, MLP-{WIDTH}, mean of {seeds} seeds. Median seconds: "
        f"find_mislabeled {own:.0f} (with F-SI and reg=\"auto\"; exact, {N * 10} kernel rows), cleanlab on 5 logistic "
        f"regressions {logistic:.1f}, on 5 MLPs {network:.1f}, one MLP {loss:.1f}. "
        "`python -m benchmarks.studies.mislabeled`",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
