"""Influence functions: the change of the trained weights to first order, by one solve with the Hessian per sample."""

from __future__ import annotations

import math
import time as clock
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from tqdm.auto import tqdm

from .._errors import ArgumentError, complaint, number, one_of, whole
from .._waiting import waited_for
from ..jacobians import Evaluator, as_samples, to_device
from ..targets import regression_targets
from .results import Result
from .retraining import LossOfWeights

METHODS = ("auto", "exact", "cg", "lissa")
EXACT_PARAMETERS = 3000  # up to here "auto" forms the Hessian


@dataclass(frozen=True, eq=False)
class InfluenceFunctions(Result):
    """First-order estimates of leaving out single samples.

    Attributes:
        ids: of the samples [c]; samples: their numbers. weight_sqnorm: ||w_-i - w||^2. prediction_sqnorm: mean over
            validation samples of ||f_-i - f||^2, or None. method; damping; residual: largest relative residual of the
            solves; seconds: for these samples.
    """

    title: ClassVar[str] = "Influence functions"
    ids: np.ndarray
    samples: np.ndarray
    weight_sqnorm: np.ndarray
    prediction_sqnorm: np.ndarray | None
    method: str
    damping: float
    residual: float
    seconds: float

    def summary(self) -> str:
        return (
            f"{len(self.ids)} samples, {self.method}, damping {self.damping:.3g}, relative residual of the solves "
            f"{self.residual:.1e}, {self.seconds:.2f} s."
        )

    def columns(self) -> dict[str, np.ndarray]:
        found = {"id": self.ids, "weight_sqnorm": self.weight_sqnorm}
        return found if self.prediction_sqnorm is None else {**found, "prediction_sqnorm": self.prediction_sqnorm}

    def _draw(self, ax) -> None:
        ax.plot(np.sort(self.weight_sqnorm)[::-1], label="weights")
        if self.prediction_sqnorm is not None:
            ax.plot(np.sort(self.prediction_sqnorm)[::-1], label="predictions")
        ax.set(xlabel="samples, largest first", ylabel="squared change", yscale="log")
        ax.legend()


