"""What a run card says of the machine and the model."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib import metadata

import torch

from .spectra import fingerprint_of

try:
    import resource
except ImportError:  # not on Windows
    resource = None


def dtypes(model: torch.dtype, method: str) -> dict[str, str]:
    """In what the model runs, features (or the kernel) are kept, sums over samples add up, and systems are solved."""
    name = str(model).removeprefix("torch.")
    features = name if method == "dense" else "float32"
    return dict(model=name, features=features, accumulation="float64", solve="float64")


def versions() -> dict[str, str]:
    """What a run depends on, for its run card."""
    found = {"python": platform.python_version()}
    for name in ("sui-fast", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def model_digest(model: torch.nn.Module, most: int = 1 << 30) -> str | None:
    """The first digits of the hash of the weights and buffers, for the run card; None for models too large or odd."""
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError):
        tensors = {name: x for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
        if sum(x.numel() * x.element_size() for x in tensors.values()) <= most:
            return fingerprint_of(tensors)[:16]
    return None


def peak_bytes(device: torch.device) -> int:
    """The most that the process, or its device, has held so far; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
