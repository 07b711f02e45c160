"""CUDA kernels of csrc/cuda, compiled by CuPy (NVRTC) at first use and launched on PyTorch's current stream."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_PACKAGE = Path(__file__).parents[1]


class Limits(NamedTuple):
    """Shared memory a block of threads may ask for, in bytes; multiprocessors; shared memory of each."""

    shared: int
    processors: int
    shared_each: int


def sources() -> Path:
    """The folder csrc: inside the package in a wheel, beside it in a checkout."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "cuda").is_dir():
            return folder
    raise ImportError("the CUDA sources (csrc/cuda) are neither in the package nor beside it; reinstall sui_fast")


def limits(device: torch.device) -> Limits:
    """Of a device; a tensor elsewhere is judged as on the smallest data-centre GPU since Volta."""
    if device.type != "cuda":
        return Limits(96 * 1024, 80, 96 * 1024)
    return _limits(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _limits(device: int) -> Limits:
    import cupy

    found = cupy.cuda.Device(device).attributes
    names = ("MaxSharedMemoryPerBlockOptin", "MultiProcessorCount", "MaxSharedMemoryPerMultiprocessor")
    return Limits(*(int(found[name]) for name in names))


@functools.cache
def _function(file: str, name: str, device: int):
    import cupy

    folder = sources()
    with cupy.cuda.Device(device):
        options = ("--std=c++17", f"-I{folder / 'include'}")
        module = cupy.RawModule(code=(folder / "cuda" / file).read_text("utf-8"), options=options, backend="nvrtc")
        found = module.get_function(name)
        found.max_dynamic_shared_size_bytes = _limits(device).shared
    return found


def dense(x: Tensor) -> Tensor:
    """The same numbers as they lie in memory one after the other, outside autograd."""
    return x.detach().resolve_conj().resolve_neg().contiguous()


def words(args: tuple) -> tuple:
    """Arguments of a kernel in 8 bytes each: tensors as addresses, None as null, floats as double, whole numbers as
    long long, of which those from 2^63 wrap: CuPy makes them signed."""

    def word(x):
        if isinstance(x, float):
            return x
        x = 0 if x is None else x.data_ptr() if isinstance(x, Tensor) else int(x)
        return x - (1 << 64) if x >> 63 == 1 else x

    return tuple(map(word, args))


def launch(file: str, name: str, grid: tuple[int, ...], threads: int, shared: int, like: Tensor, *args) -> None:
    """Launch extern "C" kernel ``name`` of a file on the device of ``like``; see ``words`` for its arguments."""
    import cupy

    device = like.device.index if like.device.index is not None else torch.cuda.current_device()
    function = _function(file, name, device)
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        function(grid, (threads,), words(args), shared_mem=shared)
