"""One map for all rows: streamed sketches, whatever the batches and however weights are shared."""

import pytest
import torch
import zoo
from torch import nn

import sui_fast
from sui_fast.jacobians import engine, sketches
from sui_fast.ops.sketching.sums import TensorSums


class Tied(nn.Module):
    """An embedding whose weight is also that of the last layer, and a weight that meets two biases."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 9, batch_first=True, dropout=0.0)
        self.turn, self.bias, self.other = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), nn.LayerNorm(6)

    def forward(self, tokens):
        x = self.block(self.embed(tokens) + self.place(torch.arange(tokens.shape[1])[None]))
        x = self.other(nn.functional.linear(self.turn(x), self.turn.weight, self.bias))
        return nn.functional.linear(x, self.embed.weight)[:, -1, :2]


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return Tied().double(), torch.randint(0, 11, (9, 5))


@pytest.mark.parametrize("kind", ["tensor", "sjlt"])
def test_streaming_changes_nothing(tied, kind):
    model, tokens = tied
    jac = sui_fast.jacobian(model, tokens)
    want = jac.sketch(64, 3, kind)
    for batch_size in (1, 4, 9):
        outputs, got = sketches(model, tokens, 64, 3, kind, batch_size=batch_size)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outputs, jac.outputs)


def test_inner_products_are_kept_on_average(tied):
    model, tokens = tied
    jac = sui_fast.jacobian(model, tokens)
    exact = jac.gram()
    total = torch.zeros_like(exact)
    for seed in range(400):
        z = jac.sketch(64, seed).flatten(0, 1)
        total += z @ z.T / 400
    assert float((total - exact).norm() / exact.norm()) < 0.05


def test_equal_weights_are_linear_in_their_uses():
    """The sketch of a sum of rows is the sum of sketches: a tied model against its untied twin, one map."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 5).double(), torch.randn(7, 5, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x).tanh()).sum(1, keepdim=True)

    jac = sui_fast.jacobian(Twice(), x)
    weight, bias = (jac.rows()[:, jac.columns(f"layer.{name}")] for name in ("weight", "bias"))
    with sui_fast.use_backend("reference"):
        want = TensorSums(7, 1, 32, 0, x)
    want.formed(weight.reshape(7, 1, 5, 5), 0, 0, bias[:, None])
    torch.testing.assert_close(jac.sketch(32), want.total(), rtol=1e-10, atol=1e-10)


def test_half_precision_is_read_as_it_lies(tied):
    model, tokens = tied
    want = sui_fast.jacobian(model.float(), tokens).sketch(64)
    got = sketches(model.bfloat16(), tokens, 64)[1]
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 0.1


ARRIVING = ["BERT", "GPT-2", "T5", "ConvNeXt block", "GRU", "Checkpointing", "Mixture of experts by hand"]
ARRIVING += ["Bare parameters"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARRIVING)
def test_gradients_sketched_as_they_arrive(name, monkeypatch):
    """Large batches of one output: the same numbers, nothing held until the pass ends."""
    try:
        model, batch, outputs = zoo.build(name)
    except ImportError as error:
        pytest.skip(f"needs {error.name}")
    one = lambda m, b: zoo.call(m, b, outputs).sum(1, keepdim=True)  # noqa: E731
    _, held = sketches(model, batch, 64, 3, outputs=one, batch_size=3)
    met = []
    real = engine.sketch_arriving
    monkeypatch.setattr(engine, "sketch_arriving", lambda *a: met.append(a) or real(*a))
    monkeypatch.setattr(engine, "LARGE", 0)
    _, found = sketches(model, batch, 64, 3, outputs=one, batch_size=3)
    assert len(met) == 2 and all(use is None for _, uses, *_ in met for use in uses)
    torch.testing.assert_close(found, held, rtol=1e-10, atol=1e-12 * float(held.abs().max()))
