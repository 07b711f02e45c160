"""One way to compare: method, floor and body take turns in one process, CPU seconds, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)


def compare(
    benchmark,
    method: Callable,
    floor: Callable,
    *,
    target: float | None = None,
    body: Callable | None = None,
    gain: float | None = None,
    rounds: int = 5,
    shape: str = "",
    floor_name: str = "",
) -> None:
    """Time ``method``, ``floor`` and ``body`` in turns; medians of the ratios go into the benchmark's extra_info.

    Args:
        benchmark: the pytest-benchmark fixture; its own figure is the method's wall time.
        floor: what the method cannot avoid. target: largest multiple of it that the issue allows.
        body: the PyTorch body or the rival that the method must beat. gain: smallest gain over it that is asked.
        shape: sizes, floor_name: what the floor is; for the table.
    """
    calls = {"floor": floor, "method": method} | ({"body": body} if body else {})
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm up
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    benchmark.extra_info.update(
        seconds=min(times["method"]),
        floor_seconds=min(times["floor"]),
        floor_name=floor_name,
        ratio=ratio("method", "floor"),
        target=target,
        spread=[min(times["method"]), max(times["method"])],
        peak_mb=peak_bytes(method) / 1e6,
        shape=shape,
    )
    if body:
        benchmark.extra_info.update(body_seconds=min(times["body"]), gain=ratio("body", "method"), gain_target=gain)
    benchmark.pedantic(method, rounds=1, iterations=1)


def peak_bytes(call: Callable) -> float:
    """Largest resident memory during a call beyond what was resident before it; NaN where Linux does not tell."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def held(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024

    try:
        clear.write_text("5")  # the high-water mark starts anew
        before = held("VmRSS")
        call()
        return max(0, held("VmHWM") - before)
    except (OSError, StopIteration):
        call()
        return float("nan")
