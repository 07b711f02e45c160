"""Sums of tensor sketches over the layers of a model: what the fft route leaves in the Fourier domain is brought back
once, embeddings stay token numbers, and half precision is read as it lies."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._register import wide_dtype
from . import _tensor, sketch
from ._random import bucket_and_sign, steps
from .layers import Layer
from .window import Window

try:
    from . import _layers_cpu, _tensor_cpu, _windows_cpu
except ImportError:  # not built: the op does not choose it
    _layers_cpu = _tensor_cpu = _windows_cpu = None


class TensorSums:
    """sum over layers of the tensor sketches of their rows, [n, k, rank].

    A parameter [o, i] keeps its map (word 0 of its stream hashes i, word 1 hashes o) however its rows are given:
    ``outer`` of a linear layer and ``index`` of an embedding that shares its weight add up to the sketch of the sum.

    Args:
        n, k, rank: of the result. seed: of the maps. like: a tensor on the device, in the dtype of the factors.
    """

    def __init__(self, n: int, k: int, rank: int, seed: int, like: Tensor):
        self.rank, self.seed = rank, seed
        self.out = torch.zeros(n, k, rank, dtype=wide_dtype(like.dtype), device=like.device)
        self._key = seed & 0xFFFFFFFFFFFFFFFF
        self._fourier: dict[int, Tensor] = {}  # by the ring of their layers
        self._spare: dict[int, Tensor] = {}  # those of an earlier total
        self._waiting: list[tuple[Tensor, Tensor, int, bool]] = []  # layers of one position, which go in one call
        self._told: list[int] = []  # addresses of what ``layer`` was given
        self._kept: list[tuple] = []  # what lies there
        one = self.out.new_zeros(1, 1, 1)
        backend, _ = sketch.op.choose((one, one[None], rank, seed, 0, "tensor", "auto"))
        # what adds in place; None: the op gives what is added
        self.kernels = {"cpu": _tensor_cpu, "cuda": sketch.op.kernel("cuda")}.get(backend)

    def outer(self, a: Tensor, g: Tensor, stream: int, ones: bool = False) -> None:
        """Rows sum_s g a^T of a [n, s, i], g [n, k, s, o]; ones: one more input of ones, the bias."""
        if a.numel() == 0 and not ones or g.numel() == 0:
            return
        kernels = self.kernels
        if kernels is None:
            dtype = self.out.dtype
            self.out += _tensor(a.to(dtype), g.to(dtype), self.rank, self.seed, stream, ones=ones)
        elif kernels.prefers_fourier(a, g, ones, self.out):
            self._waiting.append((a, g, stream, ones))
            if g.shape[1] > 1 or g.shape[2] > 1:
                self._transform()
        else:
            kernels.add_scatter(a, g, self.out, self._key, stream, ones)

    def layer(self, layer: Layer, x: Tensor, g: Tensor) -> bool:
        """Add the part of a layer of one output at the next ``flush``; False where no kernel is built for it."""
        if self.kernels is not _tensor_cpu or _tensor_cpu is None:
            return False
        like = x.shape, x.stride(), x.dtype, g.shape, g.stride(), g.dtype, self.rank, self._key, self.out.dtype
        if layer.like != like:
            layer.like, layer.known = like, _layers_cpu.known_of(layer, x, g, *like[6:])
        if layer.known is None:
            return False
        if not layer.known.as_is:
            x, g = _layers_cpu.readable(layer, x, g, self.out.dtype)
        self._told += layer.known.address, x.data_ptr(), g.data_ptr()
        self._kept.append((x, g, layer.known))
        return True

    def windows(self, x: Tensor, g: Tensor, window: Window, stream: int, ones: bool = False) -> bool:
        """As ``outer`` for a convolution of x [n, c, *space], without its patches; False where those cost less.

        Args:
            g: [n, k, s, o].
        """
        if self.kernels is not _tensor_cpu or _tensor_cpu is None or g.numel() == 0:
            return False
        (n, k, s, o), i = g.shape, x.shape[1] * prod(window.kernel)
        sizes = n, s, i + ones, o, k, self.rank
        if _windows_cpu.windows_time(*sizes) > 0.5 * s * i + _tensor_cpu.fft_time(*sizes):
            return False
        _windows_cpu.add_windows(x, g.transpose(2, 3), window, self.out, self._key, stream, ones)
        return True

    def formed(self, rows: Tensor, first: int, stream: int, bias: Tensor | None = None) -> None:
        """As ``outer`` for samples from ``first`` on, from their rows [b, k, o, i] and those of the bias [b, k, o]."""
        (o, i), out = rows.shape[2:], self.out[first : first + len(rows)]
        if hasattr(self.kernels, "add_formed"):
            self.kernels.add_formed(rows, bias, out, self._key, stream)
            return
        places = dict(device=rows.device, dtype=out.dtype)
        step_a, step = steps(i, o, self.rank)
        place_a, sign_a = bucket_and_sign(
            i + (bias is not None), self.rank, 0, stream, self.seed, **places, step=step_a
        )
        place, sign = bucket_and_sign(o, self.rank, 1, stream, self.seed, **places, step=step)
        whole = rows if bias is None else torch.cat([rows, bias[..., None]], 3)
        to = ((place[:, None] + place_a) % self.rank).reshape(-1)
        signed = whole.to(out.dtype) * (sign[:, None] * sign_a)
        out += torch.zeros_like(out).index_add(2, to, signed.flatten(2))

    def _transform(self) -> None:
        groups: dict[tuple[int, int], list] = {}
        for layer in self._waiting:
            a, g = layer[:2]
            groups.setdefault((self.kernels.ring_of(a, g, self.out), g.shape[2]), []).append(layer)
        for (ring, _), layers in groups.items():
            if ring not in self._fourier:
                spare = self._spare.pop(ring, None)
                self._fourier[ring] = self.kernels.new_sums(self.out, ring) if spare is None else spare.zero_()
            self.kernels.add_fourier(layers, self.rank, self._fourier[ring], ring, self._key)
        self._waiting = []

    def index(self, token: Tensor, g: Tensor, vocabulary: int, stream: int) -> None:
        """Rows of an embedding [vocabulary, o]: g [n, k, s, o] at tokens [n, s], -1 for none."""
        if g.numel() == 0:
            return
        if hasattr(self.kernels, "add_index"):
            self.kernels.add_index(token, g, vocabulary, self.out, self._key, stream)
            return
        n, k, s, o = g.shape
        kind = dict(device=g.device, dtype=self.out.dtype)
        step, token_step = steps(o, vocabulary, self.rank)
        token_place, token_sign = bucket_and_sign(vocabulary, self.rank, 1, stream, self.seed, **kind, step=token_step)
        place, sign = bucket_and_sign(o, self.rank, 0, stream, self.seed, **kind, step=step)
        row = token.clamp_min(0)
        signed = g.to(self.out.dtype) * sign * (token_sign[row] * (token >= 0))[:, None, :, None]
        to = (token_place[row][..., None] + place) % self.rank
        self.out.scatter_add_(2, to[:, None].expand(n, k, s, o).flatten(2), signed.flatten(2))

    def rows(self, rows: Tensor, stream: int) -> None:
        """Explicit rows [n, k, p]."""
        if 0 < rows.shape[2] <= self.rank and hasattr(self.kernels, "add_formed"):
            self.formed(rows[..., None], 0, stream)
            return
        self.outer(rows.new_ones(len(rows), 1, 1), rows[:, :, None], stream)

    def flush(self, rows: Sequence[int] = (), factor: float = 1.0, table: Tensor | None = None) -> bool:
        """Add the layers that wait; then, where all is finite, keep factor times the sum in these rows of a table."""
        if not self._told and table is None:
            return True
        done = _layers_cpu.add_layers(self._told, self.out, rows, factor, table)
        self._told, self._kept = [], []
        return done

    def total(self) -> Tensor:
        """The sum so far, [n, k, rank], float32 for half precision."""
        self.flush()
        if self._waiting:
            self._transform()
        for ring, sums in self._fourier.items():
            self.kernels.finish(sums, ring, self.out)
        self._fourier, self._spare = {}, self._fourier or self._spare
        return self.out

    def keep(self, table: Tensor, rows: Sequence[int], factor: float) -> bool:
        """table[rows] = factor times the sum of one output, float32 on the CPU; False, nothing kept, if not finite."""
        if self.kernels is _tensor_cpu is not None and self.out.dtype == torch.float32:
            if self._waiting or self._fourier:
                self.total()
            return self.flush(rows, factor, table)
        found = (self.total()[:, 0] * factor).to("cpu", torch.float32)
        finite = bool(torch.isfinite(found).all())
        if finite:
            table[list(rows)] = found
        return finite

    def clear(self) -> None:
        """Begin again, in the same memory: that of ``total`` is overwritten."""
        self._waiting, self._told, self._kept, self._fourier = [], [], [], {}
        self.out.zero_()
