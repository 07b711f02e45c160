"""Data sets that are read on demand: the same scores, few samples in memory at a time, changes noticed."""

import gc
import os
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import sui_fast

pytestmark = pytest.mark.filterwarnings("ignore:sui_fast")
N = 1500
COMMON = dict(method="sketch", rank=48, reg=0.05, progress=False)


def network(k=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, k)).double()


def arrays(n=N, k=1):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (torch.arange(n) % k if k > 1 else (x[:, 0] > 0).long())


class Counted(Dataset):
    """Rows made when they are asked for; how many live at once, and how often rows were asked for."""

    def __init__(self, x, y):
        self.x, self.y, self.asked, self.most = x, y, 0, 0
        self.alive = set()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if not 0 <= i < len(self.x):
            raise IndexError(i)
        self.asked += 1
        row = self.x[i].clone()
        self.alive.add(self.asked)
        weakref.finalize(row, self.alive.discard, self.asked)
        self.most = max(self.most, len(self.alive))
        return row, self.y[i]


class Stream(IterableDataset):
    def __init__(self, x, y, length=True):
        self.x, self.y, self.passes = x, y, 0
        if length:
            self.__class__ = type("Sized", (Stream,), {"__len__": lambda self: len(self.x)})

    def __iter__(self):
        self.passes += 1
        yield from zip(self.x, self.y, strict=True)


def kinds(x, y):
    def join(rows):
        return torch.stack([row[0] for row in rows]), torch.stack([torch.as_tensor(row[1]) for row in rows])

    yield "dataset", Counted(x, y)
    yield "tensors", TensorDataset(x, y)
    yield "subset", Subset(Counted(torch.cat([x, x]), torch.cat([y, y])), range(len(x)))
    yield "loader", DataLoader(TensorDataset(x, y), batch_size=50)
    yield "collate", DataLoader(Counted(x, y), batch_size=37, collate_fn=join)
    yield "workers", DataLoader(TensorDataset(x, y), batch_size=256, num_workers=1)
    yield "stream", Stream(x, y)
    yield "stream of unknown length", Stream(x, y, False)
    yield "loader of a stream", DataLoader(Stream(x, y), batch_size=100)


@pytest.mark.parametrize("k", [1, 3])
def test_scores_are_those_of_the_data_in_memory(tmp_path, k):
    (x, y), model = arrays(700, k), network(k)
    loss = "mse" if k == 1 else "cross_entropy"
    about = dict(COMMON, loss=loss, measures=("si", "fsi"))
    want = sui_fast.score(model, (x, y), (x[:90], y[:90]), candidates=(x[:40] + 1, y[:40]), **about)
    for name, data in kinds(x, y):
        before = torch.random.get_rng_state()
        for store in (None, tmp_path / name):
            val, new = TensorDataset(x[:90], y[:90]), DataLoader(TensorDataset(x[:40] + 1, y[:40]), batch_size=7)
            found = sui_fast.score(model, data, val, candidates=new, store=store, **about)
            for measure in ("si", "fsi"):
                for a, b in ((found, want), (found.candidates, want.candidates)):  # features are float32
                    close = dict(rtol=1e-4, atol=1e-5 * b[measure].mean(), err_msg=name)
                    np.testing.assert_allclose(a[measure], b[measure], **close)
            assert np.array_equal(found.labels, y.numpy()) and len(found.inputs) == len(x)
        assert torch.equal(before, torch.random.get_rng_state()), name


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
def test_few_samples_live_at_once(tmp_path, method):
    data = Counted(*arrays())
    about = dict(COMMON, method=method, rank=16, measures=("si",))
    sui_fast.score(network(), data, store=tmp_path, **about)
    assert data.most <= 520 < len(data)
    if method == "sketch":  # once for the targets, once for the features, a few for the map and the error
        assert data.asked <= 2 * N + 256 + 64 + 256 * 4 + 10 * N // 256 + N  # and once for the report
    loader = DataLoader(Counted(*arrays()), batch_size=32)
    sui_fast.score(network(), loader, store=tmp_path / "loader", **about)
    gc.collect()
    assert loader.dataset.most <= 260 + 2 * 32


def test_interrupted_and_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sui_fast.streaming, "_SHARD", 1 << 12)
    data, val, model = Counted(*arrays()), TensorDataset(arrays()[0][:64]), network()
    whole = sui_fast.score(model, data, val, store=tmp_path / "whole", **COMMON)
    stop = iter(range(5))
    once = sui_fast.spectra.Store.append

    def append(self, tensors):
        once(self, tensors)
        if next(stop, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sui_fast.spectra.Store, "append", append)
    with pytest.raises(KeyboardInterrupt):
        sui_fast.score(model, data, val, store=tmp_path / "again", **COMMON)
    monkeypatch.setattr(sui_fast.spectra.Store, "append", once)
    data.asked = 0
    again = sui_fast.score(model, data, val, store=tmp_path / "again", **COMMON)
    assert np.array_equal(again["si"], whole["si"]) and np.array_equal(again["fsi"], whole["fsi"])
    for number in (1, 2, 3):
        loader = DataLoader(data, batch_size=41)
        assert sui_fast.score(model, loader, val, store=tmp_path / "parts", part=(number, 3), **COMMON) is None
    merged = sui_fast.merge(model, data, val, store=tmp_path / "parts", reg=0.05)
    np.testing.assert_allclose(merged["fsi"], whole["fsi"], rtol=1e-6)


