"""Capture: ordinary batched forward and k backward passes, seen by the recorder; the model gets no hooks."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_map

from .._errors import ArgumentError, CoverageError, DataError, ModelError, complaint
from .arriving import Take, backward_into
from .data import batch_length
from .layers import Use
from .quiet import alone_with, modules_as_they_are, quiet
from .recorder import Recorder, Replay
from .recurrent import own_body
from .survey import Call, Survey, transformed

_grad = own_body(torch.autograd.grad)  # with a mode on, the function would turn it off for what checkpoints repeat
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
_COPIED = 5 * 10**8  # entries of a model that may be copied to float32 for the proof
_log = logging.getLogger("sui_fast")


def model_outputs(model: nn.Module, batch: Any, outputs: Callable | None = None) -> Any:
    """outputs(model, batch), or what the model returns for the batch: its tensor, or its ``.logits``."""
    if outputs is not None:
        out = outputs(model, batch)
    elif isinstance(batch, dict):
        out = model(*batch.values()) if len(batch) == 1 and not _takes(model, next(iter(batch))) else model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple) else model(batch)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out)


def _takes(model: nn.Module, name: str) -> bool:
    known = inspect.signature(model.forward).parameters
    return name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


class Evaluator:
    """A model, its chosen parameters and the way to its outputs [b, k]."""

    def __init__(self, model: nn.Module, outputs: Callable | None, params: Any, dtype: torch.dtype | None):
        if not isinstance(model, nn.Module):
            raise ArgumentError(complaint("model", "a torch.nn.Module", type(model).__name__, "Wrap it in a module."))
        if outputs is not None and not callable(outputs):
            raise ArgumentError(complaint("outputs", "a function (model, batch) -> [b, k]", repr(outputs), "Pass one."))
        model = unwrapped(model)
        with alone_with(model):
            self._look_at(model, outputs, params, dtype)

    def _look_at(self, model: nn.Module, outputs: Callable | None, params: Any, dtype: torch.dtype | None) -> None:
        named, modules = dict(model.named_parameters()), dict(model.named_modules())
        sharded = next((m for m in modules.values() if type(m).__name__ == "FullyShardedDataParallel"), None)
        if sharded is None:
            sharded = next((p for p in named.values() if type(p).__name__ == "DTensor"), None)
        if sharded is not None:
            raise ArgumentError(
                complaint(
                    "model",
                    "whole parameters",
                    f"sharded ones ({type(sharded).__name__})",
                    "Pass the model before sharding, or load its full state dict into one.",
                )
            )
        meta = [name for name, p in named.items() if p.device.type == "meta"]
        if meta:
            raise ArgumentError(
                complaint("model", "parameters with values", f"{meta[0]} on the meta device", "Load it.")
            )
        devices = {str(device) for device in {p.device for p in named.values()}}
        if len(devices) > 1:
            raise ArgumentError(
                complaint("model", "parameters on one device", " and ".join(sorted(devices)), "Move the model to one.")
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ArgumentError(
                complaint("dtype", "a real floating torch.dtype", repr(dtype), "Pass torch.float64, say.")
            )
        floating = [p for p in named.values() if p.is_floating_point()]
        self._remedy = "Check the shape and dtype of the inputs, or pass outputs=f(model, batch)."
        if dtype is not None and any(p.dtype != dtype for p in floating):
            own = next(p.dtype for p in floating if p.dtype != dtype)
            self._remedy = f"Check the inputs. It ran in {dtype}: if it casts inside, by x.float(), pass dtype={own}."
            model = copy.deepcopy(model).to(dtype)
        self.model, self._outputs = model, outputs
        self.parameters = choose_parameters(model, params)
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self._entries = sum(p.numel() for p in named.values())
        self.one_by_one = False  # whether torch.func turned out not to vectorise this model
        kind = self.device.type
        self._autocast = dict(
            device_type=kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind)
        )
        for name, module in modules.items():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise CoverageError(
                    complaint(
                        "model",
                        "outputs that depend on one sample each",
                        f"module {name!r} ({type(module).__name__} without running statistics), which mixes the batch",
                        "Train it with track_running_stats=True, or replace it by GroupNorm.",
                    )
                )

    def __call__(self, batch: Any, number: Callable[[int], int] = int) -> Tensor:
        """Outputs [b, k], checked; number: of the sample at a place of the batch, in the whole data set."""
        try:
            out = self._forward(batch)
        except _FAILURES as error:
            if _transformed_any(batch) or type(error) not in _FAILURES:
                raise
            raise ModelError(
                complaint(
                    "model",
                    "a forward pass on the given inputs",
                    f"{type(error).__name__}: {error}",
                    self._remedy,
                )
            ) from error
        size = batch_length(batch)
        if not isinstance(out, Tensor) or out.ndim not in (1, 2) or len(out) != size or not out.is_floating_point():
            shape = f"shape {list(out.shape)}, {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise ArgumentError(
                complaint(
                    "outputs", f"a floating-point tensor [{size}, k]", shape, "Pass outputs=f(model, batch) -> [b, k]."
                )
            )
        out = out[:, None] if out.ndim == 1 else out
        if out.shape[1] == 0:
            raise ArgumentError(
                complaint("outputs", "at least one output per sample", "k = 0", "Check the last layer.")
            )
        if not transformed(out):
            bad = torch.nonzero(~torch.isfinite(out.detach()).all(1)).flatten()
            if len(bad):
                raise DataError(
                    complaint(
                        "model",
                        "finite outputs",
                        f"NaN or infinity for sample {number(int(bad[0]))}",
                        "Check that sample and the weights of the model.",
                    )
                )
        return out

    def _forward(self, batch: Any) -> Any:
        with torch.autocast(**self._autocast):
            return model_outputs(self.model, batch, self._outputs)

    def quiet(self) -> AbstractContextManager[None]:
        """See ``quiet``; the user's autocast is on in forward passes alone."""
        return quiet(self.model, self.device)

    def exact(self) -> Evaluator:
        """The same without rounding to half precision: no autocast, a float32 copy of a bfloat16 or float16 model."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        if not half and not self._autocast["enabled"] or half and self._entries > _COPIED:
            return self
        other = copy.copy(self)
        other._autocast = self._autocast | dict(enabled=False)
        if half:
            other.model, other.dtype = copy.deepcopy(self.model).float(), torch.float32
            named = dict(other.model.named_parameters())
            other.parameters = {name: named[name] for name in self.parameters}
        return other

    def survey(self, batch: Any) -> tuple[Survey, Tensor]:
        """Shapes of all calls of a forward pass, and the outputs."""
        survey = Survey(batch_length(batch))
        with survey:
            out = self(batch)
        return survey, out.detach()

    def decide(self, batch: Any, survey: Survey, general: set[str]) -> tuple[Recorder, Tensor]:
        """A forward pass with another number of samples than the survey's, on which the plan is made."""
        ruled = {name: p for name, p in self.parameters.items() if name not in general}
        recorder = Recorder(ruled, batch_length(batch), survey)
        with recorder:
            out = self(batch)
        recorder.spoiled()
        return recorder, out

    def capture(
        self, batch: Any, plan: list[Call], general: set[str], project: Tensor | None = None,
        number: Callable[[int], int] = int,
    ) -> Captured:  # fmt: skip
        """Forward pass of a batch with every use of the ruled parameters recorded; backward passes follow on demand.

        Args:
            number: as in ``__call__``.
            project: [k, m]: outputs become outputs @ project.
        """
        ruled = {name: p for name, p in self.parameters.items() if name not in general}
        recorder = Recorder(ruled, batch_length(batch), plan=plan)
        with recorder:
            out = self(batch, number)
        out = out if project is None else out @ project.to(out)
        overwritten = {name for use in recorder.spoiled() for name in use.parameters}
        unruled = recorder.unruled | dict.fromkeys(overwritten, "an input overwritten in place")
        return Captured(
            out.detach(), recorder.uses, unruled, recorder.shapes, recorder.dtypes, _backward(out, recorder),
            functools.partial(backward_into, out, recorder),
        )  # fmt: skip

    def general_rows(self, batch: Any, names: list[str], project: Tensor | None = None) -> dict[str, Tensor]:
        """Rows [b, k, p] of parameters without a rule: torch.func one sample at a time, vectorised where it can be."""
        wrapper = _Functional(self, project)
        chosen = {f"model.{name}": self.parameters[name].detach() for name in names}

        def of_sample(parameters, sample):
            return functional_call(wrapper, parameters, (tree_map(lambda x: x[None], sample),), tie_weights=True)[0]

        found = None
        if not self.one_by_one:
            try:
                with warnings.catch_warnings(), modules_as_they_are():
                    warnings.filterwarnings("ignore", message=".*performance drop.*")
                    found = vmap(jacrev(of_sample), in_dims=(None, 0))(chosen, batch)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                _log.info("vmap does not take this model (%s); rows are formed one sample at a time", error)
                self.one_by_one = True
        if found is None:
            found = self._rows_one_by_one(wrapper, chosen, batch)
        rows = {name: found[f"model.{name}"].detach() for name in names}
        return {name: row.reshape(*row.shape[:2], self.parameters[name].numel()) for name, row in rows.items()}

    def _rows_one_by_one(self, wrapper, chosen, batch) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in chosen}
        for i in range(batch_length(batch)):
            leaves = {name: p.clone().requires_grad_() for name, p in chosen.items()}
            sample = tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) else x, batch)

            def rows(out: Tensor, leaves=leaves) -> list[tuple]:
                out, given = out[0], list(leaves.values())
                if not out.requires_grad:
                    return [(None,) * len(given)] * len(out)
                return [
                    torch.autograd.grad(out[c], given, retain_graph=c + 1 < len(out), allow_unused=True)
                    for c in range(len(out))
                ]

            found = functional_call(wrapper, leaves, (sample, rows), tie_weights=True)
            for j, (name, leaf) in enumerate(leaves.items()):
                parts[name].append(
                    torch.stack([torch.zeros_like(leaf) if r[j] is None else r[j].to_dense() for r in found])
                )
        return {name: torch.stack(rows) for name, rows in parts.items()}

    def functional(self) -> Callable[[dict[str, Tensor], Any], Tensor]:
        """f(parameters by name, batch) -> outputs [b, k], for torch.func; parameters not given stay as they are."""
        wrapper = _Functional(self)

        def call(parameters: dict[str, Tensor], batch: Any) -> Tensor:
            named = {f"model.{name}": p for name, p in parameters.items()}
            return functional_call(wrapper, named, (batch,), tie_weights=True)

        return call

    def autograd_vjp(
        self, batch: Any, cotangent: Tensor, project: Tensor, take: Callable[[str, Tensor], None]
    ) -> set[str]:
        """J^T c by one plain backward pass over views of the parameters: what the factors are compared with.

        Args:
            take: called with the gradient of each parameter that has one as the pass reaches it; none is held longer.
        Returns:
            The parameters that also act through tensors made before the forward pass.
        """
        wrapper = _Functional(self, project)
        leaves = {f"model.{name}": p.detach().requires_grad_() for name, p in self.parameters.items()}
        given = list(leaves.values())
        real = {name: p for name, p in self.parameters.items() if p.requires_grad}

        def hand(name: str, grad: Tensor) -> Tensor | None:
            take(name, grad.to_dense())
            return grad.new_zeros(()).expand(grad.shape) if grad.layout == torch.strided else None

        for name, leaf in zip(self.parameters, given, strict=True):
            leaf.register_hook(functools.partial(hand, name))

        def gradients(out: Tensor) -> tuple:
            if not out.requires_grad:
                return (None,) * (len(given) + len(real))
            return torch.autograd.grad((out * cotangent).sum(), [*given, *real.values()], allow_unused=True)

        found = functional_call(wrapper, leaves, (batch, gradients), tie_weights=True)
        return {name for name, grad in zip(real, found[len(given) :], strict=True) if grad is not None}


