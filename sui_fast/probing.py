"""How good features are, from the exact kernel of a few random samples: its error, and its effective dimension."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .footprint import HELD, PROBES, draws_more, probe_count
from .jacobians.finite import check_products
from .loo import TrainingFilter, loo_error_curve, make_blocks
from .losses import Goal
from .planning import ENOUGH
from .processes import Ahead, Source
from .spectra import RANK_FOR, FeatureMap, Spectrum

_SHARE, _MORE = 0.15, 8.0  # of the time of a run, for the kernel of the probes; more of few samples to name a rank
_MARGIN = 1.25  # of the rank that a warning names
_FEWEST = {False: 32, True: 96}  # columns of a sketch whatever the dimension; True: of logits seen by validation
_REST = 2.0**-36  # of the squared residuals: rounding has 2% of what is left
_MISSED = 0.4  # leverage beyond the features over that in them; from 0.5 on scores correlated less than 0.98


@dataclass
class Probes:
    """Random samples, the same for the same seed.

    Attributes:
        shape: (samples p, outputs k, parameters d). exact: their kernel [p k, p k], float64.
        some: which of them have features [m], sorted. features: [m, k, r], float64.
        numbers, outputs: their numbers [p] and outputs [p, k]. ahead: what pass 1 need not capture again, or None.
    """

    shape: tuple[int, int, int]
    exact: Tensor
    some: np.ndarray
    features: Tensor
    numbers: np.ndarray
    outputs: Tensor
    ahead: Ahead | None = None


def drawn(
    source: Source, fmap: FeatureMap, seed: int, share: float = _SHARE, *, ahead: bool = False, kernel: bool = True
) -> Probes:
    """Probes of a run; where their factors are large they are captured in parts, two of them in memory at a time.

    Args:
        share: of the time of a run that their kernel may take, about. ahead: whether pass 1 follows; it is told of all.
        kernel: whether it is wanted.
    """
    n, one = source.samples.n, source.first
    count, k = probe_count(one, n, share), one.k
    numbers = np.sort(np.random.default_rng(seed + 1).choice(n, count, replace=False))
    some = np.sort(np.random.default_rng(seed + 3).choice(count, min(count, PROBES), replace=False))
    step = count if count * one.nbytes <= HELD else max(1, HELD // (2 * one.nbytes))
    exact = torch.empty(count * k, count * k, dtype=torch.float64, device=source.device)
    features, outputs, own = [], [], []
    for begin in range(0, count, step):
        part, rows = source.some(numbers[begin : begin + step]), slice(begin * k, (begin + step) * k)
        outputs.append(part.outputs)
        here = np.arange(part.n) if ahead else some[(some >= begin) & (some < begin + step)] - begin
        if len(here):
            chosen = part if len(here) == part.n else part.select(here.tolist())
            found, blocks = fmap.both(chosen, ahead)
            features.append(found if ahead else found.to(torch.float64))
            own.append(blocks)
        if not kernel:
            continue
        exact[rows, rows] = part.gram().to(torch.float64)
        for other in range(begin + step, count, step):
            columns = slice(other * k, (other + step) * k)
            block = part.gram(source.some(numbers[other : other + step])).to(torch.float64)
            exact[rows, columns], exact[columns, rows] = block, block.T
    features, outputs = torch.cat(features), torch.cat(outputs)
    known = None
    if ahead:
        known = Ahead(numbers, outputs, features, None if own[0] is None else torch.cat(own))
        features = features[some].to(torch.float64)
    if kernel:
        check_products(exact)
    return Probes((count, k, one.shape[1]), exact, some, features, numbers, outputs, known)


@dataclass(frozen=True)
class Quality:
    """error: ``kernel_error``. dimension: effective. asked: what the rank must suffice for. parameters: d."""

    error: float
    dimension: float
    asked: float
    parameters: int


def quality(
    source: Source, fmap: FeatureMap, probes: Probes | None, goal: Goal, phi: TrainingFilter, seed: int, top: float,
    kept: float, missed: float, open_reg: float | None, training: dict[str, Any],
) -> Quality:  # fmt: skip
    """What the probes tell of a run; of few samples more of them where the rank will not do, for the one that would.

    Args:
        probes: as ``drawn`` gave them, or None. phi: the training.
        top: largest eigenvalue. kept, missed: leverage in the features, and beyond them.
        open_reg: what reg="auto" took with these features, which with more of them may be smaller; else None.
        training: of the run, its convention among them.
    """
    n, error, one = source.samples.n, None, source.first
    for share in (_SHARE, _MORE) if draws_more(n, one.nbytes) else (_SHARE,):
        some, probes = probes or drawn(source, fmap, seed, share), None
        error = kernel_error(n, some) if error is None else error
        edf = max(kept, probed_dimension(n, some, phi, top, seed))
        if fmap.kind == "sketch":
            beyond = _sketched(n, fmap, some, phi)
            edf = kept if beyond < 0.2 * kept else min(edf, kept + beyond)
        else:  # features that lie below the kernel: the truth is between these two
            edf = kept + missed if missed < 0.2 * kept else min(edf, kept + missed)
        asked, largest = edf, min(top, float(torch.linalg.eigvalsh(some.exact)[-1]) * n / some.shape[0])
        if 2 * largest * float(phi(np.array([largest]))[0]) < 1:  # beyond that F-SI needs the directions all the same
            asked = max(edf, probed_dimension(n, some, TrainingFilter(shift=largest), top, seed))
        if open_reg is not None:
            smaller = probed_regularisation(some, goal, training)
            if smaller < open_reg:
                asked = max(asked, probed_dimension(n, some, replace(phi, shift=n * smaller), top, seed))
        most = math.inf if fmap.kind == "sketch" else n * some.shape[1]
        enough = fmap.rank >= min(ENOUGH * RANK_FOR[fmap.kind] * asked, most)
        if enough or probe_count(one, n, _MORE) == some.shape[0]:
            break
    return Quality(error, edf, asked, some.shape[2])


def _sketched(n: int, fmap: FeatureMap, probes: Probes, phi: TrainingFilter) -> float:
    """About the most leverage that there can be beyond the anchors of a sketch."""
    rest = probes.features[:, :, fmap.state["anchors"].shape[1] if "anchors" in fmap.state else 0 :]
    return float(rest.square().sum()) * n / len(rest) * float(phi(np.zeros(1))[0])


def kernel_error(n: int, probes: Probes) -> float:
    """Relative error of the kernel, from the exact kernel of a few random samples.

    ||Theta - Z Z^T|| / ||Theta|| (Frobenius) of the whole kernel, estimated from diagonal and off-diagonal blocks of
    the probes, plus four standard deviations of that estimate (jackknife over the probes, which does not see what the
    few samples that most of a kernel may lie in would add): the error lies below what is
    returned in at least 95% of draws of probes and features.

    Args:
        n: samples of the run. probes: of these.
    """
    (m, k, _), z = probes.features.shape, probes.features.flatten(0, 1)
    rows = (torch.from_numpy(probes.some)[:, None] * k + torch.arange(k)).reshape(-1).to(z.device)
    exact = probes.exact[rows][:, rows]
    size = lambda x: x.square().reshape(m, k, m, k).sum((1, 3))  # noqa: E731
    wrong, whole = size(exact - z @ z.T), size(exact)

    def ratio(keep: Tensor) -> float:
        count = int(keep.sum())
        parts = []
        for x in (wrong[keep][:, keep], whole[keep][:, keep]):
            own = float(x.diagonal().sum())
            across = (float(x.sum()) - own) * (n - 1) / max(count - 1, 1)
            parts.append(own + across)
        return math.sqrt(parts[0] / parts[1]) if parts[1] > 0 else 0.0

    everything = torch.ones(m, dtype=torch.bool)
    estimate = ratio(everything)
    if 2 < m < n:
        without = []
        for i in range(m):
            everything[i] = False
            without.append(ratio(everything))
            everything[i] = True
        spread = math.sqrt((m - 1) / m * sum((x - sum(without) / m) ** 2 for x in without))
        estimate += 4.0 * spread
    return estimate


def probed_regularisation(probes: Probes, goal: Goal, training: dict[str, Any]) -> float:
    """What reg="auto" takes of the probes alone, by their exact kernel: features too few to fit with ask for more."""
    (m, k, _), numbers = probes.shape, torch.from_numpy(probes.numbers)
    s, u = torch.linalg.eigh(probes.exact)
    spectrum = Spectrum(u, torch.where(s > 2.0**-24 * m**0.5 * s[-1], s, 0.0), 0.0)
    residual, idle = goal.residual(numbers, probes.outputs), (probes.exact == 0).all(1)
    error = lambda part, v: goal.error(numbers, v)  # noqa: E731
    regs, errors = loo_error_curve(spectrum, residual, make_blocks(m, k), idle, error=error, **training)
    return float(regs[errors.argmin()])


def probed_dimension(n: int, probes: Probes, phi: TrainingFilter, top: float, seed: int) -> float:
    """Effective dimension sum_l s_l phi(s_l) of the whole kernel from that of random samples, and of half of them.

    The eigenvalues of a part, times n over its size, stand for those of all; what grows from the half to the whole part
    is taken to go on growing, by the same factor less with every doubling.

    Args:
        n: samples of the run. probes: of these. phi: the training. seed: of the half.
        top: largest eigenvalue of the features, beyond which a step size may not be stable.
    """
    (m, k, d), exact, found = probes.shape, probes.exact, []
    pick = torch.from_numpy(np.random.default_rng(seed + 2).permutation(m)).to(exact.device)
    for part in (m // 2, m):
        rows = (pick[:part, None] * k + torch.arange(k, device=exact.device)).reshape(-1)
        s = torch.linalg.eigvalsh(exact[rows][:, rows]).cpu().numpy() * (n / max(part, 1))
        s = s[s > 1e-12 * max(s.max(initial=0.0), 0.0)].clip(max=top)
        found.append(float((s * phi(s)).sum()))
    half, whole = found
    if m == n or not whole > half:
        return whole
    grown, total, size = whole / max(half, 1e-300), whole, m
    while size < n and grown > 1.005:
        share = min(1.0, math.log2(n / size))
        total, size, grown = total * grown**share, 2 * size, grown**0.5
    return min(total, float(n * k), float(d))


def warn_of_rank(kind: str, rank: int, edf: float, most: int, missed: float = 0.0, softmax: bool = False) -> int | None:
    """Rank that would do where this one is too small for the effective dimension, with a warning.

    It is named with a margin, so that a run with it does not warn again where its estimate of the dimension is larger.

    Args:
        most: rank at which features below the kernel have all of it. missed: leverage beyond the features, over that in
            them; where the rank does and this is large, directions are lost to float32.
        softmax: logits are trained on, and validation sees all of them moved together.
    """
    fewest = _FEWEST[softmax] if kind == "sketch" else 0
    least, exact = max(RANK_FOR[kind] * edf, fewest), most
    most = most if kind != "sketch" else 1 << 20
    if rank >= ENOUGH * least or rank >= most:
        if kind != "sketch" and missed > _MISSED:
            warnings.warn(
                f"sui_fast: the {rank} features of {kind} leave out {missed:.0%} of the leverage that is in them: "
                "directions weak against the largest, but not against reg=, are lost to rounding. Raise reg=, or use "
                f"method={'sketch' if kind == 'nystrom' else 'nystrom'!r}.",
                RuntimeWarning,
                stacklevel=4,
            )
        return None
    needed = min(math.ceil(_MARGIN * least), most)
    todo = "Raise rank=, or reg=, or use another method."
    if needed > exact:
        todo = f"That is more than the kernel has: use method='nystrom', which is exact at rank {exact}, or raise reg=."
    warnings.warn(
        f"sui_fast: rank {rank} is small for an effective dimension of {edf:.0f}; {kind} wants about {needed}. {todo}",
        RuntimeWarning,
        stacklevel=4,
    )
    return needed


def warn_of_rest(initial: float, left: float) -> None:
    """A warning where less is left of the squared residuals than float32 features tell."""
    if left < _REST * initial:
        warnings.warn(
            f"sui_fast: training without a sample leaves {left / initial:.0e} of the squared residuals, less than "
            "float32 features tell: scores are too large. Use method='dense', raise reg=, or scale the outputs.",
            RuntimeWarning,
            stacklevel=4,
        )
