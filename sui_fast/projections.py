"""Many outputs: a few rows per sample in place of k, so that the backward passes do not grow with k.

random   row 1 is the loss's own direction, e = r / ||r||, so the gradient J^T R^T r is exact; q - 1 rows are random
         signs in its complement, scaled so that their curvature is that of all outputs in the mean
top      the given class, the q - 1 most probable others, and the log of the summed exponentials of the rest: the
         cross-entropy itself is unchanged, and only differences among the rest are left out of its curvature
shared   (random, squared loss) one random projection of all samples' outputs
F-SI     on random signs of the validation outputs, E||P^T df||^2 = ||df||^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .jacobians.capture import model_outputs
from .jacobians.data import Known
from .losses import ROOTS
from .ops.sketching._random import signs

MODES = ("all", "random", "top")
_TABLE = 1 << 20


def _signs(number: Tensor, rows: int, k: int, seed: int, like: Tensor) -> Tensor:
    """Signs [b, rows, k] of the samples with these numbers: windows of one table of signs."""
    return _windows(signs(1, _TABLE, 6, 0, seed, like.device, like.dtype)[0], number, rows, k)


def _windows(table: Tensor, number: Tensor, rows: int, k: int) -> Tensor:
    start = (number[:, None] * rows + torch.arange(rows, device=number.device)) * 2654435761 + 97
    return table[(start[:, :, None] + torch.arange(k, device=number.device)) % _TABLE]


@lru_cache(maxsize=2)
def _normals(seed: int) -> Tensor:
    """A table of normal numbers: spans of its windows have no preferred direction."""
    return torch.randn(_TABLE, generator=torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF))


def _full(model: torch.nn.Module, batch: Known, base: Callable | None) -> Tensor:
    f = model_outputs(model, batch.inputs, base)
    return (f[:, None] if f.ndim == 1 else f).to(torch.promote_types(f.dtype, torch.float32))


@dataclass(frozen=True)
class Signed:
    """P^T f of validation samples, P random signs / sqrt(rows); known: the numbers of the samples [b]."""

    base: Callable | None
    rows: int
    seed: int

    def __call__(self, model: torch.nn.Module, batch: Known) -> Tensor:
        f = _full(model, batch, self.base)
        return torch.einsum("bqk,bk->bq", _signs(batch.known, self.rows, f.shape[1], self.seed, f), f) / self.rows**0.5


@dataclass(frozen=True)
class Shared:
    """P^T f with one P [k, rows] of orthonormal columns for all samples: for the squared loss, whose outputs interact
    through what samples share, a problem of its own; sums of squares over it times k / rows stand for all outputs."""

    base: Callable | None
    rows: int
    seed: int

    def basis(self, k: int, like: Tensor) -> Tensor:
        table = signs(k, self.rows, 7, 0, self.seed, like.device, torch.float64)
        return torch.linalg.qr(table).Q.to(like)

    def __call__(self, model: torch.nn.Module, batch) -> Tensor:
        f = model_outputs(model, batch, self.base)
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        return f @ self.basis(f.shape[1], f)


@dataclass(frozen=True)
class Sketched:
    """Rows of R f: the loss's own direction, then random ones; known: targets [b, k or 1] and sample number [b, 1].

    With ``rows`` 0 the length of the residual, [b, 1], instead.
    """

    kind: str
    base: Callable | None
    rows: int
    seed: int

    def __call__(self, model: torch.nn.Module, batch: Known) -> Tensor:
        f = _full(model, batch, self.base)
        given, number = batch.known[:, :-1], batch.known[:, -1].to(torch.int64)
        here = f.detach()
        y = given if self.kind != "cross_entropy" else torch.zeros_like(here).scatter(1, given.to(torch.int64), 1.0)
        y = y.to(torch.float64)
        root = ROOTS[self.kind](here)
        residual, rooted = root.residual(y), root.root(f)
        size = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
        if self.rows == 0:
            return size
        own = (residual / size.clamp_min(1e-300)).to(f)
        found = [(own * rooted).sum(1, keepdim=True)]
        if self.rows > 1:
            rest = min(self.rows, rooted.shape[1]) - 1  # all of the complement, where it has no more
            random = _windows(_normals(self.seed).to(f), number, rest, rooted.shape[1])
            random = random - torch.einsum("bqk,bk->bq", random, own)[:, :, None] * own[:, None]
            basis = torch.linalg.qr(random.transpose(1, 2)).Q
            scale = ((rooted.shape[1] - 1) / max(rest, 1)) ** 0.5
            rows = torch.einsum("bkq,bk->bq", basis, rooted) * scale
            found.append(torch.nn.functional.pad(rows, (0, self.rows - 1 - rest)))
        return torch.cat(found, 1)


@dataclass(frozen=True)
class Lumped:
    """[f of the chosen classes, logsumexp of the others]; known: the classes [b, q], the given one first.

    With ``given`` the known is the given class alone [b, 1], and what comes back are the classes to choose.
    """

    base: Callable | None
    rows: int
    given: bool = False

    def __call__(self, model: torch.nn.Module, batch: Known) -> Tensor:
        f = _full(model, batch, self.base)
        if self.given:
            others = f.detach().scatter(1, batch.known, -torch.inf)
            return torch.cat([batch.known, others.topk(self.rows - 1, 1).indices], 1).to(torch.float64)
        rest = f.scatter(1, batch.known, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([f.gather(1, batch.known), rest], 1)


@dataclass(frozen=True)
class RootedLumped:
    """R of the lumped logits; known: their values at the given weights [b, q + 1], then the classes [b, q]."""

    base: Callable | None
    rows: int

    def __call__(self, model: torch.nn.Module, batch: Known) -> Tensor:
        values, chosen = batch.known[:, : self.rows + 1], batch.known[:, self.rows + 1 :].to(torch.int64)
        lumped = Lumped(self.base, self.rows)(model, Known(batch.inputs, chosen))
        return ROOTS["cross_entropy"](values).root(lumped)


class Aligned:
    """What training is for where the first row is the loss's own direction: the residual is its length, then zeros."""

    units, suggests = ("units of the targets", "units of the targets"), False

    def __init__(self, kind: str, size: Tensor, rows: int, labels: Tensor | None):
        self.kind, self.f0, self.y, self.rows, self.labels = kind + " on random rows", size, size, rows, labels

    def residual(self, part: slice, outputs: Tensor) -> Tensor:
        """r [b, q]."""
        size = self.f0[part].to(outputs.device, torch.float64)
        return torch.cat([size, size.new_zeros(len(size), self.rows - 1)], 1)

    def error(self, part: slice, v: Tensor) -> Tensor:
        """What reg="auto" makes small, [b]: the left-out residual in the metric of the curvature."""
        return v.square().sum(1)
