"""Samples: whatever a user calls a data set, as batches of model inputs with ids and targets, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import register_pytree_node
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import default_collate as collate

from .._errors import DataError, complaint
from .digest import Digest
from .finite import check_rows
from .loaders import check_stream, quietly, refuse_shuffled
from .numbers import as_array, as_tensor, is_text, refuse_text

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_ID_KEYS = ("id", "ids", "idx", "index")
GATHERED = 256  # rows of a data set that make a batch


class Fields(dict):
    """Inputs of a batch by name; also as attributes, as in the dataclass, named tuple or encoding they came as."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


register_pytree_node(
    Fields, lambda x: (list(x.values()), list(x)), lambda values, keys: Fields(zip(keys, values, strict=True))
)


class Known(NamedTuple):
    """Inputs of a batch with what is known of its samples beside them: a tensor with a row per sample, never cast."""

    inputs: Any
    known: Tensor


class Samples:
    """Inputs, targets and ids of a data set, checked.

    Attributes:
        ids: numpy [n]; 0..n-1 where the data name none.
        targets: tensor [n] or [n, k], or None.
        argument: the name of the argument the data came as. first: the number of the first sample there, where these
            are a slice, or the numbers of all, where they were picked; for error messages.
    """

    def __init__(
        self, chunks: list[Any], targets: Tensor | None, ids: np.ndarray | None, argument: str,
        first: int | np.ndarray = 0,
    ):  # fmt: skip
        self._chunks = chunks
        self.targets, self.argument, self.first = targets, argument, first
        self.n = sum(batch_length(chunk) for chunk in chunks)
        self.ids = np.arange(self.n) if ids is None else ids
        if self.n == 0:
            raise DataError(
                complaint(argument, "at least one sample", "an empty data set", "Check how it was filtered.")
            )
        for what, size in (("targets", None if targets is None else len(targets)), ("ids", len(self.ids))):
            if size is not None and size != self.n:
                raise DataError(complaint(argument, f"as many {what} as inputs ({self.n})", size, "Align them."))

    def __len__(self) -> int:
        return self.n

    def batches(self, batch_size: int) -> Iterator[Any]:
        """Model inputs, ``batch_size`` samples at a time, in order."""
        for chunk in self._chunks:
            length = batch_length(chunk)
            for begin in range(0, length, batch_size):
                yield map_batch(lambda x, b=begin: x[b : b + batch_size], chunk)

    def digest(self) -> str:
        """SHA-256 of the inputs in their order, without what is known beside them."""
        found = Digest()
        for chunk in self._chunks:
            while isinstance(chunk, Known):
                chunk = chunk.inputs
            found.add(chunk)
        return str(found)

    def beside(self, known: Tensor) -> Samples:
        """The same inputs, every batch of them a ``Known`` with its rows of ``known`` [n, ...]."""
        chunks, offset = [], 0
        for chunk in self._chunks:
            end = offset + batch_length(chunk)
            chunks.append(Known(chunk, known[offset:end]))
            offset = end
        return Samples(chunks, self.targets, self.ids, self.argument)

    def slice(self, begin: int, end: int) -> Samples:
        """Inputs of samples begin .. end, without targets."""
        parts, offset = [], 0
        for chunk in self._chunks:
            length = batch_length(chunk)
            first, last = max(begin - offset, 0), min(end - offset, length)
            if first < last:
                parts.append(map_batch(lambda x, a=first, b=last: x[a:b], chunk))
            offset += length
        first = self.first + begin if isinstance(self.first, int) else self.first[begin:end]
        return Samples(parts, None, self.ids[begin:end], self.argument, first)

    def number(self, place: int | np.ndarray) -> int | np.ndarray:
        """Number in the whole data set of the sample at a place, or at some."""
        return self.first + place if isinstance(self.first, int) else self.first[place]

    def pick(self, numbers: np.ndarray) -> Samples:
        """Inputs of the samples with these numbers (ascending), without targets."""
        parts, offset = [], 0
        for chunk in self._chunks:
            length = batch_length(chunk)
            own = torch.from_numpy(numbers[(numbers >= offset) & (numbers < offset + length)] - offset)
            if len(own):
                parts.append(map_batch(lambda x, own=own: x[own.to(x.device)], chunk))
            offset += length
        return Samples(parts, None, self.ids[numbers], self.argument, self.number(numbers))


