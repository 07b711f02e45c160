"""CUDA kernels of the tensor sketch and of the SJLT (csrc/cuda/sketch.cu)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _nvrtc
from .._register import wide_dtype
from ._fold import fold, transform_length
from ._random import bucket_and_sign, steps

_THREADS = 256
_ROWS = 4  # of a block of threads in the scattering kernels, at most
_RESIDENT = 3  # blocks of threads on a multiprocessor, at most
_FORMED = 8  # positions from which a matrix product forms the rows, a strip at a time
_ELEMENTS = 1 << 26
_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> Tensor:
    """See the op of the same name."""
    a, g = _nvrtc.dense(a), _nvrtc.dense(g)
    out = torch.zeros(*g.shape[:2], rank, dtype=wide_dtype(a.dtype), device=a.device)
    if out.numel() and a.numel() and g.numel():
        tables = _tables(a.shape[2], g.shape[3], out, seed, stream) if kind == "tensor" else (None,) * 4
        length = _fourier_length(out) if kind == "tensor" else None
        if length is not None and (route == "fft" or route == "auto" and _cheap_fft(a, g)):
            long = torch.empty(*out.shape[:2], length, dtype=out.dtype, device=out.device)
            _fft(a, g, False, tables, None, long)
            return fold(long, rank)
        else:
            _by_scatter(a, g, out, tables, seed & 0xFFFFFFFFFFFFFFFF, stream & 0xFFFFFFFF)
    return out


def refuse_sketch(
    a: Tensor, g: Tensor, rank: int, seed: int, stream: int, kind: str = "tensor", route: str = "auto"
) -> str | None:
    """Why this call is not for the kernel, or None."""
    if a.dtype not in _NAMES:
        return f"the tensors are {a.dtype}; it takes float64, float32 and half precision"
    if kind not in ("tensor", "sjlt"):
        return f"kind {kind!r}; it takes 'tensor' and 'sjlt', the triton kernel has the others"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on; it adds in any order"
    out = torch.empty(0, 0, rank, dtype=wide_dtype(a.dtype), device=a.device)
    if kind == "tensor" and route == "fft" and _fourier_length(out) is None:
        return f"the fft route with rank {rank}; its transforms serve powers of two to 4096 and other ranks to 2048"
    most = _nvrtc.limits(a.device).shared // out.element_size()
    if rank > most:
        return f"rank {rank}; it takes at most {most}, whose sums fit shared memory"
    if g.shape[0] * g.shape[1] >= 2**31:
        return "more rows than a launch grid holds"
    return None


def _fourier_length(out: Tensor) -> int | None:
    """Length of the transform that serves ranks like that of out, or None."""
    length = transform_length(out.shape[2], 2, 4096)
    if length is None or _fft_bytes(length, out.dtype) > _nvrtc.limits(out.device).shared:
        return None
    return length


def _fft_bytes(length: int, dtype: torch.dtype) -> int:
    return 2 * (length + length // 8) * dtype.itemsize


def _cheap_fft(a: Tensor, g: Tensor) -> bool:
    """A transform a position against a row formed and scattered entry by entry; not measured on a GPU yet."""
    (_, _, s, o), i = g.shape, a.shape[2]
    return s * (i + o + 40_000) < o * i * (4.0 + 0.05 * s)


def _tables(i: int, o: int, out: Tensor, seed: int, stream: int, ones: bool = False) -> tuple[Tensor, ...]:
    """Places and signs of inputs and outputs; ones: of one more input."""
    rank, (step_a, step_g) = out.shape[2], steps(i, o, out.shape[2])
    place_a, sign_a = bucket_and_sign(i + ones, rank, 0, stream, seed, out.device, out.dtype, step_a)
    place_g, sign_g = bucket_and_sign(o, rank, 1, stream, seed, out.device, out.dtype, step_g)
    return place_a.int(), sign_a, place_g.int(), sign_g


@functools.lru_cache(maxsize=16)
def _roots(rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """exp(-2 pi i j / rank), j < rank / 2, as pairs; and where shared memory has 0 .. rank - 1 in bit-reversed order.

    Made on the CPU: a copy from there is complete when it returns, and any stream may use it.
    """
    angle = torch.arange(rank // 2, dtype=torch.float64) * (-2 * math.pi / rank)
    number, reverse = torch.arange(rank), torch.zeros(rank, dtype=torch.int64)
    for _ in range(rank.bit_length() - 1):
        reverse, number = (reverse << 1) | (number & 1), number >> 1
    slot = reverse + (reverse >> 3)  # as slot() in sketch.cu
    return torch.stack([angle.cos(), angle.sin()], 1).to(dtype).to(device), slot.int().to(device)


def _balance(a: Tensor, g: Tensor, ones: bool, dtype: torch.dtype) -> Tensor:
    """Powers of two u [n, k, s] that make u a and g / u about equal in norm; 0 where either is 0."""

    def size(x: Tensor) -> tuple[Tensor, Tensor]:
        """Twice the exponent of the geometric mean of sum and largest of |x|, which is near the norm; where x is 0."""
        if x.shape[-1] == 0:
            return torch.zeros(x.shape[:-1], dtype=torch.int32, device=x.device), x.new_ones(x.shape[:-1]).bool()
        most, total = (torch.linalg.vector_norm(x, order, -1, dtype=dtype) for order in (math.inf, 1))
        return most.frexp().exponent + total.frexp().exponent, most == 0

    (size_a, no_a), (size_g, no_g) = size(a), size(g)
    if ones:
        size_a, no_a = size_a.where(~no_a, 0).clamp_min(2), torch.zeros_like(no_a)
    half = (size_g - size_a[:, None]).div(4, rounding_mode="floor")
    return torch.exp2(half.clamp(-100, 100).to(dtype)).masked_fill_(no_a[:, None] | no_g, 0).contiguous()


def _fft(a: Tensor, g: Tensor, ones: bool, tables: tuple, sums: Tensor | None, out: Tensor | None) -> None:
    """One launch: what it adds up starts from sums where there are some, and ends in out, or else in sums."""
    like = sums if out is None else out
    (n, k, s, o), i, dtype = g.shape, a.shape[2], wide_dtype(a.dtype)
    length = out.shape[2] if sums is None else 2 * (sums.shape[2] - 1)
    roots, slots = _roots(length, dtype, like.device)
    place_a, sign_a, place_g, sign_g = tables
    place_a, place_g = slots[place_a.long()], slots[place_g.long()]
    threads = max(32, min(_THREADS, length // 8))  # 2049 frequencies of length 4096 are 9 of a thread, which it keeps
    args = (a, g, k, s, i, o, ones, length.bit_length() - 1, place_a, sign_a, place_g, sign_g)
    args = (*args, _balance(a, g, ones, dtype), roots, sums, out)
    shared = _fft_bytes(length, dtype)
    _nvrtc.launch("sketch.cu", f"tensor_fft_{_NAMES[a.dtype]}", (n * k,), threads, shared, like, *args)


# Sums over layers (sums.py), as in _tensor_cpu.py ---------------------------------------------------------------------
def prefers_fourier(a: Tensor, g: Tensor, ones: bool, out: Tensor) -> bool:
    return _fourier_length(out) is not None and _cheap_fft(a, g)


def ring_of(a: Tensor, g: Tensor, out: Tensor) -> int:
    """All layers share sums."""
    return 0


def new_sums(out: Tensor, ring: int) -> Tensor:
    """Of frequencies 0 .. length / 2."""
    kind = torch.complex64 if out.dtype == torch.float32 else torch.complex128
    return torch.zeros(*out.shape[:2], _fourier_length(out) // 2 + 1, dtype=kind, device=out.device)


def _readable(a: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kind = a.dtype if a.dtype == g.dtype and wide_dtype(a.dtype) == dtype else dtype
    return _nvrtc.dense(a.to(kind)), _nvrtc.dense(g.to(kind))


def add_fourier(layers: list[tuple[Tensor, Tensor, int, bool]], rank: int, sums: Tensor, ring: int, seed: int) -> None:
    """sums [n, k, length / 2 + 1] of the products of the transforms of layers (a, g, stream, ones)."""
    like = torch.empty(0, 0, rank, dtype=sums.real.dtype, device=sums.device)
    for a, g, stream, ones in layers:
        a, g = _readable(a, g, like.dtype)
        _fft(a, g, ones, _tables(a.shape[2], g.shape[3], like, seed, stream, ones), sums, None)


def finish(sums: Tensor, ring: int, out: Tensor) -> None:
    """out [n, k, rank] += what the sums of `add_fourier` belong to: a layer without positions, and the way back."""
    (n, k, width), rank = sums.shape, out.shape[2]
    found = torch.empty(n, k, 2 * (width - 1), dtype=out.dtype, device=out.device)
    a, g = out.new_empty(n, 0, 1), out.new_empty(n, k, 0, 1)
    _fft(a, g, False, _tables(1, 1, found, 0, 0), sums, found)
    out += fold(found, rank)


def add_scatter(a: Tensor, g: Tensor, out: Tensor, seed: int, stream: int, ones: bool) -> None:
    """Rows [o, i] added to out [n, k, rank] bucket by bucket."""
    a, g = _readable(a, g, out.dtype)
    tables = _tables(a.shape[2], g.shape[3], out, seed, stream, ones)
    a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if ones else a
    _by_scatter(a, g, out, tables, seed & 0xFFFFFFFFFFFFFFFF, stream & 0xFFFFFFFF)


# Scatter --------------------------------------------------------------------------------------------------------------
def _by_scatter(a: Tensor, g: Tensor, out: Tensor, tables: tuple, seed: int, stream: int) -> None:
    (n, k, s, o), i = g.shape, a.shape[2]
    if s == 1 and i == 1 and tables[0] is None:  # rows as they are, scaled at the end
        _scatter("formed", (g,), (n * k, 1, o, 0), tables, seed, stream, out)
        out *= a
        return
    if s < _FORMED:
        _scatter("factors", (a, g), (n * k, k, s, i, o), tables, seed, stream, out)
        return
    a, g = a.to(out.dtype), g.to(out.dtype)
    samples = max(1, min(n, _ELEMENTS // (k * i)))
    part = max(1, min(o, _ELEMENTS // (samples * k * i)))
    for n0 in range(0, n, samples):
        for o0 in range(0, o, part):
            strip = g[n0 : n0 + samples, :, :, o0 : o0 + part]
            rows = (strip.transpose(2, 3) @ a[n0 : n0 + samples, None]).contiguous()  # [samples, k, part, i]
            own = (*tables[:2], *(table if table is None else table[o0 : o0 + part] for table in tables[2:]))
            sizes = (rows.shape[0] * k, i, rows.shape[2] * i, o0 * i)
            _scatter("formed", (rows,), sizes, own, seed, stream, out[n0 : n0 + samples])


def _scatter(name: str, inputs: tuple, sizes: tuple, tables: tuple, seed: int, stream: int, out: Tensor) -> None:
    """As many rows a block of threads as leave room for a second block, as many chunks as fill the GPU once."""
    rows, length = sizes[0], sizes[2] if name == "formed" else sizes[3] * sizes[4]
    limits, size = _nvrtc.limits(out.device), out.shape[2] * out.element_size()
    group = max(1, min(_ROWS, limits.shared // 2 // size))
    grid, resident = -(-rows // group), max(1, min(_RESIDENT, limits.shared_each // (group * size + 1024)))
    chunks = max(1, min(length // max(16 * _THREADS, 2 * out.shape[2]), limits.processors * resident // grid))
    args = (*inputs, *sizes, *tables, stream, seed, out.shape[2], group, out)
    kernel = f"scatter_{name}_{_NAMES[inputs[0].dtype]}"
    _nvrtc.launch("sketch.cu", kernel, (grid, chunks), _THREADS, group * size, out, *args)