class Unsteady(Counted):
    def __init__(self, x, y, kind):
        super().__init__(x, y)
        self.kind = kind

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        late = self.asked > len(self) + 300
        if self.kind == "augmented":
            x = x + torch.rand(6, dtype=torch.float64)
        elif self.kind == "relabelled" and late and i == 700:
            y = 1 - y
        elif self.kind == "broken" and late and i == 700:
            x = x * torch.nan
        return x, y


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: DataLoader(x, batch_size=64)], ids=["dataset", "loader"])
@pytest.mark.parametrize(
    "kind, message",
    [
        ("augmented", "same whenever they are read, got other samples at the second reading"),
        ("relabelled", "got other targets than at first among samples"),
        ("broken", "NaN or infinity in the input of sample 700"),
    ],
)
def test_data_that_change_are_refused(tmp_path, kind, message, wrap):
    with pytest.raises(sui_fast.DataError, match=message):
        sui_fast.score(network(), wrap(Unsteady(*arrays(), kind)), store=tmp_path, measures=("si",), **COMMON)


@pytest.mark.parametrize("number", [3, 900])
@pytest.mark.parametrize("what", ["input", "target"])
def test_what_is_no_number_is_named_with_its_sample(tmp_path, number, what):
    x, y = arrays()
    y = y.double()
    (x[number] if what == "input" else y[number : number + 1]).fill_(torch.nan)
    for data in (Counted(x, y), DataLoader(TensorDataset(x, y), batch_size=50), Stream(x, y)):
        with pytest.raises(sui_fast.DataError, match=f"{what} of sample {number}"):
            sui_fast.score(network(), data, measures=("si",), store=tmp_path, **COMMON)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("size, message", [(None, r"as many targets as inputs \(6\)"), (1, "targets of one shape")])
def test_rows_and_batches_that_were_taken_for_each_other(tmp_path, size, message, stored):
    x, y = arrays(50)
    y = y[:, None].double()
    rows = TensorDataset(x, y) if size is None else Stream(x.split(7), y.split(7), length=False)
    with pytest.raises(sui_fast.DataError, match=message):
        data = DataLoader(rows, batch_size=size)
        sui_fast.score(network(), data, measures=("si",), store=tmp_path if stored else None, **COMMON)


def test_a_stream_that_runs_dry_is_refused(tmp_path):
    class Once(Stream):
        def __iter__(self):
            self.passes += 1
            count = len(self.x) if self.passes <= self.good else 40 * (self.good > 1)
            yield from zip(self.x[:count], self.y[:count], strict=True)

    for good, message in ((1, "nothing at the second reading"), (2, "an end at sample 40")):
        data = Once(*arrays(200), length=False)
        data.good = good
        with pytest.raises(sui_fast.DataError, match=message):
            sui_fast.score(network(), data, store=tmp_path / str(good), measures=("si",), **COMMON)
    empty = Stream(*(x[:0] for x in arrays()))
    with pytest.raises(sui_fast.DataError, match="at least one sample"):
        sui_fast.score(network(), empty, store=tmp_path / "empty", measures=("si",), **COMMON)


def test_a_plan_reads_a_few_samples_only(tmp_path):
    data = Counted(*arrays())
    plan = sui_fast.plan(network(), data, data, method="sketch", rank=48, store=tmp_path)
    assert plan.disk_bytes > N * 48 * 4 and data.asked < 700


MEMORY = textwrap.dedent(
    """
    import resource, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    from torch import nn
    torch.set_num_threads(1)
    import sui_fast

    class Made(torch.utils.data.Dataset):
        def __init__(self, n):
            self.n = n
            self.table = torch.randn(64, 3, 16, 16)
        def __len__(self):
            return self.n
        def __getitem__(self, i):
            return self.table[i % 64] + i / self.n, i % 2

    n = int(sys.argv[1])
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 1))
    val = torch.randn(20, 3, 16, 16)
    scores = sui_fast.score(
        model, Made(n), val, method="sketch", rank=16, reg=0.1, store=sys.argv[2], progress=False, batch_size=256
    )
    assert len(scores) == n and scores.inputs is None
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
)


def test_memory_does_not_grow_with_the_data(tmp_path):
    """100,000 pictures of 3 KB would be 307 MB; ids, targets and columns are a few MB."""
    (tmp_path / "script.py").write_text(MEMORY)
    peak = []
    for n in (12_000, 100_000):
        done = subprocess.run(
            [sys.executable, tmp_path / "script.py", str(n), str(tmp_path / str(n))], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        peak.append(int(done.stdout) * 1024)
    assert peak[1] - peak[0] < 60e6, peak


def test_a_store_of_other_inputs_is_refused(tmp_path):
    (x, y), model = arrays(300), network()
    val, moved = x[:200] + 1.0, x.clone()
    moved[77, 3] += 1.0
    run = lambda train, val: sui_fast.score(model, train, val, store=tmp_path / "store", **COMMON)  # noqa: E731
    first = run((x, y), val)
    for train in ((x, y), Counted(x, y), DataLoader(TensorDataset(x, y), batch_size=50)):
        np.testing.assert_array_equal(run(train, val)["fsi"], first["fsi"])
    changed = ("train", (moved, y), val), ("train", Counted(moved, y), val), ("validation", (x, y), val + 1e-9)
    for folder, train, probes in changed:
        with pytest.raises(sui_fast.StoreError, match=f"another in .*{folder}-0000-of-0001: inputs was"):
            run(train, probes)
    again = dict(store=tmp_path / "read", **COMMON)
    sui_fast.score(model, (x, y), Counted(val, y), **again)
    with pytest.raises(sui_fast.StoreError, match="another in .*: inputs was"):
        sui_fast.score(model, (x, y), Counted(val + 1e-9, y), **again)
    with pytest.raises(sui_fast.StoreError, match="another in .*: loss was"):
        sui_fast.score(model, (x, y), val, loss="binary_cross_entropy", store=tmp_path / "store", **COMMON)
