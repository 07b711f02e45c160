"""Layers of one output whose gradients come again and again, as in training."""

from __future__ import annotations

from typing import Any

from .window import Window


class Layer:
    """A linear layer of one position, x [n, i], g [n, o], or a convolution, x [n, c, *space], g [n, o, *positions].

    Args:
        stream: of its parameter. ones: one more input of ones, the bias. window: of a convolution.

    Channels of a convolution fold to planes with random signs, outputs to columns: entry (o, c, t) goes to place
    (o mod columns + h[c mod planes, t]) mod rank with the sign u[o] v[c] w[c mod planes, t]. The signs of two
    entries are independent, so E<Px, Py> = <x, y>. Measured (two CNNs, untrained and trained, ranks 256 and 1024):
    the error of the Gram matrix is that of the tensor sketch within the spread of seeds.
    """

    def __init__(self, stream: int, ones: bool, window: Window | None = None):
        self.stream, self.ones, self.window = stream, ones, window
        self.axes = 2 if window is None else 2 + len(window.kernel)
        self.like: tuple = ()  # the layouts of the last x and g
        self.known: Any = None  # what a kernel is told of them
