"""The store: what it holds survives anything or is refused by name."""

import builtins
import errno
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from benchmarks.reliability import kill
from sui_fast import StoreError
from sui_fast.spectra import Store
from sui_fast.spectra import store as stores

PRINT = {"weights": "abc", "seed": 0}


def fill(path, shards=4, rows=5):
    with Store(path, PRINT) as store:
        for number in range(shards):
            store.append({"features": torch.randn(rows, 3), "residual": torch.full((rows, 1), float(number)).double()})
    return sorted(p.name for p in path.iterdir())


def read(path, **kwargs):
    with Store(path, PRINT, **kwargs) as store:
        return [{name: x.clone() for name, x in shard.items()} for shard in store]


def test_what_was_written_comes_back(tmp_path):
    names = fill(tmp_path / "s")
    assert names == ["lock", "manifest.json", *(f"shard-{i:06d}.safetensors" for i in range(4))]
    shards = read(tmp_path / "s", write=False)
    assert [float(s["residual"][0]) for s in shards] == [0, 1, 2, 3] and shards[0]["features"].shape == (5, 3)
    with Store(tmp_path / "s", PRINT) as store:
        assert store.rows == 20 and len(store) == 4 and store.nbytes > 0
        store.append({"features": torch.zeros(2, 3), "residual": torch.zeros(2, 1).double()})
    assert len(read(tmp_path / "s")) == 5
    with Store(tmp_path / "s", PRINT, resume=False) as store:
        assert store.rows == 0
    assert os.listdir(tmp_path / "s").count("shard-000000.safetensors") == 0


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    fill(tmp_path / "s")
    with pytest.raises(StoreError, match="seed was 0, is 1"):
        Store(tmp_path / "s", {**PRINT, "seed": 1})
    with pytest.raises(StoreError, match="folder"):
        (tmp_path / "file").write_text("x")
        Store(tmp_path / "file", PRINT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="thesis"):
        Store(tmp_path / "other", PRINT)


def test_every_flipped_byte_is_found(tmp_path):
    fill(tmp_path / "s", shards=2)
    files = [p for p in (tmp_path / "s").iterdir() if p.name != "lock"]
    rng = random.Random(0)
    for trial in range(300):
        path = rng.choice(files)
        data = path.read_bytes()
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        with pytest.raises(StoreError):
            read(tmp_path / "s")
            print(trial, path, place)
        path.write_bytes(data)
    read(tmp_path / "s")


def test_truncation_loss_and_exchange_are_found(tmp_path):
    path = tmp_path / "s"
    fill(path)
    one, two = path / "shard-000001.safetensors", path / "shard-000002.safetensors"
    data, other = one.read_bytes(), two.read_bytes()
    for keep in (0, 1, len(data) // 2, len(data) - 1):
        one.write_bytes(data[:keep])
        with pytest.raises(StoreError, match="bytes where"):
            read(path)
    one.unlink()
    with pytest.raises(StoreError, match="no shard-000001"):
        read(path)
    one.write_bytes(other)
    two.write_bytes(data)
    with pytest.raises(StoreError, match="not what was written"):
        read(path)
    one.write_bytes(data)
    two.write_bytes(other)
    read(path)


def test_a_stale_or_missing_manifest_is_found(tmp_path):
    path = tmp_path / "s"
    fill(path, shards=1)
    old = (path / "manifest.json").read_bytes()
    with Store(path, PRINT) as store:
        for _ in range(3):
            store.append({"features": torch.randn(5, 3), "residual": torch.zeros(5, 1).double()})
    (path / "manifest.json").write_bytes(old)
    with pytest.raises(StoreError, match="stale"):
        read(path)
    (path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="no manifest"):
        read(path)


def test_one_shard_beyond_the_manifest_is_what_a_kill_leaves(tmp_path):
    path = tmp_path / "s"
    fill(path, shards=1)
    old = (path / "manifest.json").read_bytes()
    with Store(path, PRINT) as store:
        store.append({"features": torch.randn(5, 3), "residual": torch.zeros(5, 1).double()})
    (path / "manifest.json").write_bytes(old)
    (path / ".shard-000001.safetensors.part").write_bytes(b"half")
    assert len(read(path)) == 1
    assert sorted(os.listdir(path)) == ["lock", "manifest.json", "shard-000000.safetensors"]


def rewrite(path, change):
    from sui_fast.spectra.store import _checksum

    about = json.loads((path / "manifest.json").read_text())
    about.pop("checksum")
    change(about)
    about["checksum"] = _checksum(about)
    (path / "manifest.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["shards"][0].update(name="/etc/passwd"),
        lambda a: a["shards"][0].update(name="../shard-000000.safetensors"),
        lambda a: a["shards"][0].update(name="shard-000000.safetensors/../../x"),
        lambda a: a["shards"][0].update(rows=1 << 60),
        lambda a: a["shards"][0].update(bytes=-1),
        lambda a: a["shards"][0].update(rows=True),
        lambda a: a["shards"][1].update(first=0),
        lambda a: a["shards"].append({}),
        lambda a: a.update(format=99),
        lambda a: a.update(extra=1),
        lambda a: a.update(shards="none"),
    ],
)
def test_hostile_manifests_are_refused(tmp_path, change):
    fill(tmp_path / "s")
    rewrite(tmp_path / "s", change)
    with pytest.raises(StoreError, match="manifest"):
        read(tmp_path / "s")


