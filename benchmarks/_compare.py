"""One way to compare: method and floor take turns in one process, CPU seconds, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

torch.set_num_threads(1)


def compare(benchmark, method: Callable, floor: Callable, *, target: float, rounds: int = 5, shape: str = "") -> None:
    """Time ``method`` against ``floor``, interleaved; medians and their ratio go into the benchmark's extra_info.

    Args:
        benchmark: the pytest-benchmark fixture; its own figure is the method's wall time.
        target: largest ratio that the issue allows. shape: sizes, for the table.
    """
    method(), floor()  # warm up
    ours, theirs = [], []
    for _ in range(rounds):
        for call, times in ((floor, theirs), (method, ours)):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    benchmark.extra_info.update(
        seconds=min(ours),
        floor_seconds=min(theirs),
        ratio=ratio,
        spread=[min(ours), max(ours)],
        target=target,
        shape=shape,
    )
    benchmark.pedantic(method, rounds=1, iterations=1)
