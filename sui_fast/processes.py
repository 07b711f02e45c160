"""The samples of a run, and the processes that share them."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._errors import ArgumentError, ProcessError, complaint
from .jacobians import Jacobian, Samples, jacobian
from .jacobians.engine import predict

_PATIENCE = 30.0  # seconds that a run waits for the other processes to begin it, before it says so


@dataclass(frozen=True)
class Ahead:
    """Samples that pass 1 need not capture: numbers [p], outputs [p, k], features [p, k, r], own blocks [p, k, k] or
    None."""

    numbers: np.ndarray
    outputs: Tensor
    features: Tensor
    own: Tensor | None


@dataclass
class Source:
    """Samples, and how their Jacobian is captured.

    Attributes:
        model, samples, options: as ``jacobian`` takes them.
        begin, end: the slice of this process.
        kept: Jacobians of whole portions that stay in memory for the next pass, by their bounds. ahead: see there.
    """

    model: torch.nn.Module
    samples: Samples
    options: dict[str, Any]
    begin: int
    end: int
    kept: dict[tuple[int, int], Jacobian] = field(default_factory=dict)
    ahead: Ahead | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @functools.cached_property
    def first(self) -> Jacobian:
        """Jacobian of the first sample: its shapes are those of all."""
        return self.part(0, 1)

    def part(self, begin: int, end: int) -> Jacobian:
        """Jacobian of samples begin .. end."""
        return jacobian(self.model, self.samples.slice(begin, end), **self.options)

    def parts(self, size: int, most: int = 0) -> Iterator[tuple[int, Jacobian]]:
        """(first sample, Jacobian) of portions of this process's slice, kept where all take at most ``most`` bytes."""
        for first in range(self.begin, self.end, size):
            bounds = first, min(first + size, self.end)
            part = self.kept[bounds] if bounds in self.kept else self.part(*bounds)
            if part.nbytes * (self.end - self.begin) <= most * part.n:
                self.kept[bounds] = part
            yield first, part
            del part  # before the next is captured

    def last(self, begin: int, end: int) -> Jacobian:
        """``part``, and no longer kept."""
        kept = self.kept.pop((begin, end), None)
        return self.part(begin, end) if kept is None else kept

    def some(self, numbers: np.ndarray) -> Jacobian:
        """Jacobian of the samples with these numbers."""
        return jacobian(self.model, self.samples.pick(numbers), **self.options)


