"""Which backends live here: decided without importing Triton or CuPy."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")


def refuse_backend(backend: str, device: str | None = None) -> str | None:
    """Why a backend cannot run (on tensors of a device type, or at all), with what to install; None when it can."""
    if backend == "cpu":
        if device not in (None, "cpu"):
            return f"the tensors are on {device}; the cpu backend takes CPU tensors"
        return _compiled()
    if backend == "triton":
        if not _installed("triton"):
            return "Triton is not installed; pip install triton (Linux)"
        if interpreted() and device in (None, "cpu", "cuda"):
            return None
        if device == "cpu":
            return "the tensors are on the CPU; move them to CUDA, or set TRITON_INTERPRET=1 to interpret the kernel"
    if backend == "cuda" and not _installed("cupy"):
        return "CuPy is not installed; pip install cupy-cuda13x (or the build for your CUDA version)"
    if backend in ("triton", "cuda"):
        if device not in (None, "cuda"):
            return f"the tensors are on {device}; the {backend} backend takes CUDA tensors"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device; a CUDA build of PyTorch and a GPU are needed"
    return None


def interpreted() -> bool:
    """Whether Triton kernels are asked to run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def _compiled() -> str | None:
    try:
        importlib.import_module("sui_fast._cpu")
    except ImportError as error:
        return f"the C++ module sui_fast._cpu is not built ({error}); install a C++ compiler and reinstall sui_fast"
    return None
