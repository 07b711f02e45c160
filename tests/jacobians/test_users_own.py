"""What users bring: embeddings of bounded norm, complex weights, vmap inside, odd failures."""

import pytest
import torch
from torch import nn

import sui_fast


def rows_of(model, x):
    """One backward pass per sample and output."""
    chosen, rows = list(model.parameters()), []
    for sample in x:
        out = model(sample[None])[0]
        for c in range(len(out)):
            grads = torch.autograd.grad(out[c], chosen, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


class Bounded(nn.Module):
    """Embeddings that scale their rows in place when they are read."""

    def __init__(self):
        super().__init__()
        self.one, self.bag = nn.Embedding(11, 4, max_norm=1.0), nn.EmbeddingBag(11, 4, max_norm=0.5)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.one(x)).mean(1) + self.bag(x))


def test_embeddings_of_bounded_norm_are_left_as_they_were():
    torch.manual_seed(0)
    model, x = Bounded().double(), torch.randint(0, 11, (7, 5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = sui_fast.jacobian(model, x).rows()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(found, rows_of(model, x), rtol=1e-12, atol=1e-12)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(5, dtype=torch.cdouble)), nn.Linear(8, 2).double()

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, 8))


def test_complex_parameters_are_refused_not_left_out():
    model, x = Spectral(), torch.randn(5, 8, dtype=torch.float64)
    with pytest.raises(sui_fast.ArgumentError, match="'filter', which is complex"):
        sui_fast.jacobian(model, x)
    assert sui_fast.jacobian(model, x, params=["out"]).shape == (10, 18)


class Mapped(nn.Module):
    """A model that maps over its samples itself."""

    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.vmap(lambda row: torch.tanh(self.w @ row))(x))


def test_vmap_inside_a_model():
    torch.manual_seed(0)
    model, x = Mapped().double(), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(sui_fast.jacobian(model, x).rows(), rows_of(model, x))


@pytest.mark.parametrize(
    "error", [KeyError("y"), AttributeError("logit"), AssertionError("five"), NotImplementedError()]
)
def test_a_failing_model_is_named(error):
    def outputs(model, batch):
        raise error

    with pytest.raises(sui_fast.ModelError, match=type(error).__name__):
        sui_fast.jacobian(nn.Linear(3, 2), torch.randn(4, 3), outputs=outputs)
