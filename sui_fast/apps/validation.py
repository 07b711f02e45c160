"""Is the linearised model a good judge of this network? Real retraining without samples tells."""

from __future__ import annotations

import copy
import math
import time as clock
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError, complaint, number, whole
from ..jacobians import Evaluator, as_samples, to_device
from ..jacobians.engine import predict
from ..targets import regression_targets
from .influence import influence_functions, pick_samples
from .kernel import linear_problem
from .results import Result, correlation, rank_correlation
from .retraining import LossOfWeights, descend, without_each


@dataclass(frozen=True, eq=False)
class Validation(Result):
    """Real leave-one-out retraining against its estimates, for c samples.

    Attributes:
        ids, samples: ids and numbers of the samples [c].
        real_weights, real_predictions: ||w_-i - w||^2 and mean over validation of ||f_-i - f||^2, by retraining [c].
        linear_weights, linear_predictions: the same of the linearised model. influence_weights, influence_predictions:
            of influence functions, or None.
        correlations: {"linear" | "influence": {"weights" | "predictions": {"pearson", "spearman"}}}.
        seconds: {"real", "linear", "influence"}: for c samples, except "linear", which is for all n.
        speedup: of the linearised model over influence functions, for all n samples.
    """

    title: ClassVar[str] = "Linearised model against real retraining"
    ids: np.ndarray
    samples: np.ndarray
    real_weights: np.ndarray
    real_predictions: np.ndarray
    linear_weights: np.ndarray
    linear_predictions: np.ndarray
    influence_weights: np.ndarray | None
    influence_predictions: np.ndarray | None
    correlations: dict[str, dict[str, dict[str, float]]]
    seconds: dict[str, float]
    speedup: float | None
    n: int

    @property
    def pearson_weights(self) -> float:
        return self.correlations["linear"]["weights"]["pearson"]

    @property
    def pearson_predictions(self) -> float:
        return self.correlations["linear"]["predictions"]["pearson"]

    @property
    def spearman_weights(self) -> float:
        return self.correlations["linear"]["weights"]["spearman"]

    @property
    def spearman_predictions(self) -> float:
        return self.correlations["linear"]["predictions"]["spearman"]

    def summary(self) -> str:
        lines = [f"{len(self.ids)} of {self.n} samples left out by real retraining ({self.seconds['real']:.1f} s)."]
        for name, found in self.correlations.items():
            parts = ", ".join(
                f"{space} Pearson {value['pearson']:.4f}, Spearman {value['spearman']:.4f}"
                for space, value in found.items()
            )
            label = "linearised" if name == "linear" else "influence functions"
            lines.append(f"{label}: {parts}.")
        if self.speedup is not None:
            lines.append(f"The linearised model is {self.speedup:.0f} times faster than influence functions.")
        return " ".join(lines)

    def columns(self) -> dict[str, np.ndarray]:
        names = ("real", "linear", "influence")
        found = {f"{name}_{space}": getattr(self, f"{name}_{space}") for name in names for space in SPACES}
        return {"id": self.ids, **{name: column for name, column in found.items() if column is not None}}

    def _draw(self, ax) -> None:
        for space, marker in zip(SPACES, "ox", strict=True):
            real, guess = getattr(self, f"real_{space}"), getattr(self, f"linear_{space}")
            scale = max(float(real.max()), 1e-300)
            r = self.correlations["linear"][space]["pearson"]
            ax.scatter(real / scale, guess / scale, marker=marker, label=f"{space}, Pearson {r:.3f}")
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
        ax.set(xlabel="real retraining, relative to the largest", ylabel="linearised model")
        ax.legend()


SPACES = ("weights", "predictions")


