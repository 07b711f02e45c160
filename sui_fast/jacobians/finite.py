"""Numbers that are not finite, named by their sample, and gradients whose squares leave the range of their dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._errors import DataError, SpectrumError, complaint


def check_rows(x: Tensor, numbers: range | list[int], what: str, argument: str) -> None:
    """DataError where a row of x [b, ...] is not finite; numbers: of the samples; what: "input" or "target"."""
    if not x.is_floating_point() or torch.isfinite(x.sum()):
        return
    bad = torch.nonzero(~torch.isfinite(x.reshape(len(x), -1)).all(1)).flatten()
    if len(bad):
        got = f"NaN or infinity in the {what} of sample {numbers[int(bad[0])]}"
        raise DataError(complaint(argument, f"finite {what}s", got, "Remove or repair that sample."))


def range_of(dtype: torch.dtype) -> tuple[float, float]:
    """What squared lengths of gradients lie between: products are in ``dtype``, features of low rank in float32."""
    single, power = torch.finfo(torch.float32), 2 if dtype == torch.float64 else 1
    return single.tiny**power, single.max**power


def check_products(x: Tensor) -> None:
    """SpectrumError where what came of products of gradients is not finite."""
    if not (torch.isfinite(x.sum()) or torch.isfinite(x).all()):
        got, todo = "NaN or infinity", "Scale the inputs or outputs, or pass dtype=torch.float64."
        raise SpectrumError(complaint("train", "gradients whose products are finite", got, todo))


def check_squares(mean: float, dtype: torch.dtype) -> None:
    """SpectrumError where the mean squared length of gradients is not finite, or so small that it was rounded."""
    if not math.isfinite(mean) or 0 < mean < range_of(dtype)[0]:
        got, todo = f"{mean:.1e} on average", "Scale the inputs or outputs, or pass dtype=torch.float64."
        raise SpectrumError(complaint("train", "squares of gradients within the range of numbers", got, todo))
