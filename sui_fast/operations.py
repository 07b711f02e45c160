"""Operations of a run by each method, from the shapes of the layers: the same on every machine, unlike seconds."""

from __future__ import annotations

from collections.abc import Iterator

from .jacobians import Jacobian
from .jacobians.layers import Index, Outer
from .spectra import subspace_columns

# Always worth their time: on a core of 50 GFLOP/s a minute or two.
WORTH = {"cpu": 5e12, "cuda": 4e14}
_PASSES = 10  # over the data, forward and backward, that any method may take
EIGEN, CHOLESKY, SPECTRUM = 12, 2, 15  # times r^3: eigenvectors and changes, a factor and its inverse, of moments


class Operations:
    """Multiplications and additions of a run of n samples with m validation samples, k rows of the kernel each.

    Attributes:
        one_pass: forward and backward through the layers that count. dense: an exact kernel and its removal.
        worth: as many as a method may take.
    """

    def __init__(self, first: Jacobian, n: int, m: int, k: int, spectral: bool):
        """first: Jacobian of any samples. spectral: an exact kernel needs eigenvectors, not a Cholesky factor alone."""
        self._n, self._k, self._parameters = n, k, first.shape[1]
        self._layers = list(_layers(first))
        capture = sum(2.0 * s * i * o * (1 + k) for s, i, o in self._layers)
        self.one_pass = capture * (n + m)
        self.worth = max(WORTH["cuda" if first.device.type == "cuda" else "cpu"], _PASSES * self.one_pass)
        pair = sum(min(2.0 * k * k * i * o, 2.0 * s * s * (i + k * k * o)) for s, i, o in self._layers)
        rows = float(n * k)
        solve = (EIGEN if spectral else CHOLESKY) * rows**3 + 2.0 * rows**2 * m * k
        self.dense = self.one_pass + (n / 2 + m) * n * pair + solve

    def subspace(self, rank: int) -> float:
        """Of a basis of so many directions, found in two passes, and the coordinates along it."""
        wide, k = min(subspace_columns(rank), self._n * self._k), self._k
        each = sum(min(2.0 * k * i * o * (s + wide), 2.0 * s * o * wide * (i + k)) for s, i, o in self._layers)
        return 2 * self.one_pass + 3 * each * self._n + 6.0 * self._parameters * wide**2 + SPECTRUM * float(wide) ** 3

    def sketch(self, columns: int) -> float:
        """Of a pass and what comes after it: sums, their eigenvectors, a turn of the features (transforms are few)."""
        rows = float(self._n * self._k)
        return self.one_pass + 3.6 * rows * columns * min(columns, rows) + SPECTRUM * min(columns, rows) ** 3


def needs_spectrum(reg, time, convention: str, measures, candidates) -> bool:
    """Whether an exact kernel needs its eigenvectors, not a Cholesky factor alone."""
    settled = time is None and not isinstance(reg, str) and reg > 0 and convention != "mean"
    return not settled or "si_sgd" in measures or candidates is not None


def _layers(first: Jacobian) -> Iterator[tuple[int, int, int]]:
    """(positions, inputs, outputs) of layers; what has explicit rows counts as one output."""
    for factor in first.select(range(1)).factors():
        if isinstance(factor, Outer):
            yield factor.g.shape[2], factor.width, factor.g.shape[3]
        elif isinstance(factor, Index):
            yield factor.g.shape[2], 1, factor.g.shape[3]
        else:
            yield 1, factor.rows.shape[2], 1
