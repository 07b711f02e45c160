"""Scores from a run of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..scores import Scores
from ..training import TrainingScores


class ScoreCallback(TrainerCallback):
    """TrainerCallback that scores the training samples from the trainer's own backward passes.

    Give every sample its number in a column ``ids`` and keep it (``remove_unused_columns=False``); the column is taken
    off before the model sees it. ``scores`` is set at the end of every epoch.

    Args:
        column: the name of that column. reg, sigma: as in ``TrainingScores.scores``. options: of ``TrainingScores``.
    """

    def __init__(self, column: str = "ids", *, reg: float = 0.1, sigma: float = 1.0, **options: Any):
        self.column, self.training, self.options = column, dict(reg=reg, sigma=sigma), options
        self.live: TrainingScores | None = None
        self.scores: Scores | None = None
        self._ids: Any = None
        self._handle: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.live = TrainingScores(model, **self.options).__enter__()

        def take_off(module, inputs, given):
            if self.column not in given:
                return None
            ids = given.pop(self.column)
            if module.training:
                self._keep()
                self._ids = ids
            return inputs, given

        self._handle = model.register_forward_pre_hook(take_off, with_kwargs=True)

    def _keep(self) -> None:
        if self._ids is not None:
            self.live.step(self._ids)
            self._ids = None

    def on_substep_end(self, args, state, control, **kwargs):
        self._keep()

    def on_step_end(self, args, state, control, **kwargs):
        self._keep()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._keep()
        self.scores = self.live.scores(**self.training)

    def on_train_end(self, args, state, control, **kwargs):
        self._handle.remove()
        self.live.__exit__()
