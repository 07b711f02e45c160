"""Scores from the backward passes that training does anyway: loss gradients of its samples, sketched as they pass."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._errors import ArgumentError, DataError, complaint
from .jacobians.layers import Factor, Index, Outer, Rows
from .jacobians.taps import READERS, factors_of, reader_of, window_of
from .loo import make_filter
from .measures import information
from .ops.sketching.layers import Layer
from .ops.sketching.sums import TensorSums
from .scores import Scores
from .spectra import Moments, feature_spectrum
from .streaming import LowRank

_LARGE = 1 << 18  # numbers of a layer's input and gradient that are not kept until step()
_DISPATCH = 1e-5  # seconds for two hooks of a layer outside of them: measured, they cannot see it
_COMPARED = 1 / 16  # share of the steps that are not watched under a budget, to compare with
_MIXES = "the layer mixes the samples of a batch in train mode"
_UNKNOWN = "no rule for the layer"
_NEVER = "no gradient came through a call of its layer"


def _hook(output: Tensor, call: Callable[[Tensor], None]) -> None:
    """output.register_hook(call) without a handle to remove it by, which would take as long as the rest."""
    if output._backward_hooks is None and output.grad_fn is not None:
        output._backward_hooks = hooks = OrderedDict()
        hooks[-1] = call
        output.grad_fn._register_hook_dict(output)
    else:
        output.register_hook(call)


class _Clock:
    """Seconds of the training's own steps and of what is added to them; pauses between steps count as two of them.

    What the hooks cannot see of themselves (their calls, what they put out of the cache) is the difference between the
    training's own seconds in steps that are watched and in those that are not.
    """

    def __init__(self) -> None:
        self.own = self.taken = 0.0  # taken: of own, since the last step
        self.rest, self.count = [0.0, 0.0], [0, 0]  # of steps not watched, watched
        self.end: float | None = None
        self.least = math.inf

    def step(self, begin: float, watched: bool) -> None:
        """A step that began its own work then, and ends now."""
        if self.end is not None:
            rest = begin - self.end - self.taken
            self.least = min(self.least, rest)
            self.rest[watched] += min(rest, 2 * self.least)
            self.count[watched] += 1
        self.end = time.perf_counter()
        if sum(self.count):  # the first one pays for tables and memory
            self.own += self.taken + self.end - begin
        self.taken = 0.0

    @property
    def share(self) -> float:
        """Of the steps that were watched."""
        return self.count[1] / max(sum(self.count), 1)

    def ratio(self, idle: float) -> float:
        """Overhead so far; idle: seconds of the hooks in a step that is not watched."""
        rest, steps = sum(self.rest), sum(self.count)
        if not rest:
            return 0.0
        plain = self.rest[0] / self.count[0] - idle if self.count[0] else math.inf
        return max(self.own / rest, (self.own + rest) / max(plain * steps, 1e-9) - 1)


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
    sketch is added to a step. Seen are the trainable parameters of linear layers (those of ``transformers.Conv1D``
    too), embeddings, convolutions, norms and scales, where these layers are called as modules on a whole batch;
    ``coverage`` is the share of the trainable parameters that was, ``left_out`` says why for the others. BatchNorm in
    train mode makes a sample's loss depend on the others: its own parameters are left out, and the parts of the layers
    below it are those through the sample's own activations. The gradients are those of the weights at the time of each
    step; of a sample seen twice the later one counts.

    Args:
        model: in training. rank: features. seed: of the sketch. reduction: "mean" or "sum", of the loss over the batch.
        layers: f(name, module) -> bool, the layers to watch; default: all.
        share: of the steps that are watched, drawn at random; the overhead falls with it, and over several epochs most
            samples are seen.
        overhead: at most this part of the time of the training itself, e.g. 0.15: a step is watched only while what was
            taken so far is below it, and one of 16 is left to compare with. None: every step is. ``diagnostics`` of the
            scores tell both, the share of the steps watched and the overhead measured.
        scaler: a torch.amp.GradScaler whose scale the loss is multiplied with; steps whose gradients overflow are left
            out, as the training leaves them out.
    Raises:
        ArgumentError: no such layer; two backward passes before a step; ids of another length; a layer whose batch axis
            changes. DataError: gradients that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 256,
        seed: int = 0,
        reduction: str = "mean",
        layers: Callable[[str, nn.Module], bool] | None = None,
        share: float = 1.0,
        overhead: float | None = None,
        scaler: Any = None,
    ):
        if reduction not in ("mean", "sum"):
            raise ArgumentError(complaint("reduction", "'mean' or 'sum'", repr(reduction), "Name that of the loss."))
        if not 0 < share <= 1:
            raise ArgumentError(complaint("share", "a number in (0, 1]", repr(share), "1 watches every step."))
        if overhead is not None and not overhead > 0:
            todo = "0.15 takes 15% of the training's time; None watches every step."
            raise ArgumentError(complaint("overhead", "a number > 0 or None", repr(overhead), todo))
        if isinstance(model, nn.DataParallel):
            todo = "Use DistributedDataParallel, which runs the model itself."
            raise ArgumentError(complaint("model", "one module that sees whole batches", "nn.DataParallel", todo))
        self.model, self.rank, self.seed, self.reduction, self.scaler = model, rank, seed, reduction, scaler
        self.share, self.overhead, self.skipped = share, overhead, 0
        self._clock = _Clock()
        self._draw, self._watching = random.Random(seed), True
        self._wanted = layers
        self._left_out: dict[int, str] = {}
        self._axes: dict[int, int] = {}  # the axis of the samples of each layer, where there was only one answer
        self._guessed: dict[int, int] = {}
        self._handles: list[Any] = []
        self._waiting: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._sums: TensorSums | None = None
        self._spare: tuple[tuple, TensorSums | None] = ((), None)  # of the last step, with what it was made for
        self._numbers: dict[Any, int] = {}  # row of each sample in the table
        self._table = torch.empty(0, rank)
        self._survey()

    def _survey(self) -> None:
        """The layers to watch: those with trainable parameters of their own."""
        # a parameter keeps its map wherever it is used: its number among all of them
        numbers = {id(p): (number, name) for number, (name, p) in enumerate(self.model.named_parameters())}
        self._streams = {name: number for number, name in numbers.values()}
        self._layers: dict[int, tuple[str, nn.Module, dict[str, str]]] = {}
        time_first: set[int] = set()
        found = 0
        for name, module in self.model.named_modules():
            if getattr(module, "batch_first", True) is False:
                time_first |= {id(m) for m in module.modules()}
            own = {n: numbers[id(p)][1] for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            found += bool(own)
            if own and (self._wanted is None or self._wanted(name, module)):
                self._layers[id(module)] = (name, module, own)
        if not self._layers:
            got, todo = f"none of {found}", "Watch at least one layer with trainable parameters."
            raise ArgumentError(complaint("layers", "some layers to watch", got, todo))
        uses = Counter(name for _, _, own in self._layers.values() for name in own.values())
        self._shared = {name for name, count in uses.items() if count > 1}
        self._time_first = time_first
        self._plain: dict[int, Layer] = {}  # linear layers and convolutions that are whole and alone
        for key, (_, module, own) in self._layers.items():
            reader, bias = reader_of(module), getattr(module, "bias", None) is not None
            if len(own) != 1 + bias or not self._shared.isdisjoint(own.values()):
                continue
            if reader is READERS[nn.Linear]:
                self._plain[key] = Layer(self._streams[own["weight"]], bias)
            elif reader is READERS[nn.Conv2d] and (window := window_of(module)) is not None:
                self._plain[key] = Layer(self._streams[own["weight"]], bias, window)

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters whose gradients were seen."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
        left_out = self.left_out
        return sum(size for name, size in sizes.items() if name not in left_out) / max(sum(sizes.values()), 1)

    @property
    def left_out(self) -> dict[str, str]:
        """Trainable parameters that were not seen so far, and why."""
        reasons = {name: _NEVER for name, p in self.model.named_parameters() if p.requires_grad}
        for key, (_, _, own) in self._layers.items():
            for name in own.values():
                if key in self._left_out:
                    reasons[name] = self._left_out[key]
                elif key in self._axes or key in self._guessed:
                    reasons.pop(name, None)
        return reasons

    def __enter__(self) -> TrainingScores:
        self._survey()  # parameters may have been frozen or freed meanwhile
        self._handles = [m.register_forward_hook(self._watch) for _, m, _ in self._layers.values()]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._waiting, self._sums, self._spare = [], [], None, ((), None)

    # -- in the passes ------------------------------------------------------------------------------------------------

    def _watch(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if not (self._watching and module.training) or id(module) in self._left_out or not torch.is_grad_enabled():
            return
        begin = time.perf_counter()
        if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
            self._left_out[id(module)] = _UNKNOWN
        elif output.requires_grad:
            if (self._waiting or self._sums is not None) and torch._C._current_graph_task_id() < 0:
                todo = "Call step(ids) after every backward pass, before the next forward pass."
                raise ArgumentError(complaint("step", "one backward pass for each step", "a second one", todo))
            _hook(output, partial(self._receive, module, inputs[0]))
        self._clock.taken += time.perf_counter() - begin

    def _receive(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        begin = time.perf_counter()
        if x.numel() + g.numel() <= _LARGE:
            self._waiting.append((module, x, g))
        else:  # let go, and read as long as it is in the cache
            self._add_all([(module, x, g)], (g if self._sums is None else self._sums.out).shape[0])
            if self._sums is not None:
                self._sums.flush()
        self._clock.taken += time.perf_counter() - begin + _DISPATCH

    def _add_all(self, layers: list[tuple[nn.Module, Tensor, Tensor]], n: int) -> None:
        others = []
        for module, x, g in layers:
            key = id(module)  # len(x) would take longer than all of this
            if key in self._plain and self._axes.get(key) == 0 and x.shape[0] == g.shape[0] == n:
                self._begin(n, g)
                if self._sums.layer(self._plain[key], x, g):
                    continue
            others.append((module, x, g))
        if not others:
            return
        kind = layers[0][2].device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            for module, x, g in others:
                self._add(module, x, g, n)

    def _begin(self, n: int, g: Tensor) -> None:
        """Sums for a batch of n, in the memory of the last one where that fits."""
        if self._sums is None:
            made_for = n, g.dtype, g.is_cpu or g.device
            if self._spare[0] != made_for:
                self._spare = made_for, TensorSums(n, 1, self.rank, self.seed, g)
            else:
                self._spare[1].clear()
            self._sums = self._spare[1]

    def _add(self, module: nn.Module, x: Tensor, g: Tensor, n: int) -> None:
        """Add the sketch of a layer's part to that of the batch of n samples."""
        axis = self._axis(module, x, g, n)
        if axis is None or id(module) in self._left_out:
            return
        self._begin(n, g)
        if axis:
            x, g = x.movedim(axis, 0), g.movedim(axis, 0)
        plain = self._plain.get(id(module))
        if plain and self._sums.layer(plain, x, g):
            return
        if plain and plain.window is None:
            a, g = x.reshape(n, -1, x.shape[-1]), g.reshape(n, 1, -1, g.shape[-1])
            self._sums.outer(a, g, plain.stream, plain.ones)
            return
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            self._leave_out(module, _MIXES)
            return
        factors = factors_of(module, self._layers[id(module)][2], x, g)
        if factors is None:
            self._leave_out(module, _UNKNOWN)
            return
        for factor in factors:
            self._put(factor)

    def _put(self, factor: Factor) -> None:
        sums, streams, names = self._sums, self._streams, factor.names
        if isinstance(factor, Rows):
            sums.rows(factor.rows, streams[names["rows"]])
        elif isinstance(factor, Index):
            count = self.model.get_parameter(names["weight"]).shape[0]
            sums.index(factor.token, factor.g, count, streams[names["weight"]])
        else:
            bias = "bias" in names
            apart = bias and not self._shared.isdisjoint(names.values())
            assert isinstance(factor, Outer)
            sums.outer(factor.a, factor.g, streams[names["weight"]], bias and not apart)
            if apart:
                sums.rows(factor.g.sum(2), streams[names["bias"]])

    def _axis(self, module: nn.Module, x: Tensor, g: Tensor, n: int) -> int | None:
        """The axis of the samples; None where the layer is left out."""
        key = id(module)
        if self._axes.get(key) == 0 and len(x) == len(g) == n:
            return 0
        fits = [axis for axis in (0, 1) if x.ndim > axis and g.ndim > axis + 1 and x.shape[axis] == g.shape[axis] == n]
        if g.ndim < 3:
            fits = fits[:1] if fits and fits[0] == 0 else []
        known = self._axes.get(key, self._guessed.get(key))
        if not fits or known is not None and known not in fits:
            if known is not None and n > 1:
                name = self._layers[key][0]
                got = f"{list(g.shape)} at layer {name!r} in a batch of {n}, another axis than before"
                todo = f"Leave the layer out: layers=lambda name, module: name != {name!r}."
                raise ArgumentError(complaint("layers", "layers that see whole batches", got, todo))
            self._leave_out(module, f"its result has {len(g)} rows where the batch has {n} samples")
            return None
        first = 1 if key in self._time_first and 1 in fits else fits[0]
        if len(fits) == 1 and n > 1:
            self._axes[key] = first
        elif known is None:
            self._guessed[key] = first
        return self._axes.get(key, self._guessed.get(key, first))

    def _leave_out(self, module: nn.Module, reason: str) -> None:
        self._left_out.setdefault(id(module), reason)

    # -- after them ---------------------------------------------------------------------------------------------------

    def step(self, ids: Sequence[Any] | Tensor | np.ndarray, *, factor: float | None = None) -> None:
        """Keep the sketches of the backward pass just done as those of the samples with these ids, in batch order.

        Args:
            ids: of the batch. factor: what the sum of the samples' losses was divided by; default: their number where
                ``reduction`` is "mean", else 1. With gradients accumulated over m batches by ``loss / m``: m times it.
        """
        begin, watched = time.perf_counter(), self._watching
        self._keep(ids.tolist() if hasattr(ids, "tolist") else list(ids), factor, watched)
        self._clock.step(begin, watched)
        self._watching = self._draw.random() < self.share
        if self.overhead is not None:
            self._watching &= self._measured() <= self.overhead and self._draw.random() > _COMPARED

    def _measured(self) -> float:
        return self._clock.ratio(_DISPATCH * len(self._layers))

    def _keep(self, listed: list, factor: float | None, watched: bool) -> None:
        n = len(listed)
        waiting, self._waiting = self._waiting, []
        if not waiting and self._sums is None:
            if not watched:
                return
            todo = "Call step(ids) once after backward(), with the model in train mode and not compiled."
            raise ArgumentError(complaint("step", "a backward pass before it", "none", todo))
        rows = waiting[0][2].shape[0] if self._sums is None else self._sums.out.shape[0]
        if rows != n and (self._sums is not None or all(n not in g.shape[:2] for _, _, g in waiting)):
            self._sums = None
            got, todo = f"{n} ids for {rows} samples", "Pass the ids of the batch, in its order."
            raise ArgumentError(complaint("ids", "one for each sample of the batch", got, todo))
        self._add_all(waiting, n)
        if self._sums is None:
            return
        sums, self._sums = self._sums, None
        factor = (n if self.reduction == "mean" else 1) if factor is None else factor
        if self.scaler is not None:
            factor /= self.scaler.get_scale()
        known, numbers = len(self._numbers), self._numbers
        rows = [*map(numbers.get, listed)]
        if None in rows:
            rows = [numbers.setdefault(name, len(numbers)) for name in listed]
        if len(numbers) > self._table.shape[0]:
            grown = torch.empty(max(1024, 2 * len(numbers)), self.rank)
            grown[:known] = self._table[:known]
            self._table = grown
        if sums.keep(self._table, rows, factor):
            return
        while len(numbers) > known:
            numbers.popitem()
        if self.scaler is not None:
            self.skipped += n
            return
        bad = torch.nonzero(~torch.isfinite(factor * sums.total()[:, 0]).all(1)).flatten()
        got = f"NaN or infinity at sample {listed[int(bad[0])]!r}" if len(bad) else "values beyond float32"
        todo = "Give scaler= the GradScaler of the training, or mend the loss."
        raise DataError(complaint("step", "finite gradients", got, todo))

    def features(self) -> tuple[np.ndarray, Tensor]:
        """(ids, sketches [n, rank]) of the samples seen so far."""
        return np.asarray(list(self._numbers)), self._table[: len(self._numbers)]

    def scores(self, *, reg: float = 0.1, sigma: float = 1.0) -> Scores:
        """Smooth unique information of every sample seen, from one Gauss-Newton step of the losses.

        A sample's row is its loss gradient z_i and its residual -1, so that the step is (Z^T Z + n reg)^-1 Z^T (-1),
        the empirical Fisher form. Removal is exact for it.

        Args:
            reg: of the mean loss, > 0. sigma: standard deviation of the noise of the weights.
        """
        if not reg > 0:
            raise ArgumentError(complaint("reg", "a number > 0", repr(reg), "Loss gradients alone bound no step."))
        if not self._numbers:
            todo = "Train inside the context and call step(ids)."
            raise ArgumentError(complaint("scores", "samples seen in training", "none", todo))
        ids, z = self.features()
        left_out = self.left_out
        if self.coverage < 0.5:
            name, reason = next(iter(left_out.items()))
            warnings.warn(f"only {self.coverage:.0%} of the parameters were seen: {name!r}: {reason}", stacklevel=2)
        if self.overhead is not None and self._clock.count[0]:
            seen = f"{self._clock.share:.0%} of the steps were watched"
            warnings.warn(f"{seen}: overhead is kept to {self.overhead}", stacklevel=2)
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
        diagnostics = dict(
            method="training", features=self.rank, coverage=self.coverage, samples=len(z), left_out=left_out,
            skipped=self.skipped, share=self._clock.share, overhead=self._measured(),
        )  # fmt: skip
        return Scores(ids=ids, values=values, settings=settings, diagnostics=diagnostics, units={"si": "nats"})
