"""C++ kernels of convolutions (csrc/cpu/windows_kernels.cpp): their rows without the patches, sketched in two ways.

``add_windows`` has the map of the tensor sketch. ``fold_windows`` has one of its own: entry (o, i) of a weight goes to
(o mod width + place[i]) mod rank with the sign s[o] s[i], so a row is added to the sketch as it leaves the registers,
and a width below o saves that part of the product: outputs that meet in a column differ by random signs.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._random import bucket_and_sign
from ._tensor_cpu import add_bias, call, hashed
from .window import Window

LANES = 16  # widths are whole multiples


@functools.lru_cache(maxsize=256)
def _geometry(window: Window, channels: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int], tuple]:
    """Offsets of positions and of the numbers of a patch in a padded image; sizes and paddings for the kernel."""
    fill = 3 - len(size)
    padded = [n + before + after for n, (before, after) in zip(size, window.pads, strict=True)]
    steps = [math.prod(padded[axis + 1 :]) for axis in range(len(padded))]

    def places(counts: list[int], apart: tuple[int, ...]) -> Tensor:
        found = torch.zeros(1, dtype=torch.int32)
        for count, distance, step in zip(counts, apart, steps, strict=True):
            found = (found[:, None] + torch.arange(count, dtype=torch.int32) * (distance * step)).flatten()
        return found

    reach = [(kernel - 1) * dilation for kernel, dilation in zip(window.kernel, window.dilation, strict=True)]
    counts = [(n - r - 1) // step + 1 for n, r, step in zip(padded, reach, window.stride, strict=True)]
    taps = places(list(window.kernel), window.dilation)
    offset = (torch.arange(channels, dtype=torch.int32)[:, None] * math.prod(padded) + taps).flatten()
    before = [before for before, _ in window.pads]
    numbers = [channels, *[1] * fill, *size, *[0] * fill, *before, *[1] * fill, *padded]
    return places(counts, window.stride).contiguous(), offset.contiguous(), numbers, tuple(counts)


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype or x.dtype == torch.bfloat16 and dtype == torch.float32 else x.to(dtype)


def _described(x: Tensor, g: Tensor, window: Window, dtype: torch.dtype) -> tuple[list[int], tuple]:
    """The geometry as the kernel takes it, and what must live until it is done; x [n, c, *space], g [n, k, o, s]."""
    x, g = _readable(x, dtype), _readable(g, dtype).contiguous()
    base, offset, numbers, _ = _geometry(window, x.shape[1], tuple(x.shape[2:]))
    n, k, o, s = g.shape
    strides = [*x.stride()[:2], *[0] * (5 - x.ndim), *x.stride()[2:]]
    half = torch.bfloat16
    last = [g.data_ptr(), g.dtype == half, k, s, len(offset), o, base.data_ptr(), offset.data_ptr()]
    return [x.data_ptr(), x.dtype == half, *strides, *numbers, *last], (x, g)


def width_of(o: int) -> int:
    """The least width that keeps o outputs apart."""
    return -(-o // LANES) * LANES


@functools.lru_cache(maxsize=256)
def _wide(o: int, rank: int, stream: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places and signs of outputs, with zeros up to the next width."""
    more = width_of(o) - o
    place, sign = hashed(o, rank, 1, stream, seed, dtype)
    return torch.nn.functional.pad(place, (0, more)), torch.nn.functional.pad(sign, (0, more))


def add_windows(
    x: Tensor, g: Tensor, window: Window, out: Tensor, seed: int, stream: int, ones: bool
) -> None:
    """out [n, k, rank] += tensor sketches of the rows of a convolution's weight; x [n, c, *space], g [n, k, o, s]."""
    numbers, kept = _described(x, g, window, out.dtype)
    (n, _, o, _), rank, i = kept[1].shape, out.shape[2], numbers[21]
    left = hashed(i + ones, rank, 0, stream, seed, out.dtype)
    if ones:
        add_bias(g.sum(3, dtype=out.dtype), left, hashed(o, rank, 1, stream, seed, out.dtype), i, out)
    tables = [table.data_ptr() for table in (*_wide(o, rank, stream, seed, out.dtype), *left)]
    call("scatter_windows", out.dtype)(numbers, n, width_of(o), *tables, rank, out.data_ptr(), torch.get_num_threads())


def fold_windows(
    x: Tensor, g: Tensor, window: Window, width: int, out: Tensor, seed: int, stream: int, ones: bool
) -> None:
    """out [n, k, rank] += sketches of the same rows with the map of the module's head; width: of 16, at most rank."""
    numbers, kept = _described(x, g, window, out.dtype)
    (n, _, o, _), rank, i = kept[1].shape, out.shape[2], numbers[21]
    place, sign_i = hashed(i + ones, rank, 0, stream, seed, out.dtype)
    sign = hashed(o, rank, 1, stream, seed, out.dtype)[1]
    pointers = place.data_ptr(), sign_i.data_ptr(), sign.data_ptr(), out.data_ptr()
    call("fold_windows", out.dtype)(numbers, n, width, rank, ones, *pointers, torch.get_num_threads())


def folded(rows: Tensor, width: int, rank: int, seed: int, stream: int) -> Tensor:
    """What ``fold_windows`` adds, from rows [n, k, o, i] with the bias as the last i: the reference."""
    o, i = rows.shape[2:]
    kind = dict(device=rows.device, dtype=rows.dtype)
    place, sign_i = bucket_and_sign(i, rank, 0, stream, seed, **kind)
    sign = bucket_and_sign(o, rank, 1, stream, seed, **kind)[1]
    to = (torch.arange(o, device=rows.device)[:, None] % width + place) % rank
    signed = rows * (sign[:, None] * sign_i)
    return rows.new_zeros(*rows.shape[:2], rank).index_add(2, to.flatten(), signed.flatten(2))




# Nanoseconds per sample, as those of `_tensor_cpu.py`
def windows_time(n: int, s: int, i: int, o: int, k: int, rank: int) -> float:
    """Of ``add_windows``; the image is no larger than its patches."""
    wide = width_of(o)
    return 10_000 / n + 0.1 * s * i / 4 + k * (0.021 * s * i * wide + 0.2 * i * wide + 0.2 * s * wide + 0.4 * rank)
