"""Bad input gives a named error: which argument, what was expected, what came, what to do; never a number."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import sui_fast
from benchmarks.bad_inputs import fuzz
from sui_fast import leave_one_out, ntk, score
from sui_fast._errors import ArgumentError, DataError, StabilityError, SuiError

N, K = 6, 2
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])
J = torch.randn(N * K, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
THETA, R0 = J @ J.T, torch.randn(N, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LAMBDA_MAX = float(torch.linalg.eigvalsh(THETA).max()) / N  # of the mean loss


def with_value(x, index, value):
    x = x.clone()
    x[index] = value
    return x


class Poisoned(torch.nn.Linear):
    """NaN in the output of every sample whose first input is above 1e3."""

    def forward(self, x):
        return super().forward(x) + torch.where(x[:, :1] > 1e3, torch.nan, 0.0)


def model(kind=torch.nn.Linear, outputs=K):
    torch.manual_seed(0)
    return kind(3, outputs)


def check(error: SuiError, *words: str) -> None:
    text = str(error)
    assert isinstance(error, ValueError) or isinstance(error, SuiError)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert ": expected" in text and ", got " in text
    assert text.rstrip().endswith("."), "what to do is missing"


# name: (what differs from a good call, words that the message must contain)
ARRAYS = {
    "NaN in the kernel": (dict(ntk=with_value(THETA, (1, 2), math.nan)), ["ntk"]),
    "infinity in the kernel": (dict(ntk=with_value(THETA, (1, 1), math.inf)), ["ntk"]),
    "kernel that is not square": (dict(ntk=THETA[:, :-1]), ["ntk"]),
    "kernel of another size": (dict(ntk=THETA[:-2, :-2]), ["residual"]),
    "kernel that is not symmetric": (dict(ntk=with_value(THETA, (0, 5), 100.0)), ["ntk"]),
    "kernel with a negative eigenvalue": (dict(ntk=THETA - 5 * torch.eye(N * K, dtype=torch.float64)), ["ntk"]),
    "negative kernel, finite time": (dict(ntk=-THETA, time=5, lr=0.1), ["ntk"]),
    "integers as kernel": (dict(ntk=["a", "b"]), ["ntk"]),
    "complex kernel": (dict(ntk=THETA.to(torch.complex128)), ["ntk"]),
    "sparse kernel": (dict(ntk=THETA.to_sparse()), ["ntk"]),
    "meta kernel": (dict(ntk=THETA.to("meta")), ["ntk"]),
    "empty kernel": (dict(ntk=THETA[:0, :0], residual=R0[:0]), ["at least one sample"]),
    "NaN in the residual": (dict(residual=with_value(R0, (3, 1), math.nan)), ["residual", "3"]),
    "infinity in the residual": (dict(residual=with_value(R0, (4, 0), -math.inf)), ["residual", "4"]),
    "residual of three dimensions": (dict(residual=R0[None]), ["residual"]),
    "residual of another length": (dict(residual=R0[:-1]), ["residual"]),
    "outputs that do not divide": (dict(residual=R0.flatten(), outputs=5), ["residual"]),
    "outputs 0": (dict(residual=R0.flatten(), outputs=0), ["outputs"]),
    "outputs against the residual": (dict(residual=R0, outputs=3), ["residual"]),
    "negative reg": (dict(reg=-1e-3), ["reg"]),
    "NaN reg": (dict(reg=math.nan), ["reg"]),
    "infinite reg": (dict(reg=math.inf), ["reg"]),
    "reg as text": (dict(reg="large"), ["reg"]),
    "negative time": (dict(time=-1, lr=0.1), ["time"]),
    "NaN time": (dict(time=math.nan, lr=0.1), ["time"]),
    "half a step": (dict(time=2.5, lr=0.1), ["time"]),
    "time without lr": (dict(time=10), ["lr"]),
    "negative lr": (dict(time=10, lr=-0.1), ["lr"]),
    "NaN lr": (dict(time=10, lr=math.nan), ["lr"]),
    "unknown dynamics": (dict(dynamics="adam", time=10, lr=0.1), ["dynamics"]),
    "unknown convention": (dict(convention="median"), ["convention"]),
    "unknown method": (dict(method="guess"), ["method"]),
    "groups of another length": (dict(groups=np.zeros(N + 1)), ["groups"]),
    "groups of two dimensions": (dict(groups=np.zeros((N, 2))), ["groups"]),
    "cross kernel of another width": (dict(cross_ntk=torch.ones(4, N * K - 1, dtype=torch.float64)), ["cross_ntk"]),
    "cross kernel of odd height": (dict(cross_ntk=torch.ones(3, N * K, dtype=torch.float64)), ["cross_ntk"]),
    "NaN in the cross kernel": (dict(cross_ntk=torch.full((4, N * K), math.nan)), ["cross_ntk"]),
    "empty cross kernel": (dict(cross_ntk=torch.ones(0, N * K, dtype=torch.float64)), ["cross_ntk"]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    changes, words = ARRAYS[name]
    with pytest.raises(SuiError) as caught:
        leave_one_out(**{"ntk": THETA, "residual": R0, "outputs": K, "reg": 1e-3, **changes})
    check(caught.value, *words)


def test_the_good_call_is_good():
    assert torch.isfinite(leave_one_out(THETA, R0, outputs=K, reg=1e-3, time=10, lr=0.1).weight_sqnorm).all()
    assert np.isfinite(score(model(), (X, LABELS), X, progress=False)["fsi"]).all()


@pytest.mark.parametrize("excess", [1.001, 1.5, 1e6])
def test_divergence_names_the_largest_stable_step(excess):
    stable = 2 / (LAMBDA_MAX + 0.01)
    with pytest.raises(StabilityError) as caught:
        leave_one_out(THETA, R0, outputs=K, reg=0.01, time=10, lr=stable * excess)
    check(caught.value, "lr", f"{stable:.2g}"[:3])
    leave_one_out(THETA, R0, outputs=K, reg=0.01, time=10, lr=stable * 0.999)


SCORE = {
    "NaN input": (dict(train=(with_value(X, (2, 1), math.nan), LABELS)), ["train", "2"]),
    "infinite input": (dict(train=(with_value(X, (5, 0), math.inf), LABELS)), ["train", "5"]),
    "NaN in validation inputs": (dict(val=with_value(X, (1, 0), math.nan)), ["val", "1"]),
    "NaN model output": (dict(model=model(Poisoned), train=(with_value(X, (4, 0), 1e4), LABELS)), ["output", "4"]),
    "NaN model output in validation": (dict(model=model(Poisoned), val=with_value(X, (3, 0), 1e4)), ["output", "3"]),
    "NaN target": (dict(train=(X, with_value(torch.zeros(N, K), (3, 0), math.nan))), ["train", "3"]),
    "infinite target": (dict(train=(X, with_value(torch.zeros(N, K), (1, 1), math.inf))), ["train", "1"]),
    "class too large": (dict(train=(X, with_value(LABELS, 4, 2))), ["train", "4"]),
    "negative class": (dict(train=(X, with_value(LABELS, 2, -1))), ["train", "2"]),
    "class 2 for one output": (dict(model=model(outputs=1), train=(X, with_value(LABELS, 1, 2))), ["train", "1"]),
    "float targets of another width": (dict(train=(X, torch.zeros(N, K + 1))), ["train"]),
    "one float target for two outputs": (dict(train=(X, torch.zeros(N))), ["train"]),
    "fewer targets than inputs": (dict(train=(X, LABELS[:-1])), ["train"]),
    "no targets": (dict(train=X), ["train"]),
    "inputs under the name of names": (dict(train={"ids": X, "label": LABELS}), ["train", "'ids'", "Names"]),
    "no samples": (dict(train=(X[:0], LABELS[:0])), ["train"]),
    "an empty list": (dict(train=[]), ["train"]),
    "no validation samples": (dict(val=X[:0]), ["val"]),
    "not a data set": (dict(train=3), ["train"]),
    "text": (dict(train="digits"), ["train"]),
    "None": (dict(train=None), ["train"]),
    "shuffled loader": (dict(train=DataLoader(TensorDataset(X, LABELS), shuffle=True)), ["train"]),
    "sparse inputs": (dict(train=(X.to_sparse(), LABELS)), ["train"]),
    "meta inputs": (dict(train=(X.to("meta"), LABELS)), ["train"]),
    "meta model": (dict(model=model().to("meta")), ["model"]),
    "a function for a model": (dict(model=lambda x: x), ["model"]),
    "missing val": (dict(val=None), ["val"]),
    "unknown measure": (dict(measures=("si", "entropy")), ["measures", "entropy"]),
    "no measure": (dict(measures=()), ["measures"]),
    "unknown method": (dict(method="magic"), ["method", "magic"]),
    "unknown loss": (dict(loss="hinge"), ["loss"]),
    "unknown dynamics": (dict(dynamics="adam"), ["dynamics"]),
    "unknown convention": (dict(convention="max"), ["convention"]),
    "unknown reg": (dict(reg="best"), ["reg"]),
    "negative reg": (dict(reg=-1.0), ["reg"]),
    "negative time": (dict(time=-5, lr=0.1), ["time"]),
    "time without lr": (dict(time=5), ["lr"]),
    "divergent lr": (dict(time=5, lr=1e3), ["lr"]),
    "sigma 0": (dict(sigma=0.0), ["sigma"]),
    "negative sigma": (dict(sigma=-1.0), ["sigma"]),
    "NaN sigma": (dict(sigma=math.nan), ["sigma"]),
    "batch size 0": (dict(batch_size=0), ["batch_size"]),
    "batch size 2.5": (dict(batch_size=2.5), ["batch_size"]),
    "groups of another length": (dict(groups=[0] * (N - 1)), ["groups"]),
    "unknown parameter": (dict(params=["weight", "wieght"]), ["params", "wieght"]),
    "no parameter": (dict(params=[]), ["params"]),
    "sgd batch size 0": (dict(measures="si_sgd", sgd_batch_size=0), ["sgd_batch_size"]),
    "negative sgd lr": (dict(measures="si_sgd", sgd_lr=-1.0), ["sgd_lr"]),
    "negative sgd jitter": (dict(measures="si_sgd", sgd_jitter=-1.0), ["sgd_jitter"]),
    "outputs without a sample dimension": (dict(outputs=lambda m, x: m(x).sum()), ["outputs"]),
    "margin without classes": (dict(measures="loo_margin", train=(X, torch.rand(N, K))), ["measures"]),
    "integer dtype": (dict(dtype=torch.int64), ["dtype"]),
}


@pytest.mark.parametrize("name", SCORE)
def test_score(name):
    changes, words = SCORE[name]
    with pytest.raises(SuiError) as caught:
        score(**{"model": model(), "train": (X, LABELS), "val": X, "reg": 1e-3, "progress": False, **changes})
    check(caught.value, *words)


def test_kernel_of_nothing():
    for bad in (X[:0], with_value(X, (0, 0), math.nan), X.to("meta"), X.to_sparse()):
        with pytest.raises(SuiError):
            ntk(model(), bad)


@settings(max_examples=60)
@given(
    name=st.sampled_from(["reg", "time", "lr"]),
    value=st.one_of(
        st.floats(max_value=-1e-300),
        st.sampled_from([math.nan, -math.inf, "1", True, [1.0], 1j, np.ones(2), torch.ones(2)]),
    ),
)
def test_no_scalar_gets_through(name, value):
    with pytest.raises(ArgumentError) as caught:
        leave_one_out(THETA, R0, outputs=K, **{"reg": 1e-3, "time": 10, "lr": 0.1, name: value})
    check(caught.value, name)


@settings(max_examples=30)
@given(row=st.integers(0, N - 1), column=st.integers(0, 2), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_the_bad_sample_is_named(row, column, value):
    with pytest.raises(SuiError) as caught:
        score(model(), (with_value(X, (row, column), value), LABELS), X, progress=False, batch_size=2)
    check(caught.value, "train", f"sample {row}")


@settings(max_examples=30)
@given(rows=st.integers(1, 14), columns=st.integers(1, 14), n=st.integers(1, 8), k=st.integers(1, 3))
def test_no_shape_gets_through(rows, columns, n, k):
    theta, residual = torch.ones(rows, columns, dtype=torch.float64), torch.ones(n, k, dtype=torch.float64)
    if rows == columns == n * k:
        assert torch.isfinite(leave_one_out(theta, residual, outputs=k, reg=0.1).weight_sqnorm).all()
        return
    with pytest.raises(ArgumentError):
        leave_one_out(theta, residual, outputs=k, reg=0.1)


ONES, NAMES = torch.ones(4, 3), ["cat", "dog", "cat", "dog"]
TEXT = {  # data, what is wrong, the text
    "tuple": ((ONES, NAMES), "targets", "cat"),
    "tuples": ((ONES, tuple(NAMES)), "targets", "cat"),
    "array": ((ONES.numpy(), np.array(NAMES)), "targets", "cat"),
    "objects": ((ONES.numpy(), np.array(NAMES, dtype=object)), "targets", "cat"),
    "bytes": ((ONES, [b"a", b"b", b"a", b"b"]), "targets", "b'a'"),
    "mixed": ((ONES, [0, "dog", 1, 0]), "targets", "dog"),
    "none": ((ONES, [0, None, 1, 0]), "targets", "NoneType"),
    "batches": ([(ONES, NAMES)], "targets", "cat"),
    "rows": ([(x, name) for x, name in zip(ONES, NAMES, strict=True)], "targets", "cat"),
    "dict": ({"x": ONES, "labels": NAMES}, "targets", "cat"),
    "inputs": ((NAMES, torch.arange(4)), "inputs", "cat"),
    "alone": (NAMES, "samples", "cat"),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_in_the_place_of_numbers(name, tmp_path):
    data, what, text = TEXT[name]
    net, good = torch.nn.Linear(3, 2), (ONES, torch.tensor([0, 1, 0, 1]))
    calls = {
        "train": [
            lambda: score(net, data, good, progress=False),
            lambda: score(net, data, good, method="sketch", rank=8, store=tmp_path / "store", progress=False),
            lambda: sui_fast.plan(net, data, good),
            lambda: sui_fast.find_mislabeled(net, data),
            lambda: sui_fast.influence_functions(net, data),
        ],
        "val": [lambda: score(net, good, data, progress=False)],
        "data": [lambda: sui_fast.jacobian(net, data)],
        "sources['a']": [lambda: sui_fast.compare_sources(net, {"a": data, "b": good}, {"v": good})],
    }
    if name != "dict":  # where all is input, text beside it is left out
        calls["x1"] = [lambda: ntk(net, data)]
    for argument, some in calls.items():
        for call in some:
            with pytest.raises(DataError) as error:
                call()
            message, kind = str(error.value), "inputs" if argument == "x1" and what == "targets" else what
            assert message.startswith(f"{argument}: expected {kind} that are numbers") and text in message
            assert kind != "targets" or name == "none" or "Number the classes" in message


def test_no_call_ends_in_another_way():
    """Calls of every public function with one or two arguments spoilt at random: the harness of the benchmarks."""
    ended, defects = fuzz(250, seed=1)
    assert not defects
    assert ended["named error"] > 150