def test_links_are_refused(tmp_path):
    path = tmp_path / "s"
    fill(path)
    secret = tmp_path / "secret"
    secret.write_bytes((path / "shard-000001.safetensors").read_bytes())
    (path / "shard-000001.safetensors").unlink()
    (path / "shard-000001.safetensors").symlink_to(secret)
    with pytest.raises(StoreError, match="plain file"):
        read(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(StoreError, match="folder"):
        Store(tmp_path / "link", PRINT)


def test_a_huge_header_does_not_ask_for_memory(tmp_path):
    from sui_fast.spectra.store import _read_manifest

    path = tmp_path / "s"
    path.mkdir()
    with open(path / "manifest.json", "wb") as file:
        file.truncate(1 << 33)  # sparse
    with pytest.raises(StoreError, match="absurd"):
        _read_manifest(path / "manifest.json")


def test_two_writers_at_once(tmp_path):
    with Store(tmp_path / "s", PRINT) as held:
        with pytest.raises(StoreError, match="another one that holds its lock"):
            Store(tmp_path / "s", PRINT)
        code = f"from sui_fast.spectra import Store; Store({str(tmp_path / 's')!r}, {PRINT!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "holds its lock" in done.stderr
        assert held.rows == 0
    Store(tmp_path / "s", PRINT).close()
    reader = Store(tmp_path / "s", PRINT, write=False)
    with pytest.raises(StoreError, match="opened to write"):
        reader.append({"x": torch.zeros(1)})


def test_tensors_of_unequal_length_are_refused(tmp_path):
    with Store(tmp_path / "s", PRINT) as store, pytest.raises(StoreError, match="rows"):
        store.append({"a": torch.zeros(2), "b": torch.zeros(3)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_instants_it_ends_with_the_same_bytes(tmp_path):
    found = kill(tmp_path, 20)
    assert found["kills"] == 20 and found["stores"] >= 1
    assert found["part_files"] + found["beyond_manifest"] > 0  # some kills met it in the middle of a write


@pytest.mark.parametrize("name", ["lock", ".shard-000009.safetensors.part"])
def test_links_and_folders_in_the_place_of_files_are_named(tmp_path, name):
    path = tmp_path / "s"
    fill(path)
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    with pytest.raises(StoreError, match="plain files in"):
        read(path)
    (path / name).rmdir()
    (path / "lock").unlink(missing_ok=True)
    (path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="plain files in.*lock"):
        read(path)
    with pytest.raises(StoreError, match="plain files in"):
        Store(path / "manifest.json" / "s", PRINT)


def test_a_full_disk_is_a_store_error_and_the_store_goes_on(tmp_path, monkeypatch):
    shard = {"features": torch.randn(5, 3)}
    with Store(tmp_path / "s", PRINT) as store:
        store.append(shard)
        with monkeypatch.context() as full:
            full.setattr(
                os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
            )
            with pytest.raises(StoreError, match="store: expected to write .* No space left on device.*Make room"):
                store.append(shard)
    assert sorted(x.name for x in (tmp_path / "s").iterdir()) == ["lock", "manifest.json", "shard-000000.safetensors"]
    with Store(tmp_path / "s", PRINT) as store:
        store.append(shard)
    assert len(read(tmp_path / "s")) == 2


def test_a_shard_larger_than_memory_is_damage(tmp_path, monkeypatch):
    fill(tmp_path / "s")

    class Huge:
        def __init__(self, number, mode):
            self.file = builtins.open(number, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, most):
            raise MemoryError

    with Store(tmp_path / "s", PRINT) as store:
        monkeypatch.setattr(stores, "open", Huge, raising=False)
        with pytest.raises(StoreError, match=r"shard-000000.*larger than memory"):
            store.read(0)


def test_files_of_others_stay_and_names_that_no_file_can_have_are_refused(tmp_path):
    fill(tmp_path / "s")
    for name in (".mine.part", ".shard-000009.safetensors.part"):
        (tmp_path / "s" / name).write_text("x")
    read(tmp_path / "s")
    assert (tmp_path / "s" / ".mine.part").exists() and not (tmp_path / "s" / ".shard-000009.safetensors.part").exists()
    for path in (tmp_path / ("n" * 300), f"{tmp_path}/\0x"):
        with pytest.raises(StoreError, match="store"):
            Store(path, PRINT)


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.safetensors"])
def test_files_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch, name):
    """To delete them, as for damage, would lose the work."""
    fill(tmp_path / "s")
    usual = os.open

    def refuse(path, *flags):
        if os.path.basename(path) == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *flags)

    monkeypatch.setattr(stores.os, "open", refuse)
    with pytest.raises(StoreError, match=f"that can be read, got .*{name}.*right to read"):
        read(tmp_path / "s")
