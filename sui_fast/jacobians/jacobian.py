"""Jacobian of the outputs with respect to the chosen parameters, held as per-layer factors; never an n x d matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from math import prod

import torch
from torch import Tensor

from ..ops import jvp, sketch, vjp
from ..ops.products.rows import Piece, row_writer
from ..ops.sketching.sums import TensorSums
from .gram import gram
from .joining import by_map, join_factors
from .layers import Factor, Index, Outer, Rows, Use, dense_index, make_factors
from .streams import add_sketch, as_read, layer_order, streams_of
from .tokens import add_token_vjp, token_jvp

_VECTORS = 8  # of J^T c that are added at a time


def _unrounded(method: Callable) -> Callable:
    """The method without the autocast that a caller may have on for his model."""

    @wraps(method)
    def called(self: Jacobian, *args, **kwargs):
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return called


class Jacobian:
    """J [N, d]: row i * k + c is the gradient of output c of sample i at the present weights.

    Attributes:
        n, k: samples and outputs. shape: (N, d).
        outputs: the outputs themselves, f0 [n, k].
        parameter_names: chosen parameters; columns follow this order, each flattened row by row.
        coverage: share of the chosen entries that the factors account for; 1.0, as anything less is an error.
        general: parameters that went through torch.func, with the function that has no rule.
        engines: for each parameter "rules", "torch.func" or "one by one" (torch.func could not vectorise the model).
        dtype: of the factors and of everything computed from them; float32 where the model is bfloat16 or float16.
    """

    coverage = 1.0

    def __init__(
        self,
        outputs: Tensor,
        shapes: dict[str, torch.Size],
        uses: list[tuple[Use, Tensor]],
        rows: dict[str, Tensor],
        general: dict[str, str],
        engines: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ):
        dtype = outputs.dtype if dtype is None else dtype
        dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self.outputs, self.general = outputs.to(dtype), general
        self.engines = dict.fromkeys(shapes, "rules") | dict.fromkeys(general, "torch.func") | (engines or {})
        self._shapes, self._uses, self._rows = shapes, uses, rows
        self.n, self.k = outputs.shape
        self.parameter_names = list(shapes)
        self.device, self.dtype = outputs.device, dtype
        self._begin: dict[str, int] = {}
        total = 0
        for name, shape in shapes.items():
            self._begin[name] = total
            total += shape.numel()
        self.shape = (self.n * self.k, total)

    def __repr__(self) -> str:
        return f"Jacobian({self.n} samples x {self.k} outputs, {self.shape[1]} parameters, {len(self._uses)} layers)"

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        held = [self.outputs, *self._rows.values(), *(x for use, g in self._uses for x in (use.saved, g))]
        return sum(x.numel() * x.element_size() for x in held)

    @_unrounded
    def factors(self, start: int = 0, stop: int | None = None) -> list[Factor]:
        """Factors of samples start..stop, uses of one parameter joined so that their rows add up exactly."""
        return join_factors(self._apart(start, stop), self._shapes)

    def _apart(self, start: int = 0, stop: int | None = None) -> list[Factor]:
        """Factors of samples start..stop, use by use: enough for what is linear in the rows."""
        part = slice(start, self.n if stop is None else stop)
        found: list[Factor] = [Rows({"rows": name}, rows[part].to(self.dtype)) for name, rows in self._rows.items()]
        for use, g in self._uses:
            found += make_factors(self._typed(use.at(part)), g[part].to(self.dtype))
        return found

    def _portion(self, most: int, memory: int = 1 << 28) -> int:
        """Samples at a time, at most ``most``, so that dense rows of tables (embeddings, tied weights) fit."""
        counts: dict[str, int] = {}
        for use, _ in self._uses:
            for name in use.parameters:
                counts[name] = counts.get(name, 0) + (2 if use.rule == "embedding" else 1)
        dense = sum(self._shapes[name].numel() for name, count in counts.items() if count > 1)
        return max(1, min(most, memory // max(1, self.k * dense * self.outputs.element_size())))

    def select(self, samples: Sequence[int]) -> Jacobian:
        """The Jacobian of some of the samples, in the order given; a range of step 1 copies nothing."""
        plain = isinstance(samples, range) and samples.step == 1
        index = slice(samples.start, samples.stop) if plain else torch.as_tensor(list(samples), device=self.device)
        uses = [(use.at(index), g[index]) for use, g in self._uses]
        rows = {name: value[index] for name, value in self._rows.items()}
        return Jacobian(self.outputs[index], self._shapes, uses, rows, self.general, self.engines)

    def wide(self) -> Jacobian:
        """The same numbers as float64: nothing is copied, products of them do not round as float32."""
        return Jacobian(self.outputs.double(), self._shapes, self._uses, self._rows, self.general, self.engines)

    @_unrounded
    def own_blocks(self, step: int = 64) -> Tensor:
        """Theta of every sample with itself, [n, k, k]: the diagonal blocks of ``gram()``, without the rest."""
        total = self.outputs.new_zeros(self.n, self.k, self.k)
        step = self._portion(step)
        for begin in range(0, self.n, step):
            part = total[begin : begin + step]
            for factor in self.factors(begin, min(begin + step, self.n)):
                part += own_block(factor)
        return total

    @_unrounded
    def gram(self, other: Jacobian | None = None, *, memory: int = 1 << 28, progress: bool = False) -> Tensor:
        """Theta = J J^T (or J other^T), [N, N'], tile by tile from the factors.

        Args:
            other: a Jacobian of the same parameters; None: this one (the result is exactly symmetric).
            memory: bytes that one tile and its intermediates may take.
            progress: show a bar on runs longer than two seconds.
        Returns:
            [n * k, n' * k'] in the dtype of the factors.
        """
        return gram(self, other, memory=memory, progress=progress)

    @_unrounded
    def jvp(self, tangent: Tensor | dict[str, Tensor]) -> Tensor:
        """J t: [N] for a flat tangent [d] (or a dict by name), [N, r] for tangents [r, d]."""
        if isinstance(tangent, dict):
            tangent = torch.cat([tangent[name].reshape(-1) for name in self.parameter_names])
        flat = tangent.to(self.outputs)
        flat = flat[None] if tangent.ndim == 1 else flat
        total = self.outputs.new_zeros(self.n, self.k, len(flat))
        for factor in self._apart():
            total += self.along(flat, factor)
        result = total.reshape(self.n * self.k, -1)
        return result[:, 0] if tangent.ndim == 1 else result

    def along(self, flat: Tensor, factor: Factor) -> Tensor:
        """Rows of a factor times tangents [r, d], [n, k, r]."""
        parts = {role: self.part_of(flat, factor, role).flatten(1) for role in factor.names}
        if isinstance(factor, Rows):
            return factor.rows @ parts["rows"].T
        if isinstance(factor, Index):
            return token_jvp(factor.token, factor.g, parts["weight"].unflatten(1, (-1, factor.g.shape[3])))
        weight = parts["weight"].reshape(len(flat), factor.g.shape[3], -1)
        if "bias" in parts:
            weight = torch.cat([weight, parts["bias"][:, :, None]], 2)
        weight = weight.contiguous()
        parts = [jvp(part.augmented(), part.g.contiguous(), weight) for part in factor.portions()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @_unrounded
    def jvp_and_own_blocks(self, tangents: Tensor, step: int = 64) -> tuple[Tensor, Tensor]:
        """``jvp`` [N, r] of tangents [r, d] and ``own_blocks`` [n, k, k], the rows of a layer formed once for both."""
        flat, total = tangents.to(self.outputs), self.outputs.new_zeros(self.n, self.k, len(tangents))
        own, portion = self.outputs.new_zeros(self.n, self.k, self.k), self._portion(self.n)
        for begin in range(0, self.n, portion):
            there = slice(begin, begin + portion)
            for factor in self.factors(begin, min(begin + portion, self.n)):
                self._along_and_own(flat, factor, total[there], own[there], step)
        return total.flatten(0, 1), own

    def _along_and_own(self, flat: Tensor, factor: Factor, total: Tensor, own: Tensor, step: int) -> None:
        """Add a factor's part to both results of ``jvp_and_own_blocks``."""
        if not isinstance(factor, Outer) or factor.g.shape[2] <= self.k or _pairs_are_cheaper(factor):
            total += self.along(flat, factor)
            own += own_block(factor)
            return
        weight = self.part_of(flat, factor, "weight").flatten(1)
        if "bias" in factor.names:
            bias = factor.g.sum(2)
            total += bias @ self.part_of(flat, factor, "bias").flatten(1).T
            own += bias @ bias.transpose(1, 2)
        for part in (slice(begin, begin + step) for begin in range(0, len(own), step)):
            rows = factor.some(part).rows().view(*own[part].shape[:2], -1)
            total[part] += rows @ weight.T
            own[part] += rows @ rows.transpose(1, 2)

    @_unrounded
    def vjp(self, cotangent: Tensor, factors: list[Factor] | None = None) -> Tensor:
        """J^T c: [d] for a cotangent [N], [r, d] for cotangents [N, r]; of these factors alone where some are given."""
        flat = self.outputs.new_zeros(1 if cotangent.ndim == 1 else cotangent.shape[1], self.shape[1])
        self.add_vjp(cotangent, flat, factors)
        return flat[0] if cotangent.ndim == 1 else flat

    @_unrounded
    def add_vjp(self, cotangent: Tensor, flat: Tensor, factors: list[Factor] | None = None) -> None:
        """flat [r, d] += J^T c, layer by layer; sums over samples that are held in a wider dtype stay in it."""
        c = cotangent.to(self.outputs).reshape(self.n, self.k, -1)
        for factor in self._apart() if factors is None else factors:
            self._add_vjp(flat, factor, c)

    def _add_vjp(self, flat: Tensor, factor: Factor, c: Tensor) -> None:
        if isinstance(factor, Outer):
            found, i = vjp(factor.augmented(), factor.g.contiguous(), c), factor.width
            self._put(flat, factor, "weight", found[..., :i])
            if "bias" in factor.names:
                self._put(flat, factor, "bias", found[..., i])
            return
        if isinstance(factor, Rows):
            self._put(flat, factor, "rows", torch.einsum("nkp,nkr->rp", factor.rows, c))
            return
        target = self.part_of(flat, factor, "weight").unflatten(1, (-1, factor.g.shape[3]))
        add_token_vjp(target, factor.token, factor.g, c)

    def part_of(self, flat: Tensor, factor: Factor, role: str) -> Tensor:
        """View of the entries [..., *] that a factor speaks of, in a tensor [..., d]."""
        columns = flat[..., self.columns(factor.names[role])]
        return factor.places[role].of(columns) if role in factor.places else columns

    def _put(self, flat: Tensor, factor: Factor, role: str, values: Tensor) -> None:
        target = self.part_of(flat, factor, role)
        for some, more in zip(target.split(_VECTORS), values.split(_VECTORS), strict=True):  # copies are of a few
            some += more.reshape(some.shape)

    def _dense(self, factor: Index) -> Tensor:
        return dense_index(factor.token, factor.g, self._shapes[factor.names["weight"]][0])

    def _typed(self, use: Use) -> Use:
        """The use with its input in the dtype of the factors (models in bfloat16, autocast)."""
        if use.saved.is_floating_point() and use.saved.dtype != self.dtype:
            use.saved = use.saved.to(self.dtype)
        return use

    @_unrounded
    def rows(self, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Explicit rows of samples start..stop, [(stop - start) k, d]; ``out`` is written where it is given."""
        stop = self.n if stop is None else min(stop, self.n)
        count = max(stop - start, 0)
        result = self.outputs.new_empty(count * self.k, self.shape[1]) if out is None else out
        view = result.view(count, self.k, -1)
        factors = self.factors(start, stop) if count else []
        self._clear_unused(view, factors)
        if count:
            for write in self._writers(view, factors):
                write(0)
        return result

    def iter_rows(self, samples: int | None = None) -> Iterator[Tensor]:
        """Explicit rows, a few samples at a time, in one buffer that the next step overwrites: [samples k, d] each.

        Every row is contiguous and begins on a cache line; a step as a whole need not be contiguous.

        Args:
            samples: per step; default: as many as a cache of 2 MB holds.
        """
        size = self.k * self.shape[1] * self.outputs.element_size()
        step = max(1, min(self.n, (3 << 19) // size)) if samples is None else samples
        pitch = -(-self.shape[1] // 16) * 16
        buffer = self.outputs.new_empty(step, self.k, pitch)[:, :, : self.shape[1]]
        block = step * max(1, self._portion(256) // step)
        for begin in range(0, self.n, block):
            end = min(begin + block, self.n)
            factors = self.factors(begin, end)
            if begin == 0:
                self._clear_unused(buffer, factors)
            writers = self._writers(buffer, factors)
            for number, first in enumerate(range(0, end - begin, step)):
                for write in writers:
                    write(number)
                yield buffer[: min(step, end - begin - first)].view(-1, self.shape[1])

    def _clear_unused(self, view: Tensor, factors: list[Factor]) -> None:
        """Zero the entries that no factor writes."""
        used: dict[str, int] = {}
        for factor in factors:
            for role, name in factor.names.items():
                count = prod(factor.places[role].size) if role in factor.places else self._shapes[name].numel()
                used[name] = used.get(name, 0) + count
        for name in self.parameter_names:
            if used.get(name, 0) < self._shapes[name].numel():
                view[:, :, self.columns(name)] = 0

    def _writers(self, view: Tensor, factors: list[Factor]) -> list[Callable[[int], None]]:
        """Functions of b that write the rows of the b-th portion of the factors, as long as ``view`` or the rest."""
        writers, pieces = [], []
        for factor in factors:
            if not isinstance(factor, Outer):
                (role,) = factor.names
                rows = factor.rows if isinstance(factor, Rows) else self._dense(factor)
                self._write_rows(view, factor, role, rows, pieces, writers)
                continue
            one, begin = factor.g.shape[2] == 1, self._begin_of(factor, "weight")
            if one and begin is not None:
                pieces.append(Piece(begin, factor.g[:, :, 0], factor.a[:, 0]))
            else:
                writers.append(self._write_outer(view, factor))
            if "bias" in factor.names:
                bias = factor.g[:, :, 0] if one else factor.g.sum(2)
                self._write_rows(view, factor, "bias", bias, pieces, writers)
        return [*writers, row_writer(pieces, view)]

    def _begin_of(self, factor: Factor, role: str) -> int | None:
        """First column of what a factor fills, None where its columns are not adjacent."""
        place = factor.places.get(role)
        if place is not None and not place.dense:
            return None
        return self._begin[factor.names[role]] + (0 if place is None else place.offset)

    def _write_rows(self, view: Tensor, factor: Factor, role: str, rows: Tensor, pieces: list, writers: list) -> None:
        begin, step = self._begin_of(factor, role), len(view)
        if begin is not None:
            pieces.append(Piece(begin, rows))
            return
        target = self.part_of(view, factor, role)
        shaped = rows.reshape(*rows.shape[:2], *target.shape[2:])

        def write(number: int) -> None:
            portion = shaped[number * step : (number + 1) * step]
            target[: len(portion)] = portion

        writers.append(write)

    def _write_outer(self, view: Tensor, factor: Outer) -> Callable[[int], None]:
        step, (n, k, s, o), i = len(view), factor.g.shape, factor.width
        target = self.part_of(view, factor, "weight")
        target = target.unflatten(2, (o, i)) if target.ndim == 3 else target
        if k == 1 and target.ndim == 4:  # the row itself is the result of the product
            places, turned = target[:, 0].unbind(), target.stride(3) != 1

            def put(place: Tensor, g: Tensor, a: Tensor) -> None:
                if turned:
                    torch.mm(a.T, g, out=place.T)
                else:
                    torch.mm(g.T, a, out=place)

        else:
            places, buffer = target.unbind(), view.new_empty(k * o, i)

            def put(place: Tensor, g: Tensor, a: Tensor) -> None:
                torch.mm(g.view(k, s, o).transpose(1, 2).reshape(k * o, s), a, out=buffer)
                place.copy_(buffer.view(place.shape))

        def write(number: int) -> None:
            begin, end = number * step, min((number + 1) * step, n)
            for first in range(begin, end, factor.at_once):
                part = factor.some(slice(first, min(first + factor.at_once, end)))
                some = zip(places[first - begin :], part.g.flatten(1, 2).unbind(), part.a.unbind(), strict=False)
                for place, g, a in some:
                    put(place, g, a)

        return write

    @_unrounded
    def sketch(self, rank: int, seed: int = 0, kind: str = "tensor") -> Tensor:
        """Rows times one fixed random matrix [d, rank], summed over layers: [n, k, rank], E<Px, Py> = <x, y>."""
        return self.sketch_of_uses(rank, seed, kind)[0]

    def sketch_of_uses(self, rank: int, seed: int = 0, kind: str = "tensor") -> tuple[Tensor, list]:
        """``sketch``, and the layers in the order of their streams: portions whose lists are equal have equal maps."""
        if kind == "tensor":
            return self._tensor_sketch(rank, seed)
        total, factors = self.outputs.new_zeros(self.n, self.k, rank), sorted(self.factors(), key=layer_order)
        for stream, factor in enumerate(factors):
            if isinstance(factor, Outer):
                a, g = factor.augmented(), factor.g
            else:
                dense = factor.rows if isinstance(factor, Rows) else self._dense(factor)
                a, g = dense.new_ones(self.n, 1, 1), dense[:, :, None]
            total += sketch(a.contiguous(), g.contiguous(), rank, seed, stream, kind)
        return total, [layer_order(factor) for factor in factors]

    def _tensor_sketch(self, rank: int, seed: int) -> tuple[Tensor, list]:
        found: list[Factor] = [Rows({"rows": name}, rows.to(self.dtype)) for name, rows in self._rows.items()]
        for use, g in self._uses:
            found += make_factors(*as_read(use, g, self.dtype))
        found = by_map(found, self._shapes)
        order, sums = streams_of(found), TensorSums(self.n, self.k, rank, seed, self.outputs)
        for factor in found:
            add_sketch(sums, factor, order, self._shapes)
        return sums.total(), order

    def columns(self, name: str) -> slice:
        """Columns of a parameter in rows()."""
        return slice(self._begin[name], self._begin[name] + self._shapes[name].numel())


def own_block(factor: Factor) -> Tensor:
    """Gram matrix of the rows of each sample, [n, k, k]."""
    if isinstance(factor, Index):
        same = (factor.token[:, :, None] == factor.token[:, None]) & (factor.token >= 0)[:, None]
        return torch.einsum("nkso,nlto,nst->nkl", factor.g, factor.g, same.to(factor.g.dtype))
    if isinstance(factor, Rows):
        if factor.rows.shape[1] == 1:
            return torch.linalg.vector_norm(factor.rows, dim=2, keepdim=True).square()
        return factor.rows @ factor.rows.transpose(1, 2)
    a, g = factor.augmented(), factor.g
    if a.shape[1] == 1:
        return (g[:, :, 0] @ g[:, :, 0].transpose(1, 2)) * a.square().sum(2)[:, :, None]
    if _pairs_are_cheaper(factor):
        k, s = g.shape[1:3]
        both = g.flatten(1, 2)
        pairs = (both @ both.transpose(1, 2)).unflatten(2, (k, s)).unflatten(1, (k, s))
        return torch.einsum("nkslt,nst->nkl", pairs, a @ a.transpose(1, 2))
    rows = (g.transpose(2, 3) @ a[:, None]).flatten(2)
    return rows @ rows.transpose(1, 2)


def _pairs_are_cheaper(factor: Outer) -> bool:
    """Whether products of pairs of positions take fewer operations than the rows [o, i] of a sample."""
    (_, k, s, o), i = factor.g.shape, factor.width
    return s * s * (i + k * k * o) < k * o * i * (s + k)
