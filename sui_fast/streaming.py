"""Low rank: features shard by shard, one small eigendecomposition, scores shard by shard.

    map      a FeatureMap (sketch, nystrom or subspace), fitted where it needs fitting
    pass 1   features and residuals of every sample to a store, while Z^T Z and Z^T r0 add up in float64
    spectrum of Z^T Z [r, r]
    pass 2   every shard of the store through the same removal solver as an exact kernel

Memory does not grow with the samples when there is a store on disk. Under torch.distributed every process takes a slice
of the samples; sums meet once after each pass, never inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._errors import StabilityError, StoreError, complaint
from ._memory import return_memory
from .footprint import HELD, PORTION, PROBES, SHARD, shard_samples
from .jacobians import Jacobian, Sketch, portions
from .jacobians.data import Samples
from .jacobians.finite import check_products
from .jacobians.reading import Kept
from .loo import (
    Addition,
    SpectralRemoval,
    add_samples,
    check_stability,
    make_blocks,
    make_filter,
    shard_blocks,
)
from .losses import Goal, Rooted
from .processes import Processes, Source, grain, portion, power
from .spectra import (
    INNER,
    FeatureMap,
    FeatureSpectrum,
    Moments,
    Store,
    anchored_sketch_map,
    beside_directions,
    fingerprint_of,
    nystrom_map,
    pool_size,
    reduced_sketch_map,
    sketch_map,
    sketch_rank,
    subspace_columns,
    subspace_map,
)

_SHARD, _PORTION = SHARD, PORTION
_ROUNDING = 2.0**-21  # of Theta_ii: what float32 features leave of a direction that they have


class Memory(list):
    """A store in memory."""

    rows = 0

    def append(self, tensors: dict[str, Tensor]) -> None:
        super().append(tensors)
        self.rows += len(next(iter(tensors.values())))

    def close(self) -> None:
        pass


def joined(shards: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Shards as one."""
    parts = list(shards)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cut(shard: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Portions of a shard; of a size that is a power of two they are the same whatever slice the shard is of."""
    for begin in range(0, len(next(iter(shard.values()))), size):
        yield {name: x[begin : begin + size] for name, x in shard.items()}


def fit_map(
    source: Source, goal: Goal, kind: str, rank: int, seed: int, processes: Processes | None, sketch: str = "tensor"
) -> FeatureMap:
    """The feature map of a method; the same on every process, who must be named for "subspace".

    sketch: kind of random map of a "sketch".
    """
    n, outputs = source.samples.n, source.options.get("outputs")
    softmax = isinstance(outputs, Rooted) and outputs.kind == "cross_entropy"
    whole = source
    if softmax:  # validation sees all logits moved together, which training does not
        whole = replace(source, options={**source.options, "outputs": replace(outputs, whole=True)})
    if kind == "sketch":
        size, anchors = pool_size(source.first, n, rank, sketch, softmax)
        if not size:
            return sketch_map(sketch_rank(rank, sketch), seed, sketch)
        numbers = np.sort(np.random.default_rng(seed).choice(n, size, replace=False))
        if not anchors:
            outputs, pool = portions(
                source.model, source.samples.pick(numbers), Sketch(INNER, seed, "tensor"), **source.options
            )
            return reduced_sketch_map(pool, goal.residual(torch.from_numpy(numbers), outputs), rank, seed)
        pool = whole.some(numbers)
        residual = goal.residual(torch.from_numpy(numbers), pool.outputs)
        return anchored_sketch_map(pool, residual, rank, seed, sketch, anchors)
    first, beside = source.first, None
    if softmax and first.shape[1] > PROBES:  # of fewer weights they might be all there is
        few = np.sort(np.random.default_rng(seed + 4).choice(n, min(n, PROBES), replace=False))
        beside = beside_directions(whole.some(few), first.k, seed)
    if kind == "nystrom":
        pool = np.arange(n)
        most = max(2000, 4 * rank // first.k)
        if n > most:
            pool = np.sort(np.random.default_rng(seed).choice(n, most, replace=False))
        return nystrom_map(source.some(pool), rank, seed, beside)

    def passes() -> Iterator[tuple[int, Jacobian]]:
        return source.parts(portion(n), HELD)

    rows, rank = n * first.k, min(rank, n * first.k)

    def reduce(total: Tensor | None) -> Tensor:
        """The sum; a process without samples has none of its own, and must meet the others all the same."""
        if total is None:
            shape = min(subspace_columns(rank), rows), first.shape[1]
            total = torch.zeros(shape, dtype=torch.float64, device=source.device)
        return processes.total(total)

    return subspace_map(passes, rows, rank, seed, reduce, beside)


def collect(source: Source, fmap: FeatureMap, goal: Goal | None, store: Store | Memory, progress: bool) -> None:
    """Pass 1: features [n, k, r] float32, residual [n, k] and the diagonal that the features miss [n, k, k]."""
    check_held(source, fmap, goal, getattr(store, "stores", [store]))
    for shard in features_of(source, fmap, goal, source.begin + store.rows, progress):
        store.append(shard)
    source.kept.clear()


def features_of(
    source: Source, fmap: FeatureMap, goal: Goal | None, begin: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """What pass 1 keeps of the samples from ``begin`` on, shard by shard."""
    if begin >= source.end:
        return
    size = shard_samples(source.first.k, fmap.rank, _SHARD)
    step = portion(source.samples.n)
    with tqdm(
        total=source.end - begin, desc=f"{fmap.kind} features", delay=2, leave=False, disable=not progress
    ) as bar:
        for first in range(begin, source.end, size):
            end = min(first + size, source.end)
            yield joined(_features(source, fmap, goal, b, min(b + step, end)) for b in range(first, end, step))
            bar.update(end - first)
            return_memory()  # shards lie among what their batches took, and would keep it


def _features(source: Source, fmap: FeatureMap, goal: Goal | None, begin: int, end: int) -> dict[str, Tensor]:
    if fmap.portion is not None:
        outputs, features, own = _sketched(source, fmap, goal is not None, begin, end)
    else:
        part = source.last(begin, end)
        outputs, (features, own) = part.outputs, fmap.both(part, goal is not None)
    features = features.to(torch.float32)
    for x in (features,) if own is None else (features, own):
        check_products(x)
    found = {"features": features.cpu()}
    if goal is not None:
        found["residual"] = goal.residual(slice(begin, end), outputs).cpu()
        if own is not None:
            wide = features.to(torch.float64)
            share, counts, basis = _beyond_rounding(own.to(torch.float64) - wide @ wide.transpose(1, 2), features)
            found["missed"] = _matrix(basis, share * counts).cpu()
    return found


def _sketched(
    source: Source, fmap: FeatureMap, own: bool, begin: int, end: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(outputs, features, own blocks or None), where what was captured ahead is put among the others."""
    samples, ahead = source.samples.slice(begin, end), source.ahead
    places, rest, known = np.arange(0), np.arange(end - begin), ()
    if ahead is not None:
        there = slice(*np.searchsorted(ahead.numbers, (begin, end)))
        places = ahead.numbers[there] - begin
        rest = np.setdiff1d(rest, places)
        known = [x[there] for x in (ahead.outputs, ahead.features, ahead.own) if x is not None]
    if len(rest):
        some = Kept(samples, rest) if len(places) else samples
        found = portions(source.model, some, fmap.portion(own), **source.options)
        if fmap.reduce is not None:
            found = (found[0], *(x for x in fmap.reduce(found[1], own) if x is not None))
        if len(places):
            order = torch.from_numpy(np.concatenate([rest, places]).argsort()).to(source.device)
            known = [torch.cat(pair)[order] for pair in zip(found, known, strict=True)]
        else:
            known = found
    return (*known, None)[:3]


def _in_turn(store: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for shard in store:
        yield shard
        return_memory()  # what is kept of a shard lies among what its portions took, and would keep it


def moments_of(
    store: Store | Memory, n: int, rank: int, device: torch.device, keep_rows: bool, processes: Processes
) -> Moments:
    """Sums over n samples: those in the store, and those of the other processes."""
    sums = Moments(rank, device, keep_rows)
    for shard in _in_turn(store):
        for piece in cut(shard, grain(n)):
            sums.add(piece["features"].to(device), piece["residual"].to(device) if "residual" in piece else None)
    sums.reduce(processes.every)
    return sums


class LowRank:
    """Scores from the shards of a store and the spectrum of their moments."""

    def __init__(
        self, store, spectrum: FeatureSpectrum, k: int, *, moment: Tensor | None, convention: str, groups, device
    ):
        self.store, self.spectrum, self.k, self.moment = store, spectrum, k, moment
        self.convention, self.groups, self.device = convention, groups, device

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Portions of one shard after the other, or all as one where groups may span them."""
        if self.groups is not None:
            yield joined(self.store)
            return
        for shard in _in_turn(self.store):
            yield from cut(shard, min(power(_PORTION // shard["features"][0].numel()), grain(self.spectrum.samples)))

    def removal(self, shard: dict[str, Tensor], phi) -> SpectralRemoval:
        """What leaves with each sample (or group) of a shard."""
        features, residual = shard["features"].to(self.device), shard["residual"].to(self.device)
        n = self.spectrum.samples
        blocks = shard_blocks(len(features), n, self.k) if self.groups is None else make_blocks(n, self.k, self.groups)
        idle = torch.linalg.vector_norm(features, dim=2) == 0  # or too small to square
        idle[idle.clone()] = (features[idle] == 0).all(1)
        found = SpectralRemoval(
            self.spectrum.shard(features), phi, self.convention, blocks, residual, None, False, idle.reshape(-1),
            gain=self.spectrum.gain, moment=self.moment,
        )  # fmt: skip
        if "missed" in shard:
            found.add_missed(shard["missed"].to(self.device))
        return found

    def additions(
        self, new: Source, fmap: FeatureMap, goal: Goal, phi, seen: Moments | None, old: Source | None, progress: bool
    ) -> Iterator[Addition]:
        """What new samples would add, portion by portion.

        Args:
            seen: moments of the validation samples, where there are some. old: all of these, where their features do
                not tell all.
        """
        spectrum, begin = self.spectrum, new.begin
        root = spectrum.s.sqrt()
        v = spectrum.turn * root
        gram = None if seen is None or old is not None else seen.gram
        for shard in features_of(new, fmap, goal, begin, progress):
            found, changes = [], []
            for sample in cut(shard, portion(new.samples.n)):
                z, residual = (sample[name].to(self.device, torch.float64) for name in ("features", "residual"))
                hidden = torch.zeros_like(z)  # in directions in which no sample has features
                if len(v) > len(spectrum.s):
                    hidden = z - (z @ v) @ v.T
                unseen = hidden @ hidden.transpose(1, 2)
                if "missed" in sample:
                    unseen = unseen + sample["missed"].to(self.device)
                share, counts, basis = _beyond_rounding(unseen, z)
                fresh = (counts & (share > 0)).to(share)
                unseen = _matrix(basis, share * fresh)
                added = add_samples(
                    z @ v, unseen, residual, spectrum.s, root * spectrum.gain, phi,
                    n=spectrum.samples, convention=self.convention,
                )  # fmt: skip
                added = replace(added, beyond=torch.einsum("ckj,cj->ck", _matrix(basis, fresh), added.beyond))
                known = hidden if old is None else hidden - z  # a kernel tells of all of a gradient
                changes.append(added.inside @ v.T + torch.einsum("ckr,ck->cr", known, added.beyond))
                found.append(added)
            end = begin + len(shard["features"])
            if gram is not None:
                moved = [((change @ gram) * change).sum(1).clamp_min(0) for change in changes]
            elif seen is not None:
                moved = [torch.zeros_like(change[:, 0]) for change in changes]
                for features, number, kernel in _kernel_across(old, replace(new, begin=begin, end=end, kept={}), fmap):
                    own = torch.einsum("vck,ck->vc", kernel.unflatten(1, (-1, self.k)), found[number].beyond)
                    moved[number] += (features.flatten(0, 1) @ changes[number].T + own).square().sum(0)
            if seen is not None:
                pairs = zip(found, moved, strict=True)
                found = [replace(added, prediction_sqnorm=sums / seen.samples) for added, sums in pairs]
            yield from found
            begin = end

    def loo_error_curve(self, gather: Callable, error: Callable, first: int, points: int = 31, **training) -> tuple:
        """As in loo.regularisation, summed over shards, of which the first sample is ``first``, and processes."""
        n, top = self.spectrum.samples, float(self.spectrum.s[-1])
        regs, filters = [], []
        for reg in top / n * np.logspace(-9, 1, points):
            phi = make_filter(n, reg=float(reg), **training)
            try:
                check_stability(phi, top, n)
            except StabilityError:
                if not regs:
                    raise
                break
            regs.append(float(reg))
            filters.append(phi)
        errors = []
        for shard in self.shards():
            part = slice(first, first + len(shard["features"]))
            errors.append([float(error(part, self.removal(shard, phi).loo_residual).sum()) for phi in filters])
            first = part.stop
        return np.array(regs), gather({"errors": np.array(errors)} if errors else {})["errors"].sum(0) / n


def _beyond_rounding(missed: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of what features [n, k, r] miss, whether they are more than rounding [n, k], and eigenvectors."""
    share, basis = torch.linalg.eigh(missed) if missed.shape[1] > 1 else (missed[:, 0], torch.ones_like(missed))
    counts = share.abs() > _ROUNDING * torch.linalg.vector_norm(features, dim=(1, 2))[:, None].to(share).square()
    return share, counts, basis


def _matrix(basis: Tensor, values: Tensor) -> Tensor:
    return (basis * values[:, None]) @ basis.transpose(1, 2)


def _kernel_across(old: Source, new: Source, fmap: FeatureMap) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Of portions of ``old`` their features [b, k, r], and their kernel [b k, c k] with portions of ``new``, float64.

    With it the number of the portion of ``new``.
    """
    for _, part in old.parts(portion(old.samples.n)):
        features = fmap.features(part).to(torch.float64)
        for number, (_, other) in enumerate(new.parts(portion(new.samples.n), HELD)):
            yield features, number, part.gram(other).to(torch.float64)


def check_held(source: Source, fmap: FeatureMap, goal: Goal | None, stores: list[Store]) -> None:
    """Whether stores, one after the other from the first sample on, begin with what this process would put there.

    Weights and ids do not tell what a model does with them, what a function of the outputs does, nor which parameters
    count; and parts on several machines may have fitted other maps.

    Raises:
        StoreError: features or residuals of the first batch differ.
    """
    begin, few = source.begin, min(source.options.get("batch_size", 64), portion(source.samples.n))
    rows, most = sum(store.rows for store in stores), source.end - begin
    if rows > most:
        todo = "Delete the folder, or pass resume=False to begin anew."
        raise StoreError(complaint("store", f"at most {most} samples", rows, todo))
    for number, store in enumerate(stores, 1):
        if store.rows:
            held = store.read(0)
            one = replace(source, begin=begin, end=min(begin + few, begin + store.shards[0]["rows"]))
            fresh = next(features_of(one, fmap, goal, begin, False))
            differs = sorted(fresh.keys() ^ held.keys())
            for name in ("features", "residual")[: 1 if goal is None else 2] if not differs else ():
                x, y = fresh[name], held[name][: len(fresh[name])]
                scale = float(x.norm()) + (
                    0.0 if name == "features" else float(goal.y[begin : one.end].double().norm())
                )
                if x.shape != y.shape or not float((x - y).norm()) <= 1e-3 * scale:
                    differs.append(name)
            if differs:
                what = f"those of part {number} of {len(stores)}" if len(stores) > 1 else "others"
                todo = (
                    "The model's code, outputs=, params= or what requires gradients changed, or it ran on another kind "
                    "of machine or version: name another folder, or pass resume=False to begin anew."
                )
                got = f"{what}: {differs[0]} of sample {begin} and after"
                raise StoreError(complaint("store", "what this model gives", got, todo))
        begin += store.rows


def run_fingerprint(model: torch.nn.Module, samples: Samples, settings: dict[str, Any], version: str) -> dict[str, Any]:
    """What the features depend on."""
    ids = np.asarray(samples.ids)
    return dict(
        weights=fingerprint_of(dict(model.state_dict())),
        ids=fingerprint_of({"ids": torch.frombuffer(bytearray(repr(ids.tolist()).encode()), dtype=torch.uint8)}),
        inputs=samples.digest(),
        samples=samples.n,
        version=version,
        **settings,
    )
