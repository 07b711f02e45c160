"""Targets: numbers as they are, classes as one-hot rows, checked against what the loss can take."""

from __future__ import annotations

import torch
from torch import Tensor

from ._errors import ArgumentError, DataError, complaint


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


def loss_targets(loss: object, targets: Tensor | None, k: int, argument: str = "train") -> tuple[Tensor, Tensor | None]:
    """Targets as a loss takes them, and the class of each sample.

    Args:
        loss: "mse", "cross_entropy" (classes [n], or probabilities [n, k] of every class), "binary_cross_entropy"
            (numbers in 0..1 or integers {0, 1}, [n, k], or [n] for k = 1), or a function (any tensor [n, ...]).
        targets, k, argument: as in ``regression_targets``.
    Returns:
        y, float64 [n, k] for the named losses, and labels int64 [n] or None.
    Raises:
        DataError, ArgumentError.
    """
    if loss == "mse":
        return regression_targets(targets, k, argument)
    if callable(loss):
        if targets is None:
            raise DataError(complaint(argument, "samples with targets", "inputs only", "Pass (inputs, targets)."))
        classes = not targets.is_floating_point() and targets.ndim == 1
        return targets.to(torch.float64) if targets.is_floating_point() else targets, targets if classes else None
    if loss == "cross_entropy" and k == 1:
        todo = "Use loss='binary_cross_entropy' for one logit."
        raise ArgumentError(complaint("loss", "two or more outputs with 'cross_entropy'", "a model with one", todo))
    if loss == "binary_cross_entropy" and targets is not None and k > 1 and targets.ndim == 2:
        targets = targets.to(torch.float64)
    if loss == "binary_cross_entropy" and targets is not None and k > 1 and targets.ndim == 1:
        got, todo = f"shape {list(targets.shape)}", "Pass a row of 0 and 1 per sample, or use loss='cross_entropy'."
        raise DataError(complaint(argument, f"targets of shape [n, {k}] for 'binary_cross_entropy'", got, todo))
    y, labels = regression_targets(targets, k, argument)
    wrong = ~((y >= 0) & (y <= 1)).all(1)
    expected = "targets in 0..1 for 'binary_cross_entropy'"
    if loss == "cross_entropy":
        wrong |= (y.sum(1) - 1).abs() > 1e-6
        expected = "classes, or probabilities that sum to 1, for 'cross_entropy'"
    bad = torch.nonzero(wrong).flatten()
    if len(bad):
        got = f"{y[bad[0]].tolist()[:8]} at sample {int(bad[0])}"
        raise DataError(complaint(argument, expected, got, "Repair that sample, or use loss='mse'."))
    return y, labels if loss == "cross_entropy" or k == 1 else None
