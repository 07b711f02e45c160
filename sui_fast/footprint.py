"""Bytes that a run takes: at its stages those of the process, and what it may keep in memory between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .jacobians import Jacobian, goes_by_kernel
from .jacobians.arriving import LARGE, held_batch
from .jacobians.gram import by_rows
from .jacobians.layers import Outer, Patches
from .ops.products import vjp_room
from .processes import grain, power
from .spectra import INNER, pool_size, sketch_rank, subspace_columns
from .spectra.maps import directions_fit, landmarks_at_once, landmarks_of

PROBES = 64  # samples whose exact kernel the error estimate looks at
_PROBE_ROWS = 512  # rows of the exact kernel that the effective dimension is estimated from
HELD = 1 << 30  # bytes of factors that may stay in memory between passes
LIBRARIES = 11_000_000  # bytes that libraries take on first use, and malloc keeps
_CONVOLUTIONS = 4_000_000  # bytes more after some batches of these
SHARD = 1 << 21  # features of a shard: 8 MB, of 4096 samples at most
PORTION = 1 << 20  # float64 features at a time in pass 2: fewer are more calls, more are more fresh memory


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


def draws_more(n: int, nbytes: float) -> bool:
    """Whether a run of n samples, each with factors of so many bytes, draws more probes where the rank will not do.

    Of more samples, or a larger model, their kernel would take many times the run.
    """
    return n <= 1024 and n * nbytes <= HELD // 8


def shard_samples(k: int, columns: int, most: int = SHARD) -> int:
    """Samples of a shard: a power of two, so that slices share their batches with one process."""
    return power(max(16, min(most // (k * columns), 4096)))


def tile_rows(first: Jacobian, n: int) -> int:
    """Rows of a tile of the exact kernel."""
    positions = any(x.a.shape[1] > 1 for x in first.select(range(1)).factors() if isinstance(x, Outer))
    return min(n * first.k, 2048 if positions else 640)


def tile_bytes(first: Jacobian, n: int) -> int:
    """What a tile of the exact kernel takes: rows of the widest layer where it has positions, and products."""
    layers = [factor for factor in first.select(range(1)).factors() if isinstance(factor, Outer)]
    tile = tile_rows(first, n)
    sides = 1 + (n * first.k > tile)  # rows that are formed: of the samples of either side
    spread = [
        x.width * (sides * x.g.shape[3] if by_rows(x) else x.g.shape[3] + x.g.shape[2])
        for x in layers
        if x.g.shape[2] > 1
    ]
    return first.outputs.element_size() * tile * (max(spread, default=0) + 3 * tile)


@dataclass
class Landmarks:
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
    def of(cls, first: Jacobian, n: int, rank: int) -> Landmarks:
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


class Footprint:
    """Bytes of a run of low rank: at its stages, each with what it finds in memory and what it adds.

    Attributes:
        columns: of the features. pool, anchors: samples that a sketch looks at first, directions that it keeps exact.
        landmarks: of "nystrom". stages: their bytes by name.
    """

    def __init__(
        self,
        first: Jacobian,
        n: int,
        m: int,
        method: str,
        rank: int,
        *,
        own: tuple[int, int] | None = None,
        stored: bool = False,
        given: int = 0,
        sketch: str = "tensor",
        softmax: bool = False,
    ):
        """See ``planning.make_plan``."""
        self._first, self._n, self._m, self._rank = first, n, m, rank
        self._k, self._d, self._item = first.k, first.shape[1], first.outputs.element_size()
        self._each, self._part = first.nbytes / max(first.n, 1), min(256, n)
        self._layers = [factor for factor in first.select(range(1)).factors() if isinstance(factor, Outer)]
        self._look_at_layers()
        self.pool, self.anchors, self.columns = 0, 0, rank
        self.landmarks: Landmarks | None = None
        if method == "sketch":
            self.pool, self.anchors = pool_size(first, n, rank, sketch, softmax)
            if self.anchors or not self.pool:
                self.columns = self.anchors + sketch_rank(rank - self.anchors, sketch)
            found = self._with_anchors(self.pool * (self._k + softmax)) if self.anchors else self._sketched()
        elif method == "nystrom":
            found = self._along_landmarks()
        else:
            self.columns = min(subspace_columns(rank), n * first.k)
            found = self._along_basis((own or (n, m))[0])
        self.stages = self._stages(method, own or (n, m), stored, given, *found)

    def _look_at_layers(self) -> None:
        """What convolutions unfold, and the largest rows that are formed, for one sample."""
        k, item, layers = self._k, self._item, self._layers
        spatial = [x for x in layers if x.a.shape[1] > 1]
        numbers = sum(x.a.numel() + x.g.numel() for x in layers)
        self._patches = max(0, item * numbers - self._each)  # beyond the images themselves
        # rows of the widest layer with positions are written out, for a batch and for the kernel of some samples
        self._formed = item * k * max((x.a.shape[2] * x.g.shape[3] for x in spatial), default=0)
        twice = max((x.a.shape[2] * x.g.shape[3] for x in spatial if not by_rows(x)), default=0)
        spread = [x for x in layers if isinstance(x, Patches) and not by_rows(x)]  # the kernel unfolds their inputs
        self._unfolded = item * sum(x.a.numel() - x.image.x.numel() for x in spread)
        self._unfolded += item * max((x.a.numel() for x in spread), default=0)  # by a layer, beside those before it
        self._worked = self._unfolded + self._patches / 2 + max(self._formed, 2 * item * k * twice)

    def _with_anchors(self, pool_rows: int) -> tuple[float, float, float, float]:
        """(what fitting the map adds, what the map holds, what a batch adds, factors that wait), of a sketch."""
        k, d, item, each, few, pool = self._k, self._d, self._item, self._each, self._first.n, self.pool
        formed = [x for x in self._layers if not goes_by_kernel(x, pool, self.anchors)]
        every = len(self._layers) == len(self._first.factors())
        held = self.anchors * item * d if formed or not every else 0
        widest = self.anchors * item * max(((x.a.shape[2] + 1) * x.g.shape[3] for x in formed), default=0)
        written = min(pool_rows * item * d, 1 << 28) if self._formed else 0
        fit = pool * (1.3 * each + 8 * k * self._rank) + written + max(64 * (pool * k) ** 2, 1.5 * widest)
        return fit, held, few * (2 * each + self._patches) + self._mapped(few), 0

    def _mapped(self, count: int) -> float:
        """What an anchored sketch of so many samples at once adds."""
        return count * 10 * self._k * self._rank + 2 * min(count * self._formed, self._item << 24)

    def _sketched(self) -> tuple[float, float, float, float]:
        """The same where layers are sketched as the backward pass reaches them."""
        k, each, few, pool = self._k, self._each, self._first.n, self.pool
        columns, numbers = INNER if pool else self._rank, each / self._item
        if k == 1 and self._first.device.type == "cpu":
            few = min(few, held_batch(numbers))
        holds = k == 1 and few * numbers > LARGE
        compute = few * ((1.6 if holds else 2.8) * each + 2 * self._patches + 20 * k * columns)
        fit = max(compute + 12 * pool * k * columns, 48 * (pool * k) ** 2)
        return fit, 0, compute + 4 * self._part * k * columns, 0

    def _along_landmarks(self) -> tuple[float, float, float, float]:
        """The same of "nystrom"."""
        k, d, rank, each, part, item = self._k, self._d, self._rank, self._each, self._part, self._item
        self.landmarks = about = Landmarks.of(self._first, self._n, rank)
        count, pool = about.count, about.pool
        tile = min(pool, 2048 // k, (1 << 26) // max(1, self._formed))
        held, fit = count * (each + 8 * k * rank), tile * (self._unfolded + 1.5 * self._formed)
        compute = (part + 2 * self._first.n) * each + part * k * (12 * count * k + 12 * rank)
        if about.formed:
            held = count * 8 * k * rank + (8 if about.wide else 4) * rank * d
            some = about.at_once(self._first)
            run = min(2 * part * each, 1 << 28) + 8 / item * min(part * self._formed, 1 << 26)
            made = lambda landmarks, of: landmarks * each + run + 8 / item * of * self._formed  # noqa: E731
            fit = max(fit, about.wide * (8 * some * k * d + made(some, some)))
            compute += made(count, rank) + (not about.wide) * 8 * rank * d
        fit = pool * each + max(fit, count * each) + 20 * pool * k * count * k + 12 * (count * k) ** 2
        return fit - held + count * 8 * k * rank, held, compute, 0  # what is held is made when the pool is gone

    def _along_basis(self, n: int) -> tuple[float, float, float, float]:
        """The same of "subspace"; n: samples of this process."""
        k, d, item, each, part, wide = self._k, self._d, self._item, self._each, self._part, self.columns
        held, turned = 4 * wide * d, wide * d * item * (item != 4)  # the basis, and it in the dtype of the model
        kept = n * each if n * each <= HELD else 0  # factors that wait; pass 1 lets go of them
        room = 0  # of vjp where outputs are more than positions: two of its results at least
        for x in self._layers:
            s, i, o = x.g.shape[2], x.width + ("bias" in x.names), x.g.shape[3]
            if k > s:
                room = max(room, 2 * wide * i * o, vjp_room(part, k, s, i, o, wide))
        unfolded = item * part * max((x.a.numel() for x in self._layers if isinstance(x, Patches)), default=0)
        products = part * each + min(part * d * item, 100_000_000) + 11 * wide * part * k + unfolded
        # the next basis comes when what vjp took is gone
        fit = kept + 8.2 * wide * d + turned + products + max(4 * wide * d, item * room)
        compute = (part + 2 * self._first.n) * each + turned + part * (d * item + 16 * k * wide)
        return fit, held, compute, kept

    def _stages(
        self, method: str, own: tuple[int, int], stored: bool, given: int, fit: float, held: float, compute: float,
        kept: float,
    ) -> dict[str, float]:  # fmt: skip
        n, m, k, wide, each, rows = self._n, self._m, self._k, self.columns, self._each, own[0] * self._k
        square, seen = 8 * wide * min(wide, n * k), 8 * wide * min(wide, m * k)  # of fewer rows than columns: these
        shard, piece = 4 * k * wide * min(own[0], shard_samples(k, wide)), k * wide * min(own[0], grain(n))
        features = 0 if stored else 4 * wide * sum(own) * k + 8 * (1 + k * (method != "sketch")) * rows
        factor = 2.1 * square + 4.5 * seen if m * k < wide else 1.1 * square + 7.6 * seen  # while it is made
        after = 3.0 * square + (0.4 if m * k < wide else 2.6) * seen  # with what a product of float64 keeps
        probes = probe_count(self._first, n)
        at_once = probes if probes * each <= HELD else max(1, int(HELD / (2 * each)))
        kernel = 40 * (probes * k) ** 2
        ahead = method == "sketch" and not draws_more(n, each)  # captured before there are features, and not again
        mapped = compute if ahead else min(1.0, PROBES / self._part) * compute  # else features of a few of them only
        if ahead and self.anchors and not self._patches:  # convolutions form rows by portions
            mapped += max(0.0, self._mapped(at_once) - self._mapped(self._first.n))
        estimate = min(probes, 2 * at_once) * each + max(at_once * self._worked, mapped) + kernel
        stages = {"map": fit + held}
        held += _CONVOLUTIONS * (self._patches > 0)
        stages["probes"] = ahead * (held + estimate)
        held += ahead * (4 * probes * k * wide + 8 * (probes * k) ** 2)
        stages["features"] = held + max(kept, features) + compute + (5 if stored else 1) * shard
        held += features
        stages["sums"] = held + 3.0 * square + 3 * shard * stored + 8 * min(piece, 1 << 20)
        stages["spectrum"] = held + max(6.6 * square + 0.6 * shard * stored, factor * (m > 0))
        stages["leave one out"] = held + after + 1.5 * square * (m > 0) + 2 * shard * stored
        stages["leave one out"] += 72 * n  # columns of the scores and of what is summed, targets
        stages["leave one out"] += (24 if k == 1 else 72) * min(piece, PORTION)
        stages["error estimate"] = held + after + 40 * n + (kernel if ahead else estimate)
        stages["scores"] = n * given + 60 * n * k
        return stages
