"""Scores from training's own backward passes: the gradients are those of autograd, the adapters feed them."""

import pytest
import torch
from torch import nn

import sui_fast
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


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sui_fast.compat.transformers import ScoreCallback

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config)
    rows = [dict(input_ids=torch.randint(0, 30, (5,)), labels=i % 2, ids=100 + i) for i in range(10)]
    callback = ScoreCallback(rank=64)
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=4, num_train_epochs=1, remove_unused_columns=False, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(net, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert sorted(callback.scores.ids) == list(range(100, 110)) and (callback.scores["si"] > 0).all()


def test_lightning():
    lightning = pytest.importorskip("lightning")
    from sui_fast.compat.lightning import ScoreCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, torch.arange(24)), 5, shuffle=True)
    callback = ScoreCallback(lambda batch: batch[2], rank=64)
    lightning.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    ).fit(Module(), loader)  # fmt: skip
    assert sorted(callback.scores.ids) == list(range(24))
