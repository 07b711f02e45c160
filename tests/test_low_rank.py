"""Low rank against the exact kernel, through score(): accuracy, stores, interruption, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import nn

import sui_fast
from sui_fast import planning, probing
from sui_fast.jacobians.data import as_samples
from sui_fast.probing import drawn, kernel_error
from sui_fast.processes import Source
from sui_fast.spectra import (
    INNER,
    Moments,
    anchored_sketch_map,
    feature_spectrum,
    nystrom_map,
    pool_size,
    reduced_sketch_map,
    sketch_map,
    subspace_map,
)


def digits(n, m, k, images):
    data = load_digits()
    x = torch.tensor(data.data / 16)
    x = x.view(-1, 1, 8, 8) if images else x
    y = torch.tensor(data.target) if k == 10 else torch.tensor((data.target < 5) * 1)
    return (x[:n], y[:n]), (x[1000 : 1000 + m], y[1000 : 1000 + m])


def network(k, images):
    torch.manual_seed(0)
    if images:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(72, k),
        ).double()  # fmt: skip
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, k)).double()


MEASURES = ("si", "fsi", "si_langevin", "loo_residual", "leverage")
TRAINING = [dict(reg=0.01), dict(time=500, lr=0.1), dict(reg=0.01, time=300, lr=0.1, dynamics="flow")]


@pytest.mark.parametrize("training", TRAINING, ids=["converged", "gd", "flow"])
@pytest.mark.parametrize("images", [False, True], ids=["mlp", "cnn"])
@pytest.mark.parametrize("k", [1, 10])
def test_agrees_with_the_exact_kernel(k, images, training):
    model, (train, val) = network(k, images), digits(200 if k == 1 else 120, 60, k, images)
    common = dict(measures=MEASURES, progress=False, **training)
    exact = sui_fast.score(model, train, val, method="dense", **common)
    edf = exact.diagnostics["effective_dimension"]
    for method, factor, least in (("subspace", 2, 0.95), ("nystrom", 5, 0.95), ("sketch", 40, 0.9)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rank = int(np.ceil(factor * edf))
            if rank > 1500:
                continue
            found = sui_fast.score(model, train, val, method=method, rank=rank, **common)
        for name in ("si", "fsi", "loo_residual"):
            assert spearmanr(exact[name], found[name])[0] >= least, (method, name)
        assert found.diagnostics["effective_dimension"] == pytest.approx(edf, rel=0.25)


@pytest.mark.parametrize("method", ["subspace", "nystrom"])
def test_full_rank_is_exact(method):
    model, (train, val) = network(1, False), digits(60, 30, 1, False)
    for training in TRAINING:
        common = dict(measures=(*MEASURES, "loo_margin"), progress=False, **training)
        exact = sui_fast.score(model, train, val, method="dense", **common)
        found = sui_fast.score(model, train, val, method=method, rank=60, **common)
        for name in found.values:
            np.testing.assert_allclose(found[name], exact[name], rtol=2e-3, atol=1e-6)  # features are float32


@pytest.mark.parametrize("convention", ["mean", "iclr2021"])
def test_conventions_and_groups(convention):
    model, (train, val) = network(1, False), digits(50, 20, 1, False)
    groups = np.arange(50) % 7
    for given in (None, groups):
        common = dict(reg=0.02, convention=convention, groups=given, progress=False)
        exact = sui_fast.score(model, train, val, method="dense", **common)
        found = sui_fast.score(model, train, val, method="subspace", rank=50, **common)
        np.testing.assert_allclose(found["fsi"], exact["fsi"], rtol=1e-3, atol=1e-7)
        assert np.array_equal(found.ids, exact.ids)


@pytest.mark.parametrize("training", [dict(reg=0.05), dict(time=200, lr=0.1)], ids=["reg", "time"])
def test_what_features_miss_counts_for_groups_as_for_samples(training):
    model, (train, val), n = network(2, False), digits(300, 30, 2, False), 300
    common = dict(measures=("si", "fsi", "leverage"), progress=False, **training)
    low = dict(method="nystrom", rank=40, **common)
    alone, found = (sui_fast.score(model, train, val, groups=given, **low) for given in (None, np.arange(n)))
    assert all(np.array_equal(alone[name], found[name]) for name in alone.values)
    pairs = dict(groups=np.arange(n) // 2)
    exact = sui_fast.score(model, train, val, method="dense", **common, **pairs)
    np.testing.assert_allclose(
        sui_fast.score(model, train, val, **low, **pairs)["si"].sum(), exact["si"].sum(), rtol=0.05
    )


def test_auto_regularisation_and_sgd():
    model, (train, _) = network(1, False), digits(80, 20, 1, False)
    common = dict(reg="auto", measures=("si", "si_sgd"), progress=False)
    exact = sui_fast.score(model, train, method="dense", **common)
    found = sui_fast.score(model, train, method="nystrom", rank=80, **common)
    assert found.settings["reg"] == pytest.approx(exact.settings["reg"], rel=1e-3)
    np.testing.assert_allclose(found["si_sgd"], exact["si_sgd"], rtol=1e-2)


def test_other_measures_do_not_change_with_sgd(tmp_path):
    """Neither values nor what is in memory: it goes by shards like all of them."""
    model, (train, _), common = network(1, False), digits(300, 20, 1, False), dict(reg=0.05, progress=False)
    for method, rank in (("nystrom", 20), ("sketch", 64)):
        alone, both = (
            sui_fast.score(model, train, measures=measures, method=method, rank=rank, **common)
            for measures in (("si", "leverage"), ("si", "leverage", "si_sgd"))
        )
        assert all(np.array_equal(alone[name], both[name]) for name in ("si", "leverage"))
        assert len(both.diagnostics["si_sgd_jitter_share"]) == 300


def test_the_sketch_is_unbiased_over_the_whole_gradient():
    model, (train, _) = network(2, True), digits(6, 1, 1, True)
    jac = sui_fast.jacobian(model, train[0])
    exact = jac.gram()
    for kind in ("tensor", "sjlt", "rademacher", "two_sided"):
        found = []
        for seed in range(300):
            z = sketch_map(64, seed, kind).features(jac).flatten(0, 1)
            found.append(z @ z.T)
        mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0) / 300**0.5
        assert float(((mean - exact) / spread).abs().max()) < 5, kind


MAPS = {
    "sketch": lambda jac, rank, seed: sketch_map(rank, seed),
    "nystrom": nystrom_map,
    "subspace": lambda jac, rank, seed: subspace_map(lambda: [(0, jac)], jac.shape[0], rank, seed),
}


def spectrum_of_kind(kind, n, d, seed):
    """Inputs [n, d] with a spectrum of some shape, or samples of very unequal size, or in clusters."""
    rng, place = torch.Generator().manual_seed(seed), torch.arange(d, dtype=torch.float64)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    if kind == "tails":
        return x * (1 + place) ** -0.7 * torch.exp(0.7 * torch.randn(n, 1, generator=rng, dtype=torch.float64))
    if kind == "clusters":
        centres = torch.randn(8, d, generator=rng, dtype=torch.float64)
        return 2 * centres[torch.multinomial(0.5 ** torch.arange(8.0), n, True, generator=rng)] + 0.3 * x
    return x * {"flat": 1 + 0 * place, "power": 1 / (1 + place), "exponential": torch.exp(-place / 4)}[kind]


@pytest.mark.parametrize("method", list(MAPS))
def test_the_error_estimate_holds(method):
    """||Theta - Z Z^T|| / ||Theta|| lies below the estimate in 95% of 200 random trials."""
    torch.manual_seed(0)
    models = [nn.Linear(40, 1), nn.Linear(40, 2), nn.Sequential(nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 1))]
    models, held, trials = [model.double() for model in models], 0, 200
    for seed in range(trials):
        kind, n = ("flat", "power", "exponential", "tails", "clusters")[seed % 5], (80, 110, 170)[seed % 3]
        model, x = models[seed % 7 % 3], spectrum_of_kind(kind, n, 40, seed)
        source, jac = Source(model, as_samples(x, with_targets=None), {}, 0, n), sui_fast.jacobian(model, x)
        exact, fmap = jac.gram(), MAPS[method](jac, 6 + seed % 29, seed)
        z = fmap.features(jac).flatten(0, 1)
        error = float((exact - z @ z.T).norm() / exact.norm())
        held += error <= kernel_error(n, drawn(source, fmap, seed)) + 1e-12
    assert held >= 0.95 * trials


def test_the_error_estimate_holds_where_few_samples_have_most_of_the_kernel():
    data, held, trials = load_breast_cancer().data[:450], 0, 100
    x = torch.tensor((data - data.mean(0)) / data.std(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 41), nn.GELU(), nn.Linear(41, 29), nn.GELU(), nn.Linear(29, 1)).double()
    source, jac = Source(model, as_samples(x, with_targets=None), {}, 0, len(x)), sui_fast.jacobian(model, x)
    exact = jac.gram()
    for seed in range(trials):
        if seed % 10 == 0:
            fmap = sketch_map(64, seed)
            z = fmap.features(jac).flatten(0, 1)
            error = float((exact - z @ z.T).norm() / exact.norm())
        held += error <= kernel_error(len(x), drawn(source, fmap, seed))
    assert held >= 0.95 * trials


def test_a_rank_too_small_warns_and_names_a_better_one():
    model, (train, _) = network(1, False), digits(200, 1, 1, False)
    with pytest.warns(RuntimeWarning, match="rank 10 is small.*nystrom wants about"):
        found = sui_fast.score(model, train, method="nystrom", rank=10, reg=0.001, measures=("si",))
    assert found.diagnostics["rank_wanted"] > 50


def test_moments_are_those_of_the_features():
    z, r0 = torch.randn(7, 2, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    sums = Moments(5)
    sums.add(z[:3], r0[:3])
    sums.add(z[3:], r0[3:])
    found = feature_spectrum(sums, 2.0**-52)
    theta = z.flatten(0, 1) @ z.flatten(0, 1).T
    u = found.rows(z)
    torch.testing.assert_close(u * found.s @ u.T, theta)
    torch.testing.assert_close(u.T @ u, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(found.gain, u.T @ r0.reshape(-1))


RUN = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_low_rank import digits, network
    import sui_fast
    import sui_fast.streaming as streaming
    streaming._SHARD = 1 << 11
    {before}
    model, (train, val) = network(1, False), digits(400, 50, 1, False)
    scores = sui_fast.score(model, train, val, method={method!r}, rank=32, reg=0.05, store={store!r}, progress=False)
    {after}
    """
)


