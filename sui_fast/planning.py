"""Which method a run takes, and what it will cost, before anything runs."""

from __future__ import annotations

import ctypes
import os
import time as clock
from dataclasses import dataclass

import torch

from .jacobians import Jacobian

DENSE_ROWS = {"cpu": 12_000, "cuda": 32_000}  # samples x outputs up to which an eigendecomposition is worth its time
DEFAULT_RANK = 1024
SHARD = 1 << 21  # features of a shard: 8 MB
PORTION = 1 << 19  # float64 features at a time in pass 2: larger intermediates are fresh memory each time
METHODS = ("auto", "dense", "nystrom", "subspace", "sketch")

try:
    _trim = ctypes.CDLL(None).malloc_trim
except (OSError, AttributeError, TypeError):  # another C library
    _trim = None


@dataclass(frozen=True)
class Plan:
    """What a ``score`` call would do.

    Attributes:
        method, rank, reason: the choice, and why. passes: over the training data.
        sketch: kind of random map of method "sketch", else None.
        disk_bytes: of the store. peak_bytes: of memory beyond the model and the data. seconds: rough, on this machine.
    """

    method: str
    rank: int
    reason: str
    passes: int
    disk_bytes: int
    peak_bytes: int
    seconds: float
    sketch: str | None = None

    def __str__(self) -> str:
        kind = f" ({self.sketch})" if self.sketch not in (None, "tensor") else ""
        return (
            f"method {self.method}{kind}, rank {self.rank}: {self.reason}\n"
            f"passes over the training data {self.passes}, disk {_size(self.disk_bytes)}, "
            f"peak memory about {_size(self.peak_bytes)}, about {self.seconds:.3g} s"
        )


def choose_method(
    n: int, k: int, parameters: int, *, method: str, rank: int | None, device: torch.device, groups: bool
) -> tuple[str, int, str]:
    """(method, rank, reason) for n samples with k outputs."""
    rows, memory = n * k, free_memory(device)
    most = DENSE_ROWS["cuda" if device.type == "cuda" else "cpu"]
    if method == "dense" or method == "auto" and rank is None and rows <= most and 48 * rows * rows <= memory:
        reason = "asked for" if method == "dense" else f"{rows} rows (samples x outputs) have an exact kernel"
        return "dense", rows, reason
    wanted = min(rank or DEFAULT_RANK, rows) if method != "sketch" else rank or DEFAULT_RANK
    if method != "auto":
        return method, wanted, "asked for"
    if 24 * wanted * parameters <= memory and n <= 200_000:
        return "subspace", wanted, f"{rows} rows; a basis of {wanted} directions of {parameters} parameters fits memory"
    return "sketch", wanted, f"{rows} rows of {parameters} parameters; one pass, nothing to fit"


def make_plan(
    first: Jacobian, seconds: float, n: int, m: int, method: str, rank: int, reason: str, stored: bool, given: int,
    sketch: str = "tensor",
) -> Plan:
    """Costs from the Jacobian of a few samples and the seconds its capture took.

    Args:
        first: captured with the settings of the run. n, m: training and validation samples. stored: on disk.
        sketch: kind of random map of method "sketch".
        given: bytes of an input where the scores keep it.
    """
    k, rows, each = first.k, n * first.k, first.nbytes / max(first.n, 1)
    capture = seconds / first.n * (n + m)
    if method == "dense":
        product = _product_seconds()
        peak = int((n + m) * each + 8 * rows * rows * 5 + 8 * rows * m * k)
        work = 2 * rows * (rows + m * k) * sum(p.numel() ** 0.5 for p in first._shapes.values()) + 15 * rows**3
        return Plan(method, rows, reason, 1, 0, peak, capture + work * product)
    part = min(256, n) * each
    held = 0 if stored else 4 * rank * (n + m) * k
    shard, portion = min(n * k * rank, SHARD), min(n * k * rank, PORTION)
    ahead = 3 * 4 * shard if stored else 0  # a shard read while another is worked on
    columns = n * (given + 250 + 40 * k)  # inputs kept for the report, ids, scores, residuals
    peak = int(held + ahead + part * 3 + shard * 4 + portion * 8 * 4 + 8 * rank * rank * 8 + columns)
    passes = {"sketch": 1, "nystrom": 1, "subspace": 5}[method]
    if method == "subspace":
        peak += int(4 * first.shape[1] * rank * 3 + min(n * each, 1 << 30))
    if method == "nystrom":
        peak += int(min(n, max(2000, 4 * rank // k)) * (each + 8 * k * rank))
    disk = (4 * rank + 8 + (8 * k if method != "sketch" else 0)) * n * k + 4 * rank * m * k
    work = 2.0 * rows * rank * rank * 4 + 2.0 * rows * rank * (first.shape[1] if method == "subspace" else 0) * 6
    if method == "sketch":  # beyond the rows: dense signs multiply every entry, sjlt adds each one somewhere
        work += {"rademacher": 2.0 * rank, "sjlt": 10.0}.get(sketch, 0.0) * (rows + m * k) * first.shape[1]
    seconds = capture * passes + work * _product_seconds()
    return Plan(method, rank, reason, passes, disk, peak, seconds, sketch if method == "sketch" else None)


def return_memory() -> None:
    """Pages that the C library keeps for later go back to the system, so that stages do not pile up (glibc only)."""
    if _trim is not None:
        _trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that a run may take: three quarters of what is free."""
    if device.type == "cuda":
        return int(0.75 * torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            held = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return int(0.75 * 1024 * held["MemAvailable"])
    except (OSError, KeyError, ValueError):
        try:
            return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, ValueError, OSError):
            return 4 << 30


def _product_seconds(size: int = 384) -> float:
    """Seconds of one multiplication and addition's half in a float64 matrix product here."""
    a = torch.ones(size, size, dtype=torch.float64)
    a @ a
    start = clock.perf_counter()
    for _ in range(3):
        a @ a
    return (clock.perf_counter() - start) / 3 / (2 * size**3)


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
