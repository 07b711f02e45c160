"""Seconds for all samples of one problem, nothing extrapolated: ``score`` against influence functions."""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.studies._data import digits, mlp, table
from sui_fast import influence_functions, score

N, VALIDATION, STEPS, LR, REG = 200, 100, 1000, 0.05, 0.01


def main(width: int = 64, repeats: int = 3) -> None:
    x, y = digits(0, only=(4, 9))
    y = (y == 9).float()
    train, val, model = (x[:N], y[:N]), x[N : N + VALIDATION], mlp(width, 1)
    trained = mlp(width, 1)
    start = [p.detach().clone() for p in trained.parameters()]
    optimizer = torch.optim.SGD(trained.parameters(), LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.5 * (trained(x[:N])[:, 0] - y[:N]).square().mean()
        pull = sum((p - q).square().sum() for p, q in zip(trained.parameters(), start, strict=True))
        (loss + REG / 2 * pull).backward()
        optimizer.step()

    def seconds(call) -> tuple[float, object]:
        start = time.process_time()
        found = call()
        return time.process_time() - start, found

    def linear():
        return score(model, train, val, time=STEPS, lr=LR, reg=REG, progress=False)

    linear()
    own = min(seconds(linear)[0] for _ in range(repeats))
    rows = []
    for name, most in (("cg", 200), ("lissa", 200)):
        options = dict(method=name, iterations=most, reg=REG, start=torch.cat([p.flatten() for p in start]))
        options |= dict(progress=False)
        spent, found = seconds(lambda options=options: influence_functions(trained, train, val, **options))
        own = min(own, seconds(linear)[0])
        cells = [name, len(found.ids), f"{spent:.1f}", f"{found.residual:.2g}", f"{own:.3f}", f"{spent / own:.0f}"]
        rows.append(cells)
    size = sum(p.numel() for p in model.parameters())
    table(
        "Influence functions, measured",
        ["influence functions", "samples", "seconds", "residual of their solves", "seconds of score", "ratio"],
        rows,
        f"CPU seconds for the changes of weights and of {VALIDATION} predictions by leaving out each of all {N} "
        f"digits, 4 against 9; MLP-{width}, {size} parameters, reg = {REG}, one thread; at most 200 iterations of "
        "each; both measured for all samples in one process. `python -m benchmarks.studies.influence`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
