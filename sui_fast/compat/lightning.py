"""Scores from a run of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from ..scores import Scores
from ..training import TrainingScores


class ScoreCallback(Callback):
    """Lightning callback that scores the training samples from the trainer's own backward passes.

    Args:
        ids: function of a batch to the ids of its samples. reg, sigma: as in ``TrainingScores.scores``.
        options: of ``TrainingScores``.
    """

    def __init__(self, ids: Callable[[Any], Any], *, reg: float = 0.1, sigma: float = 1.0, **options: Any):
        self.ids, self.training, self.options = ids, dict(reg=reg, sigma=sigma), options
        self.live: TrainingScores | None = None
        self.scores: Scores | None = None

    def on_train_start(self, trainer, pl_module):
        self.live = TrainingScores(pl_module, **self.options).__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.live.step(self.ids(batch))

    def on_train_epoch_end(self, trainer, pl_module):
        self.scores = self.live.scores(**self.training)

    def on_train_end(self, trainer, pl_module):
        self.live.__exit__()
