"""Parts of a run started by hand, and what merge makes of them."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import sui_fast
from sui_fast import planning
from sui_fast.cli import main
from sui_fast.footprint import Footprint
from sui_fast.spectra.store import read_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:sui_fast")
MEASURES = ("si", "fsi", "loo_margin")


def problem(k=3):
    torch.manual_seed(0)
    x, y = torch.randn(50, 6).double(), torch.arange(50) % k
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, k)).double()
    return model, (x, y), (torch.randn(20, 6).double(), torch.arange(20) % k)


def outputs(model, batch):
    return 2 * model(batch)


def run_parts(store, count, which=None, **settings):
    for number in which or range(1, count + 1):
        assert sui_fast.score(*problem(), store=store, part=(number, count), progress=False, **settings) is None


@pytest.mark.parametrize("method", ["sketch", "nystrom"])
@pytest.mark.parametrize("count", [2, 4])
def test_merged_parts_are_the_run_of_one_process(tmp_path, method, count):
    settings = dict(method=method, rank=40, seed=3, outputs=outputs, loss="cross_entropy" if count == 4 else "mse")
    run_parts(tmp_path, count, **settings)
    about = dict(reg=0.05, measures=MEASURES, progress=False, candidates=problem()[2])
    whole = sui_fast.score(*problem(), **settings, **about)
    told = dict(outputs=outputs, loss=settings["loss"])  # method, rank and seed are known
    merged = sui_fast.merge(*problem(), store=tmp_path, **told, **about)
    for name in MEASURES:
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-12)
        np.testing.assert_allclose(merged.candidates[name], whole.candidates[name], rtol=1e-12)
    np.testing.assert_allclose(merged.left_out, whole.left_out, rtol=1e-12)
    assert np.array_equal(merged.suggested, whole.suggested)
    assert merged.neighbours.keys() == whole.neighbours.keys() and (whole.neighbours["other"] >= 0).any()
    for name, column in whole.neighbours.items():
        np.testing.assert_allclose(merged.neighbours[name], column, rtol=1e-6)
    for name in ("features", "loo_loss" if count == 4 else "loo_mse", "effective_dimension"):
        assert merged.diagnostics[name] == pytest.approx(whole.diagnostics[name], rel=1e-12)
    assert sorted(p.name for p in tmp_path.iterdir())[0] == f"train-0000-of-{count:04d}"


@pytest.mark.parametrize("shard", [1 << 14, 1 << 22])
def test_single_precision_rounds_alike_in_parts_and_whole(tmp_path, monkeypatch, shard):
    monkeypatch.setattr(sui_fast.streaming, "_SHARD", shard)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    train = torch.rand(600, 64), torch.arange(600) % 2
    common = dict(method="nystrom", rank=64, measures=("si",), progress=False)
    for number in range(1, 5):
        sui_fast.score(model, train, store=tmp_path, part=(number, 4), **common)
    merged = sui_fast.merge(model, train, store=tmp_path, reg=0.05, measures=("si",))
    np.testing.assert_allclose(merged["si"], sui_fast.score(model, train, reg=0.05, **common)["si"], rtol=1e-10)


@pytest.mark.parametrize("n, count", [(300, 7), (501, 9), (5, 4)])
def test_many_parts_of_few_samples_are_one_process_bit_by_bit(tmp_path, n, count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1))
    data = (torch.randn(n, 5), torch.randn(n, 1)), torch.randn(n // 3 + 2, 5)
    common = dict(method="sketch", rank=40, progress=False)
    for number in range(1, count + 1):
        sui_fast.score(model, *data, store=tmp_path, part=(number, count), **common)
    merged, whole = (
        sui_fast.merge(model, *data, store=tmp_path, reg=0.01),
        sui_fast.score(model, *data, reg=0.01, **common),
    )
    assert all(np.array_equal(merged[name], whole[name]) for name in ("si", "fsi"))


def test_more_parts_than_samples_and_other_settings_at_the_end(tmp_path):
    model, (x, y), _ = problem()
    few = (x[:3], y[:3])
    common = dict(measures=("si", "si_sgd"), groups=[0, 0, 1])
    for number in range(1, 6):
        sui_fast.score(model, few, store=tmp_path, part=f"{number}/5", method="sketch", rank=64, **common)
    for reg in (0.1, 1.0):
        merged = sui_fast.merge(model, few, store=tmp_path, reg=reg, **common)
        whole = sui_fast.score(model, few, method="sketch", rank=64, reg=reg, **common)
        for name in common["measures"]:
            rtol = 1e-10 if name == "si" else 1e-7  # a jitter of 1e-9 is all that holds si_sgd down here
            np.testing.assert_allclose(merged[name], whole[name], rtol=rtol)


def new_samples():
    torch.manual_seed(5)
    return torch.randn(23, 6).double(), torch.arange(23) % 3


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
def test_candidates_with_a_store_and_again_from_it(tmp_path, method):
    about = dict(method=method, rank=30, reg=0.05, measures=(*MEASURES, "leverage", "loo_residual"), progress=False)
    want = sui_fast.score(*problem(), candidates=new_samples(), **about)
    first = sui_fast.score(*problem(), candidates=new_samples(), store=tmp_path, **about)
    held = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = sui_fast.score(*problem(), candidates=new_samples(), store=tmp_path, **about)
    assert held == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    for name in about["measures"]:
        np.testing.assert_allclose(first.candidates[name], want.candidates[name], rtol=1e-10)
        assert np.array_equal(first.candidates[name], again.candidates[name])
    other = tuple(x[:5] for x in new_samples())  # others, later, from the same features
    few = sui_fast.score(*problem(), candidates=other, store=tmp_path, **about)
    np.testing.assert_allclose(few.candidates["si"], want.candidates["si"][:5], rtol=1e-10)


def test_candidates_belong_to_the_merge(tmp_path):
    about = dict(method="sketch", rank=30, measures=("si",), progress=False)
    for number in (1, 2):
        done = sui_fast.score(*problem(), store=tmp_path, part=(number, 2), candidates=new_samples(), **about)
        assert done is None
    merged = sui_fast.merge(*problem(), store=tmp_path, reg=0.05, measures=("si",), candidates=new_samples())
    whole = sui_fast.score(*problem(), reg=0.05, candidates=new_samples(), **about)
    np.testing.assert_allclose(merged.candidates["si"], whole.candidates["si"], rtol=1e-10)
    with pytest.raises(sui_fast.ArgumentError, match="si_sgd"):
        sui_fast.score(*problem(), candidates=new_samples(), method="sketch", measures=("si_sgd",), reg=0.1)


def test_a_part_missing_incomplete_or_of_another_run_is_named(tmp_path):
    settings = dict(method="sketch", rank=40)

    def merge(**more):
        return sui_fast.merge(*problem(), store=tmp_path, reg=0.05, progress=False, **more)

    with pytest.raises(sui_fast.StoreError, match="parts of one run.*none"):
        merge()
    run_parts(tmp_path, 4, (1, 2, 4), **settings)
    with pytest.raises(sui_fast.StoreError, match=r"part 3 of 4.*no store in .*train-0002-of-0004.*--part 3/4"):
        merge()
    assert not (tmp_path / "train-0002-of-0004").exists()
    run_parts(tmp_path, 4, (3,), **{**settings, "seed": 1})
    with pytest.raises(sui_fast.StoreError, match=r"seed was 1, is 0.*part 3 of 4"):
        merge()
    shutil.rmtree(tmp_path / "train-0002-of-0004")
    shutil.rmtree(tmp_path / "validation-0002-of-0004")
    run_parts(tmp_path, 4, (3,), **settings, measures=("si",))
    with pytest.raises(sui_fast.StoreError, match="part 3 of 4.*validation-0002-of-0004"):
        merge()
    assert len(merge(measures=("si",))) == 50
    with pytest.raises(sui_fast.StoreError, match="loss was None"):
        merge(measures=("si",), loss="cross_entropy")
    folder = tmp_path / "train-0001-of-0004"
    with sui_fast.spectra.Store(folder, sui_fast.spectra.store.read_fingerprint(folder), resume=False):
        pass
    with pytest.raises(sui_fast.StoreError, match="part 2 of 4, complete, got 0 of 16"):
        merge(measures=("si",))
    shutil.copytree(folder, tmp_path / "train-0001-of-0002")
    with pytest.raises(sui_fast.StoreError, match="parts of 2 and of 4"):
        merge()


def test_a_part_with_another_map_is_refused(tmp_path, monkeypatch):
    run_parts(tmp_path, 2, (1,), method="sketch", rank=40)
    once = sui_fast.runs.fit_map

    def otherwise(source, goal, method, rank, seed, *more):
        return once(source, goal, method, rank, seed + 1, *more)

    monkeypatch.setattr(sui_fast.runs, "fit_map", otherwise)
    run_parts(tmp_path, 2, (2,), method="sketch", rank=40)
    monkeypatch.undo()
    with pytest.raises(sui_fast.StoreError, match="got those of part 2 of 2: features of sample 32"):
        sui_fast.merge(*problem(), store=tmp_path)


def test_bad_parts_are_refused(tmp_path):
    for part in ((0, 2), (3, 2), "2", "a/b", (1.5, 2), 1, (1, 2, 3)):
        with pytest.raises(sui_fast.ArgumentError, match="part: expected"):
            sui_fast.score(*problem(), method="sketch", store=tmp_path, part=part)
    for method in ("subspace", "dense", "auto"):
        with pytest.raises(sui_fast.ArgumentError, match="'sketch' or 'nystrom' with part="):
            sui_fast.score(*problem(), method=method, store=tmp_path, part=(1, 2))
    with pytest.raises(sui_fast.ArgumentError, match="store"):
        sui_fast.score(*problem(), method="sketch", part=(1, 2))


def test_the_commands(tmp_path, monkeypatch, capsys):
    (tmp_path / "by_hand.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    x = torch.randn(8, 3)\n"
        "    return torch.nn.Linear(3, 2), (x, torch.arange(8) % 2), (x[:4], torch.arange(4) % 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    run = ["score", "by_hand:build", "--method", "sketch", "--rank", "16"]
    merge = ["merge", "by_hand:build", "--store", "s", "--reg", "0.1", "--out", "merged.parquet"]
    assert main([*run, "--store", "s", "--part", "1/2"]) == 0
    assert "part 1 of 2 is in s" in capsys.readouterr().out and not (tmp_path / "scores.parquet").exists()
    assert main(merge) == 2 and "--part 2/2" in capsys.readouterr().err
    assert main([*run, "--store", "s", "--part", "2/2"]) == 0 and main(merge) == 0
    assert main([*run, "--reg", "0.1", "--out", "whole.parquet"]) == 0
    one, two = sui_fast.Scores.load("merged.parquet"), sui_fast.Scores.load("whole.parquet")
    np.testing.assert_allclose(one["fsi"], two["fsi"], rtol=1e-10)


@pytest.mark.parametrize("method", ["sketch", "nystrom"])
def test_a_part_has_a_plan_of_its_own(tmp_path, method):
    settings = dict(method=method, rank=40, store=tmp_path)
    whole, parts = sui_fast.plan(*problem(), **settings), []
    for number in range(1, 4):
        parts.append(sui_fast.plan(*problem(), part=(number, 3), **settings))
        run_parts(tmp_path, 3, (number,), **{name: settings[name] for name in ("method", "rank")})
        shards = [p for p in tmp_path.glob(f"*-{number - 1:04d}-of-0003/*.safetensors")]
        assert parts[-1].disk_bytes == pytest.approx(sum(p.stat().st_size for p in shards), rel=0.2)
        assert parts[-1].peak_bytes <= whole.peak_bytes
    assert sum(part.disk_bytes for part in parts) == whole.disk_bytes
    with pytest.raises(sui_fast.ArgumentError, match="with part="):
        sui_fast.plan(*problem(), part=(1, 3), method="subspace", store=tmp_path)


def test_plan_of_a_part_counts_its_features_and_what_comes_before(tmp_path, monkeypatch):
    settings = dict(method="sketch", rank=40, store=tmp_path, part=(1, 3))
    for name, counts in (("map", True), ("probes", True), ("features", True), ("spectrum", False)):

        class Large(Footprint):
            def __init__(self, *args, name=name, **kwargs):
                super().__init__(*args, **kwargs)
                self.stages[name] = 1e12

        monkeypatch.setattr(planning, "Footprint", Large)
        assert (sui_fast.plan(*problem(), **settings).peak_bytes >= 1e12) == counts


def test_plan_under_torchrun_is_that_of_the_process_and_meets_no_other(monkeypatch):
    whole = sui_fast.plan(*problem(), method="subspace", rank=8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have made a group
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: pytest.fail("a group for a plan"))
    found = []
    for number in "012":
        for name, value in {"RANK": number, "WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
        found.append(sui_fast.plan(*problem(), method="subspace", rank=8).disk_bytes)
    assert sum(found) == whole.disk_bytes and len(set(found)) > 1


def folders(path):
    return sorted(p.name for p in path.iterdir())


def test_stores_of_another_number_of_parts_are_refused_or_begun_anew(tmp_path):
    settings = dict(method="sketch", rank=40)
    about = dict(reg=0.05, progress=False, store=tmp_path, **settings)
    whole = sui_fast.score(*problem(), **about)
    first = folders(tmp_path)
    for part in ((1, 2), (1, 4)):  # one process finished, parts then
        with pytest.raises(sui_fast.StoreError, match=rf"written by {part[1]} .*, got one by 1 in .*resume=False"):
            run_parts(tmp_path, part[1], part[:1], **settings)
    assert folders(tmp_path) == first
    run_parts(tmp_path, 2, (2,), **settings, resume=False)  # nothing of before is left, also no validation samples
    assert folders(tmp_path) == ["train-0001-of-0002", "validation-0001-of-0002"]
    with pytest.raises(sui_fast.StoreError, match="written by 1 .*got one by 2 "):  # parts begun, others then
        sui_fast.score(*problem(), **about)
    with pytest.raises(sui_fast.StoreError, match="written by 4 .*got one by 2 "):
        run_parts(tmp_path, 4, (3,), **settings)
    (tmp_path / "train-0001-of-0002" / "notes.txt").write_text("mine")
    run_parts(tmp_path, 4, (1,), **settings, resume=False)
    run_parts(tmp_path, 4, (2,), **settings, resume=False)  # leaves the first of this run alone
    run_parts(tmp_path, 4, (3, 4), **settings)
    assert [p.name for p in tmp_path.rglob("*-of-0002/*")] == ["notes.txt"]
    merged = sui_fast.merge(*problem(), store=tmp_path, reg=0.05)
    np.testing.assert_allclose(merged["fsi"], whole["fsi"], rtol=1e-12)
    again = sui_fast.score(*problem(), **about, resume=False)
    assert np.array_equal(again["fsi"], whole["fsi"])
    assert [name for name in folders(tmp_path) if "0002" not in name] == first
    np.testing.assert_array_equal(sui_fast.merge(*problem(), store=tmp_path, reg=0.05)["fsi"], whole["fsi"])


def test_a_store_that_another_process_writes_is_not_deleted(tmp_path):
    run_parts(tmp_path, 2, (2,), method="sketch", rank=40)
    held = read_fingerprint(tmp_path / "train-0001-of-0002")
    with sui_fast.spectra.Store(tmp_path / "train-0001-of-0002", held):
        with pytest.raises(sui_fast.StoreError, match="one process writing .*train-0001-of-0002"):
            sui_fast.score(*problem(), method="sketch", rank=40, store=tmp_path, resume=False)
    assert read_fingerprint(tmp_path / "train-0001-of-0002") == held


def test_shards_without_a_manifest_are_begun_anew_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sui_fast.streaming, "_SHARD", 1 << 11)
    about = dict(method="sketch", rank=40, reg=0.05, progress=False, store=tmp_path)
    whole = sui_fast.score(*problem(), **about)
    (tmp_path / "train-0000-of-0001" / "manifest.json").unlink()
    with pytest.raises(sui_fast.StoreError, match="shards and no manifest. .*resume=False"):
        sui_fast.score(*problem(), **about)
    np.testing.assert_array_equal(sui_fast.score(*problem(), **about, resume=False)["fsi"], whole["fsi"])
