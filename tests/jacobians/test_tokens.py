"""Products with the rows of an embedding against dense ones."""

import pytest
import torch

from sui_fast.jacobians.layers import dense_index
from sui_fast.jacobians.tokens import add_token_vjp, token_jvp


@pytest.mark.parametrize("vocabulary", [1, 3, 40])  # more places of a token than go together, and fewer
@pytest.mark.parametrize("n, k, s", [(5, 1, 7), (3, 2, 11), (1, 1, 1)])
def test_products_with_the_rows_of_an_embedding(vocabulary, n, k, s, monkeypatch):
    monkeypatch.setattr("sui_fast.jacobians.tokens._ELEMENTS", 200)  # several portions
    rng = torch.Generator().manual_seed(0)
    token = torch.randint(-1, vocabulary, (n, s), generator=rng)
    g = torch.randn(n, k, s, 4, generator=rng, dtype=torch.float64)
    weight = torch.randn(6, vocabulary, 4, generator=rng, dtype=torch.float64)
    rows = dense_index(token, g, vocabulary)
    torch.testing.assert_close(token_jvp(token, g, weight), rows @ weight.flatten(1).T)
    c, target = torch.randn(n, k, 6, generator=rng, dtype=torch.float64), weight.clone()
    add_token_vjp(target, token, g, c)
    torch.testing.assert_close(target, weight + torch.einsum("nkr,nkp->rp", c, rows).view(weight.shape))


def test_padding_alone_gives_nothing():
    token, g = torch.full((2, 3), -1), torch.ones(2, 1, 3, 4)
    assert not token_jvp(token, g, torch.ones(5, 2, 4)).any()
    target = torch.zeros(5, 2, 4)
    add_token_vjp(target, token, g, torch.ones(2, 1, 5))
    assert not target.any()
