"""Real retraining by full-batch gradient descent, many models at once."""

from __future__ import annotations

import logging
import time as clock
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .._errors import StabilityError, complaint
from ..jacobians import Evaluator, Samples, to_device
from ..jacobians.data import batch_length

_log = logging.getLogger("sui_fast")
_BYTES = 1 << 29  # that the weights and gradients of the models trained together may take


class LossOfWeights:
    """The mean squared loss of a model as a function of its chosen parameters, [d] flat, batch by batch.

    ::

        L(w; a) = sum_i a_i 1/2 ||f_w(x_i) - y_i||^2 + reg/2 ||w - w0||^2
    """

    def __init__(self, evaluator: Evaluator, samples: Samples, y: Tensor, reg: float, batch_size: int):
        self._call, self.reg = evaluator.functional(), reg
        self._shapes = {name: p.shape for name, p in evaluator.parameters.items()}
        flat = torch.cat([p.detach().reshape(-1) for p in evaluator.parameters.values()])
        self.start = flat.to(evaluator.dtype).clone()
        self.batches: list[Any] = []
        begin = 0
        for raw in samples.batches(batch_size):
            batch = to_device(raw, evaluator.device, evaluator.dtype)
            size = batch_length(batch)
            self.batches.append((batch, slice(begin, begin + size)))
            begin += size
        self.y = y.to(self.start)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        parts, begin = {}, 0
        for name, shape in self._shapes.items():
            parts[name] = flat[begin : begin + shape.numel()].view(shape)
            begin += shape.numel()
        return parts

    def outputs(self, flat: Tensor, batch: Any) -> Tensor:
        with _plain_attention():
            return self._call(self.named(flat), batch)

    def data_term(self, flat: Tensor, weights: Tensor, batch: Any, y: Tensor) -> Tensor:
        return 0.5 * ((self.outputs(flat, batch) - y).square().sum(1) * weights).sum()

    def gradient(self, flat: Tensor, weights: Tensor) -> Tensor:
        """Of L at weights [d]; sample weights [n]."""
        total = self.reg * (flat - self.start)
        for batch, part in self.batches:
            total = total + grad(self.data_term)(flat, weights[part], batch, self.y[part])
        return total

    def predict(self, flat: Tensor, batches: list[Any]) -> Tensor:
        return torch.cat([self.outputs(flat, batch).detach() for batch in batches])


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by single operations: the fused ones have no forward derivatives and no rule for vmap."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def descend(loss: LossOfWeights, sample_weights: Tensor, *, steps: int, lr: float, progress: bool = True) -> Tensor:
    """Weights after full-batch gradient descent from the start, one model per row of sample weights, [E, d].

    Models share each step through vmap where that is faster than one after the other (it is not for convolutions on a
    CPU); both ways are timed on the first step.

    Args:
        loss: the problem. sample_weights: [E, n]. steps, lr: of the mean loss.
    Raises:
        StabilityError: the training diverges.
    """
    count, size = len(sample_weights), loss.start.numel()
    chunk = max(1, min(count, _BYTES // (6 * size * loss.start.element_size())))
    together = vmap(loss.gradient)
    sample_weights = sample_weights.to(loss.start)

    def apart(flat: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([loss.gradient(w, a) for w, a in zip(flat, weights, strict=True)])

    step_of = apart if chunk == 1 else _faster(together, apart, loss, sample_weights[:chunk])
    done = []
    bar = tqdm(total=steps * count, desc="retraining", delay=2, leave=False, disable=not progress)
    for begin in range(0, count, chunk):
        weights = sample_weights[begin : begin + chunk]
        flat = loss.start.expand(len(weights), -1).clone()
        for step in range(steps):
            flat -= lr * step_of(flat, weights)
            bar.update(len(weights))
            if step % 100 == 0 and not bool(torch.isfinite(flat).all()):
                break
        if not bool(torch.isfinite(flat).all()):
            got, todo = f"{lr}, with which it diverges", "Lower lr."
            raise StabilityError(complaint("lr", "a step size with which the real training converges", got, todo))
        done.append(flat)
    bar.close()
    return torch.cat(done)


def _faster(together, apart, loss: LossOfWeights, weights: Tensor):
    flat = loss.start.expand(len(weights), -1).contiguous()
    seconds = []
    for way in (together, apart):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                way(flat, weights)
                start = clock.perf_counter()
                way(flat, weights)
            seconds.append(clock.perf_counter() - start)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if way is apart:
                raise
            _log.info("vmap does not take this model (%s); models are trained one after the other", error)
            seconds.append(float("inf"))
    return together if seconds[0] <= seconds[1] else apart


def without_each(n: int, chosen: np.ndarray) -> Tensor:
    """Sample weights of the mean loss: all samples, then without each of the chosen ones, [1 + c, n]."""
    weights = torch.full((1 + len(chosen), n), 1.0 / max(n - 1, 1), dtype=torch.float64)
    weights[0] = 1.0 / n
    weights[torch.arange(1, 1 + len(chosen)), torch.from_numpy(chosen)] = 0.0
    return weights
