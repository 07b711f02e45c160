"""SI and F-SI at 30 times: what it costs against one spectrum and against scores one by one."""

from __future__ import annotations

import sys
import time
from functools import partial

import numpy as np
import torch

from benchmarks.studies._data import digits, mlp, table
from sui_fast import information_curves, score
from sui_fast.apps.kernel import linear_problem
from sui_fast.loo.rational import fit_rational

VALIDATION, REPEATS = 297, 3


def main(most: int = 1500) -> None:
    rows = []
    for n, outputs in ((400, 1), (800, 1), (1500, 1), (400, 3), (800, 3)):
        if n * outputs > most * 2:
            continue
        x, y = digits(0)
        y = (y >= 5).long() if outputs == 1 else y % 3
        train, val, model = (x[:n], y[:n]), x[-VALIDATION:], mlp(256, outputs)
        calls = [
            partial(linear_problem, model, train, val, reg=0.0, progress=False),
            partial(score, model, train, val, time=2000, lr=0.01, progress=False),
            partial(information_curves, model, train, val, progress=False),
        ]
        seconds = []
        for _ in range(REPEATS):  # in turn, so that a slow moment of the machine meets all
            seconds.append([])
            for call in calls:
                fit_rational.cache_clear()
                start = time.process_time()
                found = call()
                getattr(found, "spectrum", None)
                seconds[-1].append(time.process_time() - start)
        spectrum, one, every = np.min(seconds, 0)
        peak = np.median(found.times[np.argmax(found.fsi, 0)])
        cells = [n, outputs, f"{spectrum:.2f}", f"{one:.2f}", f"{every:.2f}"]
        rows.append([*cells, f"{every / spectrum:.1f}", len(found.times), f"{peak:.0f}"])
    table(
        "Curves",
        ["n", "outputs", "kernel and spectrum, s", "one score, s", "all times, s", "ratio to the spectrum", "times",
         "median time of largest F-SI"],
        rows,
        f"CPU seconds, the least of {REPEATS}; MLP-256, {VALIDATION} validation samples. "
        "`python -m benchmarks.studies.curves`",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
