"""Factors: how one recorded call, with the gradient of its result, becomes Jacobian rows.

A ``Use`` is one call of a function that takes chosen parameters, with the input it saw. It yields factors of
three kinds:

* ``outer``: rows sum_s g[n,k,s] a[n,s]^T of a weight [o, i], its bias as one more column of ones;
* ``index``: the same for one-hot a (embeddings), as token numbers [n, s];
* ``rows``: explicit rows [n, k, p], for small parameters (norms, scales, biases) and for whatever has no rule.

A factor may speak of some entries of a parameter only, or of its transpose (packed projections, ``weight.T``): its
``Place`` says which. What a parameter went through before it met the data is its ``Origin``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..ops._register import wide_dtype
from ..ops.sketching.window import Window

_UNFOLDED = 64  # samples of a convolution
_CACHED = 1 << 17  # numbers of a factor that stay in cache while its rows are formed


@dataclass(frozen=True)
class Place:
    """Entries of a parameter: those of p.flatten().as_strided(size, stride, offset), each at most once."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def span(self) -> tuple[int, int]:
        """First entry and one past the last."""
        return self.offset, self.offset + 1 + sum((n - 1) * d for n, d in zip(self.size, self.stride, strict=True))

    @property
    def dense(self) -> bool:
        """True where the entries follow one another."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def of(self, flat: Tensor) -> Tensor:
        """View of a tensor [..., p] as [..., *size]."""
        step = flat.stride(-1)
        size, stride = (*flat.shape[:-1], *self.size), (*flat.stride()[:-1], *(step * d for d in self.stride))
        return flat.as_strided(size, stride, flat.storage_offset() + step * self.offset)


@dataclass
class Part:
    """A tensor that holds entries of one parameter: the parameter, a view, a transpose, a cast."""

    name: str
    place: Place | None  # None: all of them, in order


@dataclass
class Gather:
    """An embedding of tokens that are the same for all samples (positions)."""

    name: str
    token: Tensor  # of the shape of the tokens, -1 for padding


@dataclass
class Pull:
    """Any other function of parameters alone, with its tape."""

    leaves: dict[str, Tensor]
    result: Tensor

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows [n, k, p] of the parameters from rows [n, k, q] of the result."""
        n, k = rows.shape[:2]
        given = rows.to(self.result.dtype).reshape(n * k, *self.result.shape)
        leaves = list(self.leaves.values())
        try:
            found = torch.autograd.grad(
                self.result, leaves, given, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # a function without a batching rule
            single = [torch.autograd.grad(self.result, leaves, g, retain_graph=True, allow_unused=True) for g in given]
            found = [None if parts[0] is None else torch.stack(parts) for parts in zip(*single, strict=True)]
        return {
            name: rows.new_zeros(n, k, leaf.numel()) if grad is None else grad.reshape(n, k, -1).to(rows.dtype)
            for (name, leaf), grad in zip(self.leaves.items(), found, strict=True)
        }


Origin = Part | Gather | Pull


@dataclass
class Use:
    """One call: which rule, which parameters in which role, and what is needed to form the factors.

    Attributes:
        rule: name of the rule.
        origins: {"weight": ..., "bias": ...}, or {"rows": ...} for a tensor that was given to every sample.
        saved: input of the call [n, ...], in the form that the rule stores.
        options: static facts (stride, groups ...).
    """

    rule: str
    origins: dict[str, Origin]
    saved: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters it takes."""
        found: set[str] = set()
        for origin in self.origins.values():
            found |= set(origin.leaves) if isinstance(origin, Pull) else {origin.name}
        return found

    @property
    def key(self) -> tuple:
        """Equal for the same call in two batches, whatever their length."""
        parts = [
            (role, o.name, None if o.place is None else (o.place.offset, o.place.stride))
            for role, o in sorted(self.origins.items())
            if isinstance(o, Part)
        ]
        return self.rule, tuple(parts), tuple(sorted(self.parameters))

    def at(self, part: Any) -> Use:
        """The same use for some of the samples."""
        return Use(self.rule, self.origins, self.saved[part], self.options)


@dataclass
class Outer:
    """rows = sum_s g[n,k,s]^T a[n,s]: parameters weight [o, i] and, as a last column, bias [o]."""

    names: dict[str, str]
    a: Tensor  # [n, s, i]
    g: Tensor  # [n, k, s, o]
    places: dict[str, Place] = field(default_factory=dict)  # roles that are not a whole parameter in order

    @property
    def width(self) -> int:
        """Inputs i."""
        return self.a.shape[2]

    def some(self, part: slice) -> Outer:
        """The factor of some of the samples."""
        return Outer(self.names, self.a[part], self.g[part], self.places)

    def portions(self) -> Iterator[Outer]:
        """The factor, samples at a time whose inputs may be at hand at once."""
        return iter([self])

    def rows(self, out: Tensor | None = None) -> Tensor:
        """sum_s g a^T of the weight [n k, o i], float32 at least, in ``out`` [n, k o, i]; a few samples at a time."""
        (n, k, s, o), i, dtype, step = self.g.shape, self.width, wide_dtype(self.g.dtype), self.at_once
        out = self.g.new_empty(n, k * o, i, dtype=dtype) if out is None else out
        for begin in range(0, n, step):
            part = self.some(slice(begin, begin + step))
            g = part.g.transpose(2, 3).reshape(-1, k * o, s).to(dtype)
            torch.bmm(g, part.a.to(dtype), out=out[begin : begin + step])
        return out.view(n * k, o * i)

    @property
    def at_once(self) -> int:
        """Samples of which all stays in cache."""
        _, k, s, o = self.g.shape
        return max(1, _CACHED // max(1, s * (self.width + k * o)))

    def augmented(self) -> Tensor:
        """a [n, s, i + 1] with the ones of the bias, or a."""
        return torch.cat([self.a, self.a.new_ones(*self.a.shape[:2], 1)], 2) if "bias" in self.names else self.a


@dataclass
class Image:
    """The input of a convolution [n, c, *space], before it is unfolded."""

    x: Tensor
    window: Window

    def unfolded(self, ones: bool = False) -> Tensor:
        """[n, s, c * kernel], and a column of ones where wanted."""
        pads, window = [p for pair in reversed(self.window.pads) for p in pair], self.window
        x = torch.nn.functional.pad(self.x, pads) if any(pads) else self.x
        return _unfolded(x, dict(kernel=window.kernel, stride=window.stride, dilation=window.dilation), ones)


class Patches(Outer):
    """The factor of a convolution: ``a`` is unfolded when it is asked for."""

    def __init__(self, names: dict[str, str], image: Image, g: Tensor, places: dict[str, Place] | None = None):
        self.names, self.image, self.g, self.places = names, image, g, places or {}

    @cached_property
    def a(self) -> Tensor:  # type: ignore[override]
        return self.image.unfolded()

    @property
    def width(self) -> int:
        """Inputs i."""
        return self.image.x.shape[1] * prod(self.image.window.kernel)

    def portions(self) -> Iterator[Outer]:
        """A few samples at a time, as what is unfolded is many times the input."""
        return (self.some(slice(begin, begin + _UNFOLDED)) for begin in range(0, max(1, len(self.g)), _UNFOLDED))

    def augmented(self) -> Tensor:
        """As of any layer; what was unfolded for it alone is not kept."""
        return self.image.unfolded("bias" in self.names)

    def some(self, part: slice) -> Patches:
        """The factor of some of the samples."""
        return Patches(self.names, Image(self.image.x[part], self.image.window), self.g[part], self.places)


@dataclass
class Index:
    """rows[token[n,s]] += g[n,k,s]: an embedding [V, o]."""

    names: dict[str, str]
    token: Tensor  # int64 [n, s], -1 for padding
    g: Tensor  # [n, k, s, o]
    places: dict[str, Place] = field(default_factory=dict)


@dataclass
class Rows:
    """Explicit rows [n, k, p] of one parameter, or of some of its entries."""

    names: dict[str, str]
    rows: Tensor
    places: dict[str, Place] = field(default_factory=dict)


Factor = Outer | Index | Rows


def dense_index(token: Tensor, g: Tensor, vocabulary: int) -> Tensor:
    """Explicit rows [n, k, V * o] of an embedding from tokens [n, s] and g [n, k, s, o]."""
    n, k, _, o = g.shape
    rows = g.new_zeros(n, k, vocabulary + 1, o)
    index = token.where(token >= 0, vocabulary)[:, None, :, None].expand(n, k, -1, o)
    return rows.scatter_add_(2, index, g)[:, :, :vocabulary].flatten(2)


def make_factors(use: Use, g: Tensor) -> list[Factor]:
    """Factors of one use from the gradients of the outputs with respect to its result, g [n, k, ...]."""
    return _FORMS[use.rule](use, g)


def _rows(use: Use, role: str, rows: Callable[[], Tensor]) -> list[Factor]:
    """Rows of the tensor in a role, led back to the parameters it came from."""
    origin = use.origins.get(role)
    if origin is None:
        return []
    if isinstance(origin, Part):
        places = {} if origin.place is None else {"rows": origin.place}
        return [Rows({"rows": origin.name}, rows(), places)]
    return [Rows({"rows": name}, part) for name, part in origin.rows(rows()).items()]


def _outer(use: Use, a: Tensor | Image, g: Tensor) -> list[Factor]:
    kind = Patches if isinstance(a, Image) else Outer
    weight, bias = use.origins.get("weight"), use.origins.get("bias")
    if isinstance(weight, Part) and (bias is None or isinstance(bias, Part)):
        parts = {role: part for role, part in (("weight", weight), ("bias", bias)) if part is not None}
        places = {role: part.place for role, part in parts.items() if part.place is not None}
        return [kind({role: part.name for role, part in parts.items()}, a, g, places)]
    if isinstance(weight, Part):
        places = {} if weight.place is None else {"weight": weight.place}
        return [kind({"weight": weight.name}, a, g, places), *_rows(use, "bias", lambda: g.sum(2))]
    a = a.unfolded() if isinstance(a, Image) else a
    found = _rows(use, "weight", lambda: (g.transpose(2, 3) @ a[:, None]).flatten(2))
    return found + _rows(use, "bias", lambda: g.sum(2))


def _linear_factors(use: Use, g: Tensor) -> list[Factor]:
    inner, outer = use.options["inner"], use.options["outer"]  # axes of x and of the result that are features
    x = use.saved
    x = x.reshape(len(x), -1, prod(x.shape[x.ndim - inner :]))
    return _outer(use, x, g.reshape(*g.shape[:2], -1, prod(g.shape[g.ndim - outer :])))


def _windows(x: Tensor, options: dict[str, Any], first: int) -> Tensor:
    """x [..., *space] as [..., *positions, *kernel], a view."""
    for axis, (size, stride, dilation) in enumerate(
        zip(options["kernel"], options["stride"], options["dilation"], strict=True)
    ):
        x = x.unfold(first + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x


def _unfolded(x: Tensor, options: dict[str, Any], ones: bool = False) -> Tensor:
    """x [m, c, *space] as columns [m, s, c * kernel], and one of ones."""
    dim = len(options["kernel"])
    x = _windows(x, options, 2)
    # positions innermost: the copy runs along the image, and the result is its transpose without another one
    x = x.permute(0, 1, *range(2 + dim, 2 + 2 * dim), *range(2, 2 + dim))
    width, space = prod(x.shape[1 : 2 + dim]), x.shape[2 + dim :]
    out = x.new_empty(len(x), width + ones, prod(space))
    out[:, :width].unflatten(1, x.shape[1 : 2 + dim]).unflatten(-1, space).copy_(x)
    if ones:
        out[:, width] = 1
    return out.transpose(1, 2)


def _conv_factors(use: Use, g: Tensor) -> list[Factor]:
    x, options = use.saved, use.options
    dim = len(options["kernel"])
    n, lead = len(g), g.ndim - 3 - dim  # lead: 1 where a sample holds several images
    g = g.movedim(2 + lead, -1)  # [n, k, (t), *space, o]
    x = x.flatten(0, 1) if lead else x
    if options["groups"] > 1:
        return _grouped_factors(use, x, g.flatten(3 if lead else 2, -2), lead)
    if lead:
        columns = _unfolded(x, options)
        return _outer(use, columns.reshape(n, -1, columns.shape[2]), g.flatten(2, -2))  # more positions
    window = Window(options["kernel"], options["stride"], options["dilation"], ((0, 0),) * dim)  # x has its zeros
    return _outer(use, Image(x, window), g.flatten(2, -2))


def _grouped_factors(use: Use, x: Tensor, g: Tensor, lead: int) -> list[Factor]:
    """Explicit rows, one entry of the kernel after another: columns would be kernel times the image."""
    options, groups, n, k = use.options, use.options["groups"], len(g), g.shape[1]
    g = g if lead else g[:, :, None]  # [n, k, t, s, o]
    windows = _windows(x, options, 2)  # [n t, c, *positions, *kernel]
    dim = len(options["kernel"])
    o, c = g.shape[-1], x.shape[1]
    turned = g.unflatten(-1, (groups, -1)).permute(0, 4, 1, 5, 2, 3).reshape(n, groups, k * (o // groups), -1)

    def rows() -> Tensor:
        kernel = prod(options["kernel"])
        found = g.new_empty(kernel, n, groups, k, o // groups, c // groups)
        flat = windows.flatten(2 + dim, -1)
        for entry in range(kernel):
            part = flat[..., entry].reshape(n, -1, groups, c // groups, prod(windows.shape[2 : 2 + dim]))
            part = part.permute(0, 2, 1, 4, 3).reshape(n, groups, -1, c // groups)
            found[entry] = (turned @ part).view(n, groups, k, o // groups, c // groups)
        return found.permute(1, 3, 2, 4, 5, 0).reshape(n, k, -1)

    return _rows(use, "weight", rows) + _rows(use, "bias", lambda: g.sum((2, 3)))


def _transposed_factors(use: Use, g: Tensor) -> list[Factor]:
    """A transposed convolution is a convolution with x and g exchanged: a = x, and g unfolded."""
    x, options = use.saved, use.options
    n, k = g.shape[:2]
    found = _rows(use, "bias", lambda: g.flatten(3).sum(3))
    if "weight" not in use.origins:
        return found
    g = torch.nn.functional.pad(g.flatten(0, 1), [p for p in reversed(options["padding"]) for _ in (0, 1)])
    sizes = zip(x.shape[2:], options["stride"], options["dilation"], options["kernel"], strict=True)
    for axis, (size, stride, dilation, kernel) in enumerate(sizes):  # output_padding adds entries that x never reaches
        g = g.narrow(2 + axis, 0, (size - 1) * stride + dilation * (kernel - 1) + 1)
    a, groups = x.flatten(2).transpose(1, 2), options["groups"]  # a [n, s, c]
    columns = [_unfolded(part, options).unflatten(0, (n, k)) for part in g.chunk(groups, 1)]
    origin = use.origins["weight"]
    if groups == 1 and isinstance(origin, Part) and origin.place is None:  # stored as [c, o * kernel]
        width = columns[0].shape[3]
        place = Place((width, a.shape[2]), (1, width), 0)
        return [*found, Outer({"weight": origin.name}, a, columns[0], {"weight": place})]

    def rows() -> Tensor:
        pairs = zip(a.chunk(groups, 2), columns, strict=True)
        return torch.cat([(left.transpose(1, 2)[:, None] @ column).flatten(2) for left, column in pairs], 2)

    return found + _rows(use, "weight", rows)


def _embedding_factors(use: Use, g: Tensor) -> list[Factor]:
    token = use.saved.reshape(len(use.saved), -1)
    origin, options = use.origins["weight"], use.options
    if options["padding_idx"] is not None:
        token = torch.where(token == options["padding_idx"] % options["rows"], -1, token)
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    if isinstance(origin, Part) and origin.place is None:
        return [Index({"weight": origin.name}, token, g)]
    return _rows(use, "weight", lambda: dense_index(token, g, options["rows"]))


def _norm_factors(use: Use, g: Tensor) -> list[Factor]:
    hat, dims = use.saved, use.options["dims"]
    if dims is None:  # channels first: dim - 2 axes of space follow them
        space = use.options["space"]
        hat, g = hat.movedim(hat.ndim - 1 - space, -1), g.movedim(g.ndim - 1 - space, -1)
        dims = 1
    size = prod(hat.shape[hat.ndim - dims :])
    hat, g = hat.reshape(len(hat), -1, size), g.reshape(*g.shape[:2], -1, size)
    found = _rows(use, "weight", lambda: (g * hat[:, None]).sum(2))
    return found + _rows(use, "bias", lambda: g.sum(2))


def _given_factors(use: Use, g: Tensor) -> list[Factor]:
    """A tensor that every sample got its own copy of: g is its gradient, [n, k, *shape]."""
    origin = use.origins["rows"]
    if isinstance(origin, Gather):
        token = origin.token.reshape(1, -1).expand(len(g), -1)
        return [Index({"weight": origin.name}, token, g.reshape(*g.shape[:2], token.shape[1], -1))]
    return _rows(use, "rows", lambda: g.reshape(*g.shape[:2], -1))


_FORMS: dict[str, Callable[[Use, Tensor], list[Factor]]] = {
    "linear": _linear_factors,
    "conv": _conv_factors,
    "transposed": _transposed_factors,
    "embedding": _embedding_factors,
    "norm": _norm_factors,
    "given": _given_factors,
}
