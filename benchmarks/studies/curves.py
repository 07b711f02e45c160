"""SI and F-SI at 30 times: what it costs against one spectrum and against scores one by one."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch

from benchmarks.studies._data import digits, mlp, table
from sui_fast import information_curves, score
from sui_fast.apps.kernel import linear_problem


def main() -> None:
    rows = []
    for n in (400, 800):
        x, y = digits(0)
        y = (y >= 5).long()
        train, val, model = (x[:n], y[:n]), x[-300:], mlp(256, 1)
        seconds = []
        calls = [
            partial(linear_problem, model, train, val, reg=0.0, progress=False),
            partial(score, model, train, val, time=2000, lr=0.01, progress=False),
            partial(information_curves, model, train, val, progress=False),
        ]
        for call in calls:
            getattr(call(), "spectrum", None)
            start = time.process_time()
            found = call()
            getattr(found, "spectrum", None)
            seconds.append(time.process_time() - start)
        peak = found.times[np.argmax(found.fsi, 0)]
        rows.append([n, *(f"{s:.2f}" for s in seconds), len(found.times), f"{np.median(peak):.0f}"])
    table(
        "Curves",
        ["n", "kernel and spectrum, s", "one score, s", "all times, s", "times", "median time of largest F-SI"],
        rows,
        "CPU seconds; MLP-256, 300 validation samples. `python -m benchmarks.studies.curves`",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
