"""Uses of one parameter joined, so that the rows of the factors add up exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Factor, Index, Outer, Rows, dense_index


def join_factors(factors: list[Factor], shapes: dict[str, torch.Size]) -> list[Factor]:
    """Factors of disjoint entries: uses of equal kind join their positions, others become explicit rows."""
    owners: dict[str, list[Factor]] = {}
    for factor in factors:
        for name in factor.names.values():
            owners.setdefault(name, []).append(factor)
    if all(len(found) == 1 for found in owners.values()):
        return factors
    joined: list[Factor] = []
    done: set[int] = set()
    for factor in factors:
        if id(factor) in done:
            continue
        group = _connected(factor, owners)
        done.update(id(member) for member in group)
        joined += [factor] if len(group) == 1 else _join(group, shapes)
    return joined


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
