"""Targets of the squared loss: numbers as they are, classes as one-hot rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ._errors import DataError, complaint


def regression_targets(targets: Tensor | None, k: int, argument: str = "train") -> tuple[Tensor, Tensor | None]:
    """Targets of the mean squared loss and, where they stand for classes, the class of each sample.

    Args:
        targets: float [n, k] or [n]; integer classes [n], in 0..k-1 (k > 1) or {0, 1} (k = 1).
        k: outputs of the model. argument: where the targets came from, for messages.
    Returns:
        y float64 [n, k] and labels int64 [n] or None (numbers that are neither one-hot rows nor all 0 or 1).
    Raises:
        DataError: missing targets, wrong shape, a class out of range, NaN or infinity (with the sample's number).
    """
    if targets is None:
        raise DataError(complaint(argument, "samples with targets", "inputs only", "Pass (inputs, targets)."))
    if targets.is_floating_point():
        y = targets.to(torch.float64)
        y = y[:, None] if y.ndim == 1 else y
        if y.ndim != 2 or y.shape[1] != k:
            raise DataError(
                complaint(
                    argument,
                    f"float targets of shape [n, {k}], as the model has {k} outputs",
                    f"shape {list(targets.shape)}",
                    "Pass one target per output, or integer classes.",
                )
            )
        bad = torch.nonzero(~torch.isfinite(y).all(1)).flatten()
        if len(bad):
            raise DataError(
                complaint(
                    argument,
                    "finite targets",
                    f"NaN or infinity at sample {int(bad[0])}",
                    "Remove or repair that sample.",
                )
            )
        binary = bool(((y == 0) | (y == 1)).all())
        if k == 1:
            return y, y[:, 0].to(torch.int64) if binary else None
        return y, y.argmax(1) if binary and bool((y.sum(1) == 1).all()) else None
    labels = targets.to(torch.int64)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            complaint(
                argument,
                "integer classes of shape [n]",
                f"shape {list(targets.shape)}",
                "Pass one class per sample; convert multi-output targets to float.",
            )
        )
    classes = max(k, 2)
    bad = torch.nonzero((labels < 0) | (labels >= classes)).flatten()
    if len(bad):
        raise DataError(
            complaint(
                argument,
                f"classes in 0..{classes - 1}, as the model has {k} output{'s' if k > 1 else ''}",
                f"{int(labels[bad[0]])} at sample {int(bad[0])}",
                "Relabel the classes from 0, or widen the model.",
            )
        )
    if k == 1:
        return labels.to(torch.float64)[:, None], labels
    return torch.nn.functional.one_hot(labels, k).to(torch.float64), labels
