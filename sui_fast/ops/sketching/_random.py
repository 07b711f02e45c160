"""Philox4x32-10 (Salmon et al. 2011) in PyTorch integers: the same numbers for the same counter on every backend."""

from __future__ import annotations

import functools
from math import isqrt

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(index: Tensor, word: int, stream: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64 tensors, of counter (index low, index high, word, stream) under the key seed.

    Args:
        index: int64 tensor of any shape, >= 0.
        word, stream: 32-bit numbers that tell tables and layers apart. seed: 64-bit key.
    """
    c = [
        index & _MASK,
        (index >> 32) & _MASK,
        torch.full_like(index, word & _MASK),
        torch.full_like(index, stream & _MASK),
    ]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        left, right = c[0] * _MULTIPLY[0], c[2] * _MULTIPLY[1]  # wraps at 64 bits, as it should
        high = [(left >> 32) & _MASK, (right >> 32) & _MASK]
        c = [high[1] ^ c[1] ^ key[0], right & _MASK, high[0] ^ c[3] ^ key[1], left & _MASK]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return c[0], c[1], c[2], c[3]


def bucket_and_sign(
    size: int, buckets: int, word: int, stream: int, seed: int, device, dtype, step: int = 0
) -> tuple[Tensor, Tensor]:
    """A hash of 0..size-1 to buckets (int64) and a random sign (dtype) of each; one 32-bit word serves one index.

    step: places are its multiples, in turn, in place of random ones.
    """
    index = torch.arange(-(-size // 4), dtype=torch.int64, device=device)
    words = torch.stack(philox(index, word, stream, seed), 1).reshape(-1)[:size]
    place = torch.arange(size, device=device) * step if step else (words * buckets) >> 32
    return place, (1 - 2 * (words & 1)).to(dtype)


@functools.lru_cache(maxsize=64)
def divisors(rank: int) -> list[int]:
    """Ascending, rank among them."""
    return sorted({part for d in range(1, isqrt(rank) + 1) if rank % d == 0 for part in (d, rank // d)})


@functools.lru_cache(maxsize=1024)
def steps(i: int, o: int, rank: int) -> tuple[int, int]:
    """Steps of the places of i inputs and of o outputs in a tensor sketch; 0: at random.

    The shorter side takes every step-th place, each once: entries of the same index of the other side never meet, any
    others still do with probability 1 / rank, for that side is at random. Its transform has rank / step places only,
    that of the other side falls into ``step`` of them. One place more than inputs: for a bias.
    """
    room = next((size for size in divisors(rank) if size >= (i + 1 if i <= o else o)), None)
    if room is None:
        return 0, 0
    return (rank // room, 0) if i <= o else (0, rank // room)


def signs(rows: int, columns: int, word: int, stream: int, seed: int, device, dtype, begin: int = 0) -> Tensor:
    """Random signs [rows, columns]; entry (i, j) depends on (begin + i, j) alone, whatever the size asked for."""
    i = torch.arange(begin, begin + rows, dtype=torch.int64, device=device)[:, None]
    j = torch.arange(-(-columns // 128), dtype=torch.int64, device=device)[None]
    words = torch.stack(philox((i << 32) | j, word, stream, seed), 2)  # 128 bits serve 128 columns
    bits = (words[..., None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits.reshape(rows, -1)[:, :columns]).to(dtype)
