"""What a run trains for: the goal, samples that carry what its features need, and the outputs they belong to."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ._errors import ArgumentError, complaint, one_of
from .jacobians.data import Samples
from .jacobians.engine import predict
from .losses import Curved, Goal, Rooted, Squared
from .projections import MODES, Aligned, Lumped, RootedLumped, Shared, Sketched

_FILLED = 0.3  # of the random rows, by the effective dimension: from there on scores were more than 6% too large


def targets(samples: Samples, constant: float | None, k: int) -> torch.Tensor | None:
    return samples.targets if constant is None else torch.full((samples.n, k), constant, dtype=torch.float64)


def aim(model, loss, samples, targets, device, options, progress, predict=predict) -> tuple[Goal, Samples, Any]:
    """The goal of the training, samples that carry what its features need, and the outputs they are features of.

    predict: as ``jacobians.engine.predict``, where processes share the samples.
    """
    y, labels = targets[0].to(device), targets[1]
    if loss == "mse":
        return Squared(y, labels), samples, options["outputs"]
    f0 = predict(model, samples, progress=progress, **options)
    function = loss if callable(loss) else None
    goal = Curved("function" if function else loss, f0, y, labels, function)
    return goal, samples.beside(goal.extra), Rooted(goal.kind, options["outputs"])


def aim_at_few(model, loss, samples, targets, device, options, progress, mode, rank, seed, predict=predict):
    """As ``aim``, with ``rank`` rows in place of k outputs."""
    y, labels = targets
    base = options["outputs"]
    if loss == "mse":
        shared = Shared(base, rank, seed)
        return Squared((y @ shared.basis(y.shape[1], y)).to(device), None), samples, shared
    given = y if labels is None or loss != "cross_entropy" else labels[:, None]
    if mode == "top":
        start = samples.beside(given.to(device))
        pick = dict(options, outputs=Lumped(base, rank, given=True))
        chosen = predict(model, start, progress=progress, **pick).to(torch.float64)
        lump = dict(options, outputs=Lumped(base, rank))
        f0 = predict(model, samples.beside(chosen.long()), progress=progress, **lump).to(torch.float64)
        first = torch.zeros(samples.n, rank + 1, dtype=torch.float64, device=device)
        first[:, 0] = 1.0
        goal = Curved("cross_entropy", f0, first, torch.zeros(samples.n, dtype=torch.long, device=device))
        goal.suggests = False  # its classes are the order of the likeliest
        return goal, samples.beside(torch.cat([f0, chosen], 1)), RootedLumped(base, rank)
    number = torch.arange(samples.n, dtype=torch.float64)[:, None]
    samples = samples.beside(torch.cat([given.to(torch.float64).cpu(), number], 1).to(device))
    size = predict(model, samples, progress=progress, **dict(options, outputs=Sketched(loss, base, 0, seed)))
    return Aligned(loss, size.to(torch.float64), rank, labels), samples, Sketched(loss, base, rank, seed)


def check_mode(mode, loss, labels, wanted, candidates) -> None:
    one_of("output_mode", mode, MODES)
    classes = loss == "cross_entropy" and labels is not None
    fits = classes if mode == "top" else classes or loss in ("mse", "binary_cross_entropy")
    if mode == "random" and {"loo_residual", "loo_margin"} & set(wanted):
        fits = False
    if not fits or candidates is not None:
        got, todo = f"{mode!r} with loss={loss!r}, measures {list(wanted)}", "Use 'top' or 'all'; see output_mode."
        raise ArgumentError(complaint("output_mode", "a mode that fits the loss and the measures", got, todo))


def warn_of_rows(rows: int, n: int, edf: float) -> None:
    """A warning where random rows are too few for the effective dimension found with them, and scores too large."""
    if edf > _FILLED * n * rows:
        share = f"an effective dimension of {edf:.0f} fills {edf / (n * rows):.0%} of {n * rows} rows"
        warnings.warn(
            f"sui_fast: output_rank {rows} is small: {share}, and scores come out too large. "
            "Raise output_rank=, or reg=, or use output_mode='all'.",
            RuntimeWarning,
            stacklevel=3,
        )
