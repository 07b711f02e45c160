"""Scores from training's own backward passes: the gradients are those of autograd, the adapters feed them."""

import time

import pytest
import torch
from torch import nn

import sui_fast
from sui_fast.ops.sketching.sums import TensorSums
from sui_fast.training import TrainingScores


def data(n=24):
    torch.manual_seed(0)
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_and_scores_are_those_of_autograd(reduction):
    (x, y), net = data(), model()
    with TrainingScores(net, rank=512, reduction=reduction) as live:
        for ids in torch.arange(24).split(5):
            nn.functional.cross_entropy(net(x[ids]), y[ids], reduction=reduction).backward()
            live.step(ids)
    assert live.coverage == 1.0 and not any(m._forward_hooks for m in net)
    ids, z = live.features()
    rows = []
    for i in range(24):
        loss = nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    rows = torch.stack(rows)
    assert list(ids) == list(range(24))
    assert float((z @ z.T - rows @ rows.T).norm() / (rows @ rows.T).norm()) < 0.2
    exact = z.double()
    full = torch.linalg.solve(exact.T @ exact + 2.4 * torch.eye(512), exact.sum(0))
    rest = exact[1:]
    without = torch.linalg.solve(rest.T @ rest + 2.4 * torch.eye(512), rest.sum(0))
    got = live.scores(reg=0.1)["si"][0]
    assert got == pytest.approx(float((full - without).square().sum() / 2), rel=1e-4)


def test_a_table_of_positions_is_left_out_and_counted():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x + self.place(torch.arange(5))[None].mean(1))

    (x, y), net = data(), Placed()
    with TrainingScores(net) as live:
        nn.functional.cross_entropy(net(x), y).backward()
        live.step(range(24))
        nn.functional.cross_entropy(net(x[:9]), y[:9]).backward()
        live.step(range(9))
    assert live.coverage == 21 / 51 and len(live.features()[0]) == 24


def test_misuse_is_named():
    (x, y), net = data(), model()
    with TrainingScores(net) as live:
        with pytest.raises(sui_fast.ArgumentError, match="backward pass"):
            live.step([1])
        nn.functional.cross_entropy(net(x), y).backward()
        with pytest.raises(sui_fast.ArgumentError, match="ids"):
            live.step([1, 2])
        nn.functional.cross_entropy(net(x), y).backward()
        with pytest.raises(sui_fast.ArgumentError, match="second"):
            net(x)
    with pytest.raises(sui_fast.ArgumentError, match="layers"):
        TrainingScores(net.requires_grad_(False))


class Exact(TensorSums):
    """In the place of TensorSums: the rows themselves, parameter after parameter."""

    kernels = None

    def __init__(self, n, k, rank, seed, like):
        self.out, self.rank, self.parts = torch.zeros(n, 1, 0), rank, {}

    def clear(self):
        self.parts = {}

    def _put(self, stream, rows):
        rows = rows.flatten(1).double()
        mine = self.parts.get(stream)
        if mine is not None and mine.shape[1] < rows.shape[1]:  # the same weight without its bias
            rows, mine = mine, rows
        if mine is not None:
            mine[:, : rows.shape[1]] += rows
        self.parts[stream] = rows if mine is None else mine

    def outer(self, a, g, stream, ones=False):
        rows = g[:, 0].transpose(1, 2).to(a.dtype) @ a
        self._put(stream, torch.cat([rows.flatten(1), g[:, 0].sum(1)], 1) if ones else rows)

    def index(self, token, g, vocabulary, stream):
        hot = nn.functional.one_hot(token.clamp(min=0), vocabulary) * (token >= 0)[..., None]
        self._put(stream, hot.to(g.dtype).transpose(1, 2) @ g[:, 0])

    def rows(self, rows, stream):
        self._put(stream, rows)

    def layer(self, *_):
        return False  # nothing was added: by outer, then

    def flush(self, *_):
        pass

    def total(self):
        rows = torch.cat([self.parts[stream] for stream in sorted(self.parts)], 1)
        return nn.functional.pad(rows, (0, self.rank - rows.shape[1]))[:, None]


class Net(nn.Module):
    """Calls its parts one after another; the last result is averaged to logits."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x.flatten(2).mean(2) if x.ndim > 2 else x


class Scale(nn.Module):
    """1 + w, as in Gemma's norms, and a bias alone."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size) / 3), nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * (1 + self.weight) + self.bias


