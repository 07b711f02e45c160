"""Which method a run takes, and what it will cost, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._errors import ArgumentError, complaint
from .footprint import HELD, LIBRARIES, Footprint, Landmarks, probe_count, shard_samples, tile_bytes, tile_rows
from .jacobians import Jacobian, make_anchors, project
from .operations import CHOLESKY, EIGEN, SPECTRUM, Operations
from .spectra import INNER, RANK_FOR, subspace_columns
from .spectra.maps import coordinates
from .timing import carried_on, pair_seconds, product_seconds, repeated, seconds_of

DENSE_ROWS = {"cpu": 12_000, "cuda": 32_000}  # samples x outputs that an exact kernel has at most
DEFAULT_RANK = 1024
_FEW = 32  # directions that are timed
_RANKS = {"subspace": (64, 4096), "sketch": (1024, 8192)}  # least and largest that are chosen
_MARGIN, _STEP = 1.25, 64  # of a chosen rank: the effective dimension is an estimate, and may differ in the last bit
ENOUGH = 0.95  # of the rank that the effective dimension asks for: it is an estimate
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
    (n_own, m_own), k, rows = own or (n, m), first.k, n * first.k
    capture, product = seconds / first.n, product_seconds()
    if method == "dense":
        held = 1.2 * (n + m) * first.nbytes / first.n + 8 * rows * m * k
        solve = 8 * rows * rows * (5.2 if spectral else 4.0) + 30_000_000 * (not spectral)
        peak = int(LIBRARIES + held + max(solve, 8 * rows * rows + tile_bytes(first, n)))
        gram = pair_seconds(first, tile_rows(first, n) // k) * (n * n / 2 + n * m)
        total = capture * (n + m) + gram + (EIGEN if spectral else CHOLESKY) * rows**3 * product + 0.1
        return Plan(method, rows, reason, 1, 0, peak, total)
    about = Footprint(first, n, m, method, rank, own=own, stored=stored, given=given, sketch=sketch, softmax=softmax)
    wide, stages = about.columns, about.stages
    if grouped:  # all features at once, and of them rows of eigenvectors, these by groups, and changes
        stages["leave one out"] += 24 * wide * n * k
    shard = 4 * k * wide * min(new, shard_samples(k, wide))
    stages["candidates"] = (stages["features"] + 9 * shard) * (new > 0)
    size = LIBRARIES + int(max(stages[name] for name in (("map", "probes", "features") if alone else stages)))
    passes = {"sketch": 1, "nystrom": 1, "subspace": 3 - (wide == rows)}[method]
    rows = n_own * k
    disk = (4 * wide + 8 + (8 * k if method != "sketch" else 0)) * rows + 4 * wide * m_own * k
    least, seen = min(wide, n * k), min(wide, m * k)  # of fewer rows than columns the rows are kept
    work = 2.0 * rows * wide * least * (1.8 + 0.5 * (m > 0)) + m_own * k * wide * seen + SPECTRUM * (least**3 + seen**3)
    work = 0.0 if alone else work
    fit, each_map = _map_seconds(about, first, n_own, method, rank, sketch, capture, product)
    probes = 0 if alone else probe_count(first, n)
    probed = 2 * capture if method == "sketch" else 3 * capture + each_map  # a sketch captures its probes once
    total = fit + (n_own + m_own + new) * (capture + each_map) + work * product + 0.15 + probes * probed
    return Plan(method, rank, reason, passes, disk, size, total, sketch if method == "sketch" else None, stored)


def _map_seconds(
    about: Footprint, first: Jacobian, n_own: int, method: str, rank: int, sketch: str, capture: float,
    product: float,
) -> tuple[float, float]:  # fmt: skip
    """Of fitting the map, and of what it makes of a sample; capture: of a sample, product: of a multiplication."""
    k, d = first.k, first.shape[1]
    if method == "sketch":
        pool, anchors = about.pool, about.anchors
        columns = INNER if pool and not anchors else rank
        sketched = lambda: first.sketch(columns, 0, sketch)  # noqa: E731
        if anchors:
            many = repeated(first)
            along = make_anchors(many, many.outputs.new_ones(many.n * k, anchors, dtype=torch.float64))
            sketched = lambda: project(first, along, columns, 0, sketch, True)  # noqa: E731
        each_map = seconds_of(sketched) / first.n
        return pool * (capture + each_map) + SPECTRUM * (pool * k) ** 3 * product, each_map
    if method == "nystrom":
        count, pool = about.landmarks.count, about.landmarks.pool
        draw, each_map = _nystrom_seconds(about.landmarks, first, rank, product)
        solve, decompose = (4.25, 20.0) if count * k > rank else (1.25, 10.0)  # to fewer columns, or not
        return pool * (capture + draw) + (solve * pool + decompose * count) * k**3 * count**2 * product, each_map
    few, many = min(about.columns, max(4, (1 << 22) // d)), repeated(first)
    tangents, cotangents = first.outputs.new_ones(few, d), first.outputs.new_ones(many.n * k, few)
    each_map = carried_on(lambda count: many.jvp(tangents[:count]), few, about.columns) / many.n
    back = carried_on(lambda count: many.vjp(cotangents[:, :count]), few, about.columns) / many.n
    again = 1 if n_own * first.nbytes / first.n < HELD else 2
    fit = n_own * (again * capture + each_map + 2 * back) + 6.0 * d * about.columns**2 * product
    return fit, each_map


def _nystrom_seconds(about: Landmarks, first: Jacobian, rank: int, product: float) -> tuple[float, float]:
    """Of a sample of the pool while landmarks are drawn, and of the features of a sample."""
    many, k = first if about.formed else repeated(first), first.k
    some = many.select(range(max(1, min(many.n, about.count // 8))))
    own = seconds_of(many.own_blocks) / many.n
    draw = own + seconds_of(lambda: many.gram(some)) / many.n * about.count / some.n
    if not about.formed:
        whole = pair_seconds(first, first.n) * about.count * (3 if about.wide else 1)
        whole += 2.0 * about.count * k**2 * rank * product
        return draw + about.wide * whole, own + whole
    root = first.outputs.new_ones(first.n * first.k, _FEW, dtype=torch.float64)
    along = coordinates(first.wide() if about.wide else first, root, HELD)
    few, each = seconds_of(lambda: along(first, True)) / first.n, 2.0 * about.formed * product
    if about.wide:
        passes = -(-about.count // about.at_once(first))
        draw += own + passes * few + max(0, about.count * first.k - passes * _FEW) * each
    return draw, few + max(0, rank - _FEW) * each * (1.0 if about.wide else 0.5)


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
