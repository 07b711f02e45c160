import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import blobs, network

from sui_fast import ArgumentError, DataError, find_mislabeled, read_review, score, summarize
from sui_fast.apps.kernel import linear_problem
from sui_fast.apps.mislabeled import label_error_probability
from sui_fast.apps.results import auroc, average_precision, rank_correlation
from sui_fast.loo import part_error_curve


@pytest.mark.parametrize("k", [1, 4])
def test_wrong_labels_come_first(k):
    classes = max(k, 2)
    x, y = blobs(160, classes)
    wrong = np.zeros(120, dtype=bool)
    wrong[::10] = True
    noisy = torch.where(torch.from_numpy(wrong), (y[:120] + 1) % classes, y[:120])
    model = network(k)
    before = [p.clone() for p in model.parameters()]
    found = find_mislabeled(model, (x[:120], noisy), (x[120:], y[120:]), truth=wrong, progress=False)
    assert found.auroc > 0.97 and found.aupr > 0.8
    assert wrong[found.order[:12]].mean() > 0.8
    assert (found.suggested[wrong] == y[:120].numpy()[wrong]).mean() > 0.9
    assert abs(found.noise_rate - 0.1) < 0.08
    assert (found.flagged == (found.margin <= found.threshold)).all() and found.error_rate <= 0.2
    assert found.by == "fsi" and (found.rank[found.order] == np.arange(120)).all()
    assert found.table.num_rows == 120 and "of 120 labels" in found.summary()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    scores = score(model, (x[:120], noisy), (x[120:], y[120:]), reg="auto", measures=("fsi", "loo_margin"))
    again = find_mislabeled(scores, truth=wrong)
    assert (again.order == found.order).all()


def test_scores_from_a_file_rank_the_same(tmp_path):
    x, y = blobs(60, 3)
    scores = score(network(3), (x, y), measures=("si", "loo_margin"), reg=0.01)
    loaded = type(scores).load(scores.save(tmp_path / "s.parquet"))
    a, b = find_mislabeled(scores), find_mislabeled(loaded)
    assert (a.order == b.order).all() and a.by == b.by == "si" and a.fsi is None
    with pytest.raises(ArgumentError, match="loo_margin"):
        find_mislabeled(score(network(3), (x, y), measures=("si",)))


def test_clean_labels_are_left_alone():
    x, y = blobs(120, 3, spread=0.2)
    with warnings.catch_warnings(action="error"):
        found = find_mislabeled(network(3), (x, y), progress=False)
    assert found.flagged.sum() <= 1 and found.noise_rate < 0.02
    none = replace(found, flagged=np.zeros(120, bool), noise_rate=0.001)
    assert none.summary() == "None of 120 labels flagged. Estimated share of wrong labels: 0.1%."
    assert "the order ranks them" in replace(none, noise_rate=0.1).summary()


def test_a_model_that_knows_nothing_says_so():
    x, _ = blobs(60, 3)
    chance = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="cannot tell which are wrong") as seen:
        find_mislabeled(network(3), (x, chance), reg=1.0, progress=False)
    assert seen[0].filename == __file__


def test_bad_arguments_have_names():
    x, y = blobs(20, 2)
    with pytest.raises(DataError, match="train|measures"):
        find_mislabeled(network(2), (x, None))
    with pytest.raises(ArgumentError, match="measures|train"):
        find_mislabeled(network(1), (x, x[:, 0]))
    with pytest.raises(ArgumentError, match="truth"):
        find_mislabeled(network(1), (x, y), truth=[True])
    with pytest.raises(ArgumentError, match="error_rate"):
        find_mislabeled(network(1), (x, y), error_rate=2)
    for bad in (0, 21, 1.5, True):
        with pytest.raises(ArgumentError, match="m: "):
            summarize(network(1), (x, y), None, bad)
    with pytest.raises(ArgumentError, match="quota"):
        summarize(network(1), (x, y), None, 4, quota={0: 5})
    with pytest.raises(ArgumentError, match="val"):
        summarize(network(1), (x, y), m=4, by="fsi")


