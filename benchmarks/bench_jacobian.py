"""Capture, explicit rows and the exact NTK against what they cannot avoid."""

import pytest
import torch
from _compare import compare

import sui_fast


def plain_passes(model, x, batch_size):
    """Floor: one forward and k plain backward passes with weight gradients per batch."""
    parameters = list(model.parameters())
    for batch in x.split(batch_size):
        out = model(batch)
        for c in range(out.shape[1]):
            torch.autograd.grad(out[:, c].sum(), parameters, retain_graph=c + 1 < out.shape[1])


@pytest.mark.parametrize("outputs", [1, 10])
def test_capture(benchmark, network, outputs):
    name, build, x = network
    model = build(outputs)
    few = sui_fast.jacobian(model, x[:4])
    true = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x[:4],)))(dict(model.named_parameters()))
    rows = torch.cat([true[n].flatten(2) for n in few.parameter_names], 2).flatten(0, 1).detach()
    torch.testing.assert_close(few.rows(), rows, rtol=1e-4, atol=1e-5)
    compare(
        benchmark,
        lambda: sui_fast.jacobian(model, x, batch_size=1000),
        lambda: plain_passes(model, x, 1000),
        target=1.0,
        rounds=15,
        shape=f"{name}, n = 1000, k = {outputs}",
    )


def test_rows(benchmark, network):
    name, build, x = network
    model = build(1)

    def rows():
        total = 0.0
        for part in sui_fast.jacobian(model, x, batch_size=1000).iter_rows():
            total += float(part[0, 0])
        return total

    assert rows() == pytest.approx(float(sui_fast.jacobian(model, x).rows()[:, 0].sum()), abs=10)
    compare(
        benchmark,
        rows,
        lambda: plain_passes(model, x, 1000),
        target=4.0 if name == "mlp" else 2.7,
        rounds=9,
        shape=f"{name}, n = 1000, k = 1",
    )


def products(pairs):
    """Floor: the bare products of the upper triangle, in the blocks in which a matrix product is fastest."""
    for left, step in pairs:
        for begin in range(0, len(left), step):
            left[begin : begin + step] @ left[begin:].T


def test_ntk_mlp(benchmark, digits):
    from conftest import mlp

    x, model = digits[0][:1000], mlp()
    a = [torch.randn(1000, i) for i in (64, 256, 256)]
    g = [torch.randn(10_000, o) for o in (256, 256, 10)]
    rows = sui_fast.jacobian(model, x[:20]).rows()
    torch.testing.assert_close(sui_fast.ntk(model, x[:20]), rows @ rows.T, rtol=1e-4, atol=1e-3)
    compare(
        benchmark,
        lambda: sui_fast.ntk(model, x),
        lambda: products([(m, 1000) for m in a + g]),
        target=2.0,
        rounds=3,
        shape="mlp, n = 1000, k = 10",
    )


def test_ntk_cnn(benchmark, digits):
    from conftest import cnn

    x, model = digits[0][:300].view(-1, 1, 8, 8), cnn()
    rows = sui_fast.jacobian(model, x[:20]).rows()
    torch.testing.assert_close(sui_fast.ntk(model, x[:20]), rows @ rows.T, rtol=1e-4, atol=1e-3)
    layers = [torch.randn(3000, width) for width in (16 * 9 + 16, 32 * 144 + 32, 32 * 288 + 32, 10)]
    compare(
        benchmark,
        lambda: sui_fast.ntk(model, x),
        lambda: products([(m, 750) for m in layers]),
        target=2.0,
        rounds=3,
        shape="cnn, n = 300, k = 10",
    )
