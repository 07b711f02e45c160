"""A store of tensors on disk, cut into shards: append-only, checked, safe against a kill at any instant.

    folder/
      manifest.json            what the store holds, with its own checksum; replaced whole, never changed in place
      shard-000000.safetensors rows first .. first + count of every tensor
      lock                     held by the one process that writes

A shard is written under a temporary name, flushed, renamed, and only then entered in the manifest. What the manifest
does not name does not exist; what it names must be there, byte for byte. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .._errors import StoreError, complaint

try:
    import fcntl
except ImportError:  # not on Windows: there the lock is advisory in name only
    fcntl = None

_FORMAT = 5
_NAME = re.compile(r"shard-\d{6}\.safetensors")
_PART = re.compile(r"\.(shard-\d{6}\.safetensors|manifest\.json)\.part")
_MOST_MANIFEST = 1 << 28  # bytes; a manifest larger than this is not ours
_KEYS = {"format", "fingerprint", "shards", "checksum"}
_SHARD_KEYS = {"name", "first", "rows", "bytes", "crc32"}


class Store:
    """Tensors by rows, in shards.

    Args:
        path: folder, made if missing.
        fingerprint: what the content depends on (weights, data, settings, code), JSON values; a store with another one
            is refused, and the difference named.
        resume: go on with what is there; False: an existing store is emptied.
        write: take the lock; False: read only.
    Raises:
        StoreError: damaged, of another run, or being written by another process.
    """

    def __init__(
        self, path: str | os.PathLike, fingerprint: dict[str, Any], *, resume: bool = True, write: bool = True
    ):
        self.path, self._lock = Path(path), None
        self.fingerprint = json.loads(json.dumps(fingerprint))
        try:
            if self.path.is_symlink() or self.path.exists() and not self.path.is_dir():
                raise StoreError(complaint("store", "a folder", str(self.path), "Name a folder of its own."))
            self.path.mkdir(parents=True, exist_ok=True)
            if write:
                self._lock = _take_lock(self.path / "lock")
            self._open(resume)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            self.close()
            todo = "Name a folder of its own that can be written."
            raise StoreError(complaint("store", f"plain files in {self.path}", str(error), todo)) from error
        except BaseException:
            self.close()
            raise

    def _open(self, resume: bool) -> None:
        self.shards: list[dict[str, Any]] = []
        manifest = self.path / "manifest.json"
        if not os.path.lexists(manifest):
            stray = [entry.name for entry in self.path.iterdir() if entry.name != "lock" and not _temporary(entry.name)]
            if stray and not all(_NAME.fullmatch(name) for name in stray):
                raise StoreError(
                    complaint("store", "an empty folder or a store", f"{self.path} with {stray[0]!r}", "Name another.")
                )
            if resume:
                if len(stray) > 1:
                    raise _damage(self.path, f"{len(stray)} shards and no manifest")
                if self._lock is not None:
                    self._commit()
                return
        if not resume:
            self._check_writable()
            for entry in self.path.iterdir():
                if _NAME.fullmatch(entry.name) or entry.name == "manifest.json" or _temporary(entry.name):
                    entry.unlink()
            self._commit()
            return
        about = _read_manifest(manifest)
        differs = _difference(about["fingerprint"], self.fingerprint)
        if differs:
            raise StoreError(
                complaint(
                    "store",
                    "a store of this run",
                    f"one of another in {self.path}: {differs}",
                    "Name another folder, or pass resume=False to begin anew.",
                )
            )
        self.shards = about["shards"]
        known = {shard["name"] for shard in self.shards}
        strays = [e for e in self.path.iterdir() if _NAME.fullmatch(e.name) and e.name not in known]
        # one shard beyond the manifest is what a kill between rename and commit leaves; more is an old manifest
        if len(strays) > 1 or any(entry.name != _name(len(self.shards)) for entry in strays):
            raise _damage(self.path, f"shards that its manifest does not name ({strays[0].name} ...): a stale manifest")
        for shard in self.shards:
            found = _inspect(self.path / shard["name"])
            if found != shard["bytes"]:
                raise _damage(self.path, f"{shard['name']} with {found} bytes where {shard['bytes']} were written")
        if self._lock is not None:
            for entry in (*strays, *(e for e in self.path.iterdir() if _temporary(e.name))):
                entry.unlink()

    @property
    def rows(self) -> int:
        """Rows held."""
        return self.shards[-1]["first"] + self.shards[-1]["rows"] if self.shards else 0

    def append(self, tensors: dict[str, Tensor]) -> None:
        """Add one shard: tensors of equal length. On return it is on the disk."""
        self._check_writable()
        rows = {len(x) for x in tensors.values()}
        if len(rows) != 1:
            raise StoreError(complaint("tensors", "one number of rows", sorted(rows), "Append whole samples."))
        data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
        name = _name(len(self.shards))
        self._write(name, data)
        self.shards.append(
            {
                "name": name,
                "first": self.rows,
                "rows": rows.pop(),
                "bytes": len(data),
                "crc32": zlib.crc32(data),
            }
        )
        self._commit()

    def read(self, number: int) -> dict[str, Tensor]:
        """Tensors of one shard, checked against the manifest."""
        shard = self.shards[number]
        data = _read(self.path / shard["name"], shard["bytes"])
        if number + 1 < len(self.shards):
            _fetch(self.path / self.shards[number + 1]["name"])
        if len(data) != shard["bytes"] or zlib.crc32(data) != shard["crc32"]:
            raise _damage(self.path, f"{shard['name']}, whose content is not what was written")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise _damage(self.path, f"{shard['name']} ({error})") from error
        if any(len(x) != shard["rows"] for x in tensors.values()):
            raise _damage(self.path, f"{shard['name']} with other numbers of rows than its manifest tells")
        return tensors

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.read(number) for number in range(len(self.shards)))

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the shards on disk."""
        return sum(shard["bytes"] for shard in self.shards)

    def remove(self) -> None:
        """Delete the store, and its folder where nothing else is in it."""
        self._check_writable()
        for name in ("manifest.json", *(shard["name"] for shard in self.shards), "lock"):
            (self.path / name).unlink(missing_ok=True)
        self.close()
        with suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_writable(self) -> None:
        if self._lock is None:
            raise StoreError(complaint("store", "a store opened to write", "a closed or read-only one", "Open it."))

    def _commit(self) -> None:
        about = {"format": _FORMAT, "fingerprint": self.fingerprint, "shards": self.shards}
        about["checksum"] = _checksum(about)
        self._write("manifest.json", json.dumps(about, indent=0).encode())

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        try:
            with open(os.open(temporary, flags, 0o644), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            got, todo = f"{error} at {name}", "Make room, or name another folder; the same call goes on from here."
            raise StoreError(complaint("store", f"to write {len(data)} bytes to {self.path}", got, todo)) from error
        with suppress(OSError):  # a folder cannot be flushed everywhere
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def _temporary(name: str) -> bool:
    return _PART.fullmatch(name) is not None


def _checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _damage(path: Path, what: str) -> StoreError:
    todo = "Delete the folder (of a part: start that part again), or pass resume=False to begin anew."
    return StoreError(complaint("store", f"an undamaged store in {path}", what, todo))


def _inspect(path: Path) -> int:
    """Size of a plain file; a link or anything else is an error."""
    try:
        found = os.lstat(path)
    except OSError:
        raise _damage(path.parent, f"no {path.name}, which its manifest names") from None
    if not stat.S_ISREG(found.st_mode):
        raise _damage(path.parent, f"{path.name}, which is not a plain file")
    return found.st_size


def _read(path: Path, most: int) -> bytes:
    _inspect(path)
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            return file.read(most + 1)
    except PermissionError as error:
        todo = "Give this user the right to read them, or name another folder."
        raise StoreError(complaint("store", f"files in {path.parent} that can be read", str(error), todo)) from error
    except (OSError, MemoryError) as error:
        raise _damage(path.parent, f"{path.name} ({str(error) or 'larger than memory'})") from error


def _fetch(path: Path) -> None:
    """The system reads a file into its cache meanwhile, where it can."""
    with suppress(OSError, AttributeError):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _read_manifest(path: Path) -> dict[str, Any]:
    if _inspect(path) > _MOST_MANIFEST:
        raise _damage(path.parent, "a manifest of absurd size")
    try:
        about = json.loads(_read(path, _MOST_MANIFEST))
        if not isinstance(about, dict) or set(about) != _KEYS or not isinstance(about["shards"], list):
            raise ValueError("not a manifest")
        checksum = about.pop("checksum")
        if checksum != _checksum(about):
            raise ValueError("its checksum is not that of its content")
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r}; this version reads {_FORMAT}")
        rows = 0
        for number, shard in enumerate(about["shards"]):
            whole = [shard[key] for key in ("first", "rows", "bytes")]
            if set(shard) != _SHARD_KEYS or shard["name"] != _name(number):
                raise ValueError(f"shard {number} under another name")
            if not all(type(x) is int and 0 <= x < 1 << 48 for x in whole) or shard["first"] != rows:
                raise ValueError(f"shard {number} with impossible sizes")
            rows += shard["rows"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damage(path.parent, f"a manifest that cannot be trusted ({error})") from error
    return about


def is_store(path: Path) -> bool:
    """Whether a folder holds a store, or what is left of one."""
    return path.is_dir() and any(x.name == "manifest.json" or _NAME.fullmatch(x.name) for x in path.iterdir())


def read_fingerprint(path: str | os.PathLike) -> dict[str, Any] | None:
    """What the content of the store in a folder depends on; None where there is no store."""
    manifest = Path(path) / "manifest.json"
    return _read_manifest(manifest)["fingerprint"] if os.path.lexists(manifest) else None


def _difference(held: Any, wanted: dict[str, Any]) -> str:
    """First entries that differ, in words."""
    if not isinstance(held, dict):
        return "no fingerprint"
    names = [name for name in sorted(set(held) | set(wanted)) if held.get(name) != wanted.get(name)]
    return "; ".join("{} was {}, is {}".format(x, *_short(held.get(x), wanted.get(x))) for x in names[:4])


def _short(*values: Any) -> list[str]:
    """Values in at most 66 letters each; of long ones what is the same at the beginning is left out."""
    texts = [repr(value) for value in values]
    first = max(0, len(os.path.commonprefix(texts)) - 20) if max(map(len, texts)) > 60 else 0
    cut = [text[first : first + 60] for text in texts]
    return ["..." * (first > 0) + x + "..." * (first + 60 < len(text)) for x, text in zip(cut, texts, strict=True)]


def _take_lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise StoreError(
                complaint(
                    "store",
                    f"one process writing {path.parent}",
                    "another one that holds its lock",
                    "Wait for it to end, or name another folder.",
                )
            ) from None
    return handle


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(x.shape)}|{x.dtype}|".encode())
        digest.update(memoryview(x.reshape(-1).view(torch.uint8).numpy()) if x.numel() else b"")
    return digest.hexdigest()
