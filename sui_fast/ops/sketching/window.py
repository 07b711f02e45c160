"""How a convolution reads its image."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """An entry for each axis of space; pads: zeros before and after."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
