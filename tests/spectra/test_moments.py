"""Squares of predictions from the moments of the validation samples."""

import copy

import pytest
import torch

from sui_fast.spectra import Moments, feature_spectrum


def test_squares_keep_what_weak_directions_tell():
    """Changes of dual weights are as large on weak directions; products of features alone must not drown them."""
    rng = torch.Generator().manual_seed(0)
    size = torch.logspace(0, -4, 40, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=rng, dtype=torch.float64)).Q
    train, val = ((torch.randn(n, 40, generator=rng, dtype=torch.float64) * size) @ turn for n in (200, 60))
    moments, squares, rows = Moments(40), Moments(40), Moments(40, keep_rows=True)
    moments.add(train[:, None], torch.zeros(200, 1))
    for seen in (squares, rows):
        seen.add(val[:, None])
    spectrum = feature_spectrum(moments)
    change = torch.randn(5, len(spectrum.s), generator=rng, dtype=torch.float64) / (spectrum.s + 1e-6 * spectrum.s[-1])
    want = (change @ (val @ (spectrum.turn * spectrum.s)).T).square().sum(1) / 60
    for seen in (squares, rows):
        got = (change @ spectrum.moment(seen).T).square().sum(1)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("keep_rows", [False, True])
def test_sums_are_the_same_however_processes_share_the_portions(keep_rows):
    rng = torch.Generator().manual_seed(0)
    size = torch.logspace(0, -6, 20)
    portions = [(torch.randn(9, 2, 20, generator=rng) * size, torch.randn(9, 2, generator=rng)) for _ in range(40)]
    found = []
    for bounds in ((0, 40), (0, 11, 40), (0, 40, 40), (0, 3, 5, 22, 40)):
        parts = [Moments(20, keep_rows=keep_rows) for _ in bounds[1:]]
        for part, begin, end in zip(parts, bounds, bounds[1:], strict=False):
            for portion in portions[begin:end]:
                part.add(*portion)
        # what each process has at each call of reduce, as all of them call it in the same order
        held = [[] for _ in parts]
        for part, own in zip(parts, held, strict=True):
            copy.deepcopy(part).reduce(lambda x, own=own: own.append(x.clone()) or [x])
        for part in parts:
            calls = iter(zip(*held, strict=True))
            part.reduce(lambda x, calls=calls: [other.clone() for other in next(calls)])
            found.append(part)
    for part in found[1:]:
        assert torch.equal(part.gram, found[0].gram) and torch.equal(part.pull, found[0].pull)
        assert part.samples == 360 and part.energy == found[0].energy
    z, r0 = (torch.cat(x).flatten(0, 1).double() for x in zip(*portions, strict=True))
    torch.testing.assert_close(found[0].gram, z.T @ z, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(found[0].pull, z.T @ r0, rtol=1e-14, atol=1e-14)
