"""Sketches of large batches of one output: gradients are sketched as the backward pass reaches them and then let go.

What is held otherwise until the pass ends (the inputs and gradients of all layers) is more than the pass itself needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ..ops.sketching.sums import TensorSums
from .jacobian import Jacobian
from .joining import apart, by_map, ways
from .layers import Factor, Rows, Use, make_factors
from .recorder import Recorder, Replay
from .recurrent import own_body
from .streams import add_factor, add_sketch, as_read, layer_order, streams_of

LARGE = 1 << 23  # numbers that a batch would hold
_HELD, _LEAST = 1 << 25, 32  # numbers that are held at a time on a CPU; samples all the same
Take = Callable[[int, Tensor | None], None]
_grad = own_body(torch.autograd.grad)


@dataclass
class Ways:
    """What is known of the factors before they exist: keys of the uses, how each factor is mapped, all streams.

    maps: of each use its factors: "joined", or "alone" or "apart" and the streams of its parts.
    """

    keys: list[tuple]
    maps: list[list[tuple[str, list[int]]]]
    order: list
    numbers: int  # held for one sample

    def fits(self, uses: list[Use]) -> bool:
        return len(uses) == len(self.keys) and all(use.key == key for use, key in zip(uses, self.keys, strict=True))


def held_batch(numbers: float) -> int:
    """Samples captured at a time, which hold so many numbers each.

    What a pass over more of them holds goes back to the system and is fetched anew.
    """
    return 1 << max(_LEAST, int(_HELD / max(numbers, 1))).bit_length() - 1


def ways_of(jac: Jacobian) -> Ways:
    """From the Jacobian of a few samples."""
    per_use = [make_factors(*as_read(use, g, jac.dtype)) for use, g in jac._uses]
    general: list[Factor] = [Rows({"rows": name}, rows.to(jac.dtype)) for name, rows in jac._rows.items()]
    found = [factor for factors in per_use for factor in factors]
    known = ways([*found, *general], jac._shapes)
    held = sum(use.saved.numel() + g.numel() for use, g in jac._uses) // jac.n
    order = streams_of(by_map([*found, *general], jac._shapes))

    def map_of(factor: Factor) -> tuple[str, list[int]]:
        way = known[id(factor)]
        return way, [] if way == "joined" else [order.index(layer_order(part)) for part in _parts(factor, way)]

    maps = [[map_of(factor) for factor in factors] for factors in per_use]
    return Ways([use.key for use, _ in jac._uses], maps, order, held)


def _parts(factor: Factor, way: str) -> list[Factor]:
    return apart(factor) if way == "apart" else [factor]


def sketch_arriving(
    jac: Jacobian, uses: list[Use], backward: Callable[[Take], None], known: Ways, rank: int, seed: int
) -> Tensor:
    """The tensor sketch [n, 1, rank] of a batch whose backward pass is still to come.

    Args:
        jac: without uses; what has no rule is in it. uses: of the batch; emptied. backward: as ``backward_into``.
    """
    sums = TensorSums(jac.n, 1, rank, seed, jac.outputs)
    waiting: list[Factor] = [Rows({"rows": name}, rows.to(jac.dtype)) for name, rows in jac._rows.items()]

    def take(number: int, gradient: Tensor | None) -> None:
        use, uses[number] = uses[number], None
        if gradient is None:
            return
        factors = make_factors(*as_read(use, gradient[:, None], jac.dtype))
        for factor, (way, streams) in zip(factors, known.maps[number], strict=True):
            if way == "joined":
                waiting.append(factor)
                continue
            for part, stream in zip(_parts(factor, way), streams, strict=True):
                add_factor(sums, part, stream, jac._shapes)

    backward(take)
    for factor in by_map(waiting, jac._shapes):
        add_sketch(sums, factor, known.order, jac._shapes)
    return sums.total()


def backward_into(out: Tensor, recorder: Recorder, take: Take) -> None:
    """One backward pass from outputs [b, 1]; take(number, gradient) for every use, None where there is none."""
    targets = recorder.targets
    rest = set(range(len(targets)))

    def hand(number: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            rest.discard(number)
            with torch._C.DisableTorchFunction():  # the pass runs under a mode, this is no part of it
                take(number, recorder.turned_one(number, gradient))

    if targets and out.requires_grad:
        first, one = _first(out, targets), out[:, 0].sum()  # no seed: see ``_backward`` of capture
        handles = []
        for number in rest - set(first):
            edge = targets[number]

            def hook(gradients, number=number, place=edge.output_nr):
                hand(number, gradients[place])

            handles.append(edge.node.register_prehook(hook))
        try:
            with Replay(recorder):
                found = _grad(one, [targets[number] for number in first], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for number, gradient in zip(first, found, strict=True):
            hand(number, gradient)
    for number in rest:
        take(number, None)


def _first(out: Tensor, targets: list) -> list[int]:
    """Targets that no other one comes before: asking for their gradients takes the pass through all others."""
    nodes = {target.node for target in targets if isinstance(target, GradientEdge)}
    leaves = {id(target) for target in targets if isinstance(target, Tensor)}
    before: dict[Node, bool] = {}  # whether a target comes before the node
    todo: list[tuple[Node, list[Node] | None]] = [(out.grad_fn, None)]
    while todo:
        node, parents = todo.pop()
        if parents is not None:
            before[node] = any(before[parent] or parent in nodes for parent in parents)
        elif node not in before:
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            before[node] = not parents and id(getattr(node, "variable", None)) in leaves
            if parents:
                todo.append((node, parents))
                todo += [(parent, None) for parent in parents if parent not in before]
    return [
        number
        for number, target in enumerate(targets)
        if isinstance(target, Tensor) or not before.get(target.node, False)
    ]