@dataclass
class Captured:
    """One batch: outputs [b, k], uses, parameters no rule serves, and per output the gradients [b, ...] of all uses."""

    outputs: Tensor
    uses: list[Use]
    unruled: dict[str, str]
    shapes: list[torch.Size]  # of the results of the uses
    dtypes: list[torch.dtype]
    gradients: Iterator[tuple[Tensor | None, ...]]
    arriving: Callable[[Take], None]  # instead of ``gradients``, for one output: use by use


def _backward(out: Tensor, recorder: Recorder) -> Iterator[tuple[Tensor | None, ...]]:
    k, targets = out.shape[1], recorder.targets
    for c in range(k):
        if targets and out.requires_grad:
            one = out[:, c].sum()  # torch loads symbolic mathematics (0.3 s, 48 MB) where it is given a seed
            with Replay(recorder):
                found = _grad(one, targets, retain_graph=c + 1 < k, allow_unused=True)
            yield recorder.turned(found)
        else:
            yield (None,) * len(targets)


class _Functional(nn.Module):
    """The model behind its outputs function, for functional_call; ``finish`` acts while leaves are in place."""

    def __init__(self, evaluator: Evaluator, project: Tensor | None = None):
        super().__init__()
        self.model = evaluator.model
        self.__dict__["evaluator"], self.__dict__["project"] = evaluator, project

    def forward(self, batch, finish: Callable | None = None):
        out = self.evaluator(batch)
        out = out if self.project is None else out @ self.project.to(out)
        return out if finish is None else finish(out)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and data-parallel wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _transformed_any(batch: Any) -> bool:
    return any(isinstance(x, Tensor) and transformed(x) for x in tree_flatten(batch)[0])