@torch.random.fork_rng(devices=[])  # reading may draw random numbers; the user's stay as they are
def as_samples(data: Any, *, with_targets: bool | None, argument: str = "train") -> Samples:
    """Samples of any data set that ``score`` takes.

    Args:
        data: Dataset, unshuffled DataLoader, (inputs, targets) tensors or arrays, Hugging Face Dataset, list of
            batches or of rows, table of pandas, or a tensor, array or dict of tensors (one batch).
        with_targets: True: they are required; False: everything is input; None: taken off where they are.
        argument: its name in error messages.
    Returns:
        Samples.
    Raises:
        DataError: shuffled, empty, not finite (with the sample's number), of unequal lengths, or of an unknown kind.
    """
    if isinstance(data, Samples):
        return data
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a table of pandas
        data = data.to_dict("records")
    if isinstance(data, DataLoader):
        refuse_shuffled(data, argument)
        items = [split(batch, with_targets, argument) for batch in quietly(data)]
    elif type(data) is TensorDataset:
        items = [split(data.tensors, with_targets, argument)]
    elif is_stream(data):
        items = [split(batch, with_targets, argument) for batch in rows_in_batches(data, argument)]
    elif isinstance(data, Tensor | np.ndarray):
        items = [(as_tensor(data, argument), None, None)]
    elif isinstance(data, Mapping):
        if data and all(is_dataset(x) or is_stream(x) or isinstance(x, DataLoader) for x in data.values()):
            got, todo = f"{type(data).__name__} of {sorted(map(str, data))}", "Pass one of them."
            raise DataError(complaint(argument, "one data set", got, todo))
        items = [split(data, with_targets, argument)]
    elif _named(data) is not data:
        items = [split(data, with_targets, argument)]
    elif isinstance(data, tuple) and (with_targets is False or len(data) == 2) and _is_arrays(data):
        items = [split(data, with_targets, argument)]
    elif isinstance(data, list) and data and _is_row(data[0]):
        items = [split(batch, with_targets, argument) for batch in rows_in_batches(data, argument)]
    elif isinstance(data, list) and data and not np.isscalar(data[0]):
        items = [split(batch, with_targets, argument) for batch in data]
    elif is_dataset(data):
        items = [
            split(gather(data, range(begin, min(begin + GATHERED, len(data))), argument), with_targets, argument)
            for begin in range(0, len(data), GATHERED)
        ]
    else:
        refuse_text(data, argument, "samples")
        raise DataError(
            complaint(
                argument,
                "a Dataset, an unshuffled DataLoader, (inputs, targets) or a list of batches",
                "an empty list" if isinstance(data, list) and not data else type(data).__name__,
                "Wrap the data in torch.utils.data.TensorDataset(inputs, targets).",
            )
        )
    chunks = [inputs for inputs, _, _ in items]
    ids = join_ids([i for _, _, i in items], argument)
    check_stream(data, ids, argument)
    samples = Samples(chunks, join_targets([t for _, t, _ in items], argument), ids, argument)
    if with_targets and samples.targets is None:
        raise DataError(complaint(argument, "samples with targets", "inputs only", "Pass (inputs, targets)."))
    offset = 0
    for chunk in chunks:
        numbers = range(offset, offset + batch_length(chunk))
        check_inputs(chunk, numbers, argument)
        offset = numbers.stop
    check_targets(samples.targets, argument)
    return samples


def is_dataset(data: Any) -> bool:
    """Whether rows can be had by number."""
    plain = isinstance(data, str | bytes | list | tuple | Mapping | Tensor | np.ndarray)
    return not plain and not is_stream(data) and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def is_stream(data: Any) -> bool:
    """Whether rows come in their order only: an IterableDataset of PyTorch or of Hugging Face."""
    return isinstance(data, IterableDataset) or type(data).__name__ == "IterableDataset" and hasattr(data, "__iter__")


