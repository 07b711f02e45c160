"""Pass 1 of a run of low rank in parts started by hand, and their stores read as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from ._errors import ArgumentError, StoreError, complaint
from .jacobians import Samples
from .processes import Processes
from .spectra import Store
from .spectra.store import is_store, read_fingerprint
from .streaming import Memory

ALONE = ("sketch", "nystrom")  # methods whose map every part fits by itself, the same one
_FOLDER = re.compile(r"(train|validation)-(\d{4,})-of-(\d{4,})")


class Part(Processes):
    """One of several processes that never meet: its slice of the samples, and no sums."""

    def __init__(self, number: int, count: int):
        self.number, self.count = number, count

    def objects(self, own: Any) -> list[Any]:
        """What this part has."""
        return [own]

    def one_for_all(self, work: Callable[[], Any]) -> Any:
        """Of this part."""
        return work()

    def predict(self, model: Module, samples: Samples, **options) -> Tensor:
        """Of all samples: the map and the fingerprint hang on them."""
        return Merged(self.count).predict(model, samples, **options)


class Merged(Processes):
    """One process that reads what ``parts`` others have left."""

    def __init__(self, parts: int):
        self.number, self.count, self.parts = 0, 1, parts


class Joined:
    """The stores of all parts, one after the other, read only."""

    def __init__(self, stores: list[Store]):
        self.stores = stores

    @property
    def rows(self) -> int:
        """Rows held."""
        return sum(store.rows for store in self.stores)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (shard for store in self.stores for shard in store)

    def close(self) -> None:
        """Nothing is locked."""


def as_part(part: Any) -> Part:
    """(i, count) or "i/count", counted from 1."""
    try:
        number, count = part.split("/") if isinstance(part, str) else part
        if isinstance(number, float) or isinstance(count, float):
            raise TypeError("fractions")
        number, count = int(number), int(count)
    except (TypeError, ValueError):
        number, count = 0, 0
    if not 1 <= number <= count:
        todo = "Pass (2, 4), or --part 2/4, for the second of four."
        raise ArgumentError(complaint("part", "(number, count) with 1 <= number <= count", repr(part), todo))
    return Part(number - 1, count)


def check_part(part: Any, method: str, store: Any) -> Part | Merged | None:
    """What ``part=`` asks for, where method and store allow it."""
    if part is None:
        return None
    apart = part if isinstance(part, Merged) else as_part(part)
    if method not in ALONE:
        todo = "Choose one of them, or use torchrun, where processes meet."
        raise ArgumentError(complaint("method", f"{' or '.join(map(repr, ALONE))} with part=", repr(method), todo))
    if store is None:
        raise ArgumentError(complaint("store", "a folder with part=", None, "Name the folder that parts share."))
    return apart


def folders_of(path: Any) -> list[tuple[str, int, int, Path]]:
    """(name, number, count, folder) of the stores in a folder, in order; of those with a manifest or shards."""
    folder = Path(path)
    try:
        found = [(_FOLDER.fullmatch(x.name), x) for x in sorted(folder.iterdir())] if folder.is_dir() else []
        return [(match[1], int(match[2]), int(match[3]), x) for match, x in found if match and is_store(x)]
    except OSError as error:
        got, todo = str(error), "Name a folder of its own."
        raise StoreError(complaint("store", f"folders that can be read in {folder}", got, todo)) from error


def check_layout(path: Any, processes: Processes, resume: bool) -> None:
    """Raises StoreError, in every process, where the folder holds stores of another number of processes or parts."""
    if path is None or not resume or isinstance(processes, Merged):
        return
    seen = processes.objects({count for *_, count, _ in folders_of(path)})  # machines may have disks of their own
    others = sorted(set().union(*seen) - {processes.count})
    if others:
        expected = f"a store written by {processes.count} process(es) or parts, as run now"
        got = f"one by {' and '.join(map(str, others))} in {path}"
        again = "in one process" if others[0] == 1 else f"with {others[0]} (torchrun, or part=(i, {others[0]}))"
        todo = f"Run it {again} again, name another folder, or pass resume=False to begin anew."
        raise StoreError(complaint("store", expected, got, todo))


def begin_anew(path: Any, processes: Processes) -> None:
    """Deletes what the folder holds but the stores of other parts of this run, of which each begins by itself.

    Processes do so in turn: machines may have disks of their own, or share one.
    """
    if path is None:
        return
    for turn in range(processes.count):
        if turn == processes.number:
            for _, number, count, folder in folders_of(path):
                if not isinstance(processes, Part) or number == processes.number or count != processes.count:
                    with Store(folder, {}, resume=False) as store:
                        store.remove()
        processes.objects(None)


def settings_of_parts(path: Any) -> tuple[int, dict[str, Any]]:
    """(count, method, rank, seed and kind of sketch) of the parts in a folder, as the first of them tells."""
    folder, found = Path(path), folders_of(path)
    counts = sorted({count for *_, count, _ in found})
    if len(counts) != 1:
        got = f"parts of {' and of '.join(map(str, counts))}" if counts else "none"
        todo = "Start every part with the same count and store, or name another folder."
        raise StoreError(complaint("store", f"the parts of one run in {folder}", got, todo))
    held = next((read_fingerprint(x) for name, *_, x in found if name == "train"), None)
    if held is None:
        raise _missing(folder / f"train-0000-of-{counts[0]:04d}", 0, counts[0])
    try:
        settings = dict(method=held["method"], rank=held["rank_asked"], seed=held["seed"])
        if held["method"] == "sketch":
            settings["sketch"] = held["sketch"]
        return counts[0], settings
    except KeyError as error:
        got, todo = f"no {error} in its fingerprint", "Name a folder that score(..., part=...) filled."
        raise StoreError(complaint("store", f"the parts of a run in {folder}", got, todo)) from None


def open_store(path, fingerprint: dict[str, Any], name: str, processes: Processes, resume: bool) -> Store | Memory:
    """The store of this process, on disk where a path is given."""
    if path is None:
        return Memory()
    folder = Path(path) / f"{name}-{processes.number:04d}-of-{processes.count:04d}"
    return Store(folder, fingerprint, resume=resume)


def open_parts(path, fingerprint: dict[str, Any], name: str, merged: Merged, resume: bool) -> Joined:
    """The stores of all parts, complete and of this run; same arguments as ``open_store``."""
    stores = []
    for number in range(merged.parts):
        folder = Path(path) / f"{name}-{number:04d}-of-{merged.parts:04d}"
        which = f"part {number + 1} of {merged.parts}"
        if not (folder / "manifest.json").exists():
            raise _missing(folder, number, merged.parts)
        try:
            stores.append(Store(folder, fingerprint, write=False))
        except StoreError as error:
            raise StoreError(f"{error} ({which}, {folder})") from error
        first, last = Part(number, merged.parts).slice(fingerprint["samples"])
        if stores[-1].rows != last - first:
            got = f"{stores[-1].rows} of {last - first} samples in {folder}"
            todo = "Start that part again with the arguments it had: it goes on where it stopped."
            raise StoreError(complaint("store", f"{which}, complete", got, todo))
    return Joined(stores)


def _missing(folder: Path, number: int, count: int) -> StoreError:
    todo = f"Start it: the same call with part ({number + 1}, {count}), --part {number + 1}/{count}."
    return StoreError(complaint("store", f"part {number + 1} of {count}", f"no store in {folder}", todo))
