"""Scores from a run of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..scores import Scores
from ..training import TrainingScores


class ScoreCallback(TrainerCallback):
    """TrainerCallback that scores the training samples from the trainer's own backward passes.

    Give every sample its number in a column ``ids`` and keep it (``remove_unused_columns=False``); the column is taken
    off before the model sees it. ``scores`` is set at the end of every epoch. Gradients accumulated over batches, and a
    loss scaled for float16, are taken into account.

    Args:
        column: the name of that column. reg, sigma: as in ``TrainingScores.scores``. options: of ``TrainingScores``.
    """

    def __init__(self, column: str = "ids", *, reg: float = 0.1, sigma: float = 1.0, **options: Any):
        self.column, self.training, self.options = column, dict(reg=reg, sigma=sigma), options
        self.live: TrainingScores | None = None
        self.scores: Scores | None = None
        self._ids: Any = None
        self._divisor: Any = None
        self._handle: Any = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)
        self.live = TrainingScores(model, scaler=scaler, **self.options).__enter__()

        def take_off(module, inputs, given):
            if self.column not in given:
                return None
            ids = given.pop(self.column)
            if module.training:
                self._keep()
                self._ids, items = ids, given.get("num_items_in_batch")
                if items is None:  # the mean of the batch, then that of the accumulated ones
                    self._divisor = len(ids) * args.gradient_accumulation_steps
                else:
                    if by_items[0] is None:
                        by_items[0] = _divides_by_items(module, inputs, given)
                    self._divisor = items if by_items[0] else len(ids)
            return inputs, given

        by_items: list[bool | None] = [None]

        self._handle = model.register_forward_pre_hook(take_off, with_kwargs=True)

    def _keep(self) -> None:
        if self._ids is not None:
            self.live.step(self._ids, factor=float(self._divisor))
            self._ids = None

    def on_substep_end(self, args, state, control, **kwargs):
        self._keep()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._keep()  # before the scale of the loss changes

    def on_step_end(self, args, state, control, **kwargs):
        self._keep()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._keep()
        self.scores = self.live.scores(**self.training)

    def on_train_end(self, args, state, control, **kwargs):
        self._handle.remove()
        self.live.__exit__()


def _divides_by_items(module: nn.Module, inputs: tuple, given: dict[str, Any]) -> bool:
    """Whether the model divides its loss by ``num_items_in_batch``, or takes the argument and ignores it."""
    modes = [(m, m.training) for m in module.modules()]
    doubled = {**given, "num_items_in_batch": 2 * given["num_items_in_batch"]}
    try:
        module.eval()
        with torch.no_grad():
            # the loss is the first of a ModelOutput, too
            once, twice = (module(*inputs, **arguments)[0] for arguments in (given, doubled))
    finally:
        for m, mode in modes:
            m.training = mode
    return bool(twice < 0.75 * once)