def batch_length(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        if batch.ndim == 0:
            raise DataError(
                complaint("batch", "tensors with a sample dimension", "a scalar", "Add a leading dimension.")
            )
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    lengths = {batch_length(part) for part in parts if isinstance(part, Tensor | Mapping | tuple | list)}
    if len(lengths) != 1:
        raise DataError(
            complaint(
                "batch", "inputs of one length", f"lengths {sorted(lengths)}", "Every input needs a row per sample."
            )
        )
    return lengths.pop()


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on a device, its floating-point tensors in ``dtype``; never an inference tensor."""

    def move(x: Tensor) -> Tensor:
        x = x.clone() if x.is_inference() else x
        return x.to(device, dtype) if dtype is not None and x.is_floating_point() else x.to(device)

    if isinstance(batch, Known):
        return Known(map_batch(move, batch.inputs), batch.known.to(device))
    return map_batch(move, batch)


def map_batch(function, batch: Any) -> Any:
    if isinstance(batch, Tensor | np.ndarray):
        return function(batch)
    if isinstance(batch, Mapping):
        return Fields((key, map_batch(function, value)) for key, value in batch.items())
    if isinstance(batch, Known):
        return Known(*(map_batch(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return tuple(map_batch(function, value) for value in batch)
    return batch


def _is_arrays(data: Iterable[Any]) -> bool:
    return all(isinstance(x, Tensor | np.ndarray | Mapping) or _is_nested(x) for x in data)


def _is_row(x: Any) -> bool:
    """Whether an entry of a list is one sample: its target (or its id) is a single number or text."""
    x = _named(x)
    if isinstance(x, Mapping):
        values = [value for key, value in x.items() if key in _TARGET_KEYS or key in _ID_KEYS]
    else:
        values = x[-1:] if isinstance(x, tuple) and len(x) > 1 else ()
    return any(np.isscalar(value) or isinstance(value, Tensor | np.ndarray) and value.ndim == 0 for value in values)


def _is_nested(x: Any) -> bool:
    """Whether lists are an array, or would be if their text or None were numbers."""
    if not isinstance(x, Sequence) or isinstance(x, str | bytes) or len(x) == 0:
        return False
    return is_text(x) or any(value is None for value in x) or np.asarray(x).dtype.kind in "fiub"


def gather(data: Any, numbers: Sequence[int], argument: str) -> Any:
    """Rows of a data set as one batch; sequences of several lengths are padded to the longest of them."""
    if hasattr(data, "column_names") and hasattr(data, "features"):  # a Hugging Face Dataset
        part = slice(numbers.start, numbers.stop) if isinstance(numbers, range) else list(numbers)
        return _columns(data[part], argument)
    return _one_batch([data[i] for i in numbers], argument)


def rows_in_batches(rows: Iterable[Any], argument: str, size: int = GATHERED) -> Iterator[Any]:
    """Rows as they come, ``size`` of them a batch."""
    rows = iter(rows)
    while some := list(islice(rows, size)):
        yield _one_batch(some, argument)


def _one_batch(rows: list[Any], argument: str) -> Any:
    rows = [_named(row) for row in rows]
    if isinstance(rows[0], Mapping):
        return _columns({key: [row[key] for row in rows] for key in rows[0]}, argument)
    try:
        return collate(rows)
    except (RuntimeError, ValueError) as error:
        got, todo = f"{type(error).__name__}: {error}", "Pass a DataLoader with a collate_fn that pads."
        raise DataError(complaint(argument, "rows of one shape", got, todo)) from error


def _columns(columns: Mapping[str, Any], argument: str) -> dict[str, Any]:
    """Columns as arrays; text is left out unless it names the rows."""
    found: dict[str, Any] = {}
    mask = None
    for key, values in columns.items():
        if isinstance(values, Tensor | np.ndarray) and values.dtype != object:
            found[key] = values
            continue
        values = list(values)
        if any(value is None for value in values):
            bad = next(i for i, value in enumerate(values) if value is None)
            got, todo = f"none at row {bad} of 256 in column {key!r}", "Remove or repair that sample."
            raise DataError(complaint(argument, "a value in every column", got, todo))
        if isinstance(values[0], str):
            if key in _ID_KEYS:
                found[key] = np.asarray(values)
            continue
        if isinstance(values[0], Mapping) or hasattr(values[0], "convert"):  # nested records, pictures
            got, todo = f"{type(values[0]).__name__} in column {key!r}", "Turn it into arrays with .map()."
            raise DataError(complaint(argument, "numbers", got, todo))
        rows = [as_tensor(value, argument) for value in values]
        if len({row.shape for row in rows}) == 1:
            found[key] = torch.stack(rows)
            continue
        if "input_ids" not in columns or len({row.ndim for row in rows}) > 1 or rows[0].ndim != 1:
            got = f"shapes {sorted({tuple(row.shape) for row in rows})[:4]} in column {key!r}"
            todo = "Pass a DataLoader with a collate_fn that pads."
            raise DataError(complaint(argument, "rows of one shape", got, todo))
        found[key] = pad_sequence(rows, batch_first=True, padding_value=-100 if key in _TARGET_KEYS else 0)
        if key == "input_ids":
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    if mask is not None:
        found.setdefault("attention_mask", mask)
    return found


def _named(batch: Any) -> Any:
    """A dataclass or a named tuple as its fields by name; anything else as it is."""
    if is_dataclass(batch) and not isinstance(batch, type | Mapping) and not hasattr(batch, "__getitem__"):
        return Fields((field.name, getattr(batch, field.name)) for field in fields(batch))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return Fields(zip(batch._fields, batch, strict=True))
    return batch


def split(batch: Any, with_targets: bool | None, argument: str) -> tuple[Any, Tensor | None, Any]:
    """(inputs, targets, ids) of one batch."""
    ids = target = None
    batch = _named(batch)
    if isinstance(batch, Mapping):
        given = {key: value for key, value in batch.items() if value is not None}
        batch = dict(given)
        for key in _ID_KEYS:
            if key in batch:
                ids = batch.pop(key)
                break
        if with_targets is not False:
            found = [key for key in _TARGET_KEYS if key in batch]
            if found:
                target = batch.pop(found[0])
                if np.ndim(target) == 2 and np.shape(target) == np.shape(batch.get("input_ids")):
                    batch["labels"] = target  # of every token: the outputs of a language model need them
        inputs: Any = {key: value for key, value in batch.items() if not is_text(value)}
        if not inputs:
            got, todo = f"only {', '.join(map(repr, given)) or 'nothing'}", "Encode text as numbers first."
            if not batch:
                todo = "Names and targets of samples are no inputs: call these otherwise."
            raise DataError(complaint(argument, "inputs", got, todo))
    elif isinstance(batch, tuple | list) and with_targets is not False and len(batch) >= 2:
        *inputs, target = batch
        inputs = inputs[0] if len(inputs) == 1 else tuple(inputs)
    elif isinstance(batch, tuple | list) and len(batch) == 1:
        inputs = batch[0]
    else:
        inputs = batch
    refuse_text(inputs, argument, "inputs")
    if isinstance(inputs, list):
        inputs = as_array(inputs, argument)
    elif type(inputs) is tuple:
        inputs = tuple(as_array(part, argument) if isinstance(part, list) else part for part in inputs)
    inputs = map_batch(lambda x: as_tensor(x, argument), inputs)
    count = batch_length(inputs)
    target = None if target is None else as_tensor(target, argument, "targets")
    if target is not None and target.ndim == 0:
        raise DataError(complaint(argument, "one target per sample", "a scalar", "Pass a batch of targets."))
    if target is not None and len(target) != count:
        todo = (
            "Align them; of single samples, which are no batches, pass the Dataset, or a DataLoader with a batch_size."
        )
        raise DataError(complaint(argument, f"as many targets as inputs ({count})", len(target), todo))
    return inputs, target, ids


def join_targets(parts: list[Tensor | None], argument: str) -> Tensor | None:
    found = [part.cpu() for part in parts if part is not None]
    if len(found) < len(parts) or not found:
        return None
    odd = next((x for x in found if x.shape[1:] != found[0].shape[1:]), None)
    if odd is not None:
        got, todo = f"{list(found[0].shape[1:])} and {list(odd.shape[1:])}", "Pad them, or batch single samples."
        raise DataError(complaint(argument, "targets of one shape", got, todo))
    return torch.cat(found)


def join_ids(parts: list[Any], argument: str) -> np.ndarray | None:
    given = [part.cpu().numpy() if isinstance(part, Tensor) else part for part in parts if part is not None]
    if len(given) < len(parts) or not given:
        return None
    ids = np.concatenate(
        [as_array(x.tolist() if isinstance(x, np.ndarray) and x.dtype == object else x, argument) for x in given]
    )
    if ids.ndim != 1 or ids.dtype.kind not in "biufUSM":
        got = f"shape {list(ids.shape)}" if ids.ndim != 1 else type(ids[0]).__name__
        raise DataError(complaint(argument, "one number or text as the id of each sample", got, "Turn them into text."))
    return ids


def check_inputs(chunk: Any, numbers: Sequence[int], argument: str) -> None:
    """DataError where an input of a batch of samples with these numbers is not finite."""
    map_batch(lambda x: check_rows(x, numbers, "input", argument), chunk)


def check_targets(targets: Tensor | None, argument: str) -> None:
    """DataError where a target is not finite."""
    if targets is not None:
        check_rows(targets, range(len(targets)), "target", argument)
