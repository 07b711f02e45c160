"""The Jacobian engine against autograd, module by module, and its promise to leave the model alone."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

import sui_fast
from sui_fast import ArgumentError, CoverageError, DataError, jacobian, ntk
from sui_fast.jacobians import as_samples, portions
from sui_fast.jacobians import gram as kernels
from sui_fast.jacobians.quiet import modules_as_they_are


class Tied(nn.Module):
    """Embedding used as output layer too, and a bare parameter added without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6, padding_idx=3), nn.LayerNorm(6)
        self.position = nn.Parameter(torch.randn(5, 6))

    def forward(self, tokens):
        hidden = self.norm(self.embed(tokens) + self.position)
        return F.linear(hidden.mean(1), self.embed.weight)[:, :3]


class Twice(nn.Module):
    """One layer called twice, an elementwise scale, an in-place function, a parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.layer, self.out, self.unused = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.out(torch.relu_(self.layer(torch.tanh(self.layer(x))) * self.scale) + x)


class Position(nn.Module):
    """A position embedding: its result [s, o] has no sample dimension, and s may equal the batch size."""

    def __init__(self):
        super().__init__()
        self.embed, self.position, self.out = nn.Embedding(9, 4), nn.Embedding(4, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.out(torch.tanh(self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))).sum(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


def sequence(*layers):
    return nn.Sequential(*layers)


CASES = {
    "mlp": lambda: (
        sequence(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 7, bias=False), nn.GELU(), nn.Linear(7, 3)),
        torch.randn(7, 6),
    ),
    "positions": lambda: (
        sequence(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(12, 2)),
        torch.randn(5, 3, 6),
    ),
    "conv2d": lambda: (
        sequence(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2, groups=2),
            nn.BatchNorm2d(4),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 3, 1, padding_mode="circular", padding=1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.LazyLinear(2),
        ),
        torch.randn(7, 2, 7, 6),
    ),
    "reflect": lambda: (
        sequence(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        torch.randn(5, 2, 7, 6),
    ),
    "replicate": lambda: (
        sequence(nn.Conv1d(2, 3, 4, padding=2, padding_mode="replicate"), nn.Flatten()),
        torch.randn(3, 2, 5),
    ),
    "conv1d": lambda: (
        sequence(
            nn.Conv1d(2, 4, 3, padding="same"), nn.Tanh(), nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(), nn.LazyLinear(2)
        ),
        torch.randn(7, 2, 9),
    ),
    "even kernel": lambda: (
        sequence(nn.Conv1d(2, 3, 4, padding="same", dilation=3), nn.Flatten()),
        torch.randn(3, 2, 8),
    ),
    "conv3d": lambda: (
        sequence(nn.Conv3d(1, 3, 2, padding=(1, 0, 1)), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)),
        torch.randn(6, 1, 3, 4, 3),
    ),
    "transposed": lambda: (
        sequence(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)),
        torch.randn(5, 2, 3, 3),
    ),
    "norms": lambda: (
        sequence(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Tanh(), nn.BatchNorm1d(8), nn.PReLU(), nn.Linear(8, 2)
        ),
        torch.randn(7, 6),
    ),
    "tied": lambda: (Tied(), torch.randint(0, 11, (7, 5))),
    "twice": lambda: (Twice(), torch.randn(7, 6)),
    "position": lambda: (Position(), torch.randint(0, 9, (6, 4))),
    "position, batch = length": lambda: (Position(), torch.randint(0, 9, (4, 4))),
    "encoder": lambda: (Encoder(), torch.randn(5, 4, 8)),
    "recurrent": lambda: (Recurrent(), torch.randn(5, 4, 4)),
    "single": lambda: (sequence(nn.Linear(3, 2)), torch.randn(1, 3)),
}


def build(name):
    torch.manual_seed(0)
    model, x = CASES[name]()
    model(x)
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, x.double() if x.is_floating_point() else x


def autograd_rows(model, x):
    parameters = [p for p in model.parameters() if p.requires_grad]
    modes = [m.training for m in model.modules()]
    out = model.eval()(x)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    rows = []
    for value in out.reshape(-1):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
            )
        )
    return torch.stack(rows)


def close(a, b):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-12 * max(float(b.abs().max()), 1e-30)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [64, 3])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_autograd(name, batch_size):
    model, x = build(name)
    model.train()
    true = autograd_rows(model, x)
    jac = jacobian(model, x, batch_size=batch_size)
    assert jac.shape == true.shape and jac.coverage == 1.0
    close(jac.rows(), true)
    for samples in (None, 2):
        for backend in ("auto", "reference"):
            with sui_fast.use_backend(backend):
                close(torch.cat([part.clone() for part in jac.iter_rows(samples)]), true)
    close(jac.gram(), true @ true.T)
    assert torch.equal(jac.gram(), jac.gram().T)
    tangents, cotangents = torch.randn(2, true.shape[1]).double(), torch.randn(true.shape[0], 3).double()
    close(jac.jvp(tangents), true @ tangents.T)
    close(jac.vjp(cotangents), cotangents.T @ true)
    part = x[: max(1, len(x) // 2)]
    close(ntk(model, x, part), true @ true[: len(part) * jac.k].T)
    close(jac.outputs, model.eval()(x).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_model_is_left_as_found(name):
    model, x = build(name)
    model.train()
    next(model.modules()).custom = 1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    needs, rng = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    jacobian(model, x).gram()
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needs and all(p.grad is None for p in model.parameters())
    assert hooks == [
        (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


class Fails(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.layer, self.drop, self.after = nn.Linear(3, 2), nn.Dropout(0.3), after
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        if self.calls > self.after:
            raise RuntimeError("on purpose")
        return self.drop(self.layer(x))


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_model_is_left_as_found_after_an_exception(after):
    model = Fails(after).train()
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        jacobian(model, torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), batch_size=2)
    assert model.training and model.drop.training and float(model.calls) == 0
    assert torch.equal(rng, torch.get_rng_state()) and model.layer.weight.grad is None


def test_buffers_that_the_forward_pass_changes_are_restored():
    model = Fails(10**9)
    jacobian(model, torch.randn(9, 3), batch_size=2)
    assert float(model.calls) == 0


@pytest.mark.parametrize("params", [["0"], ["2.bias"], lambda name, p: name.endswith("weight"), "all"])
def test_chosen_parameters(params):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    x = torch.randn(5, 3).double()
    jac = jacobian(model, x, params=params)
    for p in model.parameters():
        p.requires_grad_(True)
    true, begin, columns = autograd_rows(model, x), 0, []
    for name, p in model.named_parameters():
        if name in jac.parameter_names:
            columns += range(begin, begin + p.numel())
        begin += p.numel()
    assert columns
    close(jac.rows(), true[:, columns])


def test_sketch_keeps_inner_products():
    model, x = build("mlp")
    jac = jacobian(model, x)
    theta, total = jac.gram(), 0
    for seed in range(200):
        z = jac.sketch(64, seed).reshape(len(theta), -1)
        total = total + z @ z.T / 200
    assert float((total - theta).abs().max()) < 0.15 * float(theta.abs().max())


def test_dtype_works_on_a_private_copy():
    model = nn.Linear(3, 2)
    jac = jacobian(model, torch.randn(4, 3), dtype=torch.float64)
    assert jac.dtype == torch.float64 and model.weight.dtype == torch.float32


class Stores(nn.Module):
    """A parameter written into a tensor; with ``skip`` only where the data say so, which vmap cannot follow."""

    def __init__(self, skip):
        super().__init__()
        self.layer, self.first, self.skip = nn.Linear(4, 2), nn.Parameter(torch.randn(4)), skip

    def forward(self, x):
        y = torch.tanh(x)
        if not self.skip or bool((x[:, 0] > 0).any()):
            y[:, 1] = self.first[:1]
        return self.layer(y)


@pytest.mark.parametrize("skip, engine", [(False, "torch.func"), (True, "one by one")])
def test_the_general_path_is_taken_where_rules_do_not_see(skip, engine):
    torch.manual_seed(0)
    model, x = Stores(skip).double(), torch.rand(5, 4).double() + 0.1
    jac = jacobian(model, x)
    assert jac.general == {"first": "__setitem__"}
    assert jac.engines == {"first": engine, "layer.weight": "rules", "layer.bias": "rules"}
    close(jac.rows(), autograd_rows(model, x)[:, [p for name in jac.parameter_names for p in columns_of(model, name)]])


def columns_of(model, wanted):
    begin = 0
    for name, p in model.named_parameters():
        if name == wanted:
            return range(begin, begin + p.numel())
        begin += p.numel()


def test_position_embeddings_have_rules():
    model, x = build("position, batch = length")
    assert jacobian(model, x).general == {}


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0)


class Waits(nn.Module):
    """The number of steps depends on all samples of a batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        for _ in range(1 + int(x.abs().max() > 1)):
            x = torch.tanh(self.layer(x))
        return x


