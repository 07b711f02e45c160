"""Method "nystrom": landmarks drawn twice, features along directions, and what the plan knows of both."""

import pytest
import torch
from torch import nn

from sui_fast.footprint import Landmarks
from sui_fast.jacobians import jacobian
from sui_fast.spectra import maps


class Encoder(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.embed, self.body, self.head = nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, outputs)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)).mean(1))


def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))


def flat():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))


def pool(name, n=90, outputs=2):
    rng = torch.Generator().manual_seed(1)
    if name == "encoder":
        return jacobian(Encoder(outputs), torch.randint(0, 30, (n, 9), generator=rng))
    if name == "conv":
        return jacobian(conv(), torch.randn(n, 1, 8, 8, generator=rng))
    return jacobian(flat(), torch.randn(n, 20, generator=rng))


@pytest.mark.parametrize("name", ["encoder", "conv", "flat"])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_features_along_directions_are_those_of_the_kernel(name, dtype, near, monkeypatch):
    jac = pool(name)
    found = maps._nystrom(jac, 40, 0, dtype, []).both(jac, True)
    monkeypatch.setattr(maps, "directions_fit", lambda *_: False)
    fmap = maps._nystrom(jac, 40, 0, dtype, [])
    wanted, own = fmap.both(jac, True)
    size = float(wanted.norm())
    turned = [x.flatten(0, 1).double() for x in (found[0], wanted)]  # up to signs of eigenvectors
    across = turned[0] @ turned[0].T - turned[1] @ turned[1].T
    assert float(across.norm()) < near * size**2
    torch.testing.assert_close(found[1].double(), own.double(), rtol=1e-5, atol=1e-6 * float(own.abs().max()))


def test_landmarks_in_float64_do_not_depend_on_those_of_float32():
    jac, states = pool("encoder", 300, 1), []
    told: list[int] = []
    assert maps._nystrom(jac, 256, 0, torch.float32, told) is None  # too few columns
    for drawn in ([], told, told[:7], told[::-1], told[:5] + told[:4:-1]):
        states.append(maps._nystrom(jac, 256, 0, torch.float64, list(drawn)).state)
    for state in states:
        assert torch.equal(state["landmarks"], states[0]["landmarks"])
        kernel = [x["root"] @ x["root"].T for x in (state, states[0])]
        assert float((kernel[0] - kernel[1]).norm()) < 1e-6 * float(kernel[1].norm())


def test_the_plan_foresees_float64():
    assert Landmarks.of(pool("encoder", 64, 1), 300, 256).wide
    assert not Landmarks.of(pool("encoder", 64, 1), 300, 8).wide
    assert not Landmarks.of(pool("flat", 64), 90, 20).wide
