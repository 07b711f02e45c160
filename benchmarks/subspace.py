"""method="subspace" against the forward and backward products it needs: `python -m benchmarks.subspace`.

The fit takes a vjp, a jvp and a vjp over all samples with the oversampled columns; pass 1 takes one more jvp. Floor:
these products alone, and the capture of the factors once. Interleaved in one process, CPU seconds, minimum of several.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.plan_memory import network
from sui_fast import jacobian
from sui_fast.jacobians.data import as_samples
from sui_fast.losses import Squared
from sui_fast.spectra import subspace_columns
from sui_fast.streaming import Memory, Processes, Source, collect, fit_map


def floor(source: Source, wide: int) -> None:
    parts = [part for _, part in source.parts(256)]
    basis = torch.randn(wide, parts[0].shape[1])
    for part in parts:
        for _ in range(2):
            part.vjp(part.jvp(basis))


def ours(source: Source, goal: Squared, rank: int) -> None:
    fmap = fit_map(source, goal, "subspace", rank, 0, Processes())
    collect(source, fmap, goal, Memory(), False)


def timed(work, *arguments) -> float:
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn", "encoder"])
    parser.add_argument("--repeats", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(a.samples, 64, generator=torch.Generator().manual_seed(0))
    print("| network, samples, rank | products, s | fit and pass 1, s | ratio |\n|---|---|---|---|")
    for name in a.networks:
        model = network(name, 1)
        source = Source(model, as_samples((x, x[:, :1]), with_targets=True, argument="x"), {}, 0, a.samples)
        goal, wide = Squared(x[:, :1].double(), None), subspace_columns(a.rank)
        jacobian(model, x[:64])  # the proof comes once per model

        pairs = [(timed(floor, source, wide), timed(ours, source, goal, a.rank)) for _ in range(a.repeats)]
        least, took = (min(column) for column in zip(*pairs, strict=True))
        print(f"| {name}, {a.samples}, {a.rank} | {least:.2f} | {took:.2f} | {took / least:.2f} |", flush=True)


if __name__ == "__main__":
    main()
