"""A spectrum from sums over samples: Z^T Z and Z^T r0 are all that a low-rank kernel needs to know of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import SpectrumError, complaint
from .dense import Spectrum

BLOCK = 128  # columns of a block of a symmetric product
_ROWS = 256  # of features made float64 at a time
_PORTION = 1 << 20  # numbers made float64 at a time for a sum


def add_upper(total: Tensor, x: Tensor, sign: int = 1) -> None:
    """total += sign x^T x [r, r], its upper triangle at least: the blocks of it, half the work."""
    for begin in range(0, x.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        total[block, begin:].addmm_(x[:, block].T, x[:, begin:], alpha=sign)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return upper.triu() + upper.triu(1).T


class Moments:
    """Sums over samples, float64, whatever the dtype of the features.

    Attributes:
        pull: Z^T r0 [r]. samples: n. energy: ||r0||^2.
        rows: the rows of Z themselves, float64, where they are kept.
    """

    def __init__(self, rank: int, device: torch.device | str = "cpu", keep_rows: bool = False):
        self.rows: list[Tensor] | None = [] if keep_rows else None
        self._upper = torch.zeros(rank, rank, dtype=torch.float64, device=device)
        self.pull = torch.zeros(rank, dtype=torch.float64, device=device)
        self.samples, self.energy = 0, 0.0

    def add(self, features: Tensor, residual: Tensor | None = None, sign: int = 1) -> None:
        """features [n, k, r], residual [n, k] (None for validation samples); sign -1 takes them away (no kept rows)."""
        step = max(1, _PORTION // max(1, features[0].numel())) if len(features) else 1
        for begin in range(0, len(features), step):
            part = slice(begin, begin + step)
            flat = features[part].flatten(0, 1).to(torch.float64)
            if self.rows is None:
                add_upper(self._upper, flat, sign)
            else:
                self.rows.append(flat)
            if residual is not None:
                self.pull.addmv_(flat.T, residual[part].reshape(-1).to(torch.float64), alpha=sign)
        self.samples += sign * len(features)
        if residual is not None:
            self.energy += sign * float(residual.to(torch.float64).square().sum())

    @property
    def gram(self) -> Tensor:
        """Z^T Z [r, r]."""
        if self.rows is not None:
            rows = torch.cat(self.rows)
            return rows.T @ rows
        return mirrored(self._upper)

    def reduce(self, total: Callable[[Tensor], Tensor], first: int) -> None:
        """Replace every sum by its total over processes; samples of this one are from number ``first`` on."""
        rows = sum(len(part) for part in self.rows or ())
        counts = torch.tensor([self.samples, self.energy, rows], dtype=torch.float64, device=self.pull.device)
        self._upper, self.pull, counts = total(self._upper), total(self.pull), total(counts)
        self.samples, self.energy, every = int(counts[0]), float(counts[1]), int(counts[2])
        if self.rows is not None:
            whole, begin = self.pull.new_zeros(every, len(self.pull)), first * every // max(self.samples, 1)
            whole[begin : begin + rows] = torch.cat([whole[:0], *self.rows])
            self.rows = [total(whole)]


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
        flat = features.flatten(0, 1)
        if flat.device.type != "cpu":
            return flat.to(torch.float64) @ self.turn
        out = self.turn.new_empty(len(flat), self.turn.shape[1])
        for begin in range(0, len(flat), _ROWS):  # the wide copy stays in cache
            part = slice(begin, begin + _ROWS)
            torch.mm(flat[part].to(torch.float64), self.turn, out=out[part])
        return out

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
        root = root @ (self.turn * self.s) / seen.samples**0.5
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
    top = float(s[-1]) if len(s) else 0.0
    if not top > 0:
        raise SpectrumError(complaint("features", "some that are not zero", "zeros", "Check params=."))
    keep = s > top * max(precision**2 * moments.samples, len(s) * 2.0**-52)
    s, v = s[keep], v[:, keep]
    if rows is not None:
        v = (rows.T @ v) / s.sqrt()
    turn = (v / s.sqrt()).T.contiguous().T  # columns together: products of rows with it are faster
    return FeatureSpectrum(s, turn, turn.T @ moments.pull, moments.samples)
