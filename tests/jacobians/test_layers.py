"""Factors of layers, and of convolutions before they are unfolded."""

import pytest
import torch

from sui_fast.jacobians import layers
from sui_fast.jacobians.gram import by_rows
from sui_fast.jacobians.layers import Image, Outer, Patches
from sui_fast.ops.sketching.window import Window

WINDOWS = {
    "line": ((2, 9), Window((3,), (2,), (1,), ((0, 0),))),
    "picture": ((3, 6, 5), Window((3, 2), (1, 2), (2, 1), ((0, 0), (0, 0)))),
    "padded": ((1, 4, 4), Window((3, 3), (1, 1), (1, 1), ((1, 1), (2, 0)))),
    "volume": ((2, 3, 4, 3), Window((2, 2, 2), (1, 1, 1), (1, 1, 1), ((0, 0),) * 3)),
}


def unfolded(x, window):
    """One position after the other, by plain indices."""
    pads = [p for pair in reversed(window.pads) for p in pair]
    x = torch.nn.functional.pad(x, pads)
    lengths = zip(x.shape[2:], window.kernel, window.stride, window.dilation, strict=True)
    starts = [range(0, size - (kernel - 1) * dilation, stride) for size, kernel, stride, dilation in lengths]
    places = torch.cartesian_prod(*map(torch.tensor, starts)).reshape(-1, len(starts))
    columns = []
    for place in places.tolist():
        part = x
        for axis, (begin, kernel, dilation) in enumerate(zip(place, window.kernel, window.dilation, strict=True)):
            index = begin + dilation * torch.arange(kernel)
            part = part.index_select(2 + axis, index)
        columns.append(part.flatten(1))
    return torch.stack(columns, 1)


def pair(name, n, k, bias, dtype=torch.float64):
    """The same factor as patches and in full."""
    shape, window = WINDOWS[name]
    rng = torch.Generator().manual_seed(n + k)
    x = torch.randn(n, *shape, generator=rng, dtype=torch.float64)
    a = unfolded(x, window)
    g = torch.randn(n, k, a.shape[1], 4, generator=rng, dtype=torch.float64).to(dtype)
    names = {"weight": "w"} | ({"bias": "b"} if bias else {})
    return Patches(names, Image(x.to(dtype), window), g), Outer(names, a.to(dtype), g)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("n, k", [(7, 1), (5, 3), (1, 2), (0, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_the_unfolded_layer(name, n, k, bias, monkeypatch):
    monkeypatch.setattr(layers, "_UNFOLDED", 3)
    monkeypatch.setattr(layers, "_CACHED", 200)
    patches, whole = pair(name, n, k, bias)
    assert patches.width == whole.width == whole.a.shape[2]
    torch.testing.assert_close(patches.augmented(), whole.augmented(), rtol=0, atol=0)
    assert "a" not in vars(patches)  # nothing is kept
    torch.testing.assert_close(patches.a, whole.a, rtol=0, atol=0)
    rows = torch.einsum("nkso,nsi->nkoi", whole.g, whole.a).reshape(n * k, 4 * whole.width)
    for factor in (patches, whole):
        torch.testing.assert_close(factor.rows(), rows)
        parts = list(factor.portions())
        torch.testing.assert_close(torch.cat([x.augmented() for x in parts]), whole.augmented(), rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([x.g for x in parts]), whole.g, rtol=0, atol=0)
        some = factor.some(slice(1, 4))
        assert type(some) is type(factor) and some.names == factor.names
        torch.testing.assert_close(some.a, whole.a[1:4], rtol=0, atol=0)
    assert len(list(patches.portions())) == max(1, -(-n // 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_add_up_in_float32(dtype):
    patches, whole = pair("picture", 4, 2, True, dtype)
    expected = torch.einsum("nkso,nsi->nkoi", whole.g.double(), whole.a.double()).reshape(8, -1)
    for factor in (patches, whole):
        assert factor.rows().dtype == torch.float32
        torch.testing.assert_close(factor.rows().double(), expected, rtol=1e-6, atol=1e-5)


def test_a_layer_goes_by_rows_where_these_are_few():
    """sum over pairs of positions: s t (i / (k m) + o + 2) products of a pair of rows, o i by the rows themselves."""
    of = lambda k, s, i, o: Outer({}, torch.zeros(2, s, i), torch.zeros(2, k, s, o))  # noqa: E731
    assert by_rows(of(1, 64, 9, 16)) and by_rows(of(3, 64, 9, 16), of(2, 10, 9, 16))
    assert not by_rows(of(1, 1, 9, 16)) and not by_rows(of(1, 2, 100, 100))
    assert by_rows(of(1, 1, 10, 10), of(1, 20, 10, 10)) and not by_rows(of(1, 1, 100, 100), of(1, 2, 100, 100))
