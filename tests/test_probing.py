"""Samples captured ahead of pass 1: once each, in their place, and called by their own number when they fail."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sui_fast
from sui_fast.jacobians.data import as_samples
from sui_fast.probing import drawn
from sui_fast.processes import Source
from sui_fast.spectra import sketch_map
from sui_fast.streaming import features_of, fit_map


class Encoder(nn.Module):
    """Two layers over six tokens."""

    def __init__(self, k):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, k)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))


def problem(n, k=1):
    torch.manual_seed(0)
    return Encoder(k).eval(), torch.randint(0, 30, (n, 6)), torch.randn(n, k)


class Goal:
    """As much of a goal as pass 1 asks for."""

    kind, rows, y = "mse", 1, torch.zeros(1)

    def residual(self, part, outputs):
        return outputs.double()


@pytest.mark.parametrize("n", [1, 2, 40, 64, 65, 700])
@pytest.mark.parametrize("rank, k", [(96, 1), (512, 1), (96, 3)])
def test_features_are_those_of_every_sample_in_its_place(n, rank, k):
    model, x, _ = problem(n, k)
    source = Source(model, as_samples(x, with_targets=None), {}, 0, n)
    fmap = fit_map(source, Goal(), "sketch", rank, 0, None)
    plain = [shard for shard in features_of(source, fmap, Goal(), 0, False)]
    source.ahead = drawn(source, fmap, 0, ahead=True, kernel=False).ahead
    assert len(source.ahead.numbers) == min(n, 64) or len(source.ahead.numbers) > 64
    ahead = [shard for shard in features_of(source, fmap, Goal(), 0, False)]
    for one, two in zip(plain, ahead, strict=True):
        assert one.keys() == two.keys()
        for name, x in one.items():
            size = one["features"].flatten(1).norm(dim=1).max() ** 2 if name == "missed" else x.abs().max()
            torch.testing.assert_close(two[name], x, rtol=1e-4, atol=1e-5 * float(size))


def test_a_sample_is_captured_once(monkeypatch):
    """But for a few: the look at the first ones, the proof, the part that tells the number of outputs."""
    model, x, y = problem(700)
    seen = []
    model.embed.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("sui_fast.streaming.pool_size", lambda *arguments: (0, False))
    sui_fast.score(model, (x, y), method="sketch", rank=512, reg=0.1, measures=("si",), progress=False)
    assert 700 <= sum(seen) <= 800


@pytest.mark.parametrize("n", [150, 700])
def test_probes_do_not_depend_on_how_the_data_are_read(n):
    model, x, y = problem(n)
    options = dict(method="sketch", rank=512, reg=0.1, measures=("si",), batch_size=32, progress=False)
    whole = sui_fast.score(model, (x, y), **options)
    loaded = sui_fast.score(model, DataLoader(TensorDataset(x, y), batch_size=25), **options)
    np.testing.assert_allclose(loaded["si"], whole["si"], rtol=2e-3, atol=1e-4 * whole["si"].max())
    assert loaded.diagnostics["error_estimate"] == pytest.approx(whole.diagnostics["error_estimate"], rel=1e-4)


class Exploding(nn.Module):
    """Not finite where inputs are large."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(torch.exp(self.hidden(x)))


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
@pytest.mark.parametrize("bad", [0, 1, 5, 23, 311, 500, 777, 999])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_sample_that_fails_has_its_own_number_wherever_it_is_met(method, bad, loaded):
    torch.manual_seed(0)
    x, y, seed = torch.randn(1000, 5), torch.randn(1000, 1), bad % 7
    model = Exploding()
    x[bad] = 3000.0
    data = DataLoader(TensorDataset(x, y), batch_size=50) if loaded else (x, y)
    with pytest.raises(sui_fast.DataError, match=f"NaN or infinity for sample {bad}\\b"):
        options = dict(method=method, rank=64, reg=0.1, measures=("si",), seed=seed, progress=False)
        sui_fast.score(model, data, **options)


def test_picked_and_sliced_samples_know_their_numbers():
    samples = as_samples(torch.arange(50.0)[:, None], with_targets=None)
    some = samples.slice(10, 40).pick(np.array([3, 5, 29]))
    assert [some.number(i) for i in range(3)] == [13, 15, 39]
    assert some.slice(1, 3).number(1) == 39 and some.slice(1, 3).pick(np.array([1])).number(0) == 39
    assert sketch_map(8).portion is not None  # what is captured ahead is of sketches alone


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
def test_one_sample_is_captured_once_for_its_shapes(method, monkeypatch):
    model, x, y = problem(40)
    seen, part = [], Source.part

    def noted(self, begin, end):
        seen.append((begin, end))
        return part(self, begin, end)

    monkeypatch.setattr(Source, "part", noted)
    sui_fast.score(model, (x, y), (x[:8], y[:8]), method=method, rank=96, reg=0.1)
    assert seen.count((0, 1)) == 2  # of the training and of the validation samples
