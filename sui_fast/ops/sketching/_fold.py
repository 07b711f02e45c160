"""Ranks that are no powers of two: sums of two hashes stay below 2 rank, so a longer transform holds them unwrapped."""

from __future__ import annotations

from torch import Tensor


def transform_length(rank: int, least: int, most: int) -> int | None:
    """The power of two whose transform serves a rank: itself, or one that holds 2 rank - 1; None beyond most."""
    length = rank if rank & (rank - 1) == 0 and rank >= least else max(least, 1 << (2 * rank - 2).bit_length())
    return length if length <= most else None


def fold(x: Tensor, rank: int) -> Tensor:
    """x [..., length] with places from rank on added to those of their remainders."""
    if x.shape[-1] == rank:
        return x
    out = x[..., :rank].clone()
    out[..., : rank - 1] += x[..., rank : 2 * rank - 1]
    return out
