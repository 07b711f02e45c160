"""Which method a run takes, and the operations that decide."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sui_fast
from sui_fast import operations, planning
from sui_fast.jacobians.gram import by_rows
from sui_fast.jacobians.layers import Outer
from sui_fast.operations import Operations
from sui_fast.ops import jvp, ntk_gram
from sui_fast.spectra import subspace_columns

NETWORKS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 2)
    ),
    "tokens": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(16, 60), nn.ReLU(), nn.Linear(60, 60), nn.Flatten(), nn.Linear(180, 2)
    ),
}


def samples(n):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(n))


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def operations_of(model, n=40, m=0, spectral=False):
    first = sui_fast.jacobian(model, samples(1))
    return Operations(first, n, m, first.k, spectral)


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_those_that_pytorch_counts(name):
    model, x = NETWORKS[name](), samples(40).requires_grad_() + 0.0

    def one_pass():
        out = model(x).sum(0)
        for single in out:
            torch.autograd.grad(single, x, retain_graph=True)

    work = operations_of(model)
    assert counted(one_pass) == work.one_pass
    assert work.one_pass == 40 * operations_of(model, 1).one_pass
    first = sui_fast.jacobian(model, x.detach()[:2]).factors()
    kernel, along, columns = 0, 0, min(subspace_columns(64), 80)
    for layer in (x for x in first if isinstance(x, Outer)):  # a pair of samples, and a sample along the basis
        one, two = layer.some(slice(0, 1)), layer.some(slice(1, 2))
        kernel += counted(lambda one=one, two=two: ntk_gram.op.body(one.a, one.g, two.a, two.g))
        if by_rows(one, two):  # they are formed once, not for every pair
            kernel -= 2 * counted(one.rows)
        directions = one.a.new_ones(columns, one.g.shape[3], one.width)
        along += counted(lambda one=one, directions=directions: jvp.op.body(one.a, one.g, directions))
    solve = 2 * (40 * 2) ** 3
    assert 0.95 < kernel * 40**2 / 2 / (work.dense - work.one_pass - solve) < 1.05
    basis = 2 * work.one_pass + 6 * sum(x.numel() for x in model.parameters()) * columns**2 + 15 * columns**3
    assert 0.8 < along * 40 * 3 / (work.subspace(64) - basis) < 1.25


def test_operations_grow_as_they_should():
    model = NETWORKS["mlp"]()
    few, many = operations_of(model, 1000), operations_of(model, 2000)
    assert 7 < many.dense / few.dense < 8 and many.one_pass == 2 * few.one_pass
    assert operations_of(model, 1000, spectral=True).dense - few.dense == 10 * 2000**3
    assert operations_of(model, 1000, m=100).dense > few.dense
    assert few.subspace(64) < few.subspace(128) < 3 * few.subspace(64)


def choose(monkeypatch, worth, dimension, model=None, n=4000, **others):
    monkeypatch.setitem(operations.WORTH, "cpu", worth)
    monkeypatch.setattr(operations, "_PASSES", 0)
    model = model or NETWORKS["mlp"]()
    work, d = operations_of(model, n), sui_fast.jacobian(model, samples(1)).shape[1]
    settings = dict(method="auto", rank=None, device=torch.device("cpu"), memory=1 << 33, stored=False) | others
    return planning.choose_method(n, 2, d, work, dimension=lambda: dimension, **settings), work


def test_auto_takes_an_exact_kernel_where_it_is_worth_it(monkeypatch):
    (method, rank, reason), work = choose(monkeypatch, 1e300, 10.0)
    assert (method, rank) == ("dense", 8000) and "exact kernel" in reason
    (method, *_), _ = choose(monkeypatch, work.dense, 10.0)
    assert method == "dense"
    (method, rank, reason), _ = choose(monkeypatch, work.dense * 0.999, 10.0)
    assert (method, rank) == ("subspace", 64) and f"an exact kernel would take {work.dense:.1e} operations" in reason
    (method, *_), _ = choose(monkeypatch, 0.0, 10.0, method="dense")
    assert method == "dense"  # asked for


def test_auto_takes_a_basis_where_it_is_worth_it_or_no_sketch_would_do(monkeypatch):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(48, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
    (method, rank, reason), work = choose(monkeypatch, 0.0, 1.0, wide)
    assert work.sketch(1024) < work.subspace(64) < work.dense
    assert (method, rank) == ("sketch", 1024) and "an exact kernel would take" in reason
    assert f"a basis of 64 directions would take {work.subspace(64):.1e} operations" in reason
    (method, rank, _), _ = choose(monkeypatch, work.subspace(64), 1.0, wide)
    assert (method, rank) == ("subspace", 64)
    (method, rank, _), small = choose(monkeypatch, 0.0, 40.0)
    assert (method, rank) == ("subspace", 128) and small.subspace(128) < small.sketch(2048)
    (method, rank, _), _ = choose(monkeypatch, 0.0, None, wide)  # nothing tells the dimension
    assert (method, rank) == ("sketch", 1024)
    # 40 x 300 columns are more than a sketch has
    (method, rank, _), _ = choose(monkeypatch, 0.0, 300.0, wide, memory=48 * 8000**2 - 1)
    assert (method, rank) == ("sketch", 8192)  # of the memory that a basis takes
    (method, rank, _), _ = choose(monkeypatch, 0.0, 300.0, wide, n=8000)
    assert (method, rank) == ("subspace", 768)


def test_auto_takes_an_exact_kernel_where_low_rank_costs_more(monkeypatch):
    (method, rank, reason), work = choose(monkeypatch, 0.0, 160.0, n=800)
    assert work.dense < work.subspace(448)
    assert (method, rank) == ("dense", 1600) and reason.split("; ")[1].startswith(
        ("subspace would take", "sketch would take")
    )
    (method, *_), _ = choose(monkeypatch, 0.0, 160.0, n=800, memory=1 << 24)
    assert method == "sketch"


def test_a_few_passes_are_always_worth_it(monkeypatch):
    """A large model of few samples: the kernel is little beside forward and backward."""
    monkeypatch.setitem(operations.WORTH, "cpu", 0.0)
    wide = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 1)
    )
    x = samples(30), torch.randn(30, 1)
    assert sui_fast.plan(wide, x, reg=0.1, measures=("si",)).method == "dense"
    found = sui_fast.score(wide, x, reg=0.1, measures=("si",), progress=False)
    assert found.settings["method"] == "dense"


@pytest.mark.parametrize("training", [dict(reg=0.1), dict(time=50, lr=0.01)])
@pytest.mark.parametrize("measures", [("si",), ("si", "fsi")])
def test_score_takes_what_plan_says(monkeypatch, training, measures):
    """With limits between the operations of a run with a Cholesky factor and one with eigenvectors, or with F-SI."""
    model, y, val, taken = NETWORKS["mlp"](), torch.randn(600, 2), samples(90), set()
    work = [operations_of(model, 600, m, spectral).dense for spectral in (False, True) for m in (0, 90)]
    for worth in (0.0, *work):
        monkeypatch.setitem(operations.WORTH, "cpu", worth)
        options = dict(measures=measures, **training)
        planned = sui_fast.plan(model, (samples(600), y), val, **options)
        found = sui_fast.score(model, (samples(600), y), val, progress=False, **options)
        assert planned.method == found.settings["method"]
        assert planned.method == "dense" or planned.rank == found.settings["rank"]
        assert planned.reason == found.diagnostics["method_reason"]
        least = operations_of(model, 600, 90 * ("fsi" in measures), "time" in training).dense
        assert planned.method == "dense" or least > worth
        taken.add(planned.method)
    # a Cholesky factor of so few rows costs less than a basis
    assert taken == ({"dense", "subspace"} if "time" in training else {"dense"})