class Tied(nn.Module):
    """One table as embedding and as output layer with a bias of its own; a layer called twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 5, padding_idx=0), nn.Linear(5, 5), nn.Linear(5, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(self.embed(x)))))).mean(1)[:, :3]


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.layer = nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)

    def forward(self, x):
        return self.layer(self.enter(x).transpose(0, 1)).mean(0)[:, :3]


def frozen():
    net = Net(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net.parts[0].weight.requires_grad_(False)
    net.parts[2].bias.requires_grad_(False)
    return net


def inputs(*shape):
    return lambda: torch.randn(9, *shape)


TAPPED = {
    "bias alone, frozen weight": (frozen, inputs(6), 1.0),
    "convolutions": (lambda: Net(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 3, 1, groups=1)), inputs(2, 6, 6), 1.0),
    "grouped, one axis": (lambda: Net(nn.Conv1d(2, 4, 3, padding="same", groups=2), nn.Tanh(), nn.Conv1d(4, 3, 1)),
                          inputs(2, 8), 1.0),
    "norms": (lambda: Net(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), Scale(8), nn.RMSNorm(8), nn.Linear(8, 3)),
              inputs(6), 1.0),
    "tied": (Tied, lambda: torch.randint(0, 7, (9, 4)), 1.0),
    "time first": (TimeFirst, inputs(5, 4), None),
    "circular padding": (lambda: Net(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), nn.Conv1d(3, 3, 1)),
                         inputs(2, 8), 12 / 33),
    "batch norm": (lambda: Net(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), inputs(6), None),
}  # fmt: skip


def rows_of(run, net, x, y, names=None):
    """Gradients of each sample's loss by autograd, [n, d]."""
    chosen = [p for n, p in net.named_parameters() if p.requires_grad and (names is None or n in names)]
    rows = []
    for i in range(len(x)):
        found = torch.autograd.grad(run(x[i : i + 1], y[i : i + 1]), chosen)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def exact_live(net, monkeypatch, **options):
    monkeypatch.setattr("sui_fast.training.TensorSums", Exact)
    return TrainingScores(net, rank=sum(p.numel() for p in net.parameters()), **options)


def same(z, rows, limit=1e-4):
    true = rows @ rows.T
    assert float((z @ z.T - true).abs().max()) <= limit * float(true.abs().max())


@pytest.mark.parametrize("name", TAPPED)
def test_layers_give_the_rows_of_autograd(name, monkeypatch):
    torch.manual_seed(0)
    make, x, coverage = TAPPED[name]
    net, x, y = make(), x(), torch.arange(9) % 3
    run = lambda x, y: nn.functional.cross_entropy(net(x), y)  # noqa: E731
    with exact_live(net, monkeypatch) as live:
        run(x, y).backward()
        live.step(range(9))
    assert coverage is None or live.coverage == pytest.approx(coverage)
    if name == "batch norm":
        assert set(live.left_out) == {"parts.1.weight", "parts.1.bias"} and "mixes" in live.left_out["parts.1.bias"]
        return  # its samples act on one another
    if name == "time first":
        assert live.left_out and all(n.startswith("layer.self_attn") for n in live.left_out)
    seen = {n for n, _ in net.named_parameters()} - set(live.left_out)
    same(live.features()[1], rows_of(run, net, x, y, seen))


def test_conv1d_of_transformers(monkeypatch):
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    net, x, y = nn.Sequential(utils.Conv1D(5, 6), nn.Tanh(), nn.Linear(5, 3)), torch.randn(9, 4, 6), torch.arange(9) % 3
    run = lambda x, y: nn.functional.cross_entropy(net(x).mean(1), y)  # noqa: E731
    with exact_live(net, monkeypatch) as live:
        run(x, y).backward()
        live.step(range(9))
    assert live.coverage == 1
    same(live.features()[1], rows_of(run, net, x, y))


def test_accumulation_and_several_forward_passes(monkeypatch):
    (x, y), net = data(9), model()
    run = lambda x, y: nn.functional.cross_entropy(net(x), y) + net(2 * x).square().mean()  # noqa: E731
    with exact_live(net, monkeypatch) as live:
        for part in torch.arange(9).split(3):
            (run(x[part], y[part]) / 3).backward()
            live.step(part, factor=9)
    same(live.features()[1], rows_of(run, net, x, y))


def test_large_layers_do_not_wait(monkeypatch):
    monkeypatch.setattr("sui_fast.training._LARGE", 0)
    (x, y), net = data(9), model()
    run = lambda x, y: nn.functional.cross_entropy(net(x), y)  # noqa: E731
    with exact_live(net, monkeypatch) as live:
        run(x, y).backward()
        assert not live._waiting
        live.step(range(9))
    same(live.features()[1], rows_of(run, net, x, y))


