"""Uses of one parameter joined, so that the rows of the factors add up exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._register import wide_dtype
from .layers import Factor, Index, Outer, Rows, dense_index


def join_factors(factors: list[Factor], shapes: dict[str, torch.Size]) -> list[Factor]:
    """Factors of disjoint entries: uses of equal kind join their positions, others become explicit rows."""
    joined: list[Factor] = []
    for group in _groups(factors):
        joined += group if len(group) == 1 else _join(group, shapes)
    return joined


def _groups(factors: list[Factor]) -> list[list[Factor]]:
    """Factors that share entries of a parameter, together."""
    owners: dict[str, list[Factor]] = {}
    for factor in factors:
        for name in factor.names.values():
            owners.setdefault(name, []).append(factor)
    groups: list[list[Factor]] = []
    done: set[int] = set()
    for factor in factors:
        if id(factor) not in done:
            groups.append(_connected(factor, owners))
            done.update(id(member) for member in groups[-1])
    return groups


def by_map(factors: list[Factor], shapes: dict[str, torch.Size]) -> list[Factor]:
    """Factors whose rows may be mapped one by one and added: uses of one weight stay apart where their entries agree.

    A weight that meets several biases, or an embedding beside a linear layer, is separated from the biases.
    """
    found: list[Factor] = []
    for group in _groups(factors):
        way = _way(group, shapes)
        if way == "alone":
            found += group
        elif way == "apart":
            found += [part for member in group for part in apart(member)]
        else:
            found += _join(group, shapes)
    return found


def ways(factors: list[Factor], shapes: dict[str, torch.Size]) -> dict[int, str]:
    """How ``by_map`` takes each factor, by its id: "alone", "apart" (bias from weight) or "joined" with others."""
    return {id(member): _way(group, shapes) for group in _groups(factors) for member in group}


def _way(group: list[Factor], shapes: dict[str, torch.Size]) -> str:
    first = group[0]
    if all(type(m) is type(first) and m.names == first.names and m.places == first.places for m in group):
        return "alone"
    return "apart" if all(_is_weight(m, first, shapes) for m in group) else "joined"


def apart(factor: Index | Outer) -> list[Factor]:
    """A factor of a weight, and one of its bias where there is one."""
    weight = {"weight": factor.names["weight"]}
    if isinstance(factor, Index):
        return [Index(weight, factor.token, factor.g)]
    places = {role: place for role, place in factor.places.items() if role == "weight"}
    found: list[Factor] = [Outer(weight, factor.a, factor.g, places)]
    if "bias" in factor.names:
        own = {"rows": factor.places["bias"]} if "bias" in factor.places else {}
        found.append(Rows({"rows": factor.names["bias"]}, factor.g.sum(2, dtype=wide_dtype(factor.g.dtype)), own))
    return found


def _is_weight(factor: Factor, first: Factor, shapes: dict[str, torch.Size]) -> bool:
    """Whether a factor speaks of a whole weight [o, i] in order, as the first of its group does."""
    if isinstance(factor, Rows) or isinstance(first, Rows) or factor.names["weight"] != first.names["weight"]:
        return False
    shape = shapes[factor.names["weight"]]
    if "weight" in factor.places:
        return False
    return isinstance(factor, Index) or (factor.g.shape[3], factor.width) == (shape[0], shape[1:].numel())


def _join(group: list[Factor], shapes: dict[str, torch.Size]) -> list[Factor]:
    first = group[0]
    if all(type(m) is type(first) and m.names == first.names and m.places == first.places for m in group):
        if isinstance(first, Outer):
            a, g = torch.cat([m.a for m in group], 1), torch.cat([m.g for m in group], 2)
            return [Outer(first.names, a, g, first.places)]
        if isinstance(first, Index):
            token, g = torch.cat([m.token for m in group], 1), torch.cat([m.g for m in group], 2)
            return [Index(first.names, token, g)]
        return [Rows(first.names, sum(m.rows for m in group), first.places)]
    total: dict[str, Tensor] = {}
    for member in group:
        for role, rows in _explicit(member, shapes).items():
            name = member.names[role]
            whole = total.setdefault(name, rows.new_zeros(*rows.shape[:2], shapes[name].numel()))
            target = member.places[role].of(whole) if role in member.places else whole
            target += rows.reshape(target.shape)
    return [Rows({"rows": name}, rows) for name, rows in total.items()]


def _connected(factor: Factor, owners: dict[str, list[Factor]]) -> list[Factor]:
    """Factors that share entries with this one, directly or through others."""
    group, todo, seen = [], [factor], {id(factor)}
    while todo:
        member = todo.pop(0)
        group.append(member)
        for role, name in member.names.items():
            for other in owners[name]:
                if id(other) not in seen and _overlap(member, role, other, name):
                    seen.add(id(other))
                    todo.append(other)
    return group


def _overlap(one: Factor, role: str, other: Factor, name: str) -> bool:
    """Whether two factors may share entries of a parameter."""
    mine = one.places.get(role)
    theirs = [other.places.get(r) for r, n in other.names.items() if n == name]
    if mine is None or any(place is None for place in theirs):
        return True
    return any(mine.span[0] < place.span[1] and place.span[0] < mine.span[1] for place in theirs)


def _explicit(factor: Factor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Rows [n, k, p] by role."""
    if isinstance(factor, Rows):
        return {"rows": factor.rows}
    if isinstance(factor, Index):
        return {"weight": dense_index(factor.token, factor.g, shapes[factor.names["weight"]][0])}
    found = {"weight": (factor.g.transpose(2, 3) @ factor.a[:, None]).flatten(2)}
    if "bias" in factor.names:
        found["bias"] = factor.g.sum(2)
    return found
