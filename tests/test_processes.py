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
    common = dict(measures=("si", "si_sgd"), method="sketch", rank=64, reg=0.01, progress=False)
    scores = sui_fast.score(*problem(3)[:2], **common)
    found.append(("sketch", dict(columns(scores), share=np.array(scores.diagnostics["si_sgd_jitter_share"])), {}, None))
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


def launch(script, folder, count=2):
    """Lines that each process writes to {out}."""
    (folder / "run.py").write_text(script.replace("{out}", str(folder / "found")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", folder / "run.py"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / f"found{number}").read_text().splitlines() for number in range(count)]


FAIL = textwrap.dedent(
    """
    import os
    import torch
    from torch import nn
    import sui_fast

    class Bad(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.where(x[:, :1] > 50, torch.nan, 0.0)

    def problem(bad):
        torch.manual_seed(bad)
        x = torch.randn(900, 6)
        if bad:
            x[700, 0] = 100
        return Bad(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), (x, torch.randn(900, 1))

    number, found = int(os.environ["RANK"]), []

    def attempt(*data, **more):
        settings = dict(method="subspace", rank=40, reg=0.01, measures=("si",), progress=False)
        try:
            return repr(sui_fast.score(*data, **{**settings, **more})["si"].sum())
        except sui_fast.SuiError as error:
            return f"{type(error).__name__} {error}"

    model, (x, y) = problem(False)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    found.append(attempt(*problem(True)))
    found.append(attempt(*problem(True), method="sketch"))
    found.append(attempt(model, (x, y)))
    found.append(attempt(model, (x[number::2], y[number::2])))
    found.append(attempt(other if number else model, (x, y)))
    found.append(attempt(model, (x, y), rank=40 + number))
    found.append(attempt(model, (x, y), (x[:3], y[:3]) if number else None, measures=("si", "fsi")[: 1 + number]))
    found.append(attempt(model, (x, y)))
    with open("{out}" + str(number), "w") as file:
        file.write("\\n".join(found))
    torch.distributed.destroy_process_group()
    """
)


def test_what_fails_on_one_process_fails_on_all_and_leaves_the_next_run_alone(tmp_path):
    zero, one = launch(FAIL, tmp_path)
    for first, second in zip(zero[:2], one[:2], strict=True):
        assert second.startswith("DataError") and "sample 700" in second
        assert first.startswith("ProcessError") and "in process 1: DataError" in first and "sample 700" in first
    for found in (zero, one):
        for text, what in zip(found[3:7], ("inputs, targets", "weights", "rank", "measures, val"), strict=True):
            assert text.startswith("ArgumentError processes: expected the same call") and f"some: {what}." in text
        assert found[2] == found[7] == zero[2] and "Error" not in found[2]


EARLY = textwrap.dedent(
    """
    import os, time, warnings
    import torch
    from torch import nn
    import sui_fast
    from sui_fast import planning, processes, scoring

    class Gone(torch.utils.data.Dataset):
        def __len__(self):
            return 300

        def __getitem__(self, i):
            raise FileNotFoundError("no such folder")

    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no such layer")

    torch.manual_seed(0)
    number, found = int(os.environ["RANK"]), []
    model, x, y = nn.Linear(6, 2), torch.randn(300, 6), torch.arange(300) % 2

    def attempt(*data, of=sui_fast.score, **more):
        settings = dict(method="sketch", rank=32, reg=0.01, measures=("si",), progress=False)
        try:
            scores = of(*(data or (model, (x, y))), **{**settings, **more})
            found.append(f"{scores.settings['method']} {scores.settings['rank']} {scores['si'].sum()!r}")
        except Exception as error:
            found.append(f"{type(error).__name__} {error}")

    attempt(model, Gone() if number else (x, y))
    attempt(model, Gone() if number else (x, y), method="auto", rank=None)
    attempt(Broken(6, 2) if number else model, (x, y))
    for more in (dict(reg=-1), dict(method="skech"), dict(device="nowhere"), dict(store=3)):
        attempt(**more if number else {})
    attempt(of=sui_fast.find_mislabeled, error_rate=2 if number else 0.2)
    attempt(params=["weight"] if number else "trainable")
    try:
        all_ = processes.Processes()
        with all_.together():
            for turn, part in enumerate(all_.every(torch.ones(3))):
                if number and not turn:
                    raise MemoryError("no room for the sum")
        found.append("not told")
    except Exception as error:
        found.append(f"{type(error).__name__} {error}")

    if number:  # less memory, and another dimension by the last bits of another machine
        scoring.free_memory = lambda device: 0
        scoring._dimension = lambda *_: 50.0
    planning.DENSE_ROWS["cpu"] = 900
    attempt(method="auto", rank=None)
    planning.DENSE_ROWS["cpu"] = 100
    attempt(method="auto", rank=None)
    if not number:
        attempt(method="dense", rank=None)  # one alone, which meets no other
    attempt()
    processes._PATIENCE = 0.2
    time.sleep(number)
    with warnings.catch_warnings(record=True) as heard:
        attempt()
    found.append(str([str(w.message)[:40] for w in heard if "has waited" in str(w.message)]))
    with open("{out}" + str(number), "w") as file:
        file.write("\\n".join(found))
    torch.distributed.destroy_process_group()
    """
)


def test_what_fails_early_on_one_process_fails_on_all_and_one_choice_is_made_for_all(tmp_path):
    zero, one = launch(EARLY, tmp_path)
    kinds = [
        "FileNotFoundError", "FileNotFoundError", "ModelError", "ArgumentError", "ArgumentError", "ArgumentError",
        "ArgumentError", "ArgumentError", "ArgumentError", "MemoryError",
    ]  # fmt: skip
    for first, second, kind in zip(zero, one, kinds, strict=False):
        assert second.startswith(kind), second
        if "same call" in second:
            assert "some: parameters." in second and first == second
        else:
            assert first.startswith(f"ProcessError processes: expected none to fail, got in process 1: {kind}: ")
    zero, one = zero[len(kinds) :], one[len(kinds) :]
    assert "process 0 has waited 0 s" in zero.pop() and one.pop() == "[]"
    assert zero.pop(2).startswith("dense None") and zero == one
    assert zero[0].split()[:2] == zero[1].split()[:2] == ["sketch", "1024"] and zero[2].startswith("sketch 32")


STORES = textwrap.dedent(
    """
    import os, pickle
    import torch
    import sui_fast
    from test_processes import problem

    *data, _ = problem(3)
    number, found, path = int(os.environ["RANK"]), [], "{out}-store"
    for name, more in (("first", {}), ("first", dict(resume=False)), ("first", {}), ("three", {})):
        settings = dict(method="sketch", rank=64, reg=0.01, progress=False, store=path + name)
        try:
            found.append(repr(sui_fast.score(*data, **settings, **more)["fsi"].sum()))
        except sui_fast.SuiError as error:
            found.append(f"{type(error).__name__} {error}")
        found.append(str(sorted(x for x in os.listdir(path + name))))
    with open("{out}" + str(number), "w") as file:
        file.write("\\n".join(found))
    torch.distributed.destroy_process_group()
    """
)


def test_a_store_of_another_number_of_processes_is_refused_by_all(tmp_path, monkeypatch):
    *data, _ = problem(3)
    settings = dict(method="sketch", rank=64, progress=False)
    first, three = (tmp_path / f"found-store{name}" for name in ("first", "three"))
    want = sui_fast.score(*data, store=first, reg=0.01, **settings)["fsi"]
    sui_fast.score(*data, store=three, part=(2, 3), **settings)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    zero, one = launch(STORES, tmp_path)
    assert zero == one
    for at, count, name in ((0, 1, "0000-of-0001"), (6, 3, "0001-of-0003")):
        assert (
            zero[at].startswith("StoreError")
            and f"written by 2 process(es) or parts, as run now, got one by {count}" in zero[at]
        )
        assert zero[at + 1] == str([f"train-{name}", f"validation-{name}"])
    assert zero[2] == zero[4] == repr(want.sum())
    assert zero[3] == zero[5] == str([f"{x}-000{i}-of-0002" for x in ("train", "validation") for i in (0, 1)])
    with pytest.raises(sui_fast.StoreError, match="written by 1 .*, as run now, got one by 2 "):
        sui_fast.score(*data, store=first, reg=0.01, **settings)
    held = {p: p.stat().st_mtime_ns for p in first.rglob("*.safetensors")}
    assert (
        sui_fast.score(*data, store=first, part=(1, 2), **settings) is None
    )  # goes on with what the first process wrote
    assert held == {p: p.stat().st_mtime_ns for p in first.rglob("*.safetensors")}
    np.testing.assert_allclose(sui_fast.merge(*data, store=first, reg=0.01)["fsi"], want, rtol=1e-12)