def test_probability_is_calibrated():
    rng = np.random.default_rng(0)
    n, k, noise = 4000, 3, 0.2
    outputs = rng.standard_normal((n, k))
    chance = np.exp(2 * outputs)
    chance /= chance.sum(1, keepdims=True)
    true = (rng.random((n, 1)) > chance.cumsum(1)).sum(1)
    wrong = rng.random(n) < noise
    labels = np.where(wrong, (true + rng.integers(1, k, n)) % k, true)
    probability, rate = label_error_probability(outputs, labels)
    assert abs(rate - noise) < 0.05
    for low, high in ((0, 0.2), (0.4, 0.6), (0.7, 1)):
        inside = (probability >= low) & (probability < high)
        assert abs(probability[inside].mean() - wrong[inside].mean()) < 0.1


def test_summary_is_nested_deterministic_and_drops_duplicates(problem):
    model, (x, y), val = problem
    x, y = torch.cat([x, x[:10]]), torch.cat([y, y[:10]])  # samples 40.. repeat 0..9
    found = summarize(model, (x, y), val, 20, reg=1e-3, progress=False)
    again = summarize(model, (x, y), val, 20, reg=1e-3, progress=False)
    assert (found.order == again.order).all() and sorted(found.order) == list(range(50))
    assert set(found.at(20)) < set(found.at(35)) and (found.at(20) == found.kept).all()
    assert not any(i in found.kept and i + 40 in found.kept for i in range(10))
    assert found.accuracy and set(found.accuracy) >= {20, 50}
    assert (np.bincount(found.columns()["dropped_at"]) == 1).all()


def test_first_step_is_the_one_shot_order(problem):
    model, train, val = problem
    scores = score(model, train, val, reg=0.01)
    once = summarize(scores, m=30, method="one-shot")
    assert (np.sort(once.kept) == np.sort(np.argsort(scores["fsi"], kind="stable")[10:])).all()
    by_model = summarize(model, train, val, 30, method="one-shot", reg=0.01, progress=False)
    assert (by_model.kept == once.kept).all()
    with pytest.warns(RuntimeWarning, match="one-shot"):
        summarize(scores, m=10, method="one-shot")