@waited_for
def influence_functions(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    samples=None,
    reg: float = 0.0,
    method: str = "auto",
    damping: float | None = None,
    iterations: int | None = None,
    tolerance: float = 1e-6,
    outputs=None,
    params="trainable",
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InfluenceFunctions:
    """Influence of single samples on trained weights and predictions, the baseline that ``score`` replaces.

    ::

        w_-i - w = (1/n) (H + damping)^-1 grad 1/2 ||f_w(x_i) - y_i||^2,    f_-i(x) - f(x) = J(x) (w_-i - w)

    with H the Hessian of the mean loss at the present weights, which should be trained.

    Args:
        model, train, val, outputs, params, batch_size, dtype: as in ``score``.
        samples: numbers of the training samples wanted; default: all.
        reg: lambda' of reg/2 ||w - w0||^2 in the training.
        method: "exact" (the Hessian is formed and solved with), "cg" (conjugate gradient on
            Hessian-vector products), "lissa" (Neumann series on random batches), "auto": exact up to 3000, else cg.
        damping: added to H; default: 0 with reg > 0, else 1e-4 of its largest eigenvalue, as H is singular then.
        iterations: at most, per solve (default 200 of cg, 1000 of lissa). tolerance: of cg, relative.
        start: w0, flat, where the present weights are not where the regularisation pulls to.
        seed: of the batches of lissa and of the power iteration.
    Returns:
        InfluenceFunctions.
    Raises:
        ArgumentError, DataError, ModelError.
    Source: Koh & Liang 2017; LiSSA: Agarwal et al. 2017.
    """
    one_of("method", method, METHODS)
    reg, damping = number("reg", reg), None if damping is None else number("damping", damping)
    number("tolerance", tolerance, positive=True)
    iterations = None if iterations is None else whole("iterations", iterations, 1)
    batch_size, seed = whole("batch_size", batch_size, 1), whole("seed", seed)
    begin = clock.perf_counter()
    data = as_samples(train, with_targets=True, argument="train")
    evaluator = Evaluator(model, outputs, params, dtype)
    with evaluator.quiet():
        few = to_device(next(data.batches(1)), evaluator.device, evaluator.dtype)
        y, _ = regression_targets(data.targets, evaluator(few).shape[1])
        loss = LossOfWeights(evaluator, data, y, reg, batch_size)
        w = loss.start.clone()
        if start is not None:
            if not isinstance(start, Tensor) or start.shape != w.shape:
                got = f"shape {list(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
                raise ArgumentError(complaint("start", f"a flat tensor of {w.numel()} weights", got, "Pass w0."))
            loss.start = start.to(w)
        chosen = pick_samples(samples, data.n)
        gradients = _sample_gradients(loss, w, chosen, data.n)
        hessian = Hessian(loss, w, data.n)
        size = w.numel()
        chosen_method = method if method != "auto" else "exact" if size <= EXACT_PARAMETERS else "cg"
        if damping is None:
            damping = 0.0 if reg > 0 else 1e-4 * hessian.top(seed)
        if chosen_method == "exact":
            matrix = hessian.dense()
            matrix.diagonal().add_(damping)
            solved = torch.linalg.solve(matrix.double(), gradients.double().T).T.to(w)
        elif chosen_method == "cg":
            solved = _conjugate_gradient(hessian, gradients, damping, iterations or 200, tolerance, progress)
        else:
            solved = _lissa(hessian, gradients, damping, iterations or 1000, seed, progress)
        rest = gradients - hessian(solved) - damping * solved
        sizes = gradients.norm(dim=1)
        residual = float((rest.norm(dim=1) / torch.where(sizes > 0, sizes, 1.0)).max())
        if not math.isfinite(residual):
            got, todo = f"a solve by {chosen_method!r} that ends in {residual}", "Raise damping=, or lower reg=."
            raise ArgumentError(complaint("damping", "a Hessian that can be inverted", got, todo))
        change = solved / data.n
        predictions = None
        if val is not None:
            predictions = _prediction_sqnorm(loss, evaluator, w, change, val, batch_size)
    return InfluenceFunctions(
        ids=data.ids[chosen],
        samples=chosen,
        weight_sqnorm=change.double().square().sum(1).cpu().numpy(),
        prediction_sqnorm=predictions,
        method=chosen_method,
        damping=float(damping),
        residual=residual,
        seconds=clock.perf_counter() - begin,
    )


def pick_samples(samples, n: int, argument: str = "samples") -> np.ndarray:
    """Sample numbers, checked; None: all."""
    if samples is None:
        return np.arange(n)
    numbers = np.asarray(samples)
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu" and len(numbers) > 0
    if not whole or numbers.min() < 0 or numbers.max() >= n:
        got = repr(samples) if numbers.size < 10 else f"an array of {numbers.dtype}, shape {list(numbers.shape)}"
        raise ArgumentError(complaint(argument, f"numbers of samples in 0..{n - 1}", got, "Pass integers."))
    return numbers.astype(np.int64)


class Hessian:
    """Of the mean loss (with its regularisation) at w, as a map on rows of vectors [c, d]."""

    def __init__(self, loss: LossOfWeights, w: Tensor, n: int):
        self._loss, self._w, self._n, self._vectorised = loss, w, n, True

    def _one(self, v: Tensor, parts) -> Tensor:
        total = self._loss.reg * v
        for batch, part in parts:
            rows = self._loss.y[part]
            weights = rows.new_full((len(rows),), 1.0)

            def gradient(w, batch=batch, rows=rows, weights=weights):
                return grad(self._loss.data_term)(w, weights, batch, rows)

            total = total + self._scale * jvp(gradient, (self._w,), (v,))[1]
        return total

    def __call__(self, vectors: Tensor, parts=None) -> Tensor:
        """H v of every row, over all samples or over some batches."""
        parts = self._loss.batches if parts is None else parts
        self._scale = 1.0 / sum(len(self._loss.y[part]) for _, part in parts)
        found = []
        for block in vectors.split(64):
            if self._vectorised and len(block) > 1:
                try:
                    found.append(vmap(lambda v: self._one(v, parts))(block))
                    continue
                except (RuntimeError, NotImplementedError):
                    self._vectorised = False
            found.append(torch.stack([self._one(v, parts) for v in block]))
        return torch.cat(found).detach()

    def dense(self) -> Tensor:
        size = self._w.numel()
        parts = []
        for begin in range(0, size, 256):
            rows = torch.zeros(min(256, size - begin), size, dtype=self._w.dtype, device=self._w.device)
            rows[torch.arange(len(rows)), begin + torch.arange(len(rows))] = 1
            parts.append(self(rows))
        matrix = torch.cat(parts)
        return (matrix + matrix.T) / 2

    def top(self, seed: int, steps: int = 20) -> float:
        """Largest absolute eigenvalue, by power iteration."""
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(1, self._w.numel(), generator=generator).to(self._w)
        size = 0.0
        for _ in range(steps):
            v = self(v / v.norm())
            size = float(v.norm())
            if size == 0:
                break
        return size


def _sample_gradients(loss: LossOfWeights, w: Tensor, chosen: np.ndarray, n: int) -> Tensor:
    found = torch.empty(len(chosen), w.numel(), dtype=w.dtype, device=w.device)
    for batch, part in loss.batches:
        inside = np.flatnonzero((chosen >= part.start) & (chosen < part.stop))
        for place in inside:
            weights = loss.y.new_zeros(part.stop - part.start)
            weights[int(chosen[place]) - part.start] = 1.0
            found[place] = grad(loss.data_term)(w, weights, batch, loss.y[part])
    return found.detach()


def _conjugate_gradient(
    hessian: Hessian, b: Tensor, damping: float, iterations: int, tolerance: float, progress: bool
) -> Tensor:
    """Rows solved at the same time, in the form of conjugate residuals (Stiefel 1955).

    It needs what conjugate gradient needs, and ||b - H x|| falls also where H has negative eigenvalues, as that of a
    network that is not at a minimum.
    """
    x, r, goal = torch.zeros_like(b), b.clone(), tolerance**2 * b.square().sum(1)
    p, hr = r.clone(), hessian(r) + damping * r
    hp, form = hr.clone(), (r * hr).sum(1)
    active = (form != 0) & (b.square().sum(1) > 0)
    for _ in tqdm(range(iterations), desc="conjugate gradient", delay=2, leave=False, disable=not progress):
        rows = torch.nonzero(active).flatten()
        if not len(rows):
            break
        step = (form[rows] / hp[rows].square().sum(1))[:, None]
        x[rows] += step * p[rows]
        r[rows] -= step * hp[rows]
        hr = hessian(r[rows]) + damping * r[rows]
        new = (r[rows] * hr).sum(1)
        share = (new / form[rows])[:, None]
        p[rows] = r[rows] + share * p[rows]
        hp[rows] = hr + share * hp[rows]
        form[rows] = new
        active[rows] = (r[rows].square().sum(1) > goal[rows]) & (new != 0) & torch.isfinite(new)
    return x


def _lissa(hessian, b: Tensor, damping: float, iterations: int, seed: int, progress: bool) -> Tensor:
    """x <- b / s + x - (H_batch + damping) x / s, s just above the largest eigenvalue."""
    scale = 1.1 * (hessian.top(seed) + damping)
    parts, generator = hessian._loss.batches, np.random.default_rng(seed)
    x = b / scale
    for _ in tqdm(range(iterations), desc="LiSSA", delay=2, leave=False, disable=not progress):
        some = [parts[int(generator.integers(len(parts)))]]
        x = b / scale + x - (hessian(x, some) + damping * x) / scale
    return x


def _prediction_sqnorm(loss, evaluator, w: Tensor, change: Tensor, val, batch_size: int) -> np.ndarray:
    probes = as_samples(val, with_targets=None, argument="val")
    total = change.new_zeros(len(change), dtype=torch.float64)
    for raw in probes.batches(batch_size):
        batch = to_device(raw, evaluator.device, evaluator.dtype)
        for place, delta in enumerate(change):
            moved = jvp(lambda flat, batch=batch: loss.outputs(flat, batch), (w,), (delta,))[1]
            total[place] += moved.double().square().sum()
    return (total / probes.n).detach().cpu().numpy()
