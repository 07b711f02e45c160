"""Seconds of products on this machine, measured on a few samples and carried on to many."""

from __future__ import annotations

import time as clock
from collections.abc import Callable

import torch

from .footprint import HELD
from .jacobians import Jacobian

_ENOUGH = 0.1  # seconds of a kernel that tell of a larger one


def least_seconds(work: Callable[[], object], times: int = 3) -> float:
    """Of several calls: what else the machine does meanwhile does not count."""
    # processor time is that of a machine of one's own; on several threads, or a device, it is another thing
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    now, found = clock.process_time if alone else clock.perf_counter, []
    for _ in range(times):
        start = now()
        work()
        found.append(now() - start)
    return min(found)


def seconds_of(work: Callable[[], object]) -> float:
    """Of a call, the first of which does not count."""
    work()
    return least_seconds(work)


def carried_on(work: Callable[[int], object], few: int, wide: int) -> float:
    """Seconds of ``wide`` columns from those of a few and of half of these: what columns share is counted once."""
    whole = seconds_of(lambda: work(few))
    if few == wide:
        return whole
    return whole + (wide - few) * max(0.0, whole - seconds_of(lambda: work(few // 2))) / (few - few // 2)


def pair_seconds(first: Jacobian, tile: int) -> float:
    """Of the kernel of two samples among many.

    Rows of the samples are formed once for a tile of it: what grows with the samples is told from what grows with the
    pairs by a kernel and that of half as many.
    """
    whole = seconds_of(lambda: first.gram(first))
    if whole <= _ENOUGH:
        first = repeated(first)
        whole = seconds_of(lambda: first.gram(first))
    n, half = first.n, first.n // 2
    if half == 0:
        return whole
    few = first.select(range(half))
    pair = max(0.0, whole - n / half * seconds_of(lambda: few.gram(few))) / (n * n - n * half)
    return pair + (whole - pair * n * n) / (n * max(n, tile))


def repeated(first: Jacobian) -> Jacobian:
    """The samples four times over, where they fit memory: products of many cost less a sample."""
    return first if 4 * first.nbytes > HELD else first.select(list(range(first.n)) * 4)


def product_seconds(size: int = 384) -> float:
    """Seconds of one multiplication and addition's half in a float64 matrix product here."""
    a = torch.ones(size, size, dtype=torch.float64)
    return seconds_of(lambda: a @ a) / (2 * size**3)
