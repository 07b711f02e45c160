"""A model as the engine needs it for a while, and as it was afterwards, whoever else is inside."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

_visits: WeakKeyDictionary[nn.Module, _Visit] = WeakKeyDictionary()
_visits_lock = threading.Lock()
_alone: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """One thread at a time: the proof puts other tensors in the places of parameters, where all threads see them."""
    with _visits_lock:
        lock = _alone.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def quiet(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and gradients on, nothing compiled; mode, buffers and random state as they were afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_plain_checkpoints())
        if "torch._dynamo" in sys.modules:  # compiled functions hide what they call
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_eval_mode(model))
        yield


class _Forgetful(dict):
    """A cache that finds nothing from an earlier call, whose tensors have no part in this pass's gradients."""

    def __contains__(self, key):
        return False

    def get(self, key, default=None):
        return default

    def __setitem__(self, key, value):
        super().__setitem__((threading.get_ident(), key), value)

    def __getitem__(self, key):
        return super().__getitem__((threading.get_ident(), key))


class _Visit:
    """Threads inside a model, and how the first of them found it."""

    def __init__(self, model: nn.Module):
        self.threads = 0
        self.modes = [(module, module.training) for module in model.modules()]
        norms = [m.weight for m in model.modules() if getattr(m, "max_norm", None) is not None]  # scaled when read
        self.tensors = [(x, x.detach().clone()) for x in (*model.buffers(), *norms)]
        self.caches = [
            (vars(module), name, held)
            for module in model.modules()
            for name, held in vars(module).items()
            if type(held) is dict and "cache" in name and all(isinstance(x, torch.Tensor) for x in held.values())
        ]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, caches off; the last thread to leave puts modes, buffers and caches back."""
    with _visits_lock:
        visit = _visits.get(model) or _visits.setdefault(model, _Visit(model))
        visit.threads += 1
        for module, _ in visit.modes:
            module.training = False
        for holder, name, _ in visit.caches:
            if type(holder[name]) is dict:
                holder[name] = _Forgetful()
    try:
        yield
    finally:
        with _visits_lock:
            visit.threads -= 1
            if not visit.threads:
                del _visits[model]
                for module, mode in visit.modes:
                    module.training = mode
                for holder, name, held in visit.caches:
                    holder[name] = held
                with torch.no_grad():
                    for x, before in visit.tensors:
                        if not torch.equal(x, before):
                            x.copy_(before)


class _Patch:
    """An attribute of a class replaced for the threads inside; the last to leave puts back what there was."""

    def __init__(self, owner: type, name: str, replacement: Callable):
        self._owner, self._name, self._lock = owner, name, threading.Lock()
        self._inside: Counter[int] = Counter()

        def call(*args, **kwargs):
            function = replacement if threading.get_ident() in self._inside else self._usual
            return function(*args, **kwargs)

        self._usual, self._call = getattr(owner, name), call

    @contextmanager
    def __call__(self) -> Iterator[None]:
        thread, holder = threading.get_ident(), vars(self._owner)
        with self._lock:
            if not self._inside:
                self._before, self._usual = holder.get(self._name), getattr(self._owner, self._name)
                static = isinstance(self._usual, MethodType)  # a class method is called without its class
                setattr(self._owner, self._name, staticmethod(self._call) if static else self._call)
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= Counter([thread])
                if not self._inside and self._before is None:
                    delattr(self._owner, self._name)
                elif not self._inside:
                    setattr(self._owner, self._name, self._before)


def _other_kind(function, preserve, *args):
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


def _refuse(module, *_, **__):
    raise NotImplementedError(f"{type(module).__name__} is moved or cast during the forward pass")


# reentrant checkpoints, which refuse torch.autograd.grad, run as the other kind
_plain_checkpoints = _Patch(CheckpointFunction, "apply", _other_kind)
# a model that moves or casts its modules in its forward pass fails: under torch.func that ends the process
modules_as_they_are = _Patch(nn.Module, "_apply", _refuse)
