"""Test accuracy against the share of digits kept: iterative and one-shot summaries against random, GraNd and EL2N."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch

from benchmarks.studies._data import breast_cancer, digits, fit, mlp, table, wine
from sui_fast import score, summarize
from sui_fast.apps.kernel import linear_problem

N, VALIDATION, WIDTH, REG = 800, 300, 1024, 0.01
SHARES = (0.5, 0.4, 0.3, 0.2, 0.1)


def gradient_scores(seed: int, x: torch.Tensor, y: torch.Tensor, models: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """GraNd (norm of the loss gradient) and EL2N (norm of the error) at initialisation, mean of ten networks."""
    grand, el2n = np.zeros(len(x)), np.zeros(len(x))
    for number in range(models):
        network = mlp(WIDTH, 1, 1000 * seed + number)
        error = (network(x)[:, 0] - y).detach()

        def output(parameters, sample, network=network):
            return torch.func.functional_call(network, parameters, (sample,))[0]

        weights = dict(network.named_parameters())
        features = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))(weights, x)
        norm = sum(part.flatten(1).square().sum(1) for part in features.values()).sqrt()
        grand += (error.abs() * norm).detach().numpy() / models
        el2n += error.abs().numpy() / models
    return grand, el2n


def one(seed: int) -> tuple[dict[str, list[float]], float]:
    """Accuracy of every method at every share, and with all samples."""
    x, y = digits(seed)
    y = (y >= 5).long()
    train, val = (x[:N], y[:N]), (x[N : N + VALIDATION], y[N : N + VALIDATION])
    test = (x[N + VALIDATION :], y[N + VALIDATION :])
    model = mlp(WIDTH, 1, seed)
    judge = linear_problem(model, train, test, reg=REG, progress=False)

    def accuracy(kept) -> float:
        guess = judge.predictions(np.sort(kept), convention="mean")[:, 0] > 0.5
        return float((guess == test[1].bool()).double().mean())

    common = dict(reg=REG, progress=False)
    scores = score(model, train, val, **common)
    grand, el2n = gradient_scores(seed, *train)
    order = summarize(model, train, val, SHARES[-1], **common)
    by_weights = summarize(model, train, val, SHARES[-1], by="si", **common)
    shuffled = np.random.default_rng(seed).permutation(N)
    found = {}
    for share in SHARES:
        m = round(share * N)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            once = summarize(scores, m=m, method="one-shot")
        keeps = {
            "iterative": order.at(m),
            "iterative, SI": by_weights.at(m),
            "one-shot": once.kept,
            "random": shuffled[:m],
            "most informative dropped first": np.argsort(scores["fsi"], kind="stable")[:m],
            "GraNd": np.argsort(-grand, kind="stable")[:m],
            "EL2N": np.argsort(-el2n, kind="stable")[:m],
        }
        for name, kept in keeps.items():
            found.setdefault(name, []).append(accuracy(kept))
    return found, accuracy(np.arange(N))


def automatic(seed: int, width: int = 256, draws: int = 3) -> list[list[float]]:
    """Accuracy of the default, of random samples and of all of them at every share, trained with the reg it found."""
    x, y = digits(seed)
    y = (y >= 5).long()
    train, val = (x[:N], y[:N]), (x[N : N + VALIDATION], y[N : N + VALIDATION])
    test = (x[N + VALIDATION :], y[N + VALIDATION :])
    model, rng = mlp(width, 1, seed), np.random.default_rng(seed)
    judge = linear_problem(model, train, test, reg="auto", progress=False)

    def accuracy(kept) -> float:
        guess = judge.predictions(np.sort(kept), convention="mean")[:, 0] > 0.5
        return float((guess == test[1].bool()).double().mean())

    best, columns = accuracy(np.arange(N)), []
    for share in SHARES:
        found = summarize(model, train, val, share, progress=False)
        judge.reg, m = found.reg, len(found.kept)
        drawn = np.mean([accuracy(rng.permutation(N)[:m]) for _ in range(draws)])
        columns.append([accuracy(found.kept), drawn, accuracy(np.arange(N)), best])
    return np.array(columns).T.tolist()


def elsewhere(name: str, seed: int, draws: int = 3) -> list[list[float]]:
    """As ``automatic`` on other data, judged by an ordinary network trained on what is kept (Adam, equal steps)."""
    (x, y), n, probes, outputs = ELSEWHERE[name](seed)
    parts = slice(n), slice(n, n + probes), slice(n + probes, n + probes + 600)
    train, val, test = ((x[part], y[part]) for part in parts)
    model, rng = mlp(256, outputs, seed, inputs=x.shape[1]), np.random.default_rng(seed)

    def accuracy(kept) -> float:
        targets = train[1][kept].float()[:, None] if outputs == 1 else train[1][kept]
        network = mlp(256, outputs, seed, inputs=x.shape[1])
        trained = fit(network, train[0][kept], targets, seed, int(60 * n / len(kept)))
        f = trained(test[0]).detach()
        guess = f.argmax(1) if outputs > 1 else (f[:, 0] > 0.5).long()
        return float((guess == test[1]).double().mean())

    full, columns = accuracy(np.arange(n)), []
    for share in SHARES:
        kept = summarize(model, train, val, share, progress=False).kept
        drawn = np.mean([accuracy(rng.permutation(n)[: len(kept)]) for _ in range(draws)])
        columns.append([accuracy(kept), drawn, full])
    return np.array(columns).T.tolist()


ELSEWHERE = {
    "wine": lambda seed: (wine(seed), 100, 30, 3),
    "breast cancer": lambda seed: (breast_cancer(seed), 300, 100, 1),
    "digits, 10 classes": lambda seed: (digits(seed), 120, 100, 10),
}


def main(seeds: int = 5) -> None:
    other(seeds)
    by_method(seeds)
    names = ["iterative", "random", "all samples, same reg", "all samples, the best reg for all"]
    results = np.array([automatic(seed) for seed in range(seeds)])
    means = results.mean(0).tolist()
    table(
        "Summaries with the default regularisation",
        ["kept", *(f"{share:.0%} kept" for share in SHARES)],
        [[name, *row] for name, row in zip(names, means, strict=True)] + paired(names, results),
        f'As above with MLP-256 and reg = "auto", mean of {seeds} seeds. `python -m benchmarks.studies.summaries`',
    )


def paired(names: list[str], results: np.ndarray) -> list[list[str]]:
    """Rows: mean difference between the first method and each other, and its standard error; of [seeds, ., shares]."""
    rows = []
    for number, name in enumerate(names[1:], 1):
        difference = results[:, 0] - results[:, number]
        error = difference.std(0, ddof=1) / len(results) ** 0.5 if len(results) > 1 else difference[0] * np.nan
        cells = zip(difference.mean(0), error, strict=True)
        rows.append([f"{names[0]} minus {name}", *(f"{mean:+.3f} ± {own:.3f}" for mean, own in cells)])
    return rows


def other(seeds: int) -> None:
    rows, names = [], ["iterative", "random", "all samples"]
    for name in ELSEWHERE:
        results = np.array([elsewhere(name, seed) for seed in range(seeds)])
        rows += [[name, what, *row] for what, row in zip(names, results.mean(0).tolist(), strict=True)]
        rows += [[name, *row] for row in paired(names, results)]
    table(
        "Summaries of other data",
        ["data", "kept", *(f"{share:.0%} kept" for share in SHARES)],
        rows,
        f"Test accuracy of an MLP-256 trained with Adam on what is kept; defaults of summarize; mean of {seeds} seeds, "
        "random of 3 draws each. `python -m benchmarks.studies.summaries`",
    )


def by_method(seeds: int) -> None:
    results = [one(seed) for seed in range(seeds)]
    full = np.mean([whole for _, whole in results])
    rows = [[name, *np.mean([found[name] for found, _ in results], 0).tolist()] for name in results[0][0]]
    rows.append(["all samples", *[float(full)] * len(SHARES)])
    names = ["iterative", "random", "all samples"]
    each = [[found["iterative"], found["random"], [whole] * len(SHARES)] for found, whole in results]
    rows += paired(names, np.array(each))
    table(
        "Summaries",
        ["dropped first", *(f"{share:.0%} kept" for share in SHARES)],
        rows,
        f"Test accuracy of the linearised MLP-{WIDTH} retrained on what is kept (mean loss, reg = {REG}); digits "
        f"below 5 against the rest, n = {N}, mean of {seeds} seeds; differences within a seed, with their standard "
        "errors. `python -m benchmarks.studies.summaries`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
