"""||dw||^2 and ||df||^2 at many times from the changes of the dual weights, by the shorter of two ways.

Letters as in ``times.py``; c the coefficients [b, t, v, k], D the changes on the eigenvectors, [b, t, r]. Eigenvectors
are scaled by the roots of the eigenvalues: ||dw||^2 is then the length of D, and a probe has columns of much the same
size.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..ops import product_sqnorm, triangular_sqnorm

_WORK = 1 << 19  # float64 elements of an intermediate: what stays near the processor
_LEAST_BAND = 24  # rows of the probe in one product
_PACE = 0.8  # of the products with basis functions, against that with a triangular factor


def is_shorter(times) -> bool:
    """Whether the basis functions of every sample are fewer than its changes at all times, in operations."""
    k, count, r = times.u.shape[1], times.count, len(times.s)
    through = straight = 0
    for columns, basis in zip(times.bases.columns, times.bases.basis, strict=True):
        v, own = basis.shape
        height = k * v if times.probe is None else min(len(times.probe), r - columns.start)
        through += k * v * (own + count) * height
        straight += count * own * height
    return through < _PACE * straight


class _Way:
    """What both ways begin with: the scaled bases, and how the filter itself changes, on the eigenvectors [t, r]."""

    def __init__(self, times):
        root = times.s.sqrt()
        self.places, self.columns = times.bases.places, times.bases.columns
        self.basis = [basis * root[part] for part, basis in zip(self.columns, times.bases.basis, strict=True)]
        self.base = root.new_zeros(times.count, len(root)) if times.more is None else times.more * times.g * root
        self.probe = None
        if times.probe is not None:
            self.probe = torch.where(times.s > 0, times.probe / torch.where(times.s > 0, root, 1.0), 0.0)
        self.room: dict[str, Tensor] = {}

    def __call__(self, u: Tensor, coefficients: Tensor) -> Tensor:
        """[b, t, 1 or 2] of u [b, k, r] and coefficients [b, t, v, k]."""
        parts = [slice(begin, begin + self.step) for begin in range(0, len(u), self.step)]
        return torch.cat([self.portion(u[part], coefficients[part].flatten(2)) for part in parts])

    def intervals(self, u: Tensor):
        """Of each interval: its eigenvectors, the v k numbers of a sample on it, its functions times u [v k, b, r]."""
        b, k, _ = u.shape
        for columns, places, basis in zip(self.columns, self.places, self.basis, strict=True):
            spread = self.take("spread", len(basis), k, b, basis.shape[1])
            torch.mul(basis[:, None, None], u[..., columns].transpose(0, 1), out=spread)
            yield columns, slice(places.start * k, places.stop * k), spread.flatten(0, 1)

    def take(self, name: str, *shape: int) -> Tensor:
        """Memory for an intermediate, the same every time: fresh memory is slow."""
        size = math.prod(shape)
        if name not in self.room or self.room[name].numel() < size:
            self.room[name] = self.base.new_empty(size)
        return self.room[name][:size].view(shape)


class Straight(_Way):
    """From D itself."""

    def __init__(self, times):
        super().__init__(times)
        if self.probe is not None:
            self.probe = torch.linalg.qr(self.probe, mode="r").R.contiguous()
        self.step = max(1, 4 * _WORK // self.base.numel())  # the factor is packed once for each portion

    def portion(self, u: Tensor, coefficients: Tensor) -> Tensor:
        b, count, r = len(u), *self.base.shape
        change = self.take("change", b, count, r)
        for columns, places, spread in self.intervals(u):
            own = coefficients[..., places] @ spread.transpose(0, 1)
            torch.add(self.base[:, columns], own, out=change[..., columns])
        change = change.view(b * count, r)
        found = [torch.linalg.vecdot(change, change)]
        if self.probe is not None:
            found.append(triangular_sqnorm(self.probe, change))
        return torch.stack(found, 1).view(b, count, -1)


class ThroughBases(_Way):
    """From what every basis function of a sample tells, the same at all times."""

    def __init__(self, times):
        super().__init__(times)
        width = 1
        if self.probe is not None:
            # eigenvectors in descending order: where they are few and functions many, the rows are few
            self.probe = torch.linalg.qr(self.probe.flip(1), mode="r").R.flip(1)
            self.moved = self.base @ self.probe.T
            rows, r = self.probe.shape
            live, width = [min(rows, r - columns.start) for columns in self.columns], rows
            self.bands = _bands(live, [places.stop for places in self.places])
            self.live = [next(band for band, _ in self.bands if band.stop >= x).stop for x in live]  # zeros beyond x
        k = times.u.shape[1]
        self.step = max(1, _WORK // max(k * len(basis) * max(width, basis.shape[1]) for basis in self.basis))

    def portion(self, u: Tensor, coefficients: Tensor) -> Tensor:
        b, k, _ = u.shape
        found = coefficients.new_zeros(b, coefficients.shape[1], 1 if self.probe is None else 2)
        if self.probe is not None:
            told = self.take("told", coefficients.shape[2], b, len(self.probe))
        for number, (columns, places, spread) in enumerate(self.intervals(u)):
            own = coefficients[..., places], spread.transpose(0, 1)
            found[..., 0] += product_sqnorm(*own, self.base[:, columns])
            if self.probe is not None:
                live = slice(self.live[number])
                out = told[places].flatten(0, 1)[:, live]
                torch.mm(spread.flatten(0, 1), self.probe[live, columns].T, out=out)
        if self.probe is not None:
            for rows, size in self.bands:
                own = coefficients[..., : size * k], told[: size * k, :, rows].transpose(0, 1)
                found[..., 1] += product_sqnorm(*own, self.moved[:, rows])
        return found


def _bands(live: list[int], ends: list[int]) -> list[tuple[slice, int]]:
    """Portions of the rows, each with the functions that reach it, of which the first ``ends`` belong to an interval
    with ``live`` rows and those before it."""
    edges = [0]
    for edge in sorted({min(-(-rows // 8) * 8, max(live)) for rows in live}):
        if edge - edges[-1] >= _LEAST_BAND or edge == max(live):
            edges.append(edge)
    reach = list(zip(live, ends, strict=True))
    return [(slice(*pair), max(end for rows, end in reach if rows > pair[0])) for pair in pairwise(edges)]
