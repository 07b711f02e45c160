"""Products with the rows of an embedding, of which a sample has few: places with equal tokens go together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

_TOGETHER = 8  # places of one token in a product
_ELEMENTS = 1 << 21  # of one intermediate


def token_jvp(token: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """Sum over positions of g [n, k, s, o] with weight [r, v, o] at tokens [n, s] (-1: none): [n, k, r]."""
    (n, k, s, o), r = g.shape, len(weight)
    rows, found = g.transpose(1, 2).reshape(n * s, k, o), g.new_zeros(n, k, r)
    for tokens, places, where in _groups(token, r * max(o, k * _TOGETHER)):
        along = _padded(rows[places], where, len(tokens)) @ weight[:, tokens].permute(1, 2, 0)
        found.index_add_(0, places // s, along.unflatten(1, (_TOGETHER, k))[where])
    return found


def add_token_vjp(target: Tensor, token: Tensor, g: Tensor, c: Tensor) -> None:
    """The adjoint: target [r, v, o] += c [n, k, r] times g at the tokens."""
    (n, k, s, o), r = g.shape, c.shape[2]
    rows = g.transpose(1, 2).reshape(n * s, k, o)
    for tokens, places, where in _groups(token, r * max(o, k * _TOGETHER)):
        left, right = (_padded(x, where, len(tokens)) for x in (c[places // s], rows[places]))
        target.index_add_(1, tokens, (left.transpose(1, 2) @ right).transpose(0, 1).to(target.dtype))


def _groups(token: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Places of equal tokens, a group of _TOGETHER after the other; some groups of a size at a time.

    Yields:
        The tokens of the groups [b], the places in token.reshape(-1) [m], and where in [b, _TOGETHER] each goes.
    """
    held, places = token.reshape(-1).sort(stable=True)
    held, places = held[held >= 0], places[held >= 0]
    slot = (torch.arange(len(held), device=held.device) - torch.searchsorted(held, held)) % _TOGETHER
    first, group, step = (slot == 0).nonzero()[:, 0], (slot == 0).cumsum(0) - 1, max(1, _ELEMENTS // size)
    for number, (begin, end) in enumerate(pairwise([*first[::step].tolist(), len(held)])):
        tokens = held[first[number * step : (number + 1) * step]]
        yield tokens, places[begin:end], (group[begin:end] - number * step, slot[begin:end])


def _padded(x: Tensor, where: tuple[Tensor, Tensor], groups: int) -> Tensor:
    """x [m, k, p] in its groups, [groups, _TOGETHER * k, p], zeros in between."""
    padded = x.new_zeros(groups, _TOGETHER, *x.shape[1:])
    padded[where] = x
    return padded.flatten(1, 2)