def test_quota_is_kept(problem):
    model, train, val = problem
    classes, counts = np.unique(train[1], return_counts=True)
    want = {int(c): min(int(m), 5) for c, m in zip(classes, counts, strict=True)}
    for quota in (want, "equal", "proportional"):
        found = summarize(model, train, val, 18, quota=quota, reg=0.01, progress=False)
        kept = np.bincount(train[1][found.kept], minlength=len(classes))
        least = want if quota == want else {int(c): 18 // len(classes) for c in classes}
        if quota == "proportional":
            least = {int(c): 18 * int(m) // 40 for c, m in zip(classes, counts, strict=True)}
        assert len(found.kept) == 18
        assert all(kept[c] >= min(m, counts[c]) for c, m in least.items())


def test_a_review_decides_what_is_summarized(problem, tmp_path):
    model, (x, y), val = problem
    file = tmp_path / "review.csv"
    new = 1 - int(y[7])
    file.write_text(
        f"id,decision,label,new_label\r\n3,drop,0,0\r\n7,relabel,{int(y[7])},{new}\r\n11,keep,0,0\r\n0,drop,0,0\r\n"
    )
    common = dict(reg=1e-2, progress=False)
    found = summarize(model, (x, y), val, 20, review=file, **common)
    same = summarize(model, (x, y), val, 20, review=read_review(str(file)), **common)
    rest = np.delete(np.arange(40), [0, 3])
    relabelled = y.clone()
    relabelled[7] = new
    by_hand = summarize(model, (x[rest], relabelled[rest]), val, 20, **common)
    assert (found.order == same.order).all() and sorted(found.order) == list(range(40))
    assert found.order[:2].tolist() == found.reviewed_out.tolist() == [0, 3]
    assert (found.order[2:] == rest[by_hand.order]).all() and (found.kept == rest[by_hand.kept]).all()
    assert np.allclose(found.information[rest], by_hand.information) and np.isnan(found.information[[0, 3]]).all()
    assert found.labels.tolist() == relabelled.tolist() and found.accuracy == by_hand.accuracy
    assert (found.at(38) == rest).all() and "2 of those left out" in found.summary() and y[7] != new
    with pytest.raises(ArgumentError, match="m: "):
        found.at(39)
    assert len(summarize(model, (x, y), val, 0.5, review=file, **common).kept) == 19
    scores = score(model, (x, y), val, reg=1e-2)
    with pytest.raises(ArgumentError, match="review"):
        summarize(scores, m=30, method="one-shot", review=file)
    file.write_text("id,decision,label,new_label\r\n3,drop,0,0\r\n")
    once = summarize(scores, m=39, method="one-shot", review=file)
    assert once.kept.tolist() == np.delete(np.arange(40), 3).tolist()
    with pytest.raises(ArgumentError, match="review"):
        summarize(model, (x, y), val, 20, review=[3])
    file.write_text("id,decision,label,new_label\r\n400,drop,0,0\r\n")
    with pytest.raises(DataError, match="reviewed id"):
        summarize(model, (x, y), val, 20, review=file)


def test_statistics():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    value, positive = rng.integers(0, 6, 50), rng.random(50) < 0.3
    assert np.isclose(auroc(value, positive), metrics.roc_auc_score(positive, value))
    assert np.isclose(average_precision(value, positive), metrics.average_precision_score(positive, value))
    assert np.isclose(rank_correlation(value, positive), stats.spearmanr(value, positive)[0])
    assert np.isnan(auroc(value, np.zeros(50, bool))) and np.isnan(rank_correlation(value, np.ones(50)))


def test_regularisation_of_a_summary_is_that_of_training_on_few(problem):
    model, train, val = problem
    problem = linear_problem(model, train, reg=0.0, progress=False)
    n, k, m = 40, problem.k, 8
    regs, errors = part_error_curve(problem.learn, problem.r0, m, time=None, lr=None, dynamics="gd", repeats=2)
    theta, flat, rng = problem.theta.numpy(), problem.r0.numpy().ravel(), np.random.default_rng(0)
    expected = np.zeros(len(regs))
    for _ in range(2):
        order = rng.permutation(n)
        inside, others = ((rows[:, None] * k + np.arange(k)).ravel() for rows in (order[:m], order[m:]))
        for place, reg in enumerate(regs):
            kernel = theta[np.ix_(inside, inside)] + m * reg * np.eye(m * k)
            left = flat[others] - theta[np.ix_(others, inside)] @ np.linalg.solve(kernel, flat[inside])
            expected[place] += (left**2).sum() / (n - m) / 2
    assert np.allclose(errors, expected, rtol=1e-4)
    found = summarize(model, train, val, m, progress=False)
    assert found.reg in part_error_curve(problem.learn, problem.r0, m, time=None, lr=None, dynamics="gd")[0]
    assert summarize(model, train, val, 40, progress=False).reg > 0
    assert summarize(model, train, val, m, reg=0.5, progress=False).reg == 0.5
    assert summarize(model, train, val, m, time=50, lr=0.01, progress=False).reg > 0


def test_a_fifth_of_the_digits_matches_all_of_them():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = torch.from_numpy(data.images[order].reshape(-1, 64) / 16), torch.from_numpy(data.target[order] >= 5).long()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1)).double()
    train, test = (x[:500], y[:500]), (x[800:], y[800:])
    found = summarize(model, train, (x[500:800], y[500:800]), 0.2, progress=False)
    judge = linear_problem(model, train, test, reg=found.reg, progress=False)

    def accuracy(rows):
        guess = judge.predictions(np.sort(rows), convention="mean")[:, 0] > 0.5
        return float((guess == test[1].bool()).double().mean())

    rng = np.random.default_rng(1)
    drawn = np.mean([accuracy(rng.permutation(500)[:100]) for _ in range(5)])
    assert accuracy(found.kept) > max(drawn + 0.02, accuracy(np.arange(500)) - 0.015)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.3])
def test_noise_is_estimated_where_wrong_labels_shrink_the_outputs(noise):
    """Left-out predictions of real noisy labels: their scale falls with the noise, which must not hide the noise."""
    x, clean = blobs(200, 4, seed=5)
    rng = np.random.default_rng(1)
    wrong = np.zeros(200, dtype=bool)
    wrong[rng.permutation(200)[: round(noise * 200)]] = True
    y = torch.where(torch.from_numpy(wrong), (clean + torch.from_numpy(rng.integers(1, 4, 200))) % 4, clean)
    found = find_mislabeled(network(4, width=64), (x, y), truth=wrong, progress=False)
    assert found.auroc > 0.97
    assert abs(found.noise_rate - noise) < 0.03
    assert abs(found.error_rate - (~wrong[found.flagged]).mean()) < 0.17 and found.flagged.sum() > 100 * noise
