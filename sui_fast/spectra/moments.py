"""A spectrum from sums over samples: Z^T Z and Z^T r0 are all that a low-rank kernel needs to know of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import SpectrumError, complaint
from ..jacobians.finite import check_products
from .dense import Spectrum

BLOCK = 128  # columns of a block of a symmetric product
_PORTION = 1 << 20  # numbers made float64 at a time for a sum


def add_upper(total: Tensor, x: Tensor) -> None:
    """total += x^T x [r, r], its upper triangle at least: the blocks of it, half the work."""
    for begin in range(0, x.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        total[block, begin:].addmm_(x[:, block].T, x[:, begin:])


def add_exactly(total: Tensor, x: Tensor) -> None:
    """total[0] + total[1] += x in twice the digits of a number: rounded once, the sum is the same in any order.

    x is used up. Source: Moller 1965, Knuth (the error of a sum is a number, and known).
    """
    high, low = total
    s = high + x
    v = s - high
    low += x.sub_(v).add_(v.sub_(s).add_(high))
    high.copy_(s)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle, in its place."""
    return upper.triu_().add_(upper.triu(1).T)


class Moments:
    """Sums over samples, float64, whatever the dtype of the features; the same however portions are shared out.

    Attributes:
        samples: n. rows: the rows of Z themselves, float64, where they are kept.
    """

    def __init__(self, rank: int, device: torch.device | str = "cpu", keep_rows: bool = False):
        self.rows: list[Tensor] | None = [] if keep_rows else None
        new = dict(dtype=torch.float64, device=device)
        self._upper = torch.zeros(2, *(0, 0) if keep_rows else (rank, rank), **new)  # sums, and what they lack
        self._lines = torch.zeros(2, rank + 1, **new)  # r0^T Z, ||r0||^2
        self.samples = 0

    def add(self, features: Tensor, residual: Tensor | None = None, sign: int = 1) -> None:
        """features [n, k, r], residual [n, k] (None for validation samples); sign -1 takes them away (no kept rows)."""
        most = _PORTION // max(1, features[0].numel()) if len(features) else 1
        step = 1 << max(1, most).bit_length() - 1  # a power of two: portions of portions begin where they would begin
        for begin in range(0, len(features), step):
            part = slice(begin, begin + step)
            flat = features[part].flatten(0, 1).to(torch.float64)
            if self.rows is not None:
                self.rows.append(flat)
            for first in range(0, flat.shape[1], BLOCK) if self.rows is None else ():
                block = slice(first, first + BLOCK)
                add_exactly(self._upper[:, block, first:], (sign * flat[:, block]).T @ flat[:, first:])
            if residual is not None:
                own = residual[part].reshape(-1, 1).to(torch.float64)
                add_exactly(self._lines, torch.cat([(sign * own).T @ flat, (sign * own).T @ own], 1)[0])
        self.samples += sign * len(features)

    @property
    def pull(self) -> Tensor:
        """Z^T r0 [r]."""
        return self._lines.sum(0)[:-1]

    @property
    def energy(self) -> float:
        """||r0||^2."""
        return float(self._lines.sum(0)[-1])

    @property
    def mean_square(self) -> float:
        """||z||^2, the mean over samples."""
        own = self._upper.diagonal(dim1=1, dim2=2)
        total = own.sum() if self.rows is None else sum(x.square().sum() for x in self.rows)
        return float(total) / max(self.samples, 1)

    @property
    def gram(self) -> Tensor:
        """Z^T Z [r, r]."""
        if self.rows is not None:
            rows = torch.cat(self.rows)
            return rows.T @ rows
        return mirrored(self._upper[0] + self._upper[1])

    def reduce(self, every: Callable[[Tensor], Iterable[Tensor]]) -> None:
        """Add up over processes.

        Args:
            every: gives what each process has of a tensor, in their order, to be used up; shapes may differ in the
                first dimension.
        """
        self.samples = sum(int(x) for x in every(torch.tensor([self.samples], device=self._lines.device)))
        for name in ("_upper", "_lines") if self.rows is None else ("_lines",):
            parts = iter(every(getattr(self, name)))
            total = next(parts)
            for high, low in parts:
                add_exactly(total, high)
                total[1] += low
            setattr(self, name, total)
        if self.rows is not None:
            self.rows = list(every(torch.cat([self.pull.new_zeros(0, len(self.pull)), *self.rows])))


@dataclass(frozen=True)
class FeatureSpectrum:
    """Spectrum of Theta = Z Z^T without its rows: s, and what turns features into rows of u.

    Attributes:
        s: eigenvalues, ascending, float64 [r'], > 0.
        turn: [r, r'], u = Z turn.
        gain: u^T r0 over all samples [r'].
        samples: n.
    """

    s: Tensor
    turn: Tensor
    gain: Tensor
    samples: int

    def rows(self, features: Tensor) -> Tensor:
        """Rows of u [n k, r'] of samples with features [n, k, r]."""
        return features.flatten(0, 1).to(torch.float64) @ self.turn

    def shard(self, features: Tensor) -> Spectrum:
        """Spectrum with the rows of these samples."""
        return Spectrum(self.rows(features), self.s, 0.0, complete=False)

    def moment(self, seen: Moments) -> Tensor:
        """Upper triangular C [p, r'], ||C c||^2 the mean over validation samples of ||df||^2 for a change c on the
        eigenvectors.

        Args:
            seen: sums over the validation samples; fewer rows than columns may have been kept.
        """
        if seen.rows is not None:
            root = torch.cat(seen.rows)
        else:  # before it is turned: that scales by the eigenvalues, and rounding of the largest would cover the others
            values, vectors = torch.linalg.eigh(seen.gram)
            keep = values > 1e-16 * values[-1].clamp_min(0)
            root = (vectors[:, keep] * values[keep].sqrt()).T
            del vectors
        check_products(root)
        root = (root @ self.turn).mul_(self.s / seen.samples**0.5)
        return torch.linalg.qr(root, mode="r").R.contiguous()


def feature_spectrum(moments: Moments, precision: float = 2.0**-24) -> FeatureSpectrum:
    """Eigendecomposition of Z^T Z; directions below the rounding of the features (relative, squared) are left out.

    From kept rows, fewer than columns, that of Z Z^T, which has the same eigenvalues.

    Raises:
        SpectrumError: features that are not finite or all zero.
    """
    rows = None if moments.rows is None else torch.cat(moments.rows)
    gram = moments.gram if rows is None else rows @ rows.T
    if not torch.isfinite(gram).all():
        raise SpectrumError(complaint("features", "finite numbers", "NaN or infinity", "Check the model's outputs."))
    s, v = torch.linalg.eigh((gram + gram.T) / 2 if rows is not None else gram)
    del gram
    top = float(s[-1]) if len(s) else 0.0
    if not top > 0:
        raise SpectrumError(complaint("features", "some that are not zero", "zeros", "Check params=."))
    least = top * max(precision**2 * moments.samples, len(s) * 2.0**-52)
    first = int((s <= least).sum())
    s, v = s[first:], v[:, first:]
    if rows is not None:
        v = (rows.T @ v) / s.sqrt()
    turn = v.T.contiguous().div_(s.sqrt()[:, None]).T  # columns together: products of rows with it are faster
    return FeatureSpectrum(s, turn, turn.T @ moments.pull, moments.samples)
