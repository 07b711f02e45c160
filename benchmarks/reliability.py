"""Kills at random instants and flipped bytes against the store: `python -m benchmarks.reliability [kills] [flips]`.

A writer (a fork, which starts in milliseconds) appends shards whose content follows from their number. It is killed
with SIGKILL after a random time and started again on the same folder, until it ends; then a new folder. After every
kill the store must open and hold a prefix of the right shards; at the end every file must have the bytes of a run that
nobody disturbed. Then single bits are flipped in finished stores: each must be refused with StoreError.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from sui_fast import StoreError
from sui_fast.spectra import Store

PRINT = {"weights": "abc", "seed": 0}
SHARDS, ROWS, COLUMNS = 24, 64, 48


def shard(number: int) -> dict[str, torch.Tensor]:
    """What shard ``number`` holds."""
    rng = torch.Generator().manual_seed(number)
    features = torch.randn(ROWS, COLUMNS, generator=rng)
    return {"features": features, "residual": features[:, :1].double()}


def write(path: Path, content: list[dict[str, torch.Tensor]]) -> None:
    """Append what the store lacks."""
    with Store(path, PRINT) as store:
        for tensors in content[len(store) :]:
            store.append(tensors)


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store but its lock."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "lock"}


def start(path: Path, content: list[dict[str, torch.Tensor]]) -> int:
    """Write in a process of its own."""
    process = os.fork()
    if not process:
        status = 1
        try:
            write(path, content)
            status = 0
        finally:
            os._exit(status)
    return process


def ended(process: int) -> bool:
    """Wait for a writer; whether it ended by itself."""
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the writer failed on what a kill had left"
    return os.WIFEXITED(status)


def killed(path: Path, content: list[dict[str, torch.Tensor]], after: float) -> bool:
    """Write in a process of its own, killed after some seconds; whether it was still at work then."""
    process = start(path, content)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)  # one that has ended waits for us: its number is still its own
    return not ended(process)


def kill(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """``kills`` kills at random instants; counts of what they left.

    Raises:
        AssertionError: a store that a kill had damaged, or that ended with other bytes.
    """
    rng = random.Random(seed)
    content = [shard(number) for number in range(SHARDS)]
    begin = time.perf_counter()
    assert ended(start(folder / "whole", content))
    seconds = time.perf_counter() - begin
    whole = files(folder / "whole")
    found = dict(kills=0, stores=0, part_files=0, beyond_manifest=0, no_manifest=0)
    while found["kills"] < kills:
        path = folder / f"store-{found['stores']}"
        while found["kills"] < kills and killed(path, content, rng.uniform(0, 0.6 * seconds)):
            found["kills"] += 1
            left = set(os.listdir(path)) if path.exists() else set()
            found["no_manifest"] += "manifest.json" not in left
            found["part_files"] += any(name.endswith(".part") for name in left)
            with Store(path, PRINT, write=False) as store:
                found["beyond_manifest"] += sum(name.startswith("shard") for name in left) > len(store)
                for number, held in enumerate(store):
                    for name, x in content[number].items():
                        assert torch.equal(held[name], x), (path, number, name)
        write(path, content)
        assert files(path) == whole, path
        found["stores"] += 1
    return found


def flip(folder: Path, flips: int, seed: int = 0) -> dict[str, int]:
    """``flips`` single bits flipped in a store, each put back; how many reading refused by name."""
    rng = random.Random(seed)
    path = folder / "flipped"
    write(path, [shard(number) for number in range(4)])
    names, refused = sorted(files(path)), 0
    for _ in range(flips):
        file = path / rng.choice(names)
        data = file.read_bytes()
        place = rng.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        try:
            with Store(path, PRINT, write=False) as store:
                for _ in store:
                    pass
        except StoreError:
            refused += 1
        file.write_bytes(data)
    return dict(flips=flips, refused=refused)


def main() -> None:
    """Print one line of figures each."""
    kills, flips = (int(x) for x in (*sys.argv[1:3], *("200", "1000")[len(sys.argv[1:3]) :]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = kill(Path(folder), kills)
        left = f"{found['part_files']} half-written files, {found['beyond_manifest']} shards beyond the manifest"
        print(
            f"{found['kills']} kills in {found['stores']} stores: every store opened and ended with the same bytes; "
            f"left behind: {left}, {found['no_manifest']} folders without manifest"
        )
        found = flip(Path(folder), flips)
        print(f"{found['refused']} of {found['flips']} flipped bits refused with StoreError")
        if found["refused"] < found["flips"]:
            sys.exit(1)


if __name__ == "__main__":
    main()
