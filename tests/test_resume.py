"""A store whose features the present model, data or loss would not give is refused, whatever the fingerprint knows."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import sui_fast
from sui_fast.spectra import Store
from sui_fast.spectra.store import read_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:sui_fast")
COMMON = dict(method="sketch", rank=32, reg=0.1, progress=False)


class Scaled(nn.Module):
    def __init__(self, scale=1.0, act=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.act = nn.Linear(9, 7), nn.Linear(7, 2), act
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return self.head(self.act(self.first(x) * self.scale))


class Rows(Dataset):
    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return tuple(x[i] for x in self.tensors)


def data(n=150):
    torch.manual_seed(1)
    return torch.randn(n, 9), torch.arange(n) % 2


def frozen():
    model = Scaled()
    model.first.weight.requires_grad_(False)
    return model


def twice(outputs, targets):
    return 2 * cross_entropy(outputs, targets, reduction="none")


CHANGES = {
    "outputs": (dict(outputs=lambda m, x: m(x)), dict(outputs=lambda m, x: m(x).flip(1))),
    "offset": (dict(outputs=lambda m, x: m(x)), dict(outputs=lambda m, x: m(x) + 1)),
    "params": (dict(params=lambda name, p: "first" in name), dict(params=lambda name, p: "head" in name)),
    "code": (dict(), dict(model=Scaled(act=torch.relu))),
    "buffer": (dict(), dict(model=Scaled(2.0))),
    "frozen": (dict(), dict(model=frozen())),
    "loss": (dict(loss=lambda f, y: twice(f, y) / 2), dict(loss=lambda f, y: twice(f, y))),
    "rows": tuple(dict(loss="cross_entropy", output_mode="random", output_rank=r, wide=True) for r in (3, 4)),
}


@pytest.mark.parametrize("method", ["sketch", "subspace"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_weights_and_ids_do_not_tell(tmp_path, change, method):
    def run(model=None, wide=False, **settings):
        model, (x, y) = model or Scaled(), data()
        if wide:
            model, y = nn.Linear(9, 8), torch.arange(150) % 8
            nn.init.orthogonal_(model.weight, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(model.bias)
        about = {**COMMON, "method": method, "measures": ("si",), **settings}
        return sui_fast.score(model, (x, y), store=tmp_path, **about)["si"]

    first, other = CHANGES[change]
    held = run(**first)
    np.testing.assert_array_equal(run(**first), held)
    with pytest.raises(sui_fast.StoreError, match="what this model gives|loss was|parameters was"):
        run(**other)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.other, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, x):
        gate = x[:, :1]
        return self.head(torch.tanh(gate * self.one(x[:, 1:]) + (1 - gate) * self.other(x[:, 1:])))


def test_a_frozen_layer_that_the_first_samples_do_not_reach(tmp_path):
    """Features of the first samples are the same without it."""
    (x, y), model = data(400), Experts()
    x[:, 0] = (torch.arange(400) < 200).float()
    options = dict(COMMON, rank=16, measures=("si",), store=tmp_path)
    sui_fast.score(model, (x, y.float()), **options)
    model.other.weight.requires_grad_(False)
    with pytest.raises(sui_fast.StoreError, match="parameters was .*other.weight"):
        sui_fast.score(model, (x, y.float()), **options)


def test_what_differs_is_in_sight_also_at_the_end_of_a_long_list(tmp_path):
    names = [f"first.{name}" for name in ("weight", "bias")] * 4
    run = lambda params: sui_fast.score(  # noqa: E731
        Scaled(), data(), measures=("si",), store=tmp_path, params=params, **COMMON
    )
    run([*names, "head.weight"])
    with pytest.raises(sui_fast.StoreError, match=r"params was .*first.bias', 'head\.weight.*, is .*head\.bias"):
        run([*names, "head.bias"])
    with pytest.raises(sui_fast.StoreError, match="batch_size was '64', is '32'"):
        run_other = dict(COMMON, batch_size=32)
        sui_fast.score(Scaled(), data(), measures=("si",), store=tmp_path, params=[*names, "head.weight"], **run_other)


def test_one_validation_sample_that_changed(tmp_path):
    (x, y), (vx, vy) = data(), data(300)
    run = lambda vx: sui_fast.score(Scaled(), (x, y), Rows(vx, vy), store=tmp_path, **COMMON)  # noqa: E731
    run(vx)
    vx = vx.clone()
    vx[3] += 1.0
    with pytest.raises(sui_fast.StoreError, match="inputs was"):
        run(vx)


def test_a_store_goes_on_with_the_same_data_in_another_form(tmp_path):
    (x, y), (vx, vy) = data(), data(300)
    one = sui_fast.score(Scaled(), (x, y), (vx, vy), store=tmp_path, **COMMON)
    two = sui_fast.score(Scaled(), Rows(x, y), Rows(vx, vy), store=tmp_path, **COMMON)
    np.testing.assert_array_equal(one["fsi"], two["fsi"])


def forged(folder, change):
    """The store with another content, and a fingerprint and checksums that fit."""
    fingerprint, shards = read_fingerprint(folder), list(Store(folder, read_fingerprint(folder), write=False))
    with Store(folder, fingerprint, resume=False) as store:
        for shard in change(shards):
            store.append(shard)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda shards: shards * 2, "at most 150 samples, got 300"),
        (lambda shards: [{"features": x["features"]} for x in shards], "others: missed"),
        (lambda shards: [{**x, "features": x["features"] * float("nan")} for x in shards], "others: features"),
        (lambda shards: [{**x, "features": x["features"][:, :, 1:]} for x in shards], "others: features"),
    ],
    ids=["rows", "names", "nan", "shape"],
)
def test_forged_content_is_refused(tmp_path, change, message):
    run = lambda: sui_fast.score(Scaled(), data(), measures=("si",), store=tmp_path, **COMMON)  # noqa: E731
    run()
    forged(tmp_path / "train-0000-of-0001", change)
    with pytest.raises(sui_fast.StoreError, match=message):
        run()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(sui_fast.StoreError, match="plain files in"):
        sui_fast.score(Scaled(), data(), measures=("si",), store=tmp_path / "file", **COMMON)
