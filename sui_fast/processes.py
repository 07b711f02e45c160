"""The samples of a run, and the processes that share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jacobians import Jacobian, Samples, jacobian


@dataclass
class Source:
    """Samples, and how their Jacobian is captured.

    Attributes:
        model, samples, options: as ``jacobian`` takes them.
        begin, end: the slice of this process.
    """

    model: torch.nn.Module
    samples: Samples
    options: dict[str, Any]
    begin: int
    end: int

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def part(self, begin: int, end: int) -> Jacobian:
        """Jacobian of samples begin .. end."""
        return jacobian(self.model, self.samples.slice(begin, end), **self.options)

    def parts(self, size: int, begin: int | None = None) -> Iterator[tuple[int, Jacobian]]:
        """(first sample, Jacobian) of portions of this process's slice."""
        for first in range(self.begin if begin is None else begin, self.end, size):
            yield first, self.part(first, min(first + size, self.end))

    def some(self, numbers: np.ndarray) -> Jacobian:
        """Jacobian of the samples with these numbers."""
        return jacobian(self.model, self.samples.pick(numbers), **self.options)


class Processes:
    """torch.distributed where it is initialised or torchrun started the process, else one process."""

    def __init__(self) -> None:
        live = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not live and torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            torch.distributed.init_process_group()  # gloo for CPU tensors, nccl for CUDA tensors
            live = True
        self.count = torch.distributed.get_world_size() if live else 1
        self.number = torch.distributed.get_rank() if live else 0

    def slice(self, n: int) -> tuple[int, int]:
        """First and last sample of this process."""
        step = min(256, 1 << max(n // self.count, 1).bit_length() - 1)  # batches as in one process, so equal rounding
        cut = lambda i: min(n, -(-n * i // (self.count * step)) * step)  # noqa: E731
        return cut(self.number), cut(self.number + 1)

    def total(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        if self.count > 1:
            x = x.clone()
            torch.distributed.all_reduce(x)
        return x

    def gather(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of all processes, in their order."""
        if self.count == 1:
            return values
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, values)
        return {name: np.concatenate([part[name] for part in found]) for name in values}
