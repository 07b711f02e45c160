"""score(method="sketch", rank=1024), one output a sample, against one epoch: plain batched forward + backward passes.

As a script it also tells where the time goes, in epochs:

    python benchmarks/bench_end_to_end.py [encoder encoder-256 cnn cnn-flat digits-cnn digits-mlp] [--validation]
"""

import argparse
import statistics
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from _compare import compare
from conftest import cnn as digits_cnn
from conftest import mlp as digits_mlp
from sklearn.datasets import load_digits
from torch import nn

import sui_fast
from sui_fast import runs


class Encoder(nn.Module):
    """Six layers over 64 tokens, one output."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))


def images(flat):
    tail = [nn.Flatten(), nn.Linear(8192, 1)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.ReLU(), *tail,
    )  # fmt: skip


def tokens(n):
    return torch.randint(0, 1000, (n, 64))


def pictures(n):
    return torch.randn(n, 3, 32, 32)


def digits(n, shape):
    data = load_digits()
    return torch.tensor(data.data / 16).float()[torch.arange(n) % len(data.data)].view(-1, *shape)


CASES = {  # model, inputs, samples, largest ratio asked for; a tiny model pays for r = 1024 itself
    "encoder": (lambda: Encoder(128), tokens, 1024, 1.0),
    "encoder-256": (lambda: Encoder(256), tokens, 512, 1.0),
    "cnn": (lambda: images(False), pictures, 4096, 1.8),
    "cnn-flat": (lambda: images(True), pictures, 4096, 1.8),
    "digits-cnn": (lambda: digits_cnn(1), lambda n: digits(n, (1, 8, 8)), 4000, None),
    "digits-cnn, n = 1797": (lambda: digits_cnn(1), lambda n: digits(n, (1, 8, 8)), 1797, None),
    "digits-mlp": (lambda: digits_mlp(1), lambda n: digits(n, (64,)), 4000, None),
    "digits-mlp, n = 1797": (lambda: digits_mlp(1), lambda n: digits(n, (64,)), 1797, None),
}


def problem(name, validation=0):
    """(score, epoch) of a case, functions of nothing."""
    make, data, n, _ = CASES[name]
    torch.manual_seed(0)
    model, x, y = make().eval(), data(n), torch.randn(n, 1)
    val = data(validation) if validation else None
    about = dict(method="sketch", rank=1024, reg=0.1, batch_size=64, progress=False)

    def score():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the rank: these models are not trained
            return sui_fast.score(model, (x, y), val, measures=("si", "fsi") if validation else ("si",), **about)

    def epoch(training=True):
        model.train(training)  # dropout on, as in training
        for batch, target in zip(x.split(64), y.split(64), strict=True):
            model.zero_grad()
            (model(batch) - target).square().mean().backward()
        model.zero_grad()
        model.eval()

    return score, epoch


@pytest.mark.parametrize("name", ["encoder", "cnn", "digits-cnn", "digits-mlp"])
def test_end_to_end(benchmark, name):
    score, epoch = problem(name)
    _, _, n, target = CASES[name]
    shape = f"{name}, n = {n}, r = 1024, k = 1, batches of 64"
    compare(benchmark, score, epoch, target=target, rounds=3, shape=shape, floor_name="one epoch: forward and backward")


def tell(name, validation, rounds=3):
    """Print the ratio and the CPU seconds of every stage, in epochs."""
    score, epoch = problem(name, validation)
    clock, runs.clock = runs.clock, SimpleNamespace(perf_counter=time.process_time)
    try:
        ratios, stages, epochs, plain = [], [], [], []
        for _ in range(rounds):
            start = time.process_time()
            epoch()
            middle = time.process_time()
            found = score()
            end = time.process_time()
            epochs.append(middle - start)
            ratios.append((end - middle) / epochs[-1])
            epoch(False)
            plain.append((end - middle) / (time.process_time() - end))
            stages.append({stage: took / epochs[-1] for stage, took in found.diagnostics["seconds"].items()})
    finally:
        runs.clock = clock
    n, target = CASES[name][2:]
    asked = "" if target is None else f" (asked: {target})"
    each = f"epoch {min(epochs):.2f} s, {1e6 * min(epochs) / n:.0f} us a sample"
    print(f"{name}: n = {n}, {each}, ratio {statistics.median(ratios):.2f}{asked}")
    parts = {stage: statistics.median(s[stage] for s in stages) for stage in stages[0]}
    if abs(statistics.median(plain) / statistics.median(ratios) - 1) > 0.1:
        print(f"    against an epoch without dropout: {statistics.median(plain):.2f}")
    print("   ", ", ".join(f"{stage} {share:.2f}" for stage, share in parts.items() if share >= 0.005))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), help="cases")
    parser.add_argument("--validation", type=int, default=0, help="validation samples (adds F-SI)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in arguments.names:
        tell(case, arguments.validation)
