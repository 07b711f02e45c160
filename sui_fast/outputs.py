"""Outputs of models for ``outputs=``: functions (model, batch) -> [b, k] for the usual heads of Hugging Face models.

Those of language models name a target of their own (the attribute ``target``), so the data need none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._errors import DataError, complaint

_IGNORED = -100


def classification(model: nn.Module, batch) -> Tensor:
    """Logits [b, k] of a classifier: its ``.logits`` or the tensor it returns. For loss="cross_entropy"."""
    out = model(**{key: value for key, value in batch.items() if key != "labels"})
    return getattr(out, "logits", out)


def regression(model: nn.Module, batch) -> Tensor:
    """Predictions [b, k] of a model with a head for numbers, [b] taken as [b, 1]. For loss="mse"."""
    out = classification(model, batch)
    return out[:, None] if out.ndim == 1 else out


def causal_lm_loss(model: nn.Module, batch) -> Tensor:
    """Mean negative log-likelihood of the tokens of each sequence, [b, 1], in nats a token; target 0.

    Args:
        model: returns ``.logits`` [b, s, vocabulary]. batch: input_ids [b, s], attention_mask where there is padding,
            labels where some tokens do not count (-100); without labels all tokens but the padding do.
    Raises:
        DataError: no input_ids.
    """
    log, counts = _token_log_probabilities(model, batch)
    return -(log.sum(1) / counts.sum(1).clamp_min(1))[:, None]


def causal_lm_tokens(model: nn.Module, batch) -> Tensor:
    """Log-probability of each next token, [b, s - 1], 0 where none counts; target 0. Pad all batches to one length.

    Args, Raises: as in ``causal_lm_loss``.
    """
    return _token_log_probabilities(model, batch)[0]


def causal_lm_margin(model: nn.Module, batch) -> Tensor:
    """Sum over the tokens of log p / (1 - p), [b, 1], the log odds of the sequence; target 1, for
    loss="binary_cross_entropy".

    Args, Raises: as in ``causal_lm_loss``.
    Source: Park et al. 2023 (TRAK), section 3.
    """
    log, counts = _token_log_probabilities(model, batch)
    rest = torch.log(-torch.expm1(log.clamp_max(-1e-7)))
    return ((log - rest) * counts).sum(1, keepdim=True)


causal_lm_loss.target = 0.0
causal_lm_tokens.target = 0.0
causal_lm_margin.target = 1.0


def _token_log_probabilities(model: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """log p of every next token [b, s - 1], 0 where it does not count, and whether it counts, 0 or 1."""
    if not isinstance(batch, dict) or "input_ids" not in batch:
        got = list(batch) if isinstance(batch, dict) else type(batch).__name__
        todo = "Pass batches with input_ids and attention_mask."
        raise DataError(complaint("train", "batches with 'input_ids'", got, todo))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = torch.where(batch["attention_mask"] == 0, _IGNORED, labels)
    logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    counts = (labels != _IGNORED).to(logits.dtype)
    log = torch.log_softmax(logits, 2).gather(2, torch.where(labels == _IGNORED, 0, labels)[:, :, None])[:, :, 0]
    return log * counts, counts