def test_control_flow_over_the_batch_is_refused():
    x = torch.tensor([[0.1, 0.2, 0.3], [2.0, 0.1, 0.2], [0.3, 0.2, 0.1]])
    with pytest.raises(CoverageError, match="sample"):
        jacobian(Waits(), x)


def test_one_sample_proves_nothing_about_more():
    model = Mixes()
    jacobian(model, torch.randn(1, 3))
    with pytest.raises(CoverageError):
        jacobian(model, torch.randn(5, 3))


def test_sparse_gradients():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(torch.tanh(self.embed(x)).sum(1))

    torch.manual_seed(0)
    model, x = Sparse().double(), torch.randint(0, 9, (5, 4))
    rows = jacobian(model, x).rows()
    model.embed.sparse = False
    close(rows, autograd_rows(model, x))


def test_samples_that_interact_are_refused():
    with pytest.raises(CoverageError, match="layer"):
        jacobian(Mixes(), torch.randn(6, 3))
    with pytest.raises(CoverageError, match="running statistics"):
        jacobian(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)), torch.randn(6, 3))


class Gated(nn.Module):
    """Outputs depend on one sample each while the gate is zero; its gradients depend on all."""

    def __init__(self, gate):
        super().__init__()
        self.layer, self.mix, self.gate = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.full((2,), gate))

    def forward(self, x):
        return self.layer(x) + self.gate * torch.tanh(self.mix(x - x.mean(0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_samples_that_interact_behind_a_closed_gate_are_refused(gate, dtype):
    torch.manual_seed(0)
    with pytest.raises(CoverageError, match="one sample"):
        jacobian(Gated(gate).to(dtype), torch.randn(6, 3).to(dtype))


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) * torch.rand(())


def test_random_models_are_refused():
    with pytest.raises(CoverageError):
        jacobian(Random(), torch.randn(6, 3))


def test_bad_outputs():
    with pytest.raises(ArgumentError, match="outputs"):
        jacobian(nn.Linear(3, 2), torch.randn(4, 5, 3))
    bad = torch.randn(30, 3)
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(DataError, match="sample 17"):
        jacobian(model, torch.where(torch.arange(30)[:, None] == 17, torch.nan, bad))
    with pytest.raises(DataError, match="sample 17"):
        jacobian(model, bad, outputs=lambda m, b: m(b) + torch.log(1 - (b[:, :1] == bad[17, 0]).float()))
    with pytest.raises(ArgumentError, match="params"):
        jacobian(model, bad, params=["nothing"])


def test_golden_rows(golden):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1))
    model.load_state_dict({k[7:]: torch.tensor(golden[k]) for k in golden if k.startswith("param__")})
    rows = jacobian(model, golden["x_train"][:5], dtype=torch.float64).rows().numpy()
    np.testing.assert_allclose(rows, golden["jac_train_first5"], rtol=2e-6, atol=1e-7)


