"""Data sets that are read again and again, a batch in memory at a time: what stays are targets and ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .._errors import DataError, complaint
from .data import (
    GATHERED,
    Known,
    Samples,
    as_samples,
    batch_length,
    check_inputs,
    check_targets,
    gather,
    is_dataset,
    is_stream,
    join_ids,
    join_targets,
    map_batch,
    rows_in_batches,
    split,
)
from .digest import Digest
from .loaders import check_stream, quietly, refuse_shuffled

_MOST = 1 << 26  # bytes of a batch, beyond which it is one of fewer rows
_FEW = 64


def read_samples(
    data: Any, *, with_targets: bool | None, argument: str = "train", named: bool = True, progress: bool = False
) -> Samples:
    """As ``as_samples``, but Datasets and DataLoaders are read on demand, again for every pass.

    Args:
        data, with_targets, argument: as in ``as_samples``.
        named: ids (and targets) are wanted, which takes a pass over the data before any other; False, and nothing is
            read where the data know their length.
        progress: show a bar where that pass takes longer than two seconds.
    Raises:
        DataError: as ``as_samples``; data that are not the same when they are read again.
    """
    random = isinstance(data, DataLoader) and _by_number(data)
    if isinstance(data, DataLoader):
        refuse_shuffled(data, argument)
        reader: _Rows | _Loader | _Stream = _Loader(data) if random else _Stream(data, argument)
    elif is_stream(data):
        reader = _Stream(data, argument)
    elif is_dataset(data) and not isinstance(data, Samples) and not hasattr(data, "iloc") and len(data):
        reader = _Rows(data, argument)
    else:  # in memory as they are
        return as_samples(data, with_targets=with_targets, argument=argument)
    tape = _Tape(reader, with_targets, argument)
    if not named and reader.length is not None:
        return Read(tape, 0, reader.length, None, None, argument)
    targets, ids, n = tape.look(progress)
    check_stream(data, ids, argument)
    if with_targets and targets is None:
        raise DataError(complaint(argument, "samples with targets", "inputs only", "Pass (inputs, targets)."))
    check_targets(targets, argument)
    return Read(tape, 0, n, targets, ids, argument)


class Read(Samples):
    """Samples begin .. end of a data set that is read on demand; used as ``Samples``."""

    def __init__(self, tape: _Tape, begin: int, end: int, targets, ids, argument: str, known: tuple[Tensor, ...] = ()):
        self._tape, self.first, self._known = tape, begin, known
        self.targets, self.argument, self.n = targets, argument, end - begin
        self.ids = np.arange(self.n) if ids is None else ids
        if self.n == 0:
            got, todo = "an empty data set", "Check how it was filtered."
            raise DataError(complaint(argument, "at least one sample", got, todo))

    def batches(self, batch_size: int) -> Iterator[Any]:
        """Model inputs, ``batch_size`` samples at a time, in order."""
        for first, chunk in self._tape.chunks(self.first, self.first + self.n):
            for begin in range(0, batch_length(chunk), batch_size):
                part = map_batch(lambda x, b=begin: x[b : b + batch_size], chunk)
                rows = slice(first + begin, first + begin + batch_length(part))
                yield self._beside(part, rows)

    def digest(self) -> str:
        """As of ``Samples``, known from the pass over the data."""
        return self._tape.digest

    def _beside(self, part: Any, rows: slice | np.ndarray) -> Any:
        for known in self._known:
            part = Known(part, known[rows])
        return part

    def beside(self, known: Tensor) -> Samples:
        """The same inputs, every batch of them a ``Known`` with its rows of ``known`` [n, ...]."""
        if self.first or self.n != len(known):
            raise ValueError("known of the whole data set")
        return Read(self._tape, 0, self.n, self.targets, self.ids, self.argument, (*self._known, known))

    def slice(self, begin: int, end: int) -> Samples:
        """Inputs of samples begin .. end, without targets."""
        end, first = min(end, self.n), self.first
        return Read(self._tape, first + begin, first + end, None, self.ids[begin:end], self.argument, self._known)

    def pick(self, numbers: np.ndarray) -> Samples:
        """Inputs of the samples with these numbers (ascending), without targets, in memory."""
        rows = self.first + np.asarray(numbers)
        chunks = [self._beside(part, which) for which, part in self._tape.pick(rows)]
        return Samples(chunks, None, self.ids[numbers], self.argument, rows)


class Kept(Samples):
    """Some of the samples, from batches that are read one after the other."""

    def __init__(self, samples: Samples, numbers: np.ndarray):
        self._samples, self._numbers, self.n, self.targets = samples, numbers, len(numbers), None
        self.argument, self.ids, self.first = samples.argument, samples.ids[numbers], samples.number(numbers)

    def batches(self, batch_size: int) -> Iterator[Any]:
        """What is left of batches of ``batch_size``, in order."""
        end = 0
        for batch in self._samples.batches(batch_size):
            begin, end = end, end + batch_length(batch)
            bounds = np.searchsorted(self._numbers, (begin, end))
            own = torch.from_numpy(self._numbers[slice(*bounds)] - begin)
            if len(own):
                yield map_batch(lambda x, own=own: x[own.to(x.device)], batch)


class _Tape:
    """Batches of a reader by the number of their samples; the one read last stays, so that going on costs nothing."""

    def __init__(self, reader: _Rows | _Loader | _Stream, with_targets: bool | None, argument: str):
        self.reader, self._with_targets, self._argument = reader, with_targets, argument
        self._targets: Tensor | None = None
        self.digest: str | None = None  # of all inputs, once they were looked at
        self._held: tuple[int, Any] | None = None
        self._live: Iterator[tuple[int, Any]] | None = None
        self._next = 0

    def look(self, progress: bool) -> tuple[Tensor | None, np.ndarray | None, int]:
        """Targets, ids and number of samples from a pass over the data, whose beginning is read twice."""
        once = next(self.reader.open(0), None)
        targets, ids, n, digest = [], [], 0, Digest()
        bar = tqdm(total=self.reader.length, desc=f"{self._argument} targets", delay=2, leave=False,
                   disable=not progress)  # fmt: skip
        for first, raw in self.reader.open(0):
            inputs, target, name = split(raw, self._with_targets, self._argument)
            if first == 0 and not _equal(split(once[1], self._with_targets, self._argument)[:2], (inputs, target)):
                raise self._changed("other samples at the second reading")
            n = first + batch_length(inputs)
            check_inputs(inputs, range(first, n), self._argument)
            digest.add(inputs)
            if self._with_targets:
                targets.append(target)
            ids.append(name)
            bar.update(n - first)
        bar.close()
        if n == 0:
            if once is not None:
                raise self._changed("nothing at the second reading")
            got, todo = "an empty data set", "Check how it was filtered."
            raise DataError(complaint(self._argument, "at least one sample", got, todo))
        self._targets, self.digest = join_targets(targets, self._argument), str(digest)
        return self._targets, join_ids(ids, self._argument), n

    def chunks(self, begin: int, end: int) -> Iterator[tuple[int, Any]]:
        """(number of the first sample, inputs) of consecutive batches, cut to begin .. end."""
        while begin < end:
            first, inputs = self._at(begin)
            stop = min(end, first + batch_length(inputs))
            part = slice(begin - first, stop - first)
            yield begin, map_batch(lambda x, part=part: x[part], inputs)
            begin = stop

    def pick(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
        """(numbers, inputs) of some samples."""
        if not isinstance(self.reader, _Stream):
            for begin in range(0, len(numbers), GATHERED):
                some = numbers[begin : begin + GATHERED]
                yield some, self._read(some, self.reader.pick(some))
            return
        done = 0
        for first, chunk in self.chunks(0, int(numbers[-1]) + 1) if len(numbers) else ():
            stop = np.searchsorted(numbers, first + batch_length(chunk))
            if stop > done:
                some = numbers[done:stop]
                index = torch.from_numpy(some - first)
                yield some, map_batch(lambda x, index=index: x[index.to(x.device)], chunk)
                done = stop

    def _at(self, position: int) -> tuple[int, Any]:
        if self._held is not None and self._held[0] <= position < self._held[0] + batch_length(self._held[1]):
            return self._held
        if self._live is None or position < self._next or position > self._next and self.reader.length is not None:
            self._live = self.reader.open(position)
        self._held = None
        for first, raw in self._live:
            inputs = self._read(None, raw, first)
            self._next = first + batch_length(inputs)
            if position < self._next:
                self._held = first, inputs
                return self._held
        self._live = None
        raise self._changed(f"an end at sample {position}")

    def _read(self, numbers: np.ndarray | None, raw: Any, first: int = 0) -> Any:
        """Inputs of a raw batch, whose targets must be those of the first reading."""
        inputs, target, _ = split(raw, self._with_targets, self._argument)
        count = batch_length(inputs)
        if numbers is None:
            numbers = np.arange(first, first + count)
        if count != len(numbers):
            raise self._changed(f"{count} samples where {len(numbers)} were asked for")
        check_inputs(inputs, numbers, self._argument)
        if self._targets is not None:
            known = self._targets[torch.from_numpy(numbers[numbers < len(self._targets)])]
            if target is None or not _equal(target.cpu(), known):
                got = f"other targets than at first among samples {numbers[0]} .. {numbers[-1]}"
                raise self._changed(got)
        return inputs

    def _changed(self, got: str) -> DataError:
        todo = "Turn random augmentation off, leave the files alone during a run, or drop store= to read once."
        return DataError(complaint(self._argument, "data that are the same whenever they are read", got, todo))


class _Rows:
    """A data set with rows by number."""

    def __init__(self, data: Any, argument: str):
        self.data, self.argument, self.length = data, argument, len(data)
        one = gather(data, range(1), argument)
        size = sum(x.nbytes for x in tree_flatten(one)[0] if isinstance(x, Tensor | np.ndarray))
        self._size = GATHERED if size * GATHERED <= _MOST else _FEW

    def open(self, begin: int) -> Iterator[tuple[int, Any]]:
        """(number of the first sample, raw batch) from a sample on."""
        for first in range(begin, self.length, self._size):
            yield first, gather(self.data, range(first, min(first + self._size, self.length)), self.argument)

    def pick(self, numbers: np.ndarray) -> Any:
        """Some rows as one raw batch."""
        return gather(self.data, numbers.tolist(), self.argument)


class _Loader:
    """A DataLoader of rows by number: its order, its batches, its workers, from any of its batches on."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        with torch.random.fork_rng(devices=[]):
            batches = [np.asarray(list(batch)) for batch in loader.batch_sampler]
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)
        self._order = np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)
        self.length = len(self._order)

    def open(self, begin: int) -> Iterator[tuple[int, Any]]:
        """(number of the first sample, raw batch) from the batch on that holds a sample."""
        number, given = int(np.searchsorted(self._ends, begin, side="right")), self.loader
        parts = np.split(self._order, self._ends[:-1])[number:]
        names = ("num_workers", "collate_fn", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
        options = {name: getattr(given, name) for name in names}
        # a generator of its own: the user's random state stays as it is
        rest = DataLoader(
            given.dataset, batch_sampler=[part.tolist() for part in parts], generator=torch.Generator(), **options
        )
        first = int(self._ends[number - 1]) if number else 0
        for part, raw in zip(parts, rest, strict=True):
            yield first, raw
            first += len(part)

    def pick(self, numbers: np.ndarray) -> Any:
        """Some rows as one raw batch."""
        rows, data = self._order[numbers].tolist(), self.loader.dataset
        found = data.__getitems__(rows) if hasattr(data, "__getitems__") else [data[row] for row in rows]
        return self.loader.collate_fn(found)


class _Stream:
    """Batches, or rows, that only come in their order."""

    length = None

    def __init__(self, data: Any, argument: str):
        self.data, self.argument = data, argument

    def open(self, begin: int) -> Iterator[tuple[int, Any]]:
        """(number of the first sample, raw batch) from the first on."""
        data, first = self.data, 0
        for raw in quietly(data) if isinstance(data, DataLoader) else rows_in_batches(data, self.argument, _FEW):
            yield first, raw
            first += batch_length(split(raw, None, self.argument)[0])


def _by_number(loader: DataLoader) -> bool:
    return type(loader) is DataLoader and loader.batch_sampler is not None and is_dataset(loader.dataset)


def _equal(one: Any, two: Any) -> bool:
    (a, form), (b, other) = tree_flatten(one), tree_flatten(two)
    return form == other and all(map(_same, a, b))


def _same(x: Any, y: Any) -> bool:
    """Whether two are equal; NaN is equal to NaN, as what is not a number is found later, with its sample."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y
    return x.shape == y.shape and (
        torch.equal(x, y) or bool(torch.isclose(x, y, rtol=0.0, atol=0.0, equal_nan=True).all())
    )
