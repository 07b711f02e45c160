"""Groups, overlap, sources, curves, validation and influence functions against brute force."""

import copy

import numpy as np
import pytest
import torch
from problems import blobs, network
from torch import nn

from sui_fast import (
    ArgumentError,
    ModelError,
    StabilityError,
    compare_sources,
    detect_adversarial,
    find_undersampled,
    influence_functions,
    information_curves,
    jacobian,
    ntk,
    overlap,
    redundancy,
    score,
    validate_linearization,
)

REG = 0.02


def close(a, b, rtol: float = 1e-9) -> bool:
    return np.allclose(a, b, rtol=rtol, atol=0)


def refit(rows: np.ndarray, residual: np.ndarray, kept: np.ndarray, shift: float, steps=None, eta=0.0) -> np.ndarray:
    """Weights of the linearised network trained on some samples, to the end or for some steps; rows [n, k, d]."""
    j, r = rows[kept].reshape(-1, rows.shape[2]), residual[kept].ravel()
    if steps is None:
        return np.linalg.solve(j.T @ j + shift * np.eye(j.shape[1]), j.T @ r)
    w = np.zeros(j.shape[1])
    for _ in range(steps):
        w = w - eta * (j.T @ (j @ w - r) + shift * w)
    return w


def linearised(model, train, val):
    jac, probe = jacobian(model, train), jacobian(model, val)
    y = train[1].double()[:, None] if jac.k == 1 else nn.functional.one_hot(train[1], jac.k).double()
    rows = jac.rows().numpy().reshape(jac.n, jac.k, -1)
    return rows, (y - jac.outputs).numpy(), probe.rows().numpy().reshape(probe.n, probe.k, -1)


def information_of(model, train, val, out, steps=None, lr=0.0) -> tuple[float, float]:
    rows, residual, probes = linearised(model, train, val)
    n = len(rows)
    whole = refit(rows, residual, np.arange(n), n * REG, steps, lr / n)
    change = refit(rows, residual, np.setdiff1d(np.arange(n), out), n * REG, steps, lr / n) - whole
    return (change**2).sum() / 2, ((probes @ change) ** 2).sum(1).mean() / 2


@pytest.mark.parametrize("time", [1, 80])
def test_groups_of_an_unfinished_training(problem, time):
    """Overlap, redundancy and sources after some steps of gradient descent, each group retrained without."""
    model, train, (vx, vy) = problem
    common = dict(reg=REG, time=time, lr=0.1, progress=False)
    groups, owner = np.arange(40) % 3, np.arange(40) >= 12
    found = overlap(model, train, vx, groups=groups, by="si", **common)
    alone = [information_of(model, train, vx, np.flatnonzero(groups == g), time, 0.1)[0] for g in range(3)]
    both = [information_of(model, train, vx, np.flatnonzero(groups != g), time, 0.1)[0] for g in (2, 1, 0)]
    assert close(found.joint, both, 1e-8) and close(found.first, [alone[0], alone[0], alone[1]], 1e-8)
    assert close(found.overlap, found.first + found.second - both)
    told = redundancy(model, train, vx, [3, 17], partners=2, by="fsi", **common)
    for row, sample in enumerate((3, 17)):
        for column, partner in enumerate(told.partners[row]):
            pair = information_of(model, train, vx, [sample, partner], time, 0.1)[1]
            rest = information_of(model, train, vx, [partner], time, 0.1)[1]
            assert np.isclose(told.information_without[row, column], pair - rest, rtol=1e-7, atol=1e-9 * pair)
    parts = {name: tuple(z[owner == flag] for z in train) for name, flag in (("few", False), ("many", True))}
    sources = compare_sources(model, parts, {"first": vx[:10], "all": vx}, **common)
    for place, flag in enumerate((False, True)):
        out = np.flatnonzero(owner == flag)
        si, fsi = information_of(model, train, vx, out, time, 0.1)
        assert close([sources.group_si[place], sources.group_fsi[place, 1]], [si, fsi], 1e-8)
        assert close(sources.group_fsi[place, 0], information_of(model, train, vx[:10], out, time, 0.1)[1], 1e-8)