def portion(n: int) -> int:
    """Samples captured at a time, a fourth of them at most: one process and four share them alike, and round alike."""
    return min(256, power(n // 4))


def grain(n: int) -> int:
    """Slices of processes, and portions of every product whose rounding shows, begin at multiples of this."""
    return max(portion(n), min(4096, power(n // 32)))


def power(n: int) -> int:
    """Largest power of two up to n."""
    return 1 << max(n, 1).bit_length() - 1


@dataclass(frozen=True)
class _Failure:
    """What a process that failed sends in place of what the others wait for."""

    error: str


class Processes:
    """torch.distributed where it is initialised or torchrun started the process, else one process."""

    def __init__(self, meet: bool = True) -> None:
        """meet: whether a group is made where there is none yet, for which all processes must come here."""
        there = torch.distributed.is_available()
        live = there and torch.distributed.is_initialized()
        started = not live and there and torch.distributed.is_torchelastic_launched()
        if started and meet:
            torch.distributed.init_process_group()  # gloo for CPU tensors, nccl for CUDA tensors
            live = True
        self.number, self.count = 0, 1
        if live:
            self.number, self.count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        elif started:
            self.number, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def slice(self, n: int) -> tuple[int, int]:
        """First and last sample of this process."""
        step = max(portion(n), min(grain(n), power(n // self.count)))
        cut = lambda i: min(n, -(-n * i // (self.count * step)) * step)  # noqa: E731
        return cut(self.number), cut(self.number + 1)

    def total(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        if self.count > 1:
            x = x.clone()
            self.objects(None)  # from here on none fails before the sum
            with _named():
                torch.distributed.all_reduce(x)
        return x

    def predict(self, model: torch.nn.Module, samples: Samples, *, progress: bool = False, **options) -> Tensor:
        """As ``jacobians.engine.predict``; each process predicts its slice, portion by portion, and has all of them."""
        return torch.cat(list(self.every(_outputs(model, samples, *self.slice(samples.n), progress, **options))))

    def every(self, x: Tensor) -> Iterator[Tensor]:
        """x of each process, in their order; shapes may differ in the first dimension."""
        for number, size in enumerate(self.objects(len(x))):
            held = x.contiguous() if number == self.number else x.new_empty(size, *x.shape[1:])
            if self.count > 1:
                self.objects(None)  # one may have failed with what came before, or for want of memory
                with _named():
                    torch.distributed.broadcast(held, number)
            yield held

    def gather(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of all processes, in their order; nothing from those without samples."""
        found = [part for part in self.objects(values) if part]
        if len(found) == 1:
            return found[0]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def objects(self, own: Any) -> list[Any]:
        """What each process has, in their order."""
        found = [own] * self.count
        if self.count > 1:
            with _named():
                torch.distributed.all_gather_object(found, own)
        failed = [number for number, x in enumerate(found) if isinstance(x, _Failure)]
        if failed and not isinstance(own, _Failure):
            got = f"in process {failed[0]}: {found[failed[0]].error.rstrip('.')}"
            todo = "Mend that, and start all of them again."
            raise ProcessError(complaint("processes", "none to fail", got, todo))
        return found

    def agree(self, own: dict[str, Any]) -> None:
        """Raises ArgumentError unless all processes were given the same."""
        every = self.objects(own)
        differs = sorted({name for x in every for name in own if x.get(name) != every[0].get(name)})
        if differs:
            todo = (
                "Give all of them the whole of the data, the same model and the same arguments: they share the samples."
            )
            got = f"others in some: {', '.join(differs)}"
            raise ArgumentError(complaint("processes", "the same call in each", got, todo))

    def one_for_all(self, work: Callable[[], Any]) -> Any:
        """What the first process makes; the others wait for it."""
        return self.objects(work() if self.number == 0 else None)[0]

    def leave(self) -> None:
        """From here on this process is alone, and tells the others nothing."""
        self.number, self.count = 0, 1

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Tells the others what fails: they would wait, or take what comes in a later run for what they wait for."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, ProcessError):
                with contextlib.suppress(ProcessError):  # the others may be gone
                    self.objects(_Failure(f"{type(error).__name__}: {error}"))
            raise


def processes_of(method: Any, part: Any) -> Processes:
    """Those that share a run, which all of them must begin; one alone with method="dense" or ``part``."""
    found = Processes(meet=False)
    if found.count == 1 or part is not None or method == "dense":
        found.leave()
        return found
    message = f"sui_fast: process {found.number} has waited {_PATIENCE:.0f} s for the other {found.count - 1}: "
    message += "all must make the same call; one alone can with method='dense', or part="
    hint = threading.Timer(_PATIENCE, warnings.warn, (message, RuntimeWarning))
    hint.daemon = True
    hint.start()
    try:
        found = Processes()
        found.objects(None)
    finally:
        hint.cancel()
    return found


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """What torch.distributed says where another process is gone, as ProcessError."""
    try:
        yield
    except RuntimeError as error:
        todo = "Another one ended, or cannot be reached: see what it printed, and start all of them again."
        raise ProcessError(complaint("processes", "all to answer", error, todo)) from error


def _outputs(model: torch.nn.Module, samples: Samples, begin: int, end: int, progress: bool, **options) -> Tensor:
    found, step = [predict(model, samples.slice(0, 1), **options)[:0]], grain(samples.n)
    for first in tqdm(range(begin, end, step), desc="outputs", delay=2, leave=False, disable=not progress):
        found.append(predict(model, samples.slice(first, min(first + step, end)), **options))
    return torch.cat(found)
