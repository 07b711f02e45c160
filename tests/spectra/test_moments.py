"""Squares of predictions from the moments of the validation samples."""

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


def test_processes_share_kept_rows():
    x = torch.randn(7, 2, 30, dtype=torch.float64)
    whole = Moments(30, keep_rows=True)
    whole.add(x)
    parts = [Moments(30, keep_rows=True) for _ in range(3)]
    bounds, sums = ((0, 4), (4, 7), (7, 7)), {}
    for part, (begin, end) in zip(parts, bounds, strict=True):
        part.add(x[begin:end])

    def total(number):
        """Every process adds to what others have put at the same call; the last one has the sum."""
        calls = iter(range(4))

        def add(tensor):
            call = next(calls)
            sums[call] = sums.get(call, 0) + tensor
            return sums[call] if number == 2 else tensor * 0 + torch.tensor([7.0, 0.0, 14.0]) if call == 2 else tensor

        return add

    for number, (part, (begin, _)) in enumerate(zip(parts, bounds, strict=True)):
        part.reduce(total(number), begin)
    assert torch.equal(parts[2].rows[0], x.flatten(0, 1)) and parts[2].samples == 7
