"""Scores from the backward passes that training does anyway: loss gradients of its samples, sketched as they pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._errors import ArgumentError, complaint
from .loo import make_filter
from .measures import information
from .ops.sketching.sums import TensorSums
from .scores import Scores
from .spectra import Moments, feature_spectrum
from .streaming import LowRank


class TrainingScores:
    """Sketches of the loss gradients of every sample, taken from a training run's own backward passes.

    ::

        with TrainingScores(model, rank=256) as live:
            for ids, x, y in loader:
                loss(model(x), y).backward()   # mean over the batch
                live.step(ids)
                optimizer.step(); optimizer.zero_grad()
        scores = live.scores(reg=0.1)

    The gradient of a summed (or averaged) loss at a layer's output holds each sample's own part, so nothing but the
    sketch is added to a step. Linear layers and embeddings are seen, where they are called as modules on a whole batch;
    ``coverage`` is the share of the parameters that was. The gradients are those of the weights at the time of each
    step; of a sample seen twice the later one counts.

    Args:
        model: in training. Layers that mix samples (BatchNorm in train mode) make the parts depend on one another.
        rank: features. seed: of the sketch. reduction: "mean" or "sum", of the loss over the batch.
        layers: f(name, module) -> bool, the layers to watch; default: all Linear and Embedding modules.
    Raises:
        ArgumentError: no such layer; a layer named by ``layers`` without a batch axis; ids of another length.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 256,
        seed: int = 0,
        reduction: str = "mean",
        layers: Callable[[str, nn.Module], bool] | None = None,
    ):
        if reduction not in ("mean", "sum"):
            raise ArgumentError(complaint("reduction", "'mean' or 'sum'", repr(reduction), "Name that of the loss."))
        self.model, self.rank, self.seed, self.reduction = model, rank, seed, reduction
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
        self._layers = sorted((name, m) for name, m in named if layers is None or layers(name, m))
        if not self._layers:
            got, todo = f"none of {len(named)}", "Watch at least one Linear or Embedding layer."
            raise ArgumentError(complaint("layers", "some layers to watch", got, todo))
        self._named = layers is not None
        self._met: set[int] = set()
        self._left_out: set[int] = set()
        # a weight keeps its map wherever it is used; a bias beside it is one more column
        weights = {id(m.weight): None for _, m in self._layers}
        self._streams = {key: stream for stream, key in enumerate(weights)}
        self._shared = len(weights) < len(self._layers)
        self._handles: list[Any] = []
        self._sums: TensorSums | None = None
        self._blocks: list[tuple[list, Tensor]] = []

    @property
    def coverage(self) -> float:
        """Share of the parameters whose gradients were seen."""
        every = {id(p): p.numel() for p in self.model.parameters()}
        met = [m for _, m in self._layers if id(m) in self._met - self._left_out]
        seen = {id(p): p.numel() for m in met for p in m.parameters(recurse=False)}
        return sum(seen.values()) / sum(every.values())

    def __enter__(self) -> TrainingScores:
        self._handles = [m.register_forward_hook(self._watch) for _, m in self._layers]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], None

    def _watch(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if module.training and torch.is_grad_enabled() and output.requires_grad and id(module) not in self._left_out:
            x = inputs[0].detach()
            output.register_hook(lambda g: self._add(module, x, g.detach()))

    def _add(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            n = len(g)
            if self._sums is None:
                self._sums = TensorSums(n, 1, self.rank, self.seed, g)
            if len(self._sums.out) != n and not self._named:
                self._left_out.add(id(module))  # one table of positions for all samples: its gradient is their sum
                return
            if len(self._sums.out) != n:
                name = next(name for name, m in self._layers if m is module)
                got = f"{n} rows in layer {name!r} and {len(self._sums.out)} in another"
                todo = "Call step(ids) after every backward pass, or leave the layer out with layers=."
                raise ArgumentError(complaint("layers", "layers that see one batch", got, todo))
            self._met.add(id(module))
            g = g.reshape(n, 1, -1, g.shape[-1])
            stream = self._streams[id(module.weight)]
            if isinstance(module, nn.Embedding):
                token = x.reshape(n, -1)
                if module.padding_idx is not None:
                    token = token.where(token != module.padding_idx, -1)
                self._sums.index(token, g, module.num_embeddings, stream)
            else:
                ones = module.bias is not None and not self._shared
                self._sums.outer(x.reshape(n, -1, x.shape[-1]), g, stream, ones)
                if module.bias is not None and self._shared:
                    number = next(i for i, (_, m) in enumerate(self._layers) if m is module)
                    self._sums.rows(g.sum(2), len(self._streams) + number)

    def step(self, ids: Sequence[Any] | Tensor | np.ndarray) -> None:
        """Keep the sketches of the backward pass just done as those of the samples with these ids, in batch order."""
        if self._sums is None:
            todo = "Call step(ids) once after backward(), with the model in train mode."
            raise ArgumentError(complaint("step", "a backward pass before it", "none", todo))
        features, self._sums = self._sums.total()[:, 0].to(torch.float32).cpu(), None
        listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if len(listed) != len(features):
            got, todo = f"{len(listed)} ids for {len(features)} samples", "Pass the ids of the batch, in its order."
            raise ArgumentError(complaint("ids", "one for each sample of the batch", got, todo))
        features *= len(features) if self.reduction == "mean" else 1
        self._blocks.append((listed, features))

    def features(self) -> tuple[np.ndarray, Tensor]:
        """(ids, sketches [n, rank]) of the samples seen so far."""
        last = {name: number for number, name in enumerate(name for ids, _ in self._blocks for name in ids)}
        rows = torch.cat([features for _, features in self._blocks])[list(last.values())]
        self._blocks = [(list(last), rows)]
        return np.asarray(list(last)), rows

    def scores(self, *, reg: float = 0.1, sigma: float = 1.0) -> Scores:
        """Smooth unique information of every sample seen, from one Gauss-Newton step of the losses.

        A sample's row is its loss gradient z_i and its residual -1, so that the step is (Z^T Z + n reg)^-1 Z^T (-1),
        the empirical Fisher form. Removal is exact for it.

        Args:
            reg: of the mean loss, > 0. sigma: standard deviation of the noise of the weights.
        """
        if not reg > 0:
            raise ArgumentError(complaint("reg", "a number > 0", repr(reg), "Loss gradients alone bound no step."))
        if not self._blocks:
            todo = "Train inside the context and call step(ids)."
            raise ArgumentError(complaint("scores", "samples seen in training", "none", todo))
        ids, z = self.features()
        shard = {"features": z[:, None], "residual": -torch.ones(len(z), 1, dtype=torch.float64)}
        moments = Moments(self.rank)
        moments.add(**shard)
        spectrum = feature_spectrum(moments)
        solver = LowRank([shard], spectrum, 1, moment=None, convention="sum", groups=None, device=torch.device("cpu"))
        removal = solver.removal(shard, make_filter(len(z), reg=reg))
        values = {
            "si": information(removal.weight_sqnorm, sigma).numpy(),
            "gradient_norm": torch.linalg.vector_norm(z.double(), dim=1).numpy(),
        }
        settings = dict(reg=reg, sigma=sigma, method="training", rank=self.rank, seed=self.seed)
        diagnostics = dict(method="training", features=self.rank, coverage=self.coverage, samples=len(z))
        return Scores(ids=ids, values=values, settings=settings, diagnostics=diagnostics, units={"si": "nats"})