def choose_parameters(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    """Chosen parameters by name, each tensor once, in the order of named_parameters()."""
    named = dict(model.named_parameters())
    if isinstance(params, str) and params == "trainable":
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif isinstance(params, str) and params == "all":
        chosen = named
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name, p)}
    elif isinstance(params, list | tuple | set) and all(isinstance(name, str) for name in params):
        chosen = {}
        for wanted in params:
            hits = {}
            for inner in (wanted, wanted.removeprefix("_orig_mod.").removeprefix("module.")):  # unwrapped() was here
                hits = hits or {n: p for n, p in named.items() if n == inner or n.startswith(inner + ".")}
            if not hits:
                raise ArgumentError(
                    complaint("params", "names or prefixes of parameters", repr(wanted), f"Known: {', '.join(named)}.")
                )
            chosen |= hits
        chosen = {name: p for name, p in named.items() if name in chosen}
    else:
        raise ArgumentError(
            complaint(
                "params", "'trainable', 'all', a list of names or f(name, parameter)", repr(params), "Choose one."
            )
        )
    turned = [name for name, p in chosen.items() if p.is_complex()]
    if turned:
        todo = "Keep it as a real one and use torch.view_as_complex in the forward pass, or leave it out with params=."
        raise ArgumentError(complaint("params", "real parameters", f"{turned[0]!r}, which is complex", todo))
    chosen = {name: p for name, p in chosen.items() if p.is_floating_point() and p.numel()}
    if not chosen:
        raise ArgumentError(
            complaint(
                "params",
                "at least one floating-point parameter",
                f"none of {len(named)} chosen by {params!r}",
                "Unfreeze parameters (requires_grad), or pass params='all'.",
            )
        )
    return chosen
