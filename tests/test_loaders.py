"""DataLoaders and ids that would put scores beside the wrong samples."""

import uuid

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, get_worker_info

import sui_fast

X = torch.randn(13, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Rows(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        torch.rand(1)  # as an augmentation would
        return X[i], int(Y[i])


class Stream(IterableDataset):
    def __init__(self, shared=True, named=False):
        self.shared, self.named = shared, named

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None or not self.shared else (worker.id, worker.num_workers)
        for i in range(first, len(X), step):
            yield dict(x=X[i], label=int(Y[i]), id=i) if self.named else (X[i], int(Y[i]))


class Own(Sampler):
    """A sampler that no list of names knows."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        return iter(torch.randperm(len(X)).tolist() if self.draw else range(len(X))[::-1])

    def __len__(self):
        return len(X)


def score(train, **options):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return sui_fast.score(model, train, measures=("si",), reg=0.1, progress=False, **options)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(
    "loader, what",
    [
        (lambda: DataLoader(Rows(), sampler=Own(True)), "a shuffled one"),
        (lambda: DataLoader(Rows(), sampler=DistributedSampler(Rows(), 2, 0)), "one of a DistributedSampler"),
        (lambda: DataLoader(Stream(), num_workers=2), "without ids"),
        (lambda: DataLoader(Stream(shared=False, named=True), num_workers=2), "that repeat ids"),
    ],
)
def test_loaders_without_the_order_of_the_data(loader, what, store, tmp_path):
    options = dict(method="sketch", rank=16, store=tmp_path / "store") if store else {}
    with pytest.raises(sui_fast.DataError, match=what):
        score(loader(), **options)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Rows(), batch_size=4, sampler=Own(False)),
        lambda: DataLoader(Rows(), batch_sampler=[[0, 1], list(range(2, 13))]),
        lambda: DataLoader(Stream(named=True), batch_size=2, num_workers=2),
        lambda: DataLoader(Stream(), batch_size=2),
        Rows,
    ],
)
def test_loaders_in_a_fixed_order_leave_the_random_state(loader):
    data, model = loader(), nn.Linear(3, 1)
    before = torch.get_rng_state()
    found = sui_fast.jacobian(model, data)
    assert found.n == len(X)
    assert torch.equal(before, torch.get_rng_state())


def test_ids_are_numbers_or_texts():
    names = np.array([f"n{i}" for i in range(13)], dtype=object)
    assert score(dict(x=X, label=Y, id=names)).ids.tolist() == names.tolist()
    for bad in ([("a", i) for i in range(13)], [uuid.uuid4() for _ in range(13)], [None] * 13):
        with pytest.raises(sui_fast.DataError, match="one number or text as the id"):
            score(dict(x=X, label=Y, id=bad))


def test_arrays_of_other_kinds():
    swapped = X.numpy().astype(">f4"), Y.numpy().astype(">i8")
    torch.manual_seed(0)
    one = score(swapped)["si"]
    torch.manual_seed(0)
    np.testing.assert_array_equal(one, score((X, Y))["si"])
    with pytest.raises(sui_fast.DataError, match="a masked array"):
        score((np.ma.masked_array(X.numpy(), mask=X.numpy() > 1), Y))
    with pytest.raises(sui_fast.DataError, match="a nested one"):
        score((torch.nested.nested_tensor(list(X)), Y))
    with pytest.raises(sui_fast.DataError, match=r"dict of \['train'\]"):
        score({"train": Rows()})


def test_texts_of_streams_and_of_other_orders():
    datasets = pytest.importorskip("datasets")
    columns = dict(x=X.tolist(), label=Y.tolist(), text=[f"t{i}" for i in range(13)])
    data = datasets.Dataset.from_dict(columns)
    assert score(data.to_iterable_dataset()).texts is None
    loader = DataLoader(data.remove_columns("text").with_format("torch"), batch_size=4)
    assert len(score(loader)) == 13
    turned = DataLoader(data.with_format("torch"), sampler=list(range(13))[::-1], batch_size=4)
    assert score(turned).texts is None
    assert score(DataLoader(data.with_format("torch"), batch_size=4)).texts == columns["text"]
