"""A million samples on one machine, and fifty thousand through a real model.

    python benchmarks/large.py features --samples 1000000 --rank 512 --store large_store
    python benchmarks/large.py model --samples 50000 --store large_store_model

Both show progress and may be killed at any instant: the same command goes on where the store ends. The first draws
features with a known spectrum, so that the store, the moments and pass 2 alone are measured; it prints pass 2 as a
multiple of one float64 matrix product of the same shape, taken portion by portion in the same run.
"""

from __future__ import annotations

import argparse
import resource
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import sui_fast
from sui_fast import Scores
from sui_fast.loo import make_filter, shard_blocks
from sui_fast.spectra import Moments, Store, feature_spectrum
from sui_fast.streaming import _PORTION, LowRank, run_fingerprint

SHARD = 8192


def features(samples: int, rank: int, folder: Path) -> None:
    scale = torch.logspace(0, -2, rank)
    store = Store(folder, dict(samples=samples, rank=rank))
    bar = tqdm(total=samples, initial=store.rows, desc="store", unit="sample")
    while store.rows < samples:
        count = min(SHARD, samples - store.rows)
        rng = torch.Generator().manual_seed(store.rows)
        z = torch.randn(count, 1, rank, generator=rng) * scale
        store.append({"features": z, "residual": torch.randn(count, 1, generator=rng, dtype=torch.float64)})
        bar.update(count)
    bar.close()
    sums = Moments(rank)
    for shard in tqdm(store, total=len(store), desc="moments"):
        sums.add(shard["features"], shard["residual"])
    spectrum = feature_spectrum(sums)
    known = scale.double().square().sort().values * samples
    print(f"spectrum: largest relative deviation {float((spectrum.s / known - 1).abs().max()):.3f}")
    solver = LowRank(store, spectrum, 1, moment=spectrum.moment(sums), convention="sum", groups=None, device="cpu")
    turn = torch.randn(rank, rank, dtype=torch.float64)
    rate = 0.5 * samples / float(spectrum.s[-1])
    for name, phi in {
        "converged": make_filter(samples, reg=1e-3),
        "2000 steps": make_filter(samples, reg=1e-3, time=2000, lr=rate),
    }.items():
        floor, own, total, begin = 0.0, 0.0, 0.0, time.perf_counter()
        for shard in tqdm(solver.shards(), total=-(-samples * rank // _PORTION), desc=f"pass 2, {name}"):
            start = time.process_time()
            removal = solver.removal(shard, phi)
            total += float(removal.weight_sqnorm.sum()) + float(removal.prediction_sqnorm.sum())
            del removal
            middle = time.process_time()
            wide = shard["features"][:, 0].double()
            again = time.process_time()
            wide @ turn
            own, floor = own + middle - start, floor + time.process_time() - again
        speed = samples / (time.perf_counter() - begin)
        print(f"pass 2, {name}: {own:.1f} s, {own / floor:.2f} x one float64 product; sum of scores {total:.6g}")
        print(f"{speed:,.0f} samples/s with reading and with the product")
    bookkeeping(store, samples)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def _seconds(job) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def bookkeeping(store: Store, samples: int) -> None:
    """Samples a second of what is not arithmetic: fingerprint of the ids, manifest, blocks, table, file of scores."""
    ids, values = np.arange(samples), {name: np.zeros(samples) for name in ("si", "fsi")}
    held = SimpleNamespace(ids=ids, n=samples, digest=str)
    units, results = dict.fromkeys(values, "nats"), store.path / "scores.parquet"
    portions = max(1, samples * store.read(0)["features"][0].numel() // _PORTION)
    jobs = {
        "fingerprint of ids": lambda: run_fingerprint(nn.Linear(1, 1), held, {}, "1"),
        "manifest read and checked": lambda: Store(store.path, store.fingerprint, write=False),
        "blocks of portions": lambda: [shard_blocks(samples // portions, samples, 1) for _ in range(portions)],
        "table and file": lambda: Scores(ids, values, settings={}, diagnostics={}, units=units).save(results),
    }
    total = 0.0
    for name, job in jobs.items():
        took = min(_seconds(job) for _ in range(2))  # the first also loads libraries
        total += took
        print(f"bookkeeping, {name}: {samples / took:,.0f} samples/s")
    results.unlink()
    took = min(_seconds(lambda: store.read(0)) for _ in range(2))
    count, size = store.shards[0]["rows"], store.shards[0]["bytes"]
    print(f"bookkeeping, all of these: {samples / total:,.0f} samples/s")
    print(f"a shard read and checked: {size / took / 1e9:.2f} GB/s, {count / took:,.0f} samples/s")
    data = (store.path / store.shards[0]["name"]).read_bytes()
    took = min(_seconds(lambda: zlib.crc32(data)) for _ in range(3))
    print(f"checksum alone (CRC-32): {size / took / 1e9:.2f} GB/s, {count / took:,.0f} samples/s")


def model(samples: int, rank: int, folder: Path) -> None:
    """Digits, resampled with shifts and noise, through a small CNN."""
    data, rng = load_digits(), torch.Generator().manual_seed(0)
    images = torch.tensor(data.data / 16).float().view(-1, 1, 8, 8)
    pick = torch.randint(0, len(images), (samples,), generator=rng)
    shifts = torch.randint(-1, 2, (samples, 2), generator=rng)
    moved = zip(pick.tolist(), shifts.tolist(), strict=True)
    x = torch.stack([torch.roll(images[i], tuple(shift), (1, 2)) for i, shift in moved])
    x = x + 0.1 * torch.randn(x.shape, generator=rng)
    y = (torch.tensor(data.target)[pick] < 5).long()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 1),
    )  # fmt: skip
    start = time.process_time()
    for part, target in zip(x.split(64), y.split(64), strict=True):
        net.zero_grad()
        ((net(part)[:, 0] - target) ** 2).mean().backward()
    epoch = time.process_time() - start
    start = time.process_time()
    scores = sui_fast.score(
        net, (x, y), (x[:1000], y[:1000]), method="sketch", rank=rank, reg=0.01, store=folder, batch_size=64
    )
    took = time.process_time() - start
    print(scores)
    print({name: round(value, 1) for name, value in scores.diagnostics["seconds"].items()})
    print(f"{took:.1f} s, {took / epoch:.2f} x one epoch (forward + backward, batches of 64: {epoch:.1f} s)")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["features", "model"])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--store", type=Path, default=Path("large_store"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"features": features, "model": model}[arguments.what](arguments.samples, arguments.rank, arguments.store)