def validate_linearization(
    model: torch.nn.Module,
    train,
    val,
    *,
    samples: int | Any = 30,
    time: int | None = 1000,
    lr: float | None = None,
    reg: float = 0.0,
    train_fn: Callable | None = None,
    influence: str | None = "auto",
    convention: str = "mean",
    outputs=None,
    params="trainable",
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Validation:
    """Retrain really, with and without single samples, and compare with the linearised model and influence functions.

    ::

        loss = 1/n' sum_i 1/2 ||f_w(x_i) - y_i||^2 + reg/2 ||w - w0||^2,    w <- w - lr grad loss,   ``time`` times

    Args:
        model: at the weights training starts from; left as found. train, val, outputs, params: as in ``score``.
        samples: how many training samples to leave out (drawn with ``seed``), or their numbers.
        time: steps; lr: step size, default half of what is stable for the linearised model. reg: lambda'.
        train_fn: your own training: f(model, kept) trains the given copy of the model, which is in eval mode, in place
            on the samples with the numbers ``kept``, deterministically; time, lr and reg must describe it.
        influence: method of ``influence_functions``, or None to leave them out.
        convention: "mean", what retraining on the mean loss does.
        batch_size: samples per forward pass. dtype: of the retraining and of the kernel; default: the
            model's and float64.
    Returns:
        Validation.
    Raises:
        ArgumentError; StabilityError where training diverges.
    Source: Harutyunyan et al., ICLR 2021, Table 1.
    """
    if val is None:
        raise ArgumentError(complaint("val", "validation samples", None, "Pass the inputs to predict."))
    if train_fn is None:
        time = whole("time (the steps of real training)", time, 1)
    elif not callable(train_fn):
        raise ArgumentError(complaint("train_fn", "a function f(model, kept)", repr(train_fn), "Pass your training."))
    batch_size, seed, reg = whole("batch_size", batch_size, 1), whole("seed", seed), number("reg", reg)
    data = as_samples(train, with_targets=True, argument="train")
    probes = as_samples(val, with_targets=None, argument="val")
    if isinstance(samples, int | np.integer) and not isinstance(samples, bool):
        if not 2 <= samples:
            raise ArgumentError(complaint("samples", "at least 2 samples", repr(samples), "Pass 30, say."))
        chosen = np.sort(np.random.default_rng(seed).permutation(data.n)[:samples])
    else:
        chosen = pick_samples(samples, data.n)
    common = dict(outputs=outputs, params=params)
    typed = {} if dtype is None else {"dtype": dtype}
    begin = clock.perf_counter()
    problem = linear_problem(
        model, data, probes, reg=reg, convention=convention, batch_size=batch_size, progress=progress, **common, **typed
    )
    if lr is None and time is not None:
        top = float(torch.linalg.matrix_norm(problem.theta, 2)) / data.n + reg
        lr = 1.0 / top
    removal = problem.removal(time=time, lr=lr)
    linear_all = removal.weight_sqnorm.cpu().numpy(), removal.prediction_sqnorm.cpu().numpy()
    seconds = {"linear": clock.perf_counter() - begin}

    begin = clock.perf_counter()
    evaluator = Evaluator(model, outputs, params, dtype)
    with evaluator.quiet():
        y, _ = regression_targets(data.targets, problem.k)
        loss = LossOfWeights(evaluator, data, y, reg, batch_size)
        batches = [to_device(raw, evaluator.device, evaluator.dtype) for raw in probes.batches(batch_size)]
        if train_fn is None:
            weights = without_each(data.n, chosen)
            trained = descend(loss, weights, steps=int(time), lr=lr, progress=progress)
            predictions = torch.stack([loss.predict(flat, batches) for flat in trained]).double()
            final = copy.deepcopy(evaluator.model)
        else:
            seen = dict(outputs=outputs, params="all", batch_size=batch_size, dtype=dtype)
            found = []
            for out in [np.zeros(0, int), *chosen[:, None]]:
                own = _own_training(train_fn, model, np.setdiff1d(np.arange(data.n), out))
                flat = _flat(own, evaluator)
                if not found and torch.equal(flat, loss.start):
                    got, todo = "weights as they were", "Train the copy that is given, in place, or return it."
                    raise ArgumentError(complaint("train_fn", "a training that changes the weights", got, todo))
                final = own if not found else final  # with what else changed in it, as running means do
                found.append((flat, predict(own, probes, **seen).double()))
            trained, predictions = (torch.stack(x) for x in zip(*found, strict=True))
    change = (trained[1:].double() - trained[0].double()).square().sum(1)
    moved = (predictions[1:] - predictions[0]).square().sum(2).mean(1)
    real = change.cpu().numpy(), moved.cpu().numpy()
    seconds["real"] = clock.perf_counter() - begin

    estimates = {"linear": tuple(values[chosen] for values in linear_all)}
    speedup = None
    if influence is not None:
        begin = clock.perf_counter()
        named = dict(final.named_parameters())
        with torch.no_grad():
            for name, value in loss.named(trained[0]).items():
                named[name].copy_(value)
        found = influence_functions(
            final, data, probes, samples=chosen, reg=reg, method=influence, start=loss.start, batch_size=batch_size,
            seed=seed, progress=progress, **common,
        )  # fmt: skip
        estimates["influence"] = found.weight_sqnorm, found.prediction_sqnorm
        seconds["influence"] = clock.perf_counter() - begin
        speedup = seconds["influence"] / len(chosen) * data.n / seconds["linear"]
    correlations = {
        name: {
            space: {"pearson": correlation(a, b), "spearman": rank_correlation(a, b)}
            for space, a, b in zip(SPACES, real, values, strict=True)
        }
        for name, values in estimates.items()
    }
    nothing = None, None
    return Validation(
        data.ids[chosen], chosen, *real, *estimates["linear"], *estimates.get("influence", nothing),
        correlations=correlations, seconds=seconds, speedup=speedup, n=data.n,
    )  # fmt: skip


def _own_training(train_fn: Callable, model: torch.nn.Module, kept: np.ndarray) -> torch.nn.Module:
    """A copy after the user's training."""
    own = copy.deepcopy(model)
    returned = train_fn(own, kept)
    return returned if isinstance(returned, torch.nn.Module) else own


def _flat(own: torch.nn.Module, evaluator: Evaluator) -> Tensor:
    """Chosen parameters of a model the user trained, [d]."""
    named = dict(own.named_parameters())
    lost = [name for name, p in evaluator.parameters.items() if name not in named or named[name].shape != p.shape]
    if lost:
        todo = "Train the copy that is given, in place, or return it."
        raise ArgumentError(complaint("train_fn", "a model with the same parameters", f"one without {lost[0]!r}", todo))
    flat = torch.cat([named[name].detach().reshape(-1) for name in evaluator.parameters]).to(evaluator.dtype)
    if not math.isfinite(float(flat.sum())):
        got, todo = "weights that are not finite", "Check your training."
        raise ArgumentError(complaint("train_fn", "a training that converges", got, todo))
    return flat
