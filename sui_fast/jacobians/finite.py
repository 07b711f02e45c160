"""Numbers that are not finite, named by their sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import DataError, complaint


def check_rows(x: Tensor, numbers: range | list[int], what: str, argument: str) -> None:
    """DataError where a row of x [b, ...] is not finite; numbers: of the samples; what: "input" or "target"."""
    if not x.is_floating_point() or torch.isfinite(x.sum()):
        return
    bad = torch.nonzero(~torch.isfinite(x.reshape(len(x), -1)).all(1)).flatten()
    if len(bad):
        got = f"NaN or infinity in the {what} of sample {numbers[int(bad[0])]}"
        raise DataError(complaint(argument, f"finite {what}s", got, "Remove or repair that sample."))
