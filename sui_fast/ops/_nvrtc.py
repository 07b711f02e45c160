"""CUDA kernels of csrc/cuda, compiled by CuPy (NVRTC) at first use and launched on PyTorch's current stream."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[1]
_SHARED_LIMIT = 96 * 1024  # bytes a block may ask for on every GPU since Volta


def sources() -> Path:
    """The folder csrc: inside the package in a wheel, beside it in a checkout."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "cuda").is_dir():
            return folder
    raise ImportError("the CUDA sources (csrc/cuda) are neither in the package nor beside it; reinstall sui_fast")


@functools.cache
def _function(file: str, name: str, device: int):
    import cupy

    folder = sources()
    with cupy.cuda.Device(device):
        options = ("--std=c++17", f"-I{folder / 'include'}")
        module = cupy.RawModule(code=(folder / "cuda" / file).read_text(), options=options, backend="nvrtc")
        found = module.get_function(name)
        found.max_dynamic_shared_size_bytes = _SHARED_LIMIT
    return found


def launch(file: str, name: str, grid: tuple[int, ...], threads: int, shared: int, like: torch.Tensor, *args) -> None:
    """Launch extern "C" kernel ``name``; tensors go as addresses, whole numbers as long long, floats as double."""
    import cupy

    device = like.device.index if like.device.index is not None else torch.cuda.current_device()
    function = _function(file, name, device)
    values = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        function(grid, (threads,), values, shared_mem=shared)
