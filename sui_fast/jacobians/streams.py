"""Which stream of a sketch each factor has, and how it is added."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.sketching.sums import TensorSums
from .layers import Factor, Index, Outer, Patches, Use


def as_read(use: Use, g: Tensor, dtype: torch.dtype) -> tuple[Use, Tensor]:
    """A use as sketches read it: linear layers and embeddings in half precision as they lie; other rules compute."""
    if use.rule in ("linear", "embedding"):
        return use, g
    saved = use.saved.to(dtype) if use.saved.is_floating_point() else use.saved
    return Use(use.rule, use.origins, saved, use.options), g.to(dtype)


def streams_of(factors: list[Factor]) -> list:
    """What each stream of a sketch is for, in order."""
    order = sorted(map(layer_order, factors))
    return [key for i, key in enumerate(order) if i == 0 or key != order[i - 1]]


def add_sketch(sums: TensorSums, factor: Factor, order: list, shapes: dict[str, torch.Size]) -> None:
    """``add_factor`` by the map of the factor's own place in the order of the streams."""
    add_factor(sums, factor, order.index(layer_order(factor)), shapes)


def add_factor(sums: TensorSums, factor: Factor, stream: int, shapes: dict[str, torch.Size]) -> None:
    """Add the sketch of a factor by the map of a stream; shapes: of the parameters."""
    bias = "bias" in factor.names
    if isinstance(factor, Patches) and sums.windows(factor.image.x, factor.g, factor.image.window, stream, bias):
        return
    if isinstance(factor, Outer):
        sums.outer(factor.a, factor.g, stream, bias)
    elif isinstance(factor, Index):
        sums.index(factor.token, factor.g, shapes[factor.names["weight"]][0], stream)
    else:
        sums.rows(factor.rows, stream)


def layer_order(factor: Factor) -> tuple:
    """Factors in an order that does not depend on the data: the stream of a sketch is a factor's number in it."""
    return sorted(factor.names.values()), sorted((p.offset, p.stride) for p in factor.places.values())