@pytest.mark.parametrize("by", ["si", "fsi"])
def test_overlap_of_samples_and_groups(problem, by):
    model, train, val = problem
    place = by == "fsi"
    found = overlap(model, train, val, [(0, 1), (5, 17)], by=by, reg=REG, progress=False)
    for p, (i, j) in enumerate(found.pairs):
        alone = [information_of(model, train, val, [s])[place] for s in (i, j)]
        both = information_of(model, train, val, [i, j])[place]
        got = [found.first[p], found.second[p], found.joint[p], found.overlap[p]]
        assert close(got, [*alone, both, sum(alone) - both], rtol=1e-8)
    groups = np.arange(40) % 3
    found = overlap(model, train, val, groups=groups, by=by, reg=REG, progress=False)
    assert found.pairs == [(0, 1), (0, 2), (1, 2)]
    both = information_of(model, train, val, np.flatnonzero(groups < 2))[place]
    assert close(found.joint[0], both, rtol=1e-8)
    assert found.table.num_rows == 3
    with pytest.raises(ArgumentError, match="pairs"):
        overlap(model, train, val, groups=groups, pairs=[(0, 7)], reg=REG)
    with pytest.raises(ArgumentError, match="pairs"):
        overlap(model, train, val)


def test_a_duplicate_is_named_as_the_stand_in(problem):
    model, (x, y), val = problem
    train = torch.cat([x, x[:4]]), torch.cat([y, y[:4]])
    found = redundancy(model, train, val, [0, 1, 2, 3], partners=20, reg=1e-4, progress=False)
    twins = np.array([[40], [41], [42], [43]]) == found.partners
    assert twins.any(1).all()
    assert (found.information_without[twins] > 2 * found.information).all()
    assert found.summary() and found.table.num_rows == 80


def test_sources_as_groups(problem):
    model, (x, y), (vx, vy) = problem
    parts = {"a": (x[:15], y[:15]), "b": (x[15:], y[15:])}
    found = compare_sources(model, parts, {"a": vx[:10], "b": vx[10:]}, reg=REG, progress=False)
    for i, out in enumerate((np.arange(15), np.arange(15, 40))):
        for j, probes in enumerate((vx[:10], vx[10:])):
            si, fsi = information_of(model, (x, y), probes, out)
            assert close([found.group_si[i], found.group_fsi[i, j]], [si, fsi], rtol=1e-8)
    si, fsi = information_of(model, (x, y), vx, np.arange(40))
    assert close(found.overlap_fsi[0, 1], found.overlap_fsi[0, 0] + found.overlap_fsi[1, 1] - fsi)
    each = score(model, (x, y), vx[:10], reg=REG)
    assert close(found.sample_fsi[:, 0], each["fsi"], 1e-6) and close(found.sample_si, each["si"], 1e-6)
    assert close(found.fsi[1, 0], each["fsi"][15:].mean(), 1e-6)
    with pytest.raises(ArgumentError, match="sources"):
        compare_sources(model, {"a": (x, y)}, {"a": vx})


@pytest.mark.parametrize("dynamics", ["gd", "flow"])
def test_curves_are_scores_at_every_time(problem, dynamics):
    model, train, val = problem
    found = information_curves(model, train, val, times=[1, 10, 200], lr=0.05, dynamics=dynamics, progress=False)
    for number, time in enumerate((1, 10, 200)):
        once = score(model, train, val, time=time, lr=0.05, dynamics=dynamics)
        assert close(found.si[number], once["si"], rtol=1e-8)
        assert close(found.fsi[number], once["fsi"], rtol=1e-8)
    assert len(information_curves(model, train, points=30, progress=False).times) >= 28
    best = score(model, train, reg="auto", measures=("si",), progress=False).settings["reg"]
    curves = [information_curves(model, train, val, points=4, reg=reg, progress=False) for reg in ("auto", best)]
    assert close(curves[0].si, curves[1].si) and close(curves[0].fsi, curves[1].fsi)
    with pytest.raises(ArgumentError, match="times"):
        information_curves(model, train, times=[-1.0])


