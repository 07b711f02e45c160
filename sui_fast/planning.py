"""Which method a run takes, and what it will cost, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._errors import ArgumentError, complaint
from .jacobians import Jacobian, goes_by_kernel, make_anchors, project
from .jacobians.arriving import LARGE, held_batch
from .jacobians.gram import by_rows
from .jacobians.layers import Outer, Patches
from .operations import CHOLESKY, EIGEN, SPECTRUM, Operations
from .processes import grain, power
from .spectra import INNER, RANK_FOR, pool_size, sketch_rank, subspace_columns
from .spectra.maps import coordinates, directions_fit, landmarks_at_once, landmarks_of
from .timing import carried_on, pair_seconds, product_seconds, repeated, seconds_of

DENSE_ROWS = {"cpu": 12_000, "cuda": 32_000}  # samples x outputs that an exact kernel has at most
DEFAULT_RANK = 1024
_FEW = 32  # directions that are timed
_RANKS = {"subspace": (64, 4096), "sketch": (1024, 8192)}  # least and largest that are chosen
_MARGIN, _STEP = 1.25, 64  # of a chosen rank: the effective dimension is an estimate, and may differ in the last bit
ENOUGH = 0.95  # of the rank that the effective dimension asks for: it is an estimate
PROBES = 64  # samples whose exact kernel the error estimate looks at
_PROBE_ROWS = 512  # rows of the exact kernel that the effective dimension is estimated from
HELD = 1 << 30  # bytes of factors that may stay in memory between passes
_LIBRARIES = 11_000_000  # bytes that libraries take on first use, and malloc keeps
_CONVOLUTIONS = 4_000_000  # bytes more after some batches of these
SHARD = 1 << 21  # features of a shard: 8 MB, of 4096 samples at most
PORTION = 1 << 20  # float64 features at a time in pass 2: fewer are more calls, more are more fresh memory
METHODS = ("auto", "dense", "nystrom", "subspace", "sketch")


@dataclass(frozen=True)
class Plan:
    """What a ``score`` call would do.

    Attributes:
        method, rank, reason: the choice, and why. passes: over the training data.
        sketch: kind of random map of method "sketch", else None. stored: whether the call names a store.
        disk_bytes: of the store; where the call names none, what one would take.
        peak_bytes: the largest resident size of the process during ``score`` minus that just before it, with model and
            data in memory (on CUDA: of the memory of the device).
        seconds: rough, on this machine, from a short measurement of the model.

    Of a run in parts, or of several processes, bytes and seconds are those of this one.
    """

    method: str
    rank: int
    reason: str
    passes: int
    disk_bytes: int
    peak_bytes: int
    seconds: float
    sketch: str | None = None
    stored: bool = True

    def __str__(self) -> str:
        kind = f" ({self.sketch})" if self.sketch not in (None, "tensor") else ""
        disk = f"disk {_size(self.disk_bytes)}" + " where store= is given" * (not self.stored and self.disk_bytes > 0)
        return (
            f"method {self.method}{kind}, rank {self.rank}: {self.reason}\n"
            f"passes over the training data {self.passes}, {disk}, "
            f"peak memory about {_size(self.peak_bytes)}, about {self.seconds:.3g} s"
        )


def choose_method(
    n: int,
    k: int,
    parameters: int,
    work: Operations,
    *,
    method: str,
    rank: int | None,
    device: torch.device,
    memory: int,
    stored: bool,
    dimension: Callable[[], float | None],
) -> tuple[str, int, str]:
    """(method, rank, reason) for n samples with k outputs.

    work: what each method takes. memory: bytes that the run may take. dimension: about the effective one at the
    regularisation and time of the run, asked for where it decides; None where nothing tells.
    """
    rows = n * k
    most = DENSE_ROWS["cuda" if device.type == "cuda" else "cpu"]
    small = method == "auto" and rank is None and rows <= most and 48 * rows * rows <= memory
    exact = f"{rows} rows (samples x outputs) have an exact kernel", "; store= is not used" * stored
    if method == "dense" or small and work.dense <= work.worth:
        return "dense", rows, ("asked for" if method == "dense" else exact[0]) + exact[1]
    wanted = min(rank or DEFAULT_RANK, rows) if method != "sketch" else rank or DEFAULT_RANK
    least = 16 * wanted * min(wanted, rows)  # sums in twice the digits
    if method == "sketch" and least > max(memory, 1 << 28):
        expected, got = f"columns whose sums fit {_size(memory)}", f"{wanted}, which take {_size(least)}"
        todo = f"Lower rank=, or use method='nystrom', which is exact at rank {rows}."
        raise ArgumentError(complaint("rank", expected, got, todo))
    if method != "auto":
        return method, wanted, "asked for"
    edf, told = dimension() if rank is None else None, ""
    ranks, short = dict.fromkeys(_RANKS, wanted), False
    if edf is not None:
        told = f", effective dimension about {edf:.3g}"
        for kind, (least, largest) in _RANKS.items():
            asked = math.ceil(_MARGIN * RANK_FOR[kind] * edf / _STEP) * _STEP
            ranks[kind], short = min(max(asked, least), largest), asked > largest
    few, many = min(ranks["subspace"], rows), ranks["sketch"]
    limit = math.inf if short else max(work.worth, work.sketch(many))  # no sketch has as many columns
    fits = 18 * subspace_columns(few) * parameters <= memory and n <= 200_000
    other = "subspace" if fits and work.subspace(few) <= limit else "sketch"
    count = work.subspace(few) if other == "subspace" else work.sketch(many)
    if small and work.dense <= count:
        return "dense", rows, f"{exact[0]}; {other} would take {_count(count, work)}{exact[1]}"
    beyond = f"; an exact kernel would take {_count(work.dense, work)}" * small
    if other == "subspace":
        why = f"{rows} rows{told}; a basis of {few} directions of {parameters} parameters fits memory{beyond}"
        return other, few, why
    beyond += f"; a basis of {few} directions would take {_count(work.subspace(few), work)}" * fits
    return other, many, f"{rows} rows of {parameters} parameters{told}; one pass, nothing to fit{beyond}"


def _count(count: float, work: Operations) -> str:
    return f"{count:.1e} operations, those of {count / max(1.0, work.one_pass):.3g} passes"


def make_plan(
    first: Jacobian,
    seconds: float,
    n: int,
    m: int,
    method: str,
    rank: int,
    reason: str,
    stored: bool,
    given: int,
    sketch: str = "tensor",
    spectral: bool = True,
    own: tuple[int, int] | None = None,
    alone: bool = False,
    grouped: bool = False,
    new: int = 0,
    softmax: bool = False,
) -> Plan:
    """Costs from the Jacobian of a few samples and the seconds its capture took; products with it are timed here.

    Args:
        first: captured with the settings of the run. n, m: training and validation samples. stored: on disk.
        sketch: kind of random map of method "sketch".
        given: bytes of an input where the scores keep it. spectral: an exact kernel needs its eigenvectors, not a
            Cholesky factor alone.
        own: of the training and validation samples those of this process. alone: it ends with their features.
        grouped: groups leave, which may span shards. new: candidates. softmax: the loss leaves a direction alone.
    """
    (n_own, m_own), k, each, d = own or (n, m), first.k, first.nbytes / max(first.n, 1), first.shape[1]
    rows = n * k
    capture, product = seconds / first.n, product_seconds()
    if method == "dense":
        held = 1.2 * (n + m) * each + 8 * rows * m * k
        solve = 8 * rows * rows * (5.2 if spectral else 4.0) + 30_000_000 * (not spectral)
        peak = int(_LIBRARIES + held + max(solve, 8 * rows * rows + _tile_bytes(first, n)))
        gram = pair_seconds(first, _tile_rows(first, n) // k) * (n * n / 2 + n * m)
        total = capture * (n + m) + gram + (EIGEN if spectral else CHOLESKY) * rows**3 * product + 0.1
        return Plan(method, rows, reason, 1, 0, peak, total)
    pool, anchors = pool_size(first, n, rank, sketch, softmax) if method == "sketch" else (0, 0)
    wide = min(subspace_columns(rank), rows) if method == "subspace" else rank  # columns that come out
    if method == "sketch" and (anchors or not pool):
        wide = anchors + sketch_rank(rank - anchors, sketch)
    drawn = pool, anchors, pool * (k + softmax)
    stages = _stage_bytes(first, n, m, method, rank, wide, each, stored, given, drawn, (n_own, m_own))
    if grouped:  # all features at once, and of them rows of eigenvectors, these by groups, and changes
        stages["leave one out"] += 24 * wide * n * k
    shard = 4 * k * wide * min(new, shard_samples(k, wide))
    stages["candidates"] = (stages["features"] + 9 * shard) * (new > 0)
    size = _LIBRARIES + int(max(list(stages.values())[: 2 if alone else None]))
    passes = {"sketch": 1, "nystrom": 1, "subspace": 3 - (wide == rows)}[method]
    rows = n_own * k
    disk = (4 * wide + 8 + (8 * k if method != "sketch" else 0)) * rows + 4 * wide * m_own * k
    least, seen = min(wide, n * k), min(wide, m * k)  # of fewer rows than columns the rows are kept
    work = 2.0 * rows * wide * least * (1.8 + 0.5 * (m > 0)) + m_own * k * wide * seen + SPECTRUM * (least**3 + seen**3)
    work = 0.0 if alone else work
    if method == "sketch":
        columns = INNER if pool and not anchors else rank
        sketched = lambda: first.sketch(columns, 0, sketch)  # noqa: E731
        if anchors:
            many = repeated(first)
            along = make_anchors(many, many.outputs.new_ones(many.n * k, anchors, dtype=torch.float64))
            sketched = lambda: project(first, along, columns, 0, sketch, True)  # noqa: E731
        each_map = seconds_of(sketched) / first.n
        fit = pool * (capture + each_map) + SPECTRUM * (pool * k) ** 3 * product
    elif method == "nystrom":
        about = _Landmarks.of(first, n, rank)
        draw, each_map = about.seconds(first, rank, product)
        solve, decompose = (4.25, 20.0) if about.count * k > rank else (1.25, 10.0)  # to fewer columns, or not
        fit = about.pool * (capture + draw)
        fit += (solve * about.pool + decompose * about.count) * k**3 * about.count**2 * product
    else:
        few, many = min(wide, max(4, (1 << 22) // d)), repeated(first)
        tangents, cotangents = first.outputs.new_ones(few, d), first.outputs.new_ones(many.n * k, few)
        each_map = carried_on(lambda count: many.jvp(tangents[:count]), few, wide) / many.n
        back = carried_on(lambda count: many.vjp(cotangents[:, :count]), few, wide) / many.n
        again = 1 if n_own * each < HELD else 2
        fit = n_own * (again * capture + each_map + 2 * back) + 6.0 * d * wide**2 * product
    probes = 0 if alone else probe_count(first, n)
    probed = 2 * capture if method == "sketch" else 3 * capture + each_map  # a sketch captures its probes once
    total = fit + (n_own + m_own + new) * (capture + each_map) + work * product + 0.15 + probes * probed
    return Plan(method, rank, reason, passes, disk, size, total, sketch if method == "sketch" else None, stored)


def _tile_rows(first: Jacobian, n: int) -> int:
    """Rows of a tile of the exact kernel."""
    positions = any(x.a.shape[1] > 1 for x in first.select(range(1)).factors() if isinstance(x, Outer))
    return min(n * first.k, 2048 if positions else 640)


def _tile_bytes(first: Jacobian, n: int) -> int:
    """What a tile of the exact kernel takes: rows of the widest layer where it has positions, and products."""
    layers = [factor for factor in first.select(range(1)).factors() if isinstance(factor, Outer)]
    tile = _tile_rows(first, n)
    sides = 1 + (n * first.k > tile)  # rows that are formed: of the samples of either side
    spread = [
        x.width * (sides * x.g.shape[3] if by_rows(x) else x.g.shape[3] + x.g.shape[2])
        for x in layers
        if x.g.shape[2] > 1
    ]
    return first.outputs.element_size() * tile * (max(spread, default=0) + 3 * tile)


def probe_count(first: Jacobian, n: int, share: float = 0.15) -> int:
    """Samples whose exact kernel the effective dimension is estimated from.

    Args:
        first: the Jacobian of any. share: of the time of a run that the kernel may take, about.
    """
    layers = [factor for factor in first.select(range(1)).factors() if isinstance(factor, Outer)]
    positions = max((layer.a.shape[1] for layer in layers), default=1)
    most = _PROBE_ROWS
    if positions > 1:  # an entry of the kernel costs about as much as a sample's gradient at a position
        most = min(math.isqrt(int(share * n * positions)), int(n * share / 4.8))
    return min(n, max(PROBES, min(most, _PROBE_ROWS // first.k)))


@dataclass
class _Landmarks:
    """Of a run by method "nystrom".

    Attributes:
        pool, count: samples to draw from, landmarks. wide: kernels are likely to be computed in float64.
        formed: entries of a sample's rows that are formed, for its coordinates along directions; 0: all by the kernel.
    """

    pool: int
    count: int
    wide: bool
    formed: int

    @classmethod
    def of(cls, first: Jacobian, n: int, rank: int) -> _Landmarks:
        k, each = first.k, first.nbytes / first.n
        rank = -(-rank // k) * k
        pool, count = min(n, max(2000, 4 * rank // k)), landmarks_of(n, k, rank)
        formed = sum(
            k * layer.a.shape[2] * layer.g.shape[3]
            for layer in first.select(range(1)).factors()
            if isinstance(layer, Outer) and not goes_by_kernel(layer, count, rank, False)
        )
        formed *= directions_fit(rank, first.shape[1], pool * each)
        return cls(pool, count, first.dtype != torch.float64 and _rounding_hides(first, rank, count * k), formed)

    def at_once(self, first: Jacobian) -> int:
        """Landmarks whose kernel with the pool is computed in float64 at a time."""
        return min(self.count, landmarks_at_once(first.k * first.shape[1], self.pool * first.nbytes / first.n))

    def seconds(self, first: Jacobian, rank: int, product: float) -> tuple[float, float]:
        """Of a sample of the pool while landmarks are drawn, and of the features of a sample."""
        many, k = first if self.formed else repeated(first), first.k
        some = many.select(range(max(1, min(many.n, self.count // 8))))
        own = seconds_of(many.own_blocks) / many.n
        draw = own + seconds_of(lambda: many.gram(some)) / many.n * self.count / some.n
        if not self.formed:
            whole = pair_seconds(first, first.n) * self.count * (3 if self.wide else 1)
            whole += 2.0 * self.count * k**2 * rank * product
            return draw + self.wide * whole, own + whole
        root = first.outputs.new_ones(first.n * first.k, _FEW, dtype=torch.float64)
        along = coordinates(first.wide() if self.wide else first, root, HELD)
        few, each = seconds_of(lambda: along(first, True)) / first.n, 2.0 * self.formed * product
        if self.wide:
            passes = -(-self.count // self.at_once(first))
            draw += own + passes * few + max(0, self.count * first.k - passes * _FEW) * each
        return draw, few + max(0, rank - _FEW) * each * (1.0 if self.wide else 0.5)


def _rounding_hides(first: Jacobian, rank: int, rows: int) -> bool:
    """Whether float32 is likely to leave a kernel of so many rows fewer eigenvalues than ``rank`` above its rounding.

    Carried on from the kernels of half and all of these samples.
    """
    exact = first.gram().to(torch.float64).nan_to_num(0.0, 0.0, 0.0)

    def weakest(size: int) -> float:
        s = torch.linalg.eigvalsh(exact[:size, :size]).flip(0)
        return math.log2(max(float(s[math.ceil(min(1.0, rank / rows) * size) - 1] / s[0].clamp_min(1e-300)), 2.0**-30))

    half, whole = weakest((len(exact) + 1) // 2), weakest(len(exact))
    found = whole + math.log2(rows / len(exact)) * (whole - half)
    return found < math.log2(2 * rows * torch.finfo(torch.float32).eps)  # twice: what is carried on is too large


def _stage_bytes(
    first: Jacobian,
    n: int,
    m: int,
    method: str,
    rank: int,
    wide: int,
    each: float,
    stored: bool,
    given: int,
    drawn: tuple[int, int, int],
    own: tuple[int, int],
) -> dict[str, float]:
    """Of a run of low rank: at its stages, each with what it finds in memory and what it adds."""
    k, d, rows, item = first.k, first.shape[1], own[0] * first.k, first.outputs.element_size()
    square, part, kept = 8 * wide * min(wide, n * k), min(256, n), 0  # of fewer rows than columns the rows are kept
    shard, piece = 4 * k * wide * min(own[0], shard_samples(k, wide)), k * wide * min(own[0], grain(n))
    features = 0 if stored else 4 * wide * sum(own) * k + 8 * (1 + k * (method != "sketch")) * rows
    layers = [factor for factor in first.select(range(1)).factors() if isinstance(factor, Outer)]
    read = item * sum(layer.a.numel() for layer in layers)
    given_out = item * sum(layer.g.numel() for layer in layers)
    patches = max(0, read + given_out - each)  # what inputs of convolutions take beyond the images themselves
    # rows of the widest layer with positions are written out, for a batch and for the kernel of some samples
    formed = item * k * max((x.a.shape[2] * x.g.shape[3] for x in layers if x.a.shape[1] > 1), default=0)
    twice = max((x.a.shape[2] * x.g.shape[3] for x in layers if x.a.shape[1] > 1 and not by_rows(x)), default=0)
    spread = [x for x in layers if isinstance(x, Patches) and not by_rows(x)]  # the kernel unfolds their inputs
    unfolded = item * sum(x.a.numel() - x.image.x.numel() for x in spread)
    unfolded += item * max((x.a.numel() for x in spread), default=0)  # by a layer, beside those before it
    worked = unfolded + patches / 2 + max(formed, 2 * item * k * twice)
    capture = part * each + first.n * each * 2
    pool, anchors, pool_rows = drawn
    if anchors:
        formed_of = [x for x in layers if not goes_by_kernel(x, pool, anchors)]
        held = anchors * item * d if formed_of or len(layers) < len(first.factors()) else 0
        widest = anchors * item * max(((x.a.shape[2] + 1) * x.g.shape[3] for x in formed_of), default=0)
        written = min(pool_rows * item * d, 1 << 28) if formed else 0
        fit = pool * (1.3 * each + 8 * k * rank) + written + max(64 * (pool * k) ** 2, 1.5 * widest)
        compute = first.n * (2 * each + patches + 10 * k * rank) + 2 * min(first.n * formed, item << 24)
    elif method == "sketch":  # layers are sketched as the backward pass reaches them
        columns = INNER if pool else rank
        numbers, few = each / item, first.n
        if k == 1 and first.outputs.device.type == "cpu":
            few = min(few, held_batch(numbers))
        holds = k == 1 and few * numbers > LARGE
        compute = few * ((1.6 if holds else 2.8) * each + 2 * patches + 20 * k * columns)
        held, fit = 0, max(compute + 12 * pool * k * columns, 48 * (pool * k) ** 2)
        compute += 4 * part * k * columns
    elif method == "nystrom":
        about = _Landmarks.of(first, n, rank)
        landmarks, pool = about.count, about.pool
        tile = min(pool, 2048 // k, (1 << 26) // max(1, formed))
        held, fit = landmarks * (each + 8 * k * rank), tile * (unfolded + 1.5 * formed)
        compute = capture + part * k * (12 * landmarks * k + 12 * rank)
        if about.formed:
            held = landmarks * 8 * k * rank + (8 if about.wide else 4) * rank * d
            some = about.at_once(first)
            run = min(2 * part * each, 1 << 28) + 8 / item * min(part * formed, 1 << 26)
            made = lambda count, of: count * each + run + 8 / item * of * formed  # noqa: E731
            fit = max(fit, about.wide * (8 * some * k * d + made(some, some)))
            compute += made(landmarks, rank) + (not about.wide) * 8 * rank * d
        fit = pool * each + max(fit, landmarks * each) + 20 * pool * k * landmarks * k + 12 * (landmarks * k) ** 2
        fit -= held - landmarks * 8 * k * rank  # what is held is made when the pool is gone
    else:
        held, turned = 4 * wide * d, wide * d * item * (item != 4)  # the basis, and it in the dtype of the model
        kept = own[0] * each if own[0] * each <= HELD else 0  # factors that wait; pass 1 lets go of them
        # with more outputs than positions vjp goes by positions: as much as its result again, twice
        spread = max((x.a.shape[2] * x.g.shape[3] for x in layers if k > x.a.shape[1]), default=0)
        unfolded = item * part * max((x.a.numel() for x in layers if isinstance(x, Patches)), default=0)
        products = part * each + min(part * d * item, 100_000_000) + 11 * wide * part * k + unfolded
        # the next basis comes when what vjp took is gone
        fit = kept + 8.2 * wide * d + turned + products + wide * max(4 * d, 2 * spread * item)
        compute = capture + turned + part * (d * item + 16 * k * wide)
    seen = 8 * wide * min(wide, m * k)  # rows or sums of the validation samples, and their factor
    factor = 2.1 * square + 4.5 * seen if m * k < wide else 1.1 * square + 7.6 * seen  # while it is made
    after = 3.0 * square + (0.4 if m * k < wide else 2.6) * seen  # with what a product of float64 keeps
    probes = probe_count(first, n)
    at_once = probes if probes * each <= HELD else max(1, int(HELD / (2 * each)))
    kernel = 40 * (probes * k) ** 2
    ahead = method == "sketch" and not draws_more(n, each)  # captured before there are features, and not again
    mapped = 1.0 if ahead else min(1.0, PROBES / part)  # else features of a few of them only
    estimate = min(probes, 2 * at_once) * each + max(at_once * worked, mapped * compute) + kernel
    before, held = held, held + _CONVOLUTIONS * (patches > 0)
    stages = {"map": fit + before, "probes": ahead * (held + estimate)}
    held += ahead * (4 * probes * k * wide + 8 * (probes * k) ** 2)
    return stages | {
        "features": held + max(kept, features) + compute + (5 if stored else 1) * shard,
        "sums": held + features + 3.0 * square + 3 * shard * stored + 8 * min(piece, 1 << 20),
        "spectrum": held + features + max(6.6 * square + 0.6 * shard * stored, factor * (m > 0)),
        "leave one out": held
        + features
        + after
        + 1.5 * square * (m > 0)
        + 2 * shard * stored
        + 72 * n  # columns of the scores and targets, and the columns joined
        + (24 if k == 1 else 72) * min(piece, PORTION),
        "error estimate": held + features + after + 40 * n + (kernel if ahead else estimate),
        "scores": n * given + 60 * n * k,
    }


def draws_more(n: int, nbytes: float) -> bool:
    """Whether a run of n samples, each with factors of so many bytes, draws more probes where the rank will not do.

    Of more samples, or a larger model, their kernel would take many times the run.
    """
    return n <= 1024 and n * nbytes <= HELD // 8


def shard_samples(k: int, columns: int, most: int = SHARD) -> int:
    """Samples of a shard: a power of two, so that slices share their batches with one process."""
    return power(max(16, min(most // (k * columns), 4096)))


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