def run(tmp_path, method="sketch", before="", after="", launcher=(), timeout=240):
    script = tmp_path / "script.py"
    here, store = os.path.dirname(__file__), str(tmp_path / "s")
    script.write_text(RUN.format(tests=here, before=before, after=after, method=method, store=store))
    return subprocess.run(
        [sys.executable, *launcher, script], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


KILL = """
import os, random, signal
from sui_fast.spectra import Store
random.seed({seed})
once, count = Store._write, [random.randint(1, 20)]
def write(self, name, data):
    count[0] -= 1
    if count[0] == 0:
        if random.random() < 0.5:
            once(self, name, data)
        os.kill(os.getpid(), signal.SIGKILL)
    once(self, name, data)
Store._write = write
"""


@pytest.mark.parametrize("method", ["sketch", "subspace"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path, method):
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", method, after="print(scores['si'].tobytes().hex(), scores['fsi'].tobytes().hex())")
    assert whole.returncode == 0, whole.stderr[-2000:]
    kills = 0
    for seed in range(12):
        done = run(
            tmp_path, method, before=KILL.format(seed=seed),
            after="print(scores['si'].tobytes().hex(), scores['fsi'].tobytes().hex())",
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        kills += 1
    assert kills >= 1 and done.returncode == 0
    assert done.stdout == whole.stdout


def test_a_store_of_another_run_is_refused(tmp_path):
    model, (train, _) = network(1, False), digits(40, 10, 1, False)
    common = dict(method="sketch", rank=16, reg=0.05, store=tmp_path / "s", measures=("si",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = sui_fast.score(model, train, **common)
        again = sui_fast.score(model, train, **common)
        assert np.array_equal(first["si"], again["si"])
        with pytest.raises(sui_fast.StoreError, match="seed was 0, is 1"):
            sui_fast.score(model, train, seed=1, **common)
        with torch.no_grad():
            model[0].weight[0, 0] += 1
        with pytest.raises(sui_fast.StoreError, match="weights"):
            sui_fast.score(model, train, **common)
        sui_fast.score(model, train, resume=False, **common)


KILL_LATE = """
import os, signal
from sui_fast.spectra import Store
once = Store._write
def write(self, name, data):
    once(self, name, data)
    if os.environ["RANK"] == "1" and name == "shard-000001.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
Store._write = write
"""

RUN_READ = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    import numpy, torch
    torch.set_num_threads(1)
    from test_low_rank import digits, network
    import sui_fast
    import sui_fast.streaming as streaming
    streaming._SHARD = 1 << 11
    {before}
    class Digits(torch.utils.data.Dataset):
        def __init__(self, x, y):
            self.x, self.y = x, y
        def __len__(self):
            return len(self.x)
        def __getitem__(self, i):
            return self.x[i].clone(), self.y[i]
    model, (train, val) = network(1, True), digits(400, 50, 1, True)
    train = torch.utils.data.DataLoader(Digits(*train), batch_size=37)
    scores = sui_fast.score(
        model, train, Digits(*val), candidates=Digits(val[0] + 0.1, val[1]), method="sketch", sketch={kind!r}, rank=32,
        reg=0.05, store={store!r}, progress=False, measures=("si", "fsi", "leverage"),
    )
    columns = [numpy.concatenate([scores[name], scores.candidates[name]]) for name in ("si", "fsi", "leverage")]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    numpy.save({out!r} + str(rank), columns)
    {after}
    """
)


@pytest.mark.parametrize("processes, kind", [(2, "sjlt"), (4, "tensor")])
def test_processes_share_a_loader_and_candidates(tmp_path, processes, kind):
    found = []
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    end = "torch.distributed.destroy_process_group()"
    runs = [("one", (), "", ""), ("many", launcher, KILL_LATE, end), ("many", launcher, "", end)]
    for name, start, before, after in runs if processes > 2 else runs[::2]:
        script, out = tmp_path / f"{name}.py", str(tmp_path / name)
        settings = dict(tests=os.path.dirname(__file__), store=out, out=out, kind=kind, before=before, after=after)
        script.write_text(RUN_READ.format(**settings))
        done = subprocess.run(
            [sys.executable, *start, script], capture_output=True, text=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        if before:
            assert done.returncode != 0 and "SIGKILL" in done.stderr and not os.path.exists(out + "0.npy")
            continue
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([np.load(f"{out}{rank}.npy") for rank in range(processes if start else 1)])
    for columns in found[1]:
        np.testing.assert_allclose(columns, found[0][0], rtol=1e-12)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_result_of_one(tmp_path, processes):
    after = "import numpy; numpy.save({path!r} + str(torch.distributed.get_rank() if {many} else 0), scores['fsi'])"
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    for method in ("sketch", "subspace"):
        (tmp_path / method).mkdir()
        done = run(tmp_path, method, after=after.format(path=one, many=False))
        assert done.returncode == 0, done.stderr[-2000:]
        done = run(
            tmp_path / method, method,
            before="torch.distributed.init_process_group('gloo')",
            after=after.format(path=many, many=True) + "\ntorch.distributed.destroy_process_group()",
            launcher=("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        want = np.load(one + "0.npy")
        for rank in range(processes):
            np.testing.assert_allclose(np.load(f"{many}{rank}.npy"), want, rtol=1e-12)
        shutil.rmtree(tmp_path / "s")


KILL_SECOND = """
import os, signal
from sui_fast.spectra import Store
once = Store._write
def write(self, name, data):
    once(self, name, data)
    if os.environ["RANK"] == "1" and name == "shard-000002.safetensors":  # on disk, not yet in the manifest
        os.kill(os.getpid(), signal.SIGKILL)
Store._write = write
"""


def test_one_of_two_processes_killed_and_all_started_again(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    save = "import os, numpy; numpy.save({path!r} + os.environ.get('RANK', '0'), [scores['si'], scores['fsi']])"
    end = "\ntorch.distributed.destroy_process_group()"
    (tmp_path / "whole").mkdir()
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    whole = run(tmp_path / "whole", after=save.format(path=one))
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = run(tmp_path, before=KILL_SECOND, after=save.format(path=two) + end, launcher=launcher)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr[-2000:]
    assert not (tmp_path / "two0.npy").exists()
    part = tmp_path / "s" / "train-0001-of-0002"
    held = json.loads((part / "manifest.json").read_text())["shards"]
    assert len(held) == 2 and held[1]["first"] + held[1]["rows"] < 200
    written = (part / held[0]["name"]).stat().st_mtime_ns
    again = run(tmp_path, after=save.format(path=two) + end, launcher=launcher)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (part / held[0]["name"]).stat().st_mtime_ns == written  # went on, not anew
    for rank in range(2):
        np.testing.assert_allclose(np.load(f"{two}{rank}.npy"), np.load(one + "0.npy"), rtol=1e-12)


@pytest.mark.parametrize("fits", [True, False])
def test_auto_looks_at_the_regularisation(monkeypatch, fits):
    """The rank that it takes does: no warning, and more of it for less regularisation."""
    monkeypatch.setitem(planning.DENSE_ROWS, "cpu", 100)
    if not fits:
        monkeypatch.setattr("sui_fast.scoring.free_memory", lambda device: 0)
    train, val = digits(600, 50, 1, False)
    ranks = []
    for training in (dict(reg=0.3), dict(reg=0.01), dict(time=200, lr=0.1)):
        planned = sui_fast.plan(network(1, False), train, val, **training)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = sui_fast.score(network(1, False), train, val, progress=False, **training)
        exact = sui_fast.score(network(1, False), train, val, method="dense", progress=False, **training)
        assert planned.method == found.settings["method"] == ("subspace" if fits else "sketch")
        assert planned.rank == found.settings["rank"] and "effective dimension about" in planned.reason
        assert all(spearmanr(found[name], exact[name])[0] > 0.97 for name in ("si", "fsi"))
        ranks.append(planned.rank)
    assert ranks[0] < ranks[1] or not fits
    assert sui_fast.plan(network(1, False), train, val, reg="auto").rank == 600  # of 1024: no more than rows
    with pytest.raises(sui_fast.StabilityError):
        sui_fast.score(network(1, False), train, val, time=200, lr=100.0, progress=False)


def test_auto_says_where_a_store_is_not_used(tmp_path):
    train, _ = digits(50, 5, 1, False)
    found = sui_fast.score(
        network(1, False), train, reg=0.1, measures=("si",), store=tmp_path / "store", progress=False
    )
    plan = sui_fast.plan(network(1, False), train, reg=0.1, store=tmp_path / "store")
    assert all("store= is not used" in reason for reason in (plan.reason, found.diagnostics["method_reason"]))
    assert not (tmp_path / "store").exists()


def test_plan_tells_what_score_would_do():
    model, (train, val) = network(1, False), digits(100, 20, 1, False)
    plan = sui_fast.plan(model, train, val)
    assert plan.method == "dense" and "rows" in plan.reason and plan.peak_bytes > 0
    low = sui_fast.plan(model, train, val, method="sketch", rank=64)
    assert low.rank == 64 and low.passes == 1 and low.disk_bytes > 100 * 64 * 4
    assert "sketch" in str(low) and "peak memory" in str(low) and "where store= is given" in str(low)
    stored = sui_fast.plan(model, train, val, method="sketch", rank=64, store="unused")
    assert stored.stored and "where store=" not in str(stored) and not os.path.exists("unused")
    with pytest.raises(sui_fast.ArgumentError, match="store: expected None with an exact method"):
        sui_fast.plan(model, train, val, method="dense", store="unused")


@pytest.mark.parametrize("images", [False, True], ids=["mlp", "cnn"])
@pytest.mark.parametrize("k", [1, 3])
def test_an_anchored_sketch_is_linear_and_keeps_its_anchors_exactly(k, images):
    model, (train, _) = network(k, images), digits(90, 1, 1, images)
    whole = sui_fast.jacobian(model, train[0])
    pool, rest = whole.select(range(60)), whole.select(range(60, 90))
    residual = torch.randn(60, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fmap = anchored_sketch_map(pool, residual, 256)
    chosen = fmap.state["anchors"]
    directions = chosen.T @ pool.rows().double()
    there = chosen.any(0).double()  # columns of zeros where the pool has fewer directions
    assert there.sum() >= 58
    torch.testing.assert_close(directions @ directions.T, there.diag())
    z, own = fmap.both(rest, True)
    torch.testing.assert_close(z[..., : len(directions)].flatten(0, 1), rest.rows() @ directions.T)
    torch.testing.assert_close(own, rest.own_blocks())
    plain, exact = sketch_map(256, 0).features(rest).flatten(0, 1), rest.gram()
    near = z.flatten(0, 1)
    assert (near @ near.T - exact).norm() < 0.7 * (plain @ plain.T - exact).norm()


@pytest.mark.parametrize("k", [1, 3])
def test_an_anchored_sketch_does_not_hang_on_the_last_bit(k):
    """A run that goes on with other threads, or on another machine, must find the same features."""
    model, (train, _) = network(k, False), digits(80, 1, 1, False)
    found = []
    for scale in (1.0, 1.0 + 1e-13):
        with torch.no_grad():
            model[0].weight *= scale
        jac = sui_fast.jacobian(model, train[0])
        residual = torch.linspace(-1, 1, 80 * k, dtype=torch.float64).view(80, k)
        found.append(anchored_sketch_map(jac, residual, 200).features(jac))
    assert float((found[0] - found[1]).norm()) < 1e-6 * float(found[0].norm())


def test_anchors_are_the_same_where_eigenvectors_turn():
    """Equal eigenvalues: eigenvectors are anybody's, and turn with the last bit; their span does not."""
    torch.manual_seed(0)
    model, found = nn.Linear(40, 1, bias=False).double(), []
    x = torch.cat([torch.linalg.qr(torch.randn(40, 40).double()).Q, torch.zeros(10, 40).double()])
    for noise in (0.0, 1e-9):
        pool = sui_fast.jacobian(model, x + noise * torch.randn(50, 40).double())
        found.append(anchored_sketch_map(pool, torch.ones(50, 1).double(), 400).features(pool).flatten(0, 1))
    torch.testing.assert_close(found[0] @ found[1].T, x @ x.T, atol=1e-5, rtol=0)


def test_anchors_grow_with_the_rank_where_they_cost_little():
    few, many = (sui_fast.jacobian(network(1, images), digits(8, 1, 1, images)[0][0]) for images in (True, False))
    assert [pool_size(few, 2000, rank)[1] for rank in (64, 1024, 4096)] == [16, 255, 512]
    assert pool_size(few, 2000, 4096)[0] == 1024 and pool_size(many, 100, 4096)[0] == 100
    torch.manual_seed(0)
    large = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(25088, 1)
    )
    held = sui_fast.jacobian(large, torch.randn(2, 3, 16, 16))
    assert pool_size(held, 2000, 1024) == (0, 0) and pool_size(held, 2000, 256) == (256, 0)
    assert pool_size(held, 160, 512)[1] >= 64  # few samples for the rank
    torch.manual_seed(0)
    layers = [nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2))]
    small = sui_fast.jacobian(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8192, 1)), torch.randn(2, 3, 32, 32))
    assert [pool_size(small, 1000, rank)[1] for rank in (512, 1023, 1024, 1400)] == [32, 32, 0, 0]  # within an epoch
    assert pool_size(small, 600, 1024)[1] >= 32


