"""Several processes give the very result of one: every number of it, bit by bit or nearly."""

import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import sui_fast
from sui_fast.jacobians import as_samples
from sui_fast.parts import as_part
from sui_fast.processes import Processes

RUN = textwrap.dedent(
    """
    import os, pickle, sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_processes import everything
    result = everything()
    with open({out!r} + os.environ.get("RANK", "0"), "wb") as file:
        pickle.dump(result, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    """
)


def problem(k):
    torch.manual_seed(0)
    x, y = torch.randn(1111, 12), torch.arange(1111) % max(k, 2)
    x[:, 0] += y
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, k))
    return model, (x, y), (x[:37] + 0.1, y[:37]), (x[:45] - 0.1, y[:45])


def columns(scores):
    """All that there is a number of for every sample."""
    found = dict(scores.values, ids=scores.ids, labels=scores.labels, inputs=scores.inputs)
    found.update(left_out=scores.left_out, suggested=scores.suggested, **(scores.neighbours or {}))
    if scores.candidates is not None:
        found.update({f"new {name}": column for name, column in scores.candidates.values.items()})
    return found


def everything():
    found = []
    for method, k, training in (
        ("nystrom", 1, dict(reg=0.001)),
        ("nystrom", 3, dict(reg=0.001, loss="cross_entropy")),
        ("subspace", 1, dict(reg=0.001)),
        ("subspace", 3, dict(reg=0.001, time=2000, lr=0.01)),
        ("sketch", 3, dict(reg="auto", loss="cross_entropy")),
    ):
        *data, new = problem(k)
        measures = ("si", "fsi", "leverage", "loo_residual", "loo_margin")
        common = dict(measures=measures, method=method, rank=128, progress=False)
        scores = sui_fast.score(*data, candidates=new, **training, **common)
        numbers = {name: x for name, x in scores.diagnostics.items() if isinstance(x, int | float | str)}
        del numbers["peak_bytes"]
        found.append((method, columns(scores), numbers, scores.diagnostics.get("reg_curve")))
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1)[0]


def run(folder, count):
    script, out = folder / "run.py", str(folder / "found")
    script.write_text(RUN.format(tests=os.path.dirname(__file__), out=out))
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}") if count > 1 else ()
    done = subprocess.run(
        [sys.executable, *launcher, script], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [pickle.loads((folder / f"found{rank}").read_bytes()) for rank in range(count)]


@pytest.mark.parametrize("count", [2, 3])
def test_every_number_is_that_of_one_process(tmp_path, one, count):
    for found in run(tmp_path, count):
        for (method, want, numbers, curve), (_, got, others, again) in zip(one, found, strict=True):
            assert want["other"] is not None and want.keys() == got.keys() and curve == again
            for name, column in want.items():
                if column is None or column.dtype.kind != "f":
                    assert np.array_equal(column, got[name]), (method, name)
                else:
                    np.testing.assert_allclose(got[name], column, rtol=1e-12, err_msg=f"{method} {name}")
            assert others.keys() == numbers.keys()
            for name, value in numbers.items():
                assert others[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), name


def test_each_process_predicts_its_slice():
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    model, samples = Seen(5, 2), as_samples(torch.randn(1000, 5), with_targets=None)
    whole, found = Processes().predict(model, samples, batch_size=50), []
    for number in range(3):
        seen.clear()
        one = Processes()
        one.count, one.number, one.every = 3, number, lambda x: [x]
        found.append(one.predict(model, samples, batch_size=50))
        assert sum(seen) == len(found[-1]) + 1  # one for the shape
    assert torch.equal(torch.cat(found), whole) and min(map(len, found)) > 200
    assert torch.equal(as_part((2, 3)).predict(model, samples, batch_size=50), whole)


class Overflowing(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.where(x[:, :1] > 1e3, torch.inf, 0.0)


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
def test_samples_in_messages_are_numbered_as_in_the_data(loss):
    x = torch.randn(700, 4)
    x[600, 0] = 1e6
    with pytest.raises(sui_fast.DataError, match="sample 600"):
        sui_fast.score(
            Overflowing(4, 1), (x, torch.arange(700) % 2), method="sketch", loss=loss, measures=("si",), reg=0.1
        )
