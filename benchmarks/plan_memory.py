"""What plan() promises against what score() takes: peak memory and seconds, every run in a process of its own.

    python -m benchmarks.plan_memory [--samples 10000 100000] [--methods sketch nystrom subspace dense]
                                     [--networks mlp cnn encoder] [--rank 256] [--val 0 1000] [--store no yes]

Peak memory is the highest resident size during the call (VmHWM of Linux, reset before it) minus the resident size just
before: after the imports, with model and data in memory, and after one plan() of a few samples, so that what libraries
load on first use is there in both. Prints one row per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from torch import nn

import sui_fast


class Encoder(nn.Module):
    """Two layers of 32, 16 positions."""

    def __init__(self, outputs: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.body = nn.Linear(4, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, outputs)

    def forward(self, x):
        return self.head(self.body(self.embed(x.reshape(-1, 16, 4))).mean(1))


def network(name: str, k: int) -> nn.Module:
    """A small network on 64 numbers."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, k))
    if name == "cnn":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, k),
        )  # fmt: skip
    return Encoder(k)


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(what))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(method: str, name: str, n: int, rank: int, m: int, stored: bool, k: int) -> None:
    """One run in this process, figures as JSON."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 64, generator=rng), torch.randn(n, k, generator=rng)
    model, val = network(name, k), torch.randn(m, 64, generator=rng) if m else None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(method=method, reg=0.01, measures=("si", "fsi") if m else ("si",))
        options |= dict(rank=rank) if method != "dense" else {}
        options |= dict(store=f"{folder}/store") if stored else {}
        planned = sui_fast.plan(model, (x, y), val, **options)
        reset_peak()
        before, start = resident("VmRSS"), time.process_time()
        sui_fast.score(model, (x, y), val, progress=False, **options)
        took, peak = time.process_time() - start, resident("VmHWM") - before  # one thread: CPU seconds
    print(json.dumps(dict(plan=planned.peak_bytes, peak=peak, plan_seconds=planned.seconds, seconds=took)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--methods", nargs="+", default=["sketch", "nystrom", "subspace", "dense"])
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn", "encoder"])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--outputs", type=int, default=1)
    parser.add_argument("--val", type=int, nargs="+", default=[0, 1000])
    parser.add_argument("--store", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        return measure(*json.loads(a.one))
    print("| method, network, samples, validation, store | plan, MB | measured | ratio | plan, s | measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    for n, method, name, m, store in itertools.product(a.samples, a.methods, a.networks, a.val, a.store):
        if method == "dense" and (n > 10_000 or store == "yes"):
            continue
        one = json.dumps([method, name, n, a.rank, m, store == "yes", a.outputs])
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--one", one]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {method}, {name}, {n}, {m}, {store} | {done.stderr.strip().splitlines()[-1]} |")
            continue
        f = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {method}, {name}, {n}, {m}, {store} | {f['plan'] / 1e6:.0f} | {f['peak'] / 1e6:.0f} "
            f"| {f['peak'] / f['plan']:.2f} | {f['plan_seconds']:.1f} | {f['seconds']:.1f} "
            f"| {f['seconds'] / f['plan_seconds']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