def test_samples_from_every_kind_of_data():
    x, y = torch.randn(7, 3), torch.arange(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    kinds = [
        (x, y),
        (x.numpy()[::-1][::-1], y.numpy()),
        loader,
        loader.dataset,
        list(loader),
        {"x": x, "labels": y},
        [{"x": x[:4], "labels": y[:4]}, {"x": x[4:], "labels": y[4:]}],
    ]
    for data in kinds:
        samples = as_samples(data, with_targets=True)
        got = [b["x"] if isinstance(b, dict) else b for b in samples.batches(2)]
        assert samples.n == 7 and torch.equal(torch.cat(got), x) and torch.equal(samples.targets, y)
    shuffled = torch.utils.data.DataLoader(loader.dataset, batch_size=3, shuffle=True)
    with pytest.raises(DataError, match="shuffle"):
        as_samples(shuffled, with_targets=True)
    with pytest.raises(DataError, match="at least one"):
        as_samples((x[:0], y[:0]), with_targets=True)


def test_patches_end_with_the_last_thread():
    """What is replaced while a model is captured binds the threads inside alone, in whatever order they leave."""
    before = nn.Module._apply, CheckpointFunction.apply
    inside, leave = threading.Barrier(2), [threading.Event(), threading.Event()]
    refused = []

    def visit(number):
        with modules_as_they_are(), modules_as_they_are():
            inside.wait(10)
            try:
                nn.Linear(1, 1).double()
            except NotImplementedError:
                refused.append(number)
            leave[number].wait(10)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for number, thread in enumerate(threads):  # the first to come is the first to leave
        assert nn.Linear(1, 1).double().weight.dtype == torch.float64
        leave[number].set()
        thread.join()
    assert sorted(refused) == [0, 1]
    assert (nn.Module._apply, CheckpointFunction.apply) == before and "apply" not in vars(CheckpointFunction)


@pytest.mark.parametrize("name", ["mlp", "encoder layer"])
def test_a_batch_is_let_go_without_a_collection_of_cycles(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    if name == "encoder layer":  # results that are turned, so that gradients are as well
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(nn.Linear(6, 8), layer, nn.Flatten(), nn.Linear(24, 1)).eval()
    x = torch.randn(12, 6) if name == "mlp" else torch.randn(12, 3, 6)
    seen = []

    def watch(jac):
        seen.extend(weakref.ref(x) for use, g in jac._uses for x in (use.saved, g))
        return jac.outputs, []

    portions(model, x, watch, batch_size=4)
    seen.clear()
    gc.disable()
    try:
        portions(model, x, watch, batch_size=4)
        assert len(seen) >= 6 and all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_large_tables_do_not_shrink_the_tiles_of_a_kernel(monkeypatch):
    """Only the tokens at hand are formed, not the table."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50_000, 64), nn.Linear(64, 32), nn.Tanh(), nn.Flatten(), nn.Linear(160, 2))
    tokens = torch.randint(0, 50_000, (40, 5))
    jac, tiles = jacobian(model, tokens, dtype=torch.float64), []
    product = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda one, *rest: tiles.append(one) or product(one, *rest))
    theta = jac.gram(memory=1 << 23)
    assert len(tiles) <= 10
    rows = jac.rows()
    torch.testing.assert_close(theta, rows @ rows.T)
    torch.testing.assert_close(jac.gram(memory=1), theta)
    assert len(tiles) > 800  # tiles of one sample
