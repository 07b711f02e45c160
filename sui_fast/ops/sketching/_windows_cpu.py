"""C++ kernels of convolutions (csrc/cpu/windows_kernels.cpp): their rows without the patches, sketched in two ways.

``add_windows`` has the map of the tensor sketch. Layers of a training step have one of their own: channel c of the
image, with a sign, is added to plane c mod planes; entry (o, i) of the weight of that smaller image goes to
(o mod width + place[i]) mod rank with the sign s[o] s'[i]. A row is added to the sketch as it leaves the registers, and
what folds saves its part of the product: entries that meet differ by random signs, so E<Px, Py> = <x, y> for any planes
and width.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ... import _cpu
from ._random import bucket_and_sign
from ._tensor_cpu import add_bias, call, readable_dtype, sides
from .window import Window


@functools.lru_cache(maxsize=256)
def _geometry(window: Window, channels: int, planes: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
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
    offset = (torch.arange(planes, dtype=torch.int32)[:, None] * math.prod(padded) + taps).flatten()
    before = [before for before, _ in window.pads]
    numbers = [channels, *[1] * fill, *size, *[0] * fill, *before, *[1] * fill, *padded]
    return places(counts, window.stride), offset, numbers


@functools.lru_cache(maxsize=256)
def layout_of(window: Window, planes: int, signs: int, axes: int, x_size, x_stride, x_half, g_size, g_half) -> tuple:
    """The geometry as the kernel takes it but for two addresses, and what must live as long.

    axes: positions are axes axes - 1 .. of g.
    """
    base, offset, numbers = _geometry(window, x_size[1], planes, tuple(x_size[2:]))
    n, c, *space = x_stride
    *k, o, s = *g_size[1 : axes - 1], math.prod(g_size[axes - 1 :])
    first = [x_half, n, c, *[0] * (3 - len(space)), *space, *numbers, planes, signs]
    return first, [g_half, *(k or (1,)), s, len(offset), o, base.data_ptr(), offset.data_ptr()], (base, offset)


def width_of(o: int) -> int:
    """The least width that keeps o outputs apart: a whole multiple."""
    return -(-o // _cpu.WIDTH) * _cpu.WIDTH


@functools.lru_cache(maxsize=256)
def _wide(i: int, o: int, rank: int, stream: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places and signs of outputs, with zeros up to the next width."""
    more = width_of(o) - o
    place, sign = sides(i, o, False, rank, stream, seed, dtype)[1]
    return torch.nn.functional.pad(place, (0, more)), torch.nn.functional.pad(sign, (0, more))


@functools.lru_cache(maxsize=256)
def fold_sizes(window: Window, channels: int, o: int, rank: int) -> tuple[int, int] | None:
    """Planes and width that a folded layer takes for a rank; None where it is too small."""
    planes = min(channels, -(-rank // (4 * math.prod(window.kernel))))
    return (planes, width_of(min(rank // 16, o))) if rank >= width_of(1) else None


def add_windows(x: Tensor, g: Tensor, window: Window, out: Tensor, seed: int, stream: int, ones: bool) -> None:
    """out [n, k, rank] += tensor sketches of the rows of a convolution's weight; x [n, c, *space], g [n, k, o, s]."""
    x, g = readable_dtype(x, out.dtype), readable_dtype(g, out.dtype).contiguous()
    halves = x.dtype != out.dtype, g.dtype != out.dtype
    first, last, _ = layout_of(window, x.shape[1], 0, 4, x.shape, x.stride(), halves[0], g.shape, halves[1])
    numbers = [x.data_ptr(), *first, g.data_ptr(), *last]
    (n, _, o, _), rank, i = g.shape, out.shape[2], numbers[23]
    left, right = sides(i, o, ones, rank, stream, seed, out.dtype)
    if ones:
        add_bias(g.sum(3, dtype=out.dtype), left, right, i, out)
    tables = [table.data_ptr() for table in (*_wide(i, o, rank, stream, seed, out.dtype), *left)]
    call("scatter_windows", out.dtype)(numbers, n, width_of(o), *tables, rank, out.data_ptr(), torch.get_num_threads())


def folded(rows: Tensor, bias: Tensor | None, planes: int, width: int, rank: int, seed: int, stream: int) -> Tensor:
    """What a folded layer adds, from rows [n, k, o, channels, kernel] and of a bias [n, k, o]: the reference."""
    o, channels, kernel = rows.shape[2:]
    kind, i = dict(device=rows.device, dtype=rows.dtype), planes * kernel
    place, sign_i = bucket_and_sign(i + (bias is not None), rank, 0, stream, seed, **kind)
    sign = bucket_and_sign(o, rank, 1, stream, seed, **kind)[1]
    sign_c = bucket_and_sign(channels, rank, 2, stream, seed, **kind)[1]
    plane = torch.arange(channels, device=rows.device) % planes
    to, signed = place[:i].view(planes, kernel)[plane], sign_i[:i].view(planes, kernel)[plane] * sign_c[:, None]
    to, signed, flat = to.flatten(), signed.flatten(), rows.flatten(3)
    if bias is not None:
        to, signed = torch.cat([to, place[i:]]), torch.cat([signed, sign_i[i:]])
        flat = torch.cat([flat, bias[..., None]], 3)
    to = (torch.arange(o, device=rows.device)[:, None] % width + to) % rank
    signed = flat * (sign[:, None] * signed)
    return rows.new_zeros(*rows.shape[:2], rank).index_add(2, to.flatten(), signed.flatten(2))


# Nanoseconds per sample, as those of `_tensor_cpu.py`
def windows_time(n: int, s: int, i: int, o: int, k: int, rank: int) -> float:
    """Of ``add_windows``; the image is no larger than its patches."""
    wide = width_of(o)
    return 10_000 / n + 0.1 * s * i / 4 + k * (0.021 * s * i * wide + 0.2 * i * wide + 0.2 * s * wide + 0.4 * rank)