def test_a_linear_network_is_its_own_linearisation():
    x, y = blobs(30, 2)
    model = nn.Linear(6, 1).double()
    before = copy.deepcopy(model.state_dict())
    common = dict(samples=12, time=300, reg=0.01, progress=False)
    found = validate_linearization(model, (x, y), x[:9], **common)
    assert close(found.real_weights, found.linear_weights, rtol=1e-6)
    assert close(found.real_predictions, found.linear_predictions, rtol=1e-6)
    assert found.pearson_weights > 0.999999 and found.correlations["influence"]["weights"]["spearman"] > 0.5
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_own_training_function_and_one_by_one():
    x, y = blobs(24, 2)
    model = network(1, width=8)

    def train(own, kept):
        optimizer = torch.optim.SGD(own.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            (0.5 * (own(x[kept])[:, 0] - y[kept]).square().mean()).backward()
            optimizer.step()

    common = dict(samples=[0, 5, 9, 20], time=60, lr=0.1, progress=False)
    mine = validate_linearization(model, (x, y), x, train_fn=train, influence=None, **common)
    ours = validate_linearization(model, (x, y), x, batch_size=7, **common)
    assert close(mine.real_weights, ours.real_weights, rtol=1e-8)
    assert close(mine.real_predictions, ours.real_predictions, rtol=1e-8)
    assert mine.speedup is None and ours.speedup > 0
    with pytest.raises(StabilityError, match="lr"):
        validate_linearization(model, (x, y), x, samples=2, time=500, lr=1e3, progress=False)
    for wrong in (lambda own, kept: None, lambda own, kept: nn.Linear(6, 1)):
        with pytest.raises(ArgumentError, match="train_fn: expected a"):
            validate_linearization(model, (x, y), x, train_fn=wrong, **common)


@pytest.mark.parametrize("method", ["exact", "cg", "lissa"])
def test_influence_functions_of_a_linear_network(method):
    x, y = blobs(25, 2)
    model, n = nn.Linear(6, 1).double(), 25
    j = np.hstack([x.numpy(), np.ones((n, 1))])
    hessian = j.T @ j / n + REG * np.eye(7)
    start = torch.zeros(7, dtype=torch.float64)
    w = np.linalg.solve(hessian, j.T @ y.numpy() / n)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w[None, :6]))
        model.bias.copy_(torch.from_numpy(w[6:]))
    gradient = j * (j @ w - y.numpy())[:, None]
    change = np.linalg.solve(hessian, gradient.T).T / n
    found = influence_functions(
        model, (x, y), x[:5], reg=REG, method=method, start=start, tolerance=1e-10, iterations=1000,
        progress=False,
    )  # fmt: skip
    tolerance = 1e-2 if method == "lissa" else 1e-6
    assert found.residual < tolerance and found.method == method
    assert close(found.weight_sqnorm, (change**2).sum(1), rtol=tolerance)
    assert close(found.prediction_sqnorm, ((change @ j[:5].T) ** 2).mean(1), rtol=tolerance)


def test_influence_of_a_network_by_two_methods(problem):
    model, train, val = problem
    common = dict(samples=[0, 3, 8], reg=0.5, damping=20.0, progress=False)
    a = influence_functions(model, train, val, method="exact", **common)
    b = influence_functions(model, train, val, method="cg", tolerance=1e-10, batch_size=7, **common)
    assert close(a.weight_sqnorm, b.weight_sqnorm, rtol=1e-5)
    assert close(a.prediction_sqnorm, b.prediction_sqnorm, rtol=1e-5)
    with pytest.raises(ArgumentError, match="samples"):
        influence_functions(model, train, samples=[40])


