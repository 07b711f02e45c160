"""Which rows leave together: one sample, or a group of samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .._errors import ArgumentError, complaint


@dataclass(frozen=True)
class Blocks:
    """Removed blocks, sorted by group label (or by sample).

    Attributes:
        labels: group label of each block, numpy [b]; the sample number where no groups were given.
        samples: sample numbers of each block, list of int64 arrays; None: block i is sample i.
        n, k: samples and outputs of the whole problem; a shard holds fewer samples than n.
    """

    labels: np.ndarray
    samples: list[np.ndarray] | None
    n: int
    k: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def single(self) -> bool:
        """Whether block i is sample i alone."""
        return self.samples is None or all(len(x) == 1 and x[0] == i for i, x in enumerate(self.samples))

    @property
    def block_of_sample(self) -> np.ndarray:
        """Number of the block that each sample belongs to, int64 [n]."""
        if self.samples is None:
            return np.arange(len(self))
        owner = np.empty(sum(len(members) for members in self.samples), dtype=np.int64)
        for number, members in enumerate(self.samples):
            owner[members] = number
        return owner

    def by_size(self) -> dict[int, np.ndarray]:
        """Numbers of the blocks of each size, {samples removed: block numbers}."""
        if self.samples is None:
            return {1: np.arange(len(self))}
        sizes = np.array([len(members) for members in self.samples], dtype=np.int64)
        return {int(size): np.flatnonzero(sizes == size) for size in np.unique(sizes)}

    def rows(self, numbers: np.ndarray, device: torch.device) -> torch.Tensor:
        """Kernel rows of blocks of one size, int64 [b, size * k]."""
        one_by_one = self.samples is None
        members = numbers[:, None] if one_by_one else np.stack([self.samples[number] for number in numbers])
        rows = members[:, :, None] * self.k + np.arange(self.k)
        return torch.from_numpy(rows.reshape(len(numbers), -1)).to(device)


def shard_blocks(count: int, n: int, k: int) -> Blocks:
    """Single samples 0 .. count - 1 of a shard; the whole problem has n."""
    return Blocks(np.arange(count), None, n, k)


def make_sets(n: int, k: int, sets: list[np.ndarray]) -> Blocks:
    """Blocks of any sets of samples, which may overlap: per-block results hold, per-sample ones (left-out) do not."""
    return Blocks(np.arange(len(sets)), [np.unique(members) for members in sets], n, k)


def make_blocks(n: int, k: int, groups: object = None) -> Blocks:
    """Blocks of single samples, or of the samples that share a value in ``groups`` [n]."""
    if groups is None:
        return shard_blocks(n, n, k)
    values = groups.detach().cpu().numpy() if isinstance(groups, torch.Tensor) else np.asarray(groups)
    if values.shape != (n,):
        raise ArgumentError(
            complaint(
                "groups",
                f"one label per sample, shape [{n}]",
                f"shape {list(values.shape)}",
                "Pass a one-dimensional array; samples with equal labels are removed together.",
            )
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ArgumentError(
            complaint(
                "groups",
                "finite labels",
                f"NaN or infinity at sample {int(np.flatnonzero(~np.isfinite(values))[0])}",
                "Use integers or strings.",
            )
        )
    try:
        labels, inverse = np.unique(values, return_inverse=True)
    except TypeError as error:
        todo = "Use integers or strings."
        raise ArgumentError(complaint("groups", "labels of one kind", str(error), todo)) from None
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(np.bincount(inverse, minlength=len(labels)))[:-1]
    return Blocks(labels, np.split(order, ends), n, k)