@pytest.mark.parametrize("large", [0, 1 << 18])
def test_without_the_kernels_the_maps_are_the_same(large, monkeypatch):
    monkeypatch.setattr("sui_fast.training._LARGE", large)
    (x, y), net, found = data(9), model(), []
    for backend in ("auto", "reference"):
        if backend == "reference":
            monkeypatch.setattr("sui_fast.ops.sketching.sums._layers_cpu", None)
        with sui_fast.use_backend(backend), TrainingScores(net, rank=32) as live:
            for part in torch.arange(9).split(4):
                nn.functional.cross_entropy(net(x[part]), y[part]).backward()
                live.step(part)
        found.append(live.features()[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_mixed_precision_with_a_scaler(monkeypatch):
    (x, y), net = data(9), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def run(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(net(x).float(), y)

    with exact_live(net, monkeypatch, scaler=scaler) as live:
        scaler.scale(run(x, y)).backward()
        live.step(range(9))
        scaler.step(optimizer)
        scaler.update()
        z = live.features()[1].clone()
        scaler.scale(run(x, y) * torch.inf).backward()
        live.step(range(9))  # an overflow, which the training skips too
        assert live.skipped == 9 and torch.equal(live.features()[1], z)
    same(z, rows_of(run, net, x, y), limit=0.03)
    with exact_live(net, monkeypatch) as live:
        (run(x, y) * torch.nan).backward()
        with pytest.raises(sui_fast.DataError, match="sample 100"):
            live.step(range(100, 109))


def test_a_share_of_the_steps():
    (x, y), net = data(), model()
    with TrainingScores(net, rank=16, share=0.5) as live:
        for _ in range(6):
            for ids in torch.arange(24).split(4):
                nn.functional.cross_entropy(net(x[ids]), y[ids]).backward()
                live.step(ids)
        assert 4 < len(live.features()[0]) <= 24
    with pytest.raises(sui_fast.ArgumentError, match="share"):
        TrainingScores(net, share=0)


def test_checkpoints_give_each_gradient_once(monkeypatch):
    from torch.utils.checkpoint import checkpoint

    (x, y), net = data(9), model()
    for reentrant in (False, True):
        given = x.clone().requires_grad_()
        run = lambda x, y: nn.functional.cross_entropy(checkpoint(net, x, use_reentrant=reentrant), y)  # noqa: E731, B023
        with exact_live(net, monkeypatch) as live:
            run(given, y).backward()
            live.step(range(9))
        plain = lambda x, y: nn.functional.cross_entropy(net(x), y)  # noqa: E731
        same(live.features()[1], rows_of(plain, net, x, y))


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Llama"])
def test_hugging_face_trainer(tmp_path, kind):
    """Accumulated batches give the gradients of whole ones, whatever the model's loss is divided by."""
    transformers = pytest.importorskip("transformers")
    from sui_fast.compat.transformers import ScoreCallback

    sizes = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    if kind == "DistilBert":
        sizes = dict(vocab_size=30, dim=8, n_layers=1, n_heads=2, hidden_dim=16, dropout=0.0, seq_classif_dropout=0.0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "Bert" else {}
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=8, pad_token_id=0, **sizes, **none)
    head = "ForCausalLM" if kind == "Llama" else "ForSequenceClassification"
    torch.manual_seed(0)
    net = getattr(transformers, kind + head)(config)
    rows = [dict(input_ids=torch.randint(1, 30, (5,)), labels=i % 2, ids=100 + i) for i in range(12)]
    if kind == "Llama":
        rows = [row | dict(labels=row["input_ids"]) for row in rows]
    found = []
    for batch, accumulated in ((6, 1), (2, 3)):
        callback = ScoreCallback(rank=64)
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, num_train_epochs=1,
            remove_unused_columns=False, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            learning_rate=0.0, weight_decay=0.0,
        )  # fmt: skip
        transformers.Trainer(net, arguments, train_dataset=rows, callbacks=[callback]).train()
        scores = callback.scores
        assert sorted(scores.ids) == list(range(100, 112)) and (scores["si"] > 0).all()
        assert scores.diagnostics["coverage"] > 0.9
        found.append(scores["gradient_norm"][scores.ids.argsort()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def lightning_callback(**options):
    from sui_fast.compat.lightning import ScoreCallback

    return ScoreCallback(lambda batch: batch[2], **options)


def fit(lightning, callback, loader, **options):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    lightning.Trainer(
        callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **options,
    ).fit(Module(), loader)  # fmt: skip


def test_lightning():
    lightning = pytest.importorskip("lightning")
    (x, y), first = data(), model()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, torch.arange(24)), 5, shuffle=True)
    callback = lightning_callback(rank=64)
    fit(lightning, callback, loader, max_epochs=1, accumulate_grad_batches=5)
    assert sorted(callback.scores.ids) == list(range(24))
    with TrainingScores(first, rank=64) as live:
        nn.functional.cross_entropy(first(x), y).backward()
        live.step(range(24))
    norms = torch.linalg.vector_norm(live.features()[1], dim=1).double()
    got = torch.tensor(callback.scores["gradient_norm"][callback.scores.ids.argsort()])
    torch.testing.assert_close(got, norms, rtol=1e-4, atol=0)  # one optimizer step came after all of them


class Slow:
    """Sums that take far longer than the training, and how long they took."""

    def __init__(self, monkeypatch):
        self.seconds, keep = 0.0, TensorSums.keep

        def slow(*args):
            begin = time.perf_counter()
            time.sleep(0.02)
            kept = keep(*args)
            self.seconds += time.perf_counter() - begin
            return kept

        monkeypatch.setattr(TensorSums, "keep", slow)

    def within(self, overhead, seconds):
        # the first step is watched whatever it costs, and the last one that is may go beyond by what it costs
        return self.seconds <= overhead * (seconds - self.seconds) + 3 * 0.03


def steps(net, live, count):
    x, y = data()
    for step in range(count):
        ids = torch.arange(4) + 4 * (step % 6)
        nn.functional.cross_entropy(net(x[ids]), y[ids]).backward()
        live.step(ids)
        yield


def test_overhead_is_kept_within_its_budget(monkeypatch):
    net, slow = model(), Slow(monkeypatch)

    def train(count, overhead):
        with TrainingScores(net, rank=16, overhead=overhead) as live:
            for _ in steps(net, live, count):
                pass
        return live

    every = train(6, None).scores().diagnostics
    assert every["share"] == 1 and every["overhead"] > 2
    slow.seconds, begin = 0.0, time.perf_counter()
    live = train(400, 1.0)
    assert slow.within(1.0, time.perf_counter() - begin)
    with pytest.warns(UserWarning, match="of the steps were watched"):
        some = live.scores().diagnostics
    assert 0 < some["share"] < 0.5 and some["overhead"] < 2
    with pytest.raises(sui_fast.ArgumentError, match="overhead"):
        TrainingScores(net, overhead=0)


def test_the_budget_counts_what_hooks_cannot_see():
    """Steps of 2.5 ms, watched ones of 2 ms more, as in a cold cache; whatever the speed of the machine."""
    net, hidden, begin = model(), 0.0, time.perf_counter()
    with TrainingScores(net, rank=16, overhead=0.2) as live:
        for _ in steps(net, live, 400):
            time.sleep(2.5e-3)
            if live._watching:
                time.sleep(2e-3)
                hidden += 2e-3
        assert 0 < hidden <= 0.3 * (time.perf_counter() - begin - hidden)


def test_the_budget_holds_in_the_trainer_of_hugging_face(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from sui_fast.compat.transformers import ScoreCallback

    slow = Slow(monkeypatch)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    rows = [dict(input_ids=torch.randint(1, 30, (5,)), labels=i % 2, ids=i) for i in range(12)]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=20, report_to=[],
        remove_unused_columns=False, save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    net, callback = transformers.BertForSequenceClassification(config), ScoreCallback(rank=64, overhead=0.5)
    begin = time.perf_counter()
    with pytest.warns(UserWarning, match="of the steps were watched"):
        transformers.Trainer(net, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert slow.within(0.5, time.perf_counter() - begin) and callback.scores.diagnostics["share"] < 0.8


def test_the_budget_holds_in_lightning(monkeypatch):
    lightning = pytest.importorskip("lightning")
    slow, (x, y) = Slow(monkeypatch), data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, torch.arange(24)), 4, shuffle=True)
    callback, begin = lightning_callback(rank=64, overhead=0.5), time.perf_counter()
    with pytest.warns(UserWarning, match="of the steps were watched"):
        fit(lightning, callback, loader, max_epochs=20)
    assert slow.within(0.5, time.perf_counter() - begin) and callback.scores.diagnostics["share"] < 0.8