def test_own_training_is_judged_by_the_models_it_makes():
    """Running means that a training moves count in what its model predicts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    (x, y), made = blobs(16, 2), []

    def train(own, kept):
        own.train()
        for _ in range(5):
            (own(x[kept])[:, 0] - y[kept]).square().mean().backward()
            with torch.no_grad():
                for p in own.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        made.append(own.eval())

    found = validate_linearization(model, (x, y), x[:5], samples=[1, 7], time=5, lr=0.1, train_fn=train, progress=False)
    first, *others = (own(x[:5]).detach() for own in made)
    assert close(found.real_predictions, [float((f - first).square().mean()) for f in others])
    assert model[1].num_batches_tracked == 0


def test_attention_is_differentiated_twice_and_trained_many_at_once():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), layer, nn.Flatten(), nn.Linear(24, 1)).double()
    x, y = blobs(16, 2)
    common = dict(samples=[0, 5], reg=0.5, damping=20.0, progress=False)
    exact, cg = (influence_functions(model, (x, y), x[:4], method=method, **common) for method in ("exact", "cg"))
    assert close(exact.weight_sqnorm, cg.weight_sqnorm, rtol=1e-5)
    assert close(exact.prediction_sqnorm, cg.prediction_sqnorm, rtol=1e-5)
    found = validate_linearization(model, (x, y), x, samples=2, time=1, lr=1e-3, influence=None, progress=False)
    assert close(found.real_weights, found.linear_weights, rtol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_casts_inside_is_validated_in_its_own_type():
    class Casting(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    torch.manual_seed(0)
    x, y = blobs(20, 2)
    common = dict(samples=3, time=50, influence=None, progress=False)
    with pytest.raises(ModelError, match=r"pass dtype=torch\.float32"):
        validate_linearization(Casting(6, 1), (x, y), x, **common)
    found = validate_linearization(Casting(6, 1), (x, y), x, dtype=torch.float32, **common)
    assert close(found.real_weights, found.linear_weights, rtol=1e-2)


def test_rarity_is_information_where_the_nearest_are_far_averaged_twice():
    (x, y), model = blobs(20, 3), network(3)
    found = find_undersampled(model, (x, y), blobs(9, 3, seed=5), neighbours=4, reg=0.1, progress=False)
    kernel = ntk(model, x, dtype=torch.float64).view(20, 3, 20, 3).diagonal(dim1=1, dim2=3).sum(2)
    likeness = kernel / (kernel.diag()[:, None] * kernel.diag()).sqrt()
    near = {}
    for i in range(20):
        others = [j for j in range(20) if j != i and y[j] == y[i]]
        near[i] = sorted(others, key=lambda j: -likeness[i, j])[:4]
    value = {i: found.measures["fsi"][i] * (1 - float(likeness[i, near[i]].mean())) for i in near}
    for _ in range(2):
        value = {i: np.mean([value[j] for j in (i, *near[i])]) for i in near}
    assert close(found.value, list(value.values()))
    number, _, size, mean = found.clusters[0]
    assert close(mean, found.value[found.cluster == number].mean()) and size == (found.cluster == number).sum()
    assert f"on average {mean / found.value.mean():.1f} times the value of all" in found.summary()
    plain = find_undersampled(model, (x, y), blobs(9, 3, seed=5), neighbours=0, reg=0.1, progress=False)
    assert close(plain.value, plain.measures["fsi"])


def test_rare_kind_and_strange_inputs_are_found():
    x, y = blobs(150, 4)
    rare = (y == 3).numpy()
    keep = np.flatnonzero(~rare | (np.cumsum(rare) <= 8))
    train, truth = (x[keep], y[keep] % 2), rare[keep]
    val = blobs(60, 4, seed=5)
    found = find_undersampled(network(1), train, (val[0], val[1] % 2), truth=truth, progress=False)
    assert found.auroc > 0.75 and found.auroc > found.aurocs["si"] - 0.1
    assert len(found.cluster) == len(keep) and sum(row[2] for row in found.clusters) == len(keep)
    marked = np.zeros(len(keep), dtype=bool)
    marked[:6] = True
    strange = train[0].clone()
    strange[:6] += 3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = detect_adversarial(network(1), (strange, train[1]), truth=marked, progress=False)
    assert seen.auroc > 0.85 and set(seen.aurocs) >= {"si", "leverage", "loo_margin"}
    with pytest.raises(ArgumentError, match="by"):
        detect_adversarial(network(1), train, by="fsi", progress=False)


def test_every_result_draws_itself(problem, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from sui_fast import find_mislabeled, summarize

    model, train, val = problem
    quiet = dict(progress=False)
    results = [
        find_mislabeled(model, train, val, **quiet),
        summarize(model, train, val, 30, **quiet),
        summarize(model, train, m=30, **quiet),
        overlap(model, train, val, [(0, 1)], **quiet),
        redundancy(model, train, val, 3, **quiet),
        information_curves(model, train, val, points=4, **quiet),
        compare_sources(model, {"a": train, "b": train}, {"a": val[0]}, **quiet),
        find_undersampled(model, train, val, **quiet),
        detect_adversarial(model, train, truth=np.arange(40) < 5, **quiet),
        influence_functions(model, train, val, samples=[0, 1], **quiet),
        validate_linearization(model, train, val, samples=3, time=20, **quiet),
    ]
    for number, result in enumerate(results):
        assert result.title and len(result.summary()) > 20 and str(result).startswith(result.title)
        assert result.table.num_rows > 0 and len({len(c) for c in result.columns().values()}) == 1
        figure = result.plot()
        assert isinstance(figure, Figure) and figure.axes[0].get_title() == result.title
        result.plot(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
        with pytest.raises(AttributeError):
            result.title = "other"


@pytest.mark.parametrize("pairs", [[([0, 1], [2])], [(0, 1, 2)], [3], [({}, 1)]])
@pytest.mark.parametrize("groups", [None, [0, 1, 1, 2]])
def test_pairs_that_are_none_are_named(pairs, groups):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match="pairs: expected pairs of"):
        overlap(torch.nn.Linear(3, 1), (x, x[:, :1]), x, pairs, groups=groups, reg=0.1, progress=False)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (dict(groups=[0.0, np.nan, 1.0, np.nan]), "groups: expected finite labels"),
        (dict(groups=[None, "a", "a", "b"]), "groups: expected labels of one kind"),
        (dict(pairs=[(0, 4)]), "pairs: expected numbers of samples"),
    ],
)
def test_groups_and_pairs_that_would_mean_no_sample_are_named(asked, match):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match=match):
        overlap(torch.nn.Linear(3, 1), (x, x[:, :1]), x, reg=0.1, progress=False, **asked)


def test_one_sample_has_no_stand_in(problem):
    model, (x, y), _ = problem
    with pytest.raises(ArgumentError, match="at least two samples"):
        redundancy(model, (x[:1], y[:1]), samples=1, reg=0.1, progress=False)
