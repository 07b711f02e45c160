"""DataLoaders: whether they read every sample once, in an order of their own data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .._errors import DataError, complaint

_SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_FIXED = (SequentialSampler, list, tuple, range)


def quietly(loader: DataLoader) -> Iterator[Any]:
    """The batches of a DataLoader, whose start draws from the user's random numbers, which are put back."""
    with torch.random.fork_rng(devices=[]):
        return iter(loader)


def refuse_shuffled(loader: DataLoader, argument: str) -> None:
    """DataError for a DataLoader that leaves samples out or mixes their order."""
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    shared = any(isinstance(sampler, DistributedSampler) for sampler in samplers)
    if shared or any(isinstance(sampler, _SHUFFLED) for sampler in samplers) or _drawn(loader):
        expected, got = "a DataLoader in a fixed order", "one of a DistributedSampler" if shared else "a shuffled one"
        todo = "Pass shuffle=False, or the Dataset itself: scores are returned in the order of the data"
        todo += ", and under torchrun score() shares the samples itself." if shared else "."
        raise DataError(complaint(argument, expected, got, todo))
    if loader.drop_last:
        raise DataError(
            complaint(argument, "every sample", "a DataLoader with drop_last=True", "Pass drop_last=False.")
        )


def check_stream(data: Any, ids: np.ndarray | None, argument: str) -> None:
    """DataError where several workers read a stream without ids, or the same samples more than once."""
    if not isinstance(data, DataLoader) or not isinstance(data.dataset, IterableDataset) or data.num_workers < 2:
        return
    if ids is None or len(np.unique(ids)) < len(ids):
        got = f"{data.num_workers} workers of a stream " + ("without ids" if ids is None else "that repeat ids")
        todo = "Workers may repeat samples and mix their order: pass num_workers=0, or name each sample by an 'id'."
        raise DataError(complaint(argument, "every sample once, in a fixed order", got, todo))


def in_order(loader: DataLoader) -> bool:
    """Whether batches follow the order of the data set."""
    return type(loader.batch_sampler) is BatchSampler and type(loader.batch_sampler.sampler) is SequentialSampler


def _drawn(loader: DataLoader) -> bool:
    """Whether a sampler of the user's gives other numbers each time."""
    batches = loader.batch_sampler
    if batches is None or isinstance(loader.dataset, IterableDataset) or iter(batches) is batches:
        return False
    if isinstance(batches, _FIXED) or type(batches) is BatchSampler and isinstance(batches.sampler, _FIXED):
        return False
    with torch.random.fork_rng(devices=[]):
        return [list(batch) for batch in batches] != [list(batch) for batch in batches]
