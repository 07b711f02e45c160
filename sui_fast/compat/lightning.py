"""Scores from a run of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from ..scores import Scores
from ..training import TrainingScores


class ScoreCallback(Callback):
    """Lightning callback that scores the training samples from the trainer's own backward passes.

    Gradients accumulated over batches, and a loss scaled for float16, are taken into account.

    Args:
        ids: function of a batch to the ids of its samples. reg, sigma: as in ``TrainingScores.scores``.
        options: of ``TrainingScores``.
    """

    def __init__(self, ids: Callable[[Any], Any], *, reg: float = 0.1, sigma: float = 1.0, **options: Any):
        self.ids, self.training, self.options = ids, dict(reg=reg, sigma=sigma), options
        self.live: TrainingScores | None = None
        self.scores: Scores | None = None
        self._ids: Any = None

    def on_train_start(self, trainer, pl_module):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.live = TrainingScores(pl_module, scaler=scaler, **self.options).__enter__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._ids = self.ids(batch)

    def on_after_backward(self, trainer, pl_module):
        mean = self.live.reduction == "mean"
        self.live.step(self._ids, factor=(len(self._ids) if mean else 1) * trainer.accumulate_grad_batches)

    def on_train_epoch_end(self, trainer, pl_module):
        self.scores = self.live.scores(**self.training)

    def on_train_end(self, trainer, pl_module):
        self.live.__exit__()
