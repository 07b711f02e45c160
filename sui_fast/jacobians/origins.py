"""Tensors made of parameters alone, followed from the parameter to where it meets the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Gather, Origin, Part, Place, Pull
from .rules import CASTS, RULES, Reading, plain_name


class Origins:
    """What is known about each followed tensor.

    Args:
        parameters: the chosen ones by name; they are followed from the start.
    """

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = parameters
        self._known: dict[int, Origin] = {id(p): Part(name, None) for name, p in parameters.items()}
        self._twins: dict[int, Tensor] = {}  # views taken of a parameter, without its memory
        self._held: list[Tensor] = []  # an id is a tensor's own while the tensor lives
        self._leaves: dict[str, Tensor] = {}

    def __contains__(self, x: Any) -> bool:
        return id(x) in self._known

    def __getitem__(self, x: Tensor) -> Origin:
        return self._known[id(x)]

    def among(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """Arguments that are followed."""
        found, known = [], self._known
        for x in (*args, *kwargs.values()) if kwargs else args:
            if id(x) in known:
                found.append(x)
            elif isinstance(x, tuple | list):
                _search(x, known, found)
        return found

    def names(self, met: list[Tensor]) -> frozenset[str]:
        found: set[str] = set()
        for x in met:
            origin = self[x]
            found |= set(origin.leaves) if isinstance(origin, Pull) else {origin.name}
        return frozenset(found)

    def swapped(self, x: Any, swap: dict[int, Tensor] | None = None) -> Any:
        """Arguments with parameters replaced, or detached so that no weight gradient is ever formed."""
        if isinstance(x, Tensor):
            if swap and id(x) in swap:
                return swap[id(x)]
            return x.detach() if x in self else x
        if isinstance(x, tuple | list) and not isinstance(x, torch.Size):
            parts = [self.swapped(part, swap) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        return {key: self.swapped(part, swap) for key, part in x.items()} if type(x) is dict else x

    def follow(self, function, args, kwargs, met, results: list[Tensor]) -> None:
        """Follow results that depend on parameters alone."""
        kept = self._views(function, args, kwargs, met, results) or self._gathered(function, args, kwargs, met)
        if kept is None:
            kept = self._pulled(function, args, kwargs, met)
        for result, origin in zip(results, kept, strict=True):
            if origin is not None and result.is_floating_point():
                self._held.append(result)
                self._known[id(result)] = origin

    def _views(self, function, args, kwargs, met, results: list[Tensor]) -> list[Origin] | None:
        """Results that hold entries of one parameter: the same function on a tensor without memory tells which."""
        origin = self[met[0]]
        if len({id(x) for x in met}) != 1 or isinstance(origin, Pull):
            return None
        twin = self._twins.get(id(met[0]))
        if twin is None:
            twin = torch.empty(met[0].shape, device="meta")
        twins = [twin]
        if plain_name(function) not in CASTS or results[0].shape != twin.shape:
            swap = {id(met[0]): twin}
            try:
                twins = tensors(function(*self.swapped(args, swap), **self.swapped(kwargs, swap)))
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
                return None
            base = twin if twin._base is None else twin._base
            if len(twins) != len(results) or any(x is not base and x._base is not base for x in twins):
                return None
        origins: list[Origin] = []
        for result, view in zip(results, twins, strict=True):
            if view.shape != result.shape or 0 in (d for n, d in zip(view.shape, view.stride(), strict=True) if n > 1):
                return None
            self._twins[id(result)] = view
            if isinstance(origin, Part):
                origins.append(Part(origin.name, self._place(view, self.parameters[origin.name].numel())))
            elif self._place(view, met[0].numel()) is None:
                origins.append(origin)
            else:
                return None
        return origins

    @staticmethod
    def _place(view: Tensor, entries: int) -> Place | None:
        place = Place(tuple(view.shape), view.stride(), view.storage_offset())
        return None if place.dense and place.offset == 0 and view.numel() == entries else place

    def _gathered(self, function, args, kwargs, met) -> list[Origin] | None:
        if function is not F.embedding or len(met) != 1:
            return None
        origin, reading = self[met[0]], RULES[F.embedding](args, kwargs)
        if reading is None or reading.given["weight"] is not met[0] or not isinstance(origin, Part) or origin.place:
            return None
        token, padding = reading.input, reading.options["padding_idx"]
        if padding is not None:
            token = torch.where(token == padding % reading.options["rows"], -1, token)
        return [Gather(origin.name, token)]

    def _pulled(self, function, args, kwargs, met) -> list[Origin]:
        leaves: dict[str, Tensor] = {}
        swap = {id(x): self._attached(self[x], x, leaves) for x in met}
        with torch.enable_grad():
            found = function(*self.swapped(args, swap), **self.swapped(kwargs, swap))
        return [Pull(leaves, x) if x.requires_grad else None for x in tensors(found)]

    def _attached(self, origin: Origin, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """A tensor that is computed anew from fresh leaves."""
        if isinstance(origin, Pull):
            leaves |= origin.leaves
            return origin.result
        leaf = self._leaves.get(origin.name)  # one for all functions, so that their tapes can meet
        if leaf is None:
            whole = self.parameters[origin.name].detach().clone(memory_format=torch.contiguous_format)
            leaf = self._leaves[origin.name] = whole.requires_grad_()
        leaves[origin.name] = leaf
        if isinstance(origin, Gather):
            rows = F.embedding(origin.token.clamp(min=0), leaf)
            return (rows * (origin.token >= 0)[..., None]).to(x.dtype).view(x.shape)
        flat = leaf.reshape(-1)
        return (flat.view(x.shape) if origin.place is None else origin.place.of(flat)).to(x.dtype)

    def role(self, x: Tensor, reading: Reading, role: str) -> Origin:
        """Origin of a weight as the form wants it, [*o, *i]."""
        origin = self[x]
        if role != "weight" or reading.turn is None:
            return origin
        if isinstance(origin, Part):
            twin = self._twins.get(id(x))
            if twin is None:
                twin = torch.empty(x.shape, device="meta")
            return Part(origin.name, self._place(twin.permute(reading.turn), self.parameters[origin.name].numel()))
        leaves: dict[str, Tensor] = {}
        with torch.enable_grad():
            return Pull(leaves, self._attached(origin, x, leaves).permute(reading.turn))


def _search(parts: Any, known: dict[int, Any], found: list[Tensor]) -> None:
    """Append the arguments that are followed."""
    for x in parts:
        if id(x) in known:
            found.append(x)
        elif isinstance(x, tuple | list):
            _search(x, known, found)


def tensors(x: Any) -> list[Tensor]:
    """Tensors in arguments or results, in the order of tree_flatten."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, tuple | list):
        return [found for part in x for found in tensors(part)]
    return [found for part in x.values() for found in tensors(part)] if isinstance(x, dict) else []
