"""Memory of the machine: what is free, and what is given back."""

from __future__ import annotations

import ctypes
import os

import torch

try:
    _trim = ctypes.CDLL(None).malloc_trim
except (OSError, AttributeError, TypeError):  # another C library
    _trim = None


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
