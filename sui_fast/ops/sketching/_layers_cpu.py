"""All layers of a training step, and where their sum is kept, in one call of C++ (`layers` in csrc/cpu/binding.cpp)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._tensor_cpu import call, fourier_length, hashed, readable_dtype, side_of, sides
from ._windows_cpu import fold_sizes, layout_of
from .layers import Layer


class Known(NamedTuple):
    """address: of the numbers that the kernel reads; as_is: whether x and g are read where they lie."""

    address: int
    as_is: bool
    kept: tuple


def readable(layer: Layer, x: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and g in a layout and dtype that the kernel reads."""
    x, g = readable_dtype(x, dtype), readable_dtype(g, dtype)
    if layer.window is not None:
        return x, g.contiguous()
    return tuple(t if t.stride(1) == 1 else t.contiguous() for t in (x, g))


def known_of(layer: Layer, x: Tensor, g: Tensor, rank: int, seed: int, dtype: torch.dtype) -> Known | None:
    """What the kernel is told of x and g, for all others of their layout; None where it does not run."""
    if x.ndim != layer.axes or g.ndim != layer.axes or not x.numel() or not g.numel():
        return None
    read = readable(layer, x, g, dtype)
    as_is, (x, g) = read[0] is x and read[1] is g, read
    if layer.window is None:
        i, o = x.shape[1], g.shape[1]
        left, right = (
            (table, *(t.data_ptr() for t in table))
            for table in sides(i, o, layer.ones, rank, layer.stream, seed, dtype)
        )
        numbers = [0, *side_of(x[:, None], i, layer.ones, left), *side_of(g[:, None], o, False, right)]
        kept = left, right
    else:
        (channels, o), window = (x.shape[1], g.shape[1]), layer.window
        sizes = fold_sizes(window, channels, o, rank)
        if sizes is None:
            return None
        planes, width = sizes
        i = planes * math.prod(window.kernel) + layer.ones
        places = hashed(i, rank, 0, layer.stream, seed, dtype)
        signs = [hashed(size, rank, word, layer.stream, seed, dtype)[1] for size, word in ((o, 1), (channels, 2))]
        images = x.shape, x.stride(), x.dtype != dtype, g.shape, g.dtype != dtype
        first, last, held = layout_of(window, planes, signs[1].data_ptr(), 3, *images)
        tables = [table.data_ptr() for table in (*places, signs[0])]
        numbers, kept = [1, 0, *first, 0, *last, width, layer.ones, *tables], (places, signs, held)
    numbers = array("q", numbers)
    return Known(numbers.buffer_info()[0], as_is, (numbers, kept))


def add_layers(told: list[int], out: Tensor, rows: Sequence[int], factor: float, table: Tensor | None) -> bool:
    """out [n, 1, rank] += the layers; then table[rows] = factor out if all of it is finite.

    told: the addresses of what is known of a layer, of x and of g, layer after layer.
    """
    n, _, rank = out.shape
    to = 0 if table is None else table.data_ptr()
    sizes = n, rank, fourier_length(rank), out.data_ptr()
    return call("layers", out.dtype)(told, *sizes, rows, factor, to, torch.get_num_threads())