class Encoder(nn.Module):
    """A layer of attention over the features, one by one."""

    def __init__(self, inputs, k):
        super().__init__()
        self.embed, self.place = nn.Linear(1, 8), nn.Parameter(0.1 * torch.randn(inputs, 8))
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, k)

    def forward(self, x):
        return self.head(self.block(self.embed(x[:, :, None]) + self.place).mean(1))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sketch_with_more_columns_than_rows_is_nearly_exact(seed):
    """Of few samples F-SI of an encoder correlated 0.90 to 0.94 with 32 anchors whatever the rank; unwarned."""
    data = load_wine()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x = ((data.data - data.data.mean(0)) / data.data.std(0))[order]
    x, y = torch.tensor(x).float(), torch.tensor(data.target)[order]
    torch.manual_seed(seed)
    model, train, val = Encoder(13, 3).eval(), (x[:130], y[:130]), (x[130:], y[130:])
    common = dict(loss="cross_entropy", reg=0.001, progress=False)
    exact = sui_fast.score(
        model.double(), (x[:130].double(), y[:130]), (x[130:].double(), y[130:]), method="dense", **common
    )
    rank = int(np.ceil(40 * exact.diagnostics["effective_dimension"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = sui_fast.score(model.float(), train, val, method="sketch", rank=rank, **common)
    for name in ("si", "fsi"):
        assert spearmanr(exact[name], found[name])[0] > 0.99, name


@pytest.mark.parametrize("reduced", [False, True], ids=["anchored", "reduced"])
def test_a_sketch_with_directions_of_a_pool_is_unbiased(reduced):
    model, (train, _) = network(1, True), digits(50, 1, 1, True)
    jac = sui_fast.jacobian(model, train[0])
    pool, rest = jac.select(range(40)), jac.select(range(40, 50))
    residual, exact, found = train[1][:40, None] - pool.outputs, rest.gram(), []
    for seed in range(200):
        if reduced:
            fmap = reduced_sketch_map(pool.sketch(INNER, seed), residual, 64, seed)
        else:
            fmap = anchored_sketch_map(pool, residual, 64, seed)
        z = fmap.features(rest).flatten(0, 1)
        found.append(z @ z.T)
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0) / 200**0.5
    assert float(((mean - exact) / spread).abs().max()) < 5


@pytest.mark.parametrize("k", [1, 3])
def test_a_reduced_sketch_errs_less_than_a_plain_one_of_its_rank(k):
    model, (train, _) = network(k, True), digits(150, 1, 1, True)
    jac = sui_fast.jacobian(model, train[0])
    pool, rest = jac.select(range(100)), jac.select(range(100, 150))
    residual, exact, errors = torch.linspace(-1, 1, 100 * k).view(100, k).double(), rest.gram(), []
    for seed in range(5):
        fmap = reduced_sketch_map(pool.sketch(INNER, seed), residual, 96, seed)
        near, own = fmap.both(rest, True)
        assert near.shape == (50, k, fmap.rank) and fmap.rank == 96
        long = rest.sketch(INNER, seed)
        torch.testing.assert_close(own, long @ long.transpose(1, 2))
        size = lambda z: float((z.flatten(0, 1) @ z.flatten(0, 1).T - exact).norm())  # noqa: E731
        errors.append([size(near), size(sketch_map(96, seed).features(rest)), size(long)])
    near, plain, long = map(sum, zip(*errors, strict=True))
    assert near < 0.6 * plain and near < 2 * long


def test_a_run_reduces_a_sketch_where_anchors_cost_too_much(monkeypatch):
    model, (train, val) = network(1, True), digits(200, 40, 1, True)
    exact = sui_fast.score(model, train, val, reg=0.1, method="dense", progress=False)
    options = dict(reg=0.1, method="sketch", rank=128, progress=False)
    monkeypatch.setattr("sui_fast.spectra.anchors._burden", lambda *arguments: 2.0)
    found = sui_fast.score(model, train, val, **options)
    monkeypatch.setattr("sui_fast.streaming.pool_size", lambda *arguments: (0, False))
    plain = sui_fast.score(model, train, val, **options)
    for name in ("si", "fsi"):
        near, far = (spearmanr(exact[name], x[name])[0] for x in (found, plain))
        assert near > 0.97 and near > far
    assert found.diagnostics["features"] == 128


def test_probes_with_large_factors_are_captured_in_parts(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 2)).double(), torch.randn(90, 40).double()
    source, fmap = Source(model, as_samples(x, with_targets=None), {}, 0, 90), sketch_map(16)
    whole = drawn(source, fmap, 3)
    most, some = [], source.some
    monkeypatch.setattr(source, "some", lambda numbers: most.append(len(numbers)) or some(numbers))
    monkeypatch.setattr(probing, "HELD", 20 * source.part(0, 1).nbytes)
    parts = drawn(source, fmap, 3)
    assert max(most) == 10 and whole.shape == parts.shape == (90, 2, 518)
    assert (whole.some == parts.some).all()
    torch.testing.assert_close(parts.exact, whole.exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method, rank", [("sketch", 64), ("sketch", 400), ("nystrom", 40), ("subspace", 40)])
@pytest.mark.parametrize("reg", [1e-6, 1e-2])
@pytest.mark.parametrize("k", [1, 2])
def test_leverage_is_near_the_exact_one_and_within_the_outputs_whatever_features_miss(method, rank, reg, k):
    """To first order it was up to 150,000 for one sample of two outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, k))
    train = torch.randn(200, 20), torch.randn(200, k)
    exact, found = (
        sui_fast.score(model, train, measures=("leverage",), reg=reg, progress=False, **options)["leverage"]
        for options in (dict(method="dense"), dict(method=method, rank=rank))
    )
    assert 0 <= found.min() and found.max() <= k * (1 + 1e-9)
    assert 0.6 < found.sum() / exact.sum() < 1.4
