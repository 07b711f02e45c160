"""Losses: the second-order model of each sample's loss in the outputs, which turns any convex loss into a squared one.

    l(f0 + d) = l(f0) + g . d + 1/2 d^T W d + ...,   W = R^T R,   R^T r = -g
              = const + 1/2 ||r - R d||^2            the residual r and the features R J take the place of r0 and J

g and W are the gradient and the Hessian of the loss in the outputs at the given weights: the generalised Gauss-Newton
form. R has as many rows as W has rank, so the null space of W (all logits moved together) never appears.
Source: Schraudolph 2002; Martens 2020, section 8; docs/math.md, section 12.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._errors import ArgumentError, DataError, complaint
from .jacobians.capture import model_outputs
from .jacobians.data import Known
from .measures import class_margin, suggested_label

LOSSES = ("mse", "cross_entropy", "binary_cross_entropy")
# Probabilities below exp(-120) count as exp(-120): W changes by 1e-52, and no square of 1 / R overflows.
_FLOOR = -120.0
_MOST = 4096  # outputs for which the Hessian of a loss function is formed


class Softmax:
    """Cross-entropy: W = diag(p) - p p^T = R^T R with R [k - 1, k], the square root in closed form.

    ::

        R_j = sqrt(p_j q_j / q_(j-1)) (e_j - sum_(i>j) (p_i / q_j) e_i),      q_j = sum_(i>j) p_i,  p ascending
        r_j = sqrt(q_j / q_(j-1)) (y_j / sqrt(p_j) - sqrt(p_j) sum_(i>j) y_i / q_j)

    Class j against the later ones: in ascending order q_j never falls below p_max, so nothing is divided by a small
    number and nothing cancels; probabilities stay logarithms until their square root is taken.

    Args:
        f: logits [b, k].
    Source: Tanabe and Sagae 1992 (Cholesky factor of a multinomial covariance).
    """

    def __init__(self, f: Tensor):
        log, self.order = torch.sort(F.log_softmax(f.to(torch.float64), 1).clamp_min(_FLOOR), dim=1, stable=True)
        self.p = log.exp()
        tail = _later(self.p)  # sum over i >= j
        self.q, self.conditional = tail[:, 1:], (self.p / tail)[:, :-1]
        self.share = (self.q / tail[:, :-1]).sqrt()
        self.half = (log[:, :-1] / 2).exp()

    def root(self, x: Tensor) -> Tensor:
        """R x [b, k - 1] of x [b, k]."""
        x = x.gather(1, self.order)
        mean = _later(self.p.to(x) * x)[:, 1:] / self.q.to(x)
        return (self.half * self.share).to(x) * (x[:, :-1] - mean)

    def residual(self, y: Tensor) -> Tensor:
        """r [b, k - 1] of targets y [b, k] that sum to 1."""
        y = y.gather(1, self.order)
        return self.share * (y[:, :-1] / self.half - self.half * _later(y)[:, 1:] / self.q)

    def unroot(self, x: Tensor) -> Tensor:
        """The d [b, k] with R d = x and 0 for the most probable class."""
        d = x / (self.half * self.share)
        mean = _later(self.conditional * d)
        moved = F.pad(d + F.pad(mean[:, 1:], (0, 1)), (0, 1))
        return torch.zeros_like(moved).scatter(1, self.order, moved)

    @staticmethod
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return -(y * F.log_softmax(f, 1)).sum(1)

    @staticmethod
    def slope(f: Tensor, y: Tensor) -> Tensor:
        return y - F.softmax(f, 1)


class Logistic:
    """Binary cross-entropy of every output: W = diag(p (1 - p)), R = sqrt(W), r = (y - p) / R, all from logarithms."""

    def __init__(self, f: Tensor):
        f = f.to(torch.float64).clamp(_FLOOR, -_FLOOR)
        self.one, self.zero = F.logsigmoid(f), F.logsigmoid(-f)
        self.scale = ((self.one + self.zero) / 2).exp()

    def root(self, x: Tensor) -> Tensor:
        return self.scale.to(x) * x

    def residual(self, y: Tensor) -> Tensor:
        odds = ((self.zero - self.one) / 2).exp()
        return y * odds - (1 - y) / odds

    def unroot(self, x: Tensor) -> Tensor:
        return x / self.scale

    @staticmethod
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1)

    @staticmethod
    def slope(f: Tensor, y: Tensor) -> Tensor:
        return y - torch.sigmoid(f)


class Matrix:
    """Any R [b, k', k], given."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def root(self, x: Tensor) -> Tensor:
        return torch.einsum("brk,bk->br", self.matrix.to(x), x)

    def unroot(self, x: Tensor) -> Tensor:
        """The smallest d with R d = x; rows of R are orthogonal."""
        size = self.matrix.square().sum(2)
        return torch.einsum("brk,br->bk", self.matrix, x * torch.where(size > 0, 1 / size, 0.0))


ROOTS = {"cross_entropy": Softmax, "binary_cross_entropy": Logistic, "function": Matrix}


@dataclass(frozen=True)
class Rooted:
    """R f for a batch that carries what R is made of: the outputs whose Jacobian is R J.

    whole: with what R leaves alone of logits, their sum over sqrt(k), after it.
    """

    kind: str
    base: Callable | None
    whole: bool = False

    def __call__(self, model: torch.nn.Module, batch: Known) -> Tensor:
        f = model_outputs(model, batch.inputs, self.base)
        f = f[:, None] if f.ndim == 1 else f
        with torch.autocast(f.device.type, enabled=False):  # half precision has no room for small roots
            wide = f.to(torch.promote_types(f.dtype, torch.float32))
            found = ROOTS[self.kind](batch.known).root(wide)
            alone = [wide.sum(1, keepdim=True) / wide.shape[1] ** 0.5] if self.whole else []
            return torch.cat([found, *alone], 1).to(f.dtype)


class Squared:
    """1/2 ||f - y||^2: the residual is y - f0, nothing is transformed.

    Attributes:
        labels: class of each sample [n] or None. rows, k: residuals and outputs per sample. units: of "loo_residual",
            "loo_margin".
    """

    kind, units = "mse", ("units of the targets", "units of the targets")

    def __init__(self, y: Tensor, labels: Tensor | None):
        self.y, self.labels, self.rows, self.k = y, labels, y.shape[1], y.shape[1]
        self.suggests = labels is not None

    def residual(self, part: slice, outputs: Tensor) -> Tensor:
        """r [b, k'] of the samples ``part``, whose outputs at the given weights are ``outputs``."""
        return self.y[part].to(outputs.device) - outputs.to(torch.float64)

    def left_out(self, part: slice, v: Tensor) -> Tensor:
        """Outputs [b, k] of the model trained without each sample, from the residual v that it leaves there."""
        return self.y[part].to(v.device) - v

    def slope(self, part: slice, v: Tensor) -> Tensor:
        """Minus the gradient of the loss at the left-out outputs, [b, k]."""
        return v

    def margin(self, part: slice, v: Tensor) -> Tensor:
        """How clearly the left-out outputs are for the given class, [b]."""
        f, labels = self.left_out(part, v), self.labels[part].to(v.device)
        return class_margin(2.0 * f - 1.0 if f.shape[1] == 1 else f, labels)

    def suggest(self, part: slice, v: Tensor) -> Tensor:
        """Class that the model trained without each sample gives it, [b]."""
        return suggested_label(self.left_out(part, v), 0.5)

    def error(self, part: slice, v: Tensor) -> Tensor:
        """What reg="auto" makes small, [b]: ||y - f||^2."""
        return v.square().sum(1)


class Curved:
    """A loss other than the squared one, at the outputs f0 [n, k] of the given weights.

    Args:
        kind: key of ROOTS. f0: [n, k]. y: targets as the loss takes them. labels: class of each sample or None.
        function: the loss itself where kind is "function".
    """

    def __init__(self, kind: str, f0: Tensor, y: Tensor, labels: Tensor | None, function: Callable | None = None):
        self.kind, self.f0, self.y, self.labels, self.function = kind, f0.to(torch.float64), y, labels, function
        if kind == "function":
            self.extra, self._residual = expand(function, self.f0, y)
        else:
            self.extra, self._residual = self.f0, ROOTS[kind](self.f0).residual(y)
        self.rows, self.k = self._residual.shape[1], f0.shape[1]
        probability = "probability" if kind != "function" else "units of the loss's gradient"
        self.units = (probability, "nats (log odds)")
        self._moves, self.suggests = False, labels is not None

    def residual(self, part: slice, outputs: Tensor) -> Tensor:
        return self._residual[part].to(outputs.device)

    def of_moves(self) -> Curved:
        """The same where the left-out residuals v are given as changes of the outputs [b, k]."""
        other = copy(self)
        other._moves = True
        return other

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """Gradient [n, k] and Hessian [n, k, k] of the losses at the given weights."""
        n, k = self.f0.shape
        root = ROOTS[self.kind](self.extra)
        rows = torch.stack([root.root(e.expand(n, k)) for e in torch.eye(k).to(self.f0)], 2)
        if self.kind == "function":
            slope = -torch.einsum("nrk,nr->nk", rows, self._residual)
        else:
            slope = -ROOTS[self.kind].slope(self.f0, self.y)
        return slope, rows.transpose(1, 2) @ rows

    def left_out(self, part: slice, v: Tensor) -> Tensor:
        if self._moves:
            return self.f0[part] + v
        move = ROOTS[self.kind](self.extra[part]).unroot(self._residual[part] - v.to(self.f0.device))
        return self.f0[part] + move

    def slope(self, part: slice, v: Tensor) -> Tensor:
        f, y = self.left_out(part, v), self.y[part]
        if self.kind != "function":
            return ROOTS[self.kind].slope(f, y)
        with torch.enable_grad():
            f = f.requires_grad_()
            return -torch.autograd.grad(_values(self.function, f, y).sum(), f)[0]

    def margin(self, part: slice, v: Tensor) -> Tensor:
        return class_margin(self.left_out(part, v), self.labels[part])

    def suggest(self, part: slice, v: Tensor) -> Tensor:
        return suggested_label(self.left_out(part, v), 0.0)

    def error(self, part: slice, v: Tensor) -> Tensor:
        """What reg="auto" makes small: the loss at the left-out outputs."""
        return self.losses(part, self.left_out(part, v))

    def losses(self, part: slice, f: Tensor) -> Tensor:
        """The loss of each sample at outputs f, [b]."""
        if self.kind != "function":
            return ROOTS[self.kind].loss(f, self.y[part])
        return _values(self.function, f, self.y[part]).detach()


Goal = Squared | Curved


def check_loss(loss: Any) -> None:
    """Raises ArgumentError where ``loss`` is neither a name nor a function."""
    if not callable(loss) and not (isinstance(loss, str) and loss in LOSSES):
        known = ", ".join(map(repr, LOSSES))
        raise ArgumentError(complaint("loss", f"{known} or a function", repr(loss), "Choose one."))


def name_of(loss) -> str:
    """Of a loss, given by name or as a function."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def is_certain(size: Tensor, r0: Tensor, goal: Goal) -> bool:
    """Whether rows of the whitened kernel (diagonal: size) are so small, or residuals so large, that digits go."""
    size = size.reshape(r0.shape).abs()
    lost = (size < 1e-8 * size.max()) & (r0 != 0) & (size > 0)
    if goal.kind in ("cross_entropy", "binary_cross_entropy"):
        lost |= r0.abs() > 1e4
    return goal.kind in ROOTS and bool(lost.any())


def expand(function: Callable, f: Tensor, y: Tensor, step: int = 1024) -> tuple[Tensor, Tensor]:
    """R [n, k, k] with orthogonal rows and the residual r [n, k] of any convex loss.

    Args:
        function: loss(outputs [b, k], targets) -> [b], each value of one sample alone.
        f: outputs [n, k], float64. y: targets, a row per sample.
    Raises:
        ArgumentError: not one value per sample, not convex in the outputs, or with a slope where it has no curvature.
    """
    (n, k), device = f.shape, f.device
    if k > _MOST:
        got = f"{k} outputs"
        raise ArgumentError(complaint("loss", f"at most {_MOST} outputs for a function", got, "Use a named loss."))
    roots, residuals = f.new_empty(n, k, k), f.new_empty(n, k)
    eye = torch.eye(k, dtype=f.dtype, device=device)
    step = max(1, min(step, (1 << 24) // (k * k)))
    for begin in range(0, n, step):
        part = slice(begin, begin + step)
        with torch.enable_grad():
            leaf = f[part].detach().clone().requires_grad_()
            value = _values(function, leaf, y[part])
            (g,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            columns = [
                torch.autograd.grad(g, leaf, eye[c].expand_as(g), retain_graph=True, allow_unused=True)[0]
                if g.requires_grad
                else None
                for c in range(k)
            ]
        w = torch.stack([torch.zeros_like(leaf) if x is None else x for x in columns], 1).detach()
        g = g.detach()
        _check_finite(begin, w.flatten(1), g)
        s, u = torch.linalg.eigh((w + w.transpose(1, 2)) / 2)
        top = s.abs().amax(1, keepdim=True)
        keep = s > 1e-13 * k * top
        bad = torch.nonzero((s < -1e-9 * top).any(1)).flatten()
        if len(bad):
            got = f"curvature {float(s[bad[0], 0]):.3g} at sample {begin + int(bad[0])}"
            todo = "The linearised problem has no minimum there; use a convex loss."
            raise ArgumentError(complaint("loss", "a function convex in the outputs", got, todo))
        turned = torch.einsum("bkr,bk->br", u, g)
        size = torch.linalg.vector_norm(g, dim=1)
        lost = torch.linalg.vector_norm(torch.where(keep, 0.0, turned), dim=1)
        bad = torch.nonzero(lost > 1e-7 * size + 1e-12).flatten()
        if len(bad):
            got = f"a slope of {float(lost[bad[0]]):.3g} where it has none at sample {begin + int(bad[0])}"
            todo = "Its step has no end there; smooth the loss, or add a small multiple of the squared one."
            raise ArgumentError(complaint("loss", "a function that is curved where it has a slope", got, todo))
        scale = torch.where(keep, s, 0.0).sqrt()
        roots[part] = scale[:, :, None] * u.transpose(1, 2)
        residuals[part] = -torch.where(keep, turned, 0.0) / torch.where(keep, scale, 1.0)
    return roots, residuals


def _values(function: Callable, f: Tensor, y: Tensor) -> Tensor:
    try:
        value = function(f, y)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        got, todo = f"{type(error).__name__}: {error}", "It is given outputs [b, k] and the targets of train."
        raise ArgumentError(complaint("loss", "loss(outputs, targets) -> one value per sample", got, todo)) from error
    if not isinstance(value, Tensor) or value.shape != f.shape[:1]:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        todo = "Use reduction='none', and sum over outputs."
        raise ArgumentError(complaint("loss", f"one value per sample, [{len(f)}]", got, todo))
    return value


def _check_finite(begin: int, *parts: Tensor) -> None:
    for x in parts:
        bad = torch.nonzero(~torch.isfinite(x).all(1)).flatten()
        if len(bad):
            got = f"NaN or infinity at sample {begin + int(bad[0])}"
            raise DataError(complaint("loss", "finite derivatives in the outputs", got, "Check that sample."))


def _later(x: Tensor) -> Tensor:
    """Sums over i >= j along the second dimension."""
    return x.flip(1).cumsum(1).flip(1)
