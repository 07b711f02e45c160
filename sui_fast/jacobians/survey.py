"""The survey: functions and shapes of all calls of a pass, and what the recorder decides about a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .origins import tensors
from .recurrent import taken_apart


@dataclass(frozen=True)
class Axis:
    """The axis that carries the samples; merged: together with positions."""

    dim: int
    merged: bool


@dataclass
class Call:
    """What was decided about one call."""

    function: Callable
    kind: str
    result: Axis | None = None
    inputs: list[Axis | None] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    positions_first: bool = False  # a merged axis runs over positions, then samples
    copy: bool = False  # the input is overwritten later

    @property
    def ambiguous(self) -> bool:
        """Whether the order inside a merged axis had to be guessed."""
        return any(axis is not None and axis.merged for axis in (self.result, *self.inputs))


@dataclass
class Seen:
    function: Callable
    inputs: list[torch.Size]
    results: list[torch.Size]


class Survey(TorchFunctionMode):
    """Functions and shapes of all calls of a forward pass."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch, self.calls = batch, []
        self.dtypes: set[torch.dtype] = set()  # of the results that carry gradients

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        apart = taken_apart(function, args, kwargs)
        if apart is not None:
            return apart(self)
        shapes = [x.shape for x in tensors((args, kwargs))]
        out = function(*args, **kwargs)
        results = tensors(out)
        self.calls.append(Seen(function, shapes, [x.shape for x in results]))
        self.dtypes |= {x.dtype for x in results if x.requires_grad}
        return out


def transformed(x: Tensor) -> bool:
    """Whether a tensor stands for others under a transform of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
