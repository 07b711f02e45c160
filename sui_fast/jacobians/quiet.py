"""A model as the engine needs it for a while, and as it was afterwards, whoever else is inside."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

_visits: WeakKeyDictionary[nn.Module, _Visit] = WeakKeyDictionary()
_visits_lock = threading.Lock()


@contextmanager
def quiet(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and gradients on, nothing compiled; mode, buffers and random state as they were afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_plain_checkpoints())
        if "torch._dynamo" in sys.modules:  # compiled functions hide what they call
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_eval_mode(model))
        yield


class _Visit:
    """Threads inside a model, and how the first of them found it."""

    def __init__(self, model: nn.Module):
        self.threads = 0
        self.modes = [(module, module.training) for module in model.modules()]
        self.buffers = [(b, b.detach().clone()) for b in model.buffers()]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; the last thread to leave puts modes and buffers back."""
    with _visits_lock:
        visit = _visits.get(model) or _visits.setdefault(model, _Visit(model))
        visit.threads += 1
        for module, _ in visit.modes:
            module.training = False
    try:
        yield
    finally:
        with _visits_lock:
            visit.threads -= 1
            if not visit.threads:
                del _visits[model]
                for module, mode in visit.modes:
                    module.training = mode
                with torch.no_grad():
                    for buffer, before in visit.buffers:
                        if not torch.equal(buffer, before):
                            buffer.copy_(before)


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints, which refuse torch.autograd.grad, run as the other kind meanwhile."""

    def apply(function, preserve, *args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    CheckpointFunction.apply = staticmethod(apply)
    try:
        yield
    finally:
        if "apply" in CheckpointFunction.__dict__:  # another thread may have been first
            del CheckpointFunction.apply


@contextmanager
def modules_as_they_are() -> Iterator[None]:
    """A model that moves or casts its modules in its forward pass fails: under torch.func that ends the process."""
    apply = nn.Module._apply

    def refuse(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} is moved or cast during the forward pass")

    nn.Module._apply = refuse
    try:
        yield
    finally:
        nn.Module._apply = apply
