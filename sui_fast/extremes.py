"""What linear algebra cannot solve: an error that names the sample whose gradient is too large, or too small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ._errors import DataError, SpectrumError, complaint
from .jacobians.finite import range_of
from .processes import Source, portion

_NEAR = 2.0**20  # sums of products leave their range before each of them does


@contextmanager
def solvable(sources: Callable[[], dict[str, Source]]) -> Iterator[None]:
    """Looks for the reason where a spectrum, or a system, has no solution.

    Args:
        sources: the samples by the name of their argument.
    Raises:
        DataError: gradients out of range, with the sample. SpectrumError: what LAPACK says, as one of our own.
    """
    try:
        yield
    except (SpectrumError, torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
        for argument, source in sources().items():
            if not _look_at_lengths(source, argument):
                break
        if isinstance(error, SpectrumError):
            raise
        todo = "Raise reg=, pass dtype=torch.float64, or scale the inputs."
        raise SpectrumError(complaint("train", "a kernel that can be solved with", error, todo)) from error


def _look_at_lengths(source: Source, argument: str) -> bool:
    """Raises DataError where gradients are out of range; False where all are zero, which is another reason."""
    most, where, total = 0.0, source.begin, 0.0
    for first in range(source.begin, source.end, portion(source.samples.n)):
        part = source.part(first, min(first + portion(source.samples.n), source.end))
        known, squares = (x.own_blocks().diagonal(dim1=1, dim2=2).sum(1) for x in (part, part.wide()))
        squares = torch.where(torch.isfinite(known) & torch.isfinite(squares), squares, torch.inf)
        total += float(squares.sum())
        if float(squares.max()) > most:
            most, where = float(squares.max()), first + int(squares.argmax())
    if most > 0:
        dtype = part.outputs.dtype
        (least, largest), wide = range_of(dtype), dtype == torch.float64
        todo = "Scale the inputs or outputs." if wide else "Scale the inputs or outputs, or pass dtype=torch.float64."
        expected = f"gradients whose squares are in the range of {dtype}" + ", and they in that of torch.float32" * wide
        if most > largest / _NEAR:
            raise DataError(complaint(argument, expected, f"an overflow at sample {where}", todo))
        if total < least * _NEAR * (source.end - source.begin):
            got = f"lengths of {most**0.5:.1e} (sample {where}) and less, which vanish"
            raise DataError(complaint(argument, expected, got, todo))
    return most > 0
