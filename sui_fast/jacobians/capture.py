"""Capture: ordinary batched forward and k backward passes, seen from a function mode; the model gets no hooks."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from .._errors import ArgumentError, CoverageError, DataError, ModelError, complaint
from .data import batch_length
from .layers import RULES, Use

_log = logging.getLogger("sui_fast")


class Recorder(TorchFunctionMode):
    """Records every call that takes a chosen parameter; parameters without a rule end in ``unruled``."""

    def __init__(self, names: dict[int, str], batch: int):
        super().__init__()
        self.names, self.batch = names, batch
        self.uses: list[Use] = []
        self.edges: list[Any] = []
        self.shapes: list[torch.Size] = []
        self.versions: list[int] = []
        self.unruled: dict[str, str] = {}
        self._anchor = torch.zeros(1, requires_grad=True)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        met: list[Tensor] = []
        _search(args, self.names, met)
        if kwargs:
            _search(kwargs.values(), self.names, met)
        if not met:
            return function(*args, **kwargs)
        use = self._match(function, args, kwargs)
        args, kwargs = self._detach(args), {key: self._detach(x) for key, x in kwargs.items()}
        out = function(*args, **kwargs)
        if not isinstance(out, Tensor):
            if any(isinstance(x, Tensor) for x in _flat((out,))):
                self._give_up(met, function)
            return out
        if use is None or out.ndim == 0 or len(out) != self.batch or not out.is_floating_point():
            self._give_up(met, function)
            return out
        if not out.requires_grad:
            out = _Attach.apply(out, self._anchor)
        self.uses.append(use)
        self.edges.append(torch.autograd.graph.get_gradient_edge(out))
        self.shapes.append(out.shape)
        self.versions.append(use.saved._version)
        return out

    def _match(self, function, args, kwargs) -> Use | None:
        if function not in RULES:
            return None
        rule, read = RULES[function]
        with torch.no_grad():
            found = read(args, kwargs)
        if found is None:
            return None
        given, saved, options = found
        names = {role: self.names[id(x)] for role, x in given.items() if _is(x, self.names)}
        if not set(names) <= {"weight", "bias"} or not isinstance(saved, Tensor) or len(saved) != self.batch:
            return None
        if saved.ndim < 2 and rule != "embedding":
            return None
        if rule == "embedding":
            options["rows"] = len(given["weight"])
        return Use(rule, names, saved.detach(), options)

    def _detach(self, x: Any) -> Any:
        """The argument with chosen parameters detached, so that no weight gradient is ever formed."""
        if isinstance(x, tuple | list) and not isinstance(x, torch.Size):
            return type(x)(self._detach(part) for part in x)
        return x.detach() if isinstance(x, Tensor) and id(x) in self.names else x

    def _give_up(self, met: list[Tensor], function: Callable) -> None:
        for tensor in met:
            self.unruled.setdefault(self.names[id(tensor)], getattr(function, "__name__", repr(function)))

    def spoiled(self) -> set[str]:
        """Parameters of uses whose saved input was overwritten later."""
        pairs = zip(self.uses, self.versions, strict=True)
        return {name for use, version in pairs if use.saved._version != version for name in use.names.values()}


class _Attach(torch.autograd.Function):
    """Puts a result that needs no gradient on the tape, without a copy; in-place functions may still follow."""

    @staticmethod
    def forward(ctx, out: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def _search(parts: Any, names: dict[int, str], found: list[Tensor]) -> None:
    """Append the arguments that are named; the parameters live on, so an id is theirs alone."""
    for x in parts:
        if id(x) in names:
            found.append(x)
        elif isinstance(x, tuple | list):
            _search(x, names, found)


def _flat(parts: Any) -> Iterator[Any]:
    """Arguments of a call, lists and tuples opened."""
    for x in parts:
        if isinstance(x, tuple | list | type({}.values())):
            yield from _flat(x)
        else:
            yield x


def _is(x: Any, names: dict[int, str]) -> bool:
    return isinstance(x, Tensor) and id(x) in names


class Evaluator:
    """A model, its chosen parameters and the way to its outputs [b, k]."""

    def __init__(self, model: nn.Module, outputs: Callable | None, params: Any, dtype: torch.dtype | None):
        if not isinstance(model, nn.Module):
            raise ArgumentError(complaint("model", "a torch.nn.Module", type(model).__name__, "Wrap it in a module."))
        meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
        if meta:
            raise ArgumentError(
                complaint("model", "parameters with values", f"{meta[0]} on the meta device", "Load it.")
            )
        devices = {str(p.device) for p in model.parameters()}
        if len(devices) > 1:
            raise ArgumentError(
                complaint("model", "parameters on one device", " and ".join(sorted(devices)), "Move the model to one.")
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ArgumentError(
                complaint("dtype", "a real floating torch.dtype", repr(dtype), "Pass torch.float64, say.")
            )
        floating = [p for p in model.parameters() if p.is_floating_point()]
        if dtype is not None and any(p.dtype != dtype for p in floating):
            model = copy.deepcopy(model).to(dtype)
        self.model, self._outputs = model, outputs
        self.parameters = choose_parameters(model, params)
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise CoverageError(
                    complaint(
                        "model",
                        "outputs that depend on one sample each",
                        f"module {name!r} ({type(module).__name__} without running statistics), which mixes the batch",
                        "Train it with track_running_stats=True, or replace it by GroupNorm.",
                    )
                )

    def __call__(self, batch: Any, first: int = 0) -> Tensor:
        """Outputs [b, k], checked."""
        try:
            out = self._forward(batch)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if _transformed_any(batch) or type(error) not in (RuntimeError, ValueError, TypeError, IndexError):
                raise
            raise ModelError(
                complaint(
                    "model",
                    "a forward pass on the given inputs",
                    f"{type(error).__name__}: {error}",
                    "Check the shape and dtype of the inputs, or pass outputs=f(model, batch).",
                )
            ) from error
        if not isinstance(out, Tensor):
            out = getattr(out, "logits", out)
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
        if not _transformed(out):
            bad = torch.nonzero(~torch.isfinite(out.detach()).all(1)).flatten()
            if len(bad):
                raise DataError(
                    complaint(
                        "model",
                        "finite outputs",
                        f"NaN or infinity for sample {first + int(bad[0])}",
                        "Check that sample and the weights of the model.",
                    )
                )
        return out

    def _forward(self, batch: Any) -> Any:
        if self._outputs is not None:
            return self._outputs(self.model, batch)
        if isinstance(batch, dict):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple) else self.model(batch)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Eval mode and gradients on; mode, buffers and random state as they were afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
            try:
                for module, _ in modes:
                    module.training = False
                yield
            finally:
                for module, mode in modes:
                    module.training = mode
                with torch.no_grad():
                    for buffer, before in buffers:
                        if not torch.equal(buffer, before):
                            buffer.copy_(before)

    def capture(self, batch: Any, first: int, ruled: set[str]) -> Captured:
        """Forward pass of a batch with every use of the ruled parameters recorded; backward passes follow on demand."""
        names = {id(p): name for name, p in self.parameters.items() if name in ruled}
        recorder = Recorder(names, batch_length(batch))
        with recorder:
            out = self(batch, first)
        unruled = recorder.unruled | dict.fromkeys(recorder.spoiled(), "an input overwritten in place")
        return Captured(out.detach(), recorder.uses, unruled, recorder.shapes, _backward(out, recorder.edges))

    def general_rows(self, batch: Any, names: list[str], k: int) -> dict[str, Tensor]:
        """Rows [b, k, p] of parameters without a rule: torch.func one sample at a time, vectorised where it can be."""
        wrapper = _Functional(self)
        chosen = {f"model.{name}": self.parameters[name].detach() for name in names}

        def of_sample(parameters, sample):
            return functional_call(wrapper, parameters, (tree_map(lambda x: x[None], sample),), tie_weights=False)[0]

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                found = vmap(jacrev(of_sample), in_dims=(None, 0))(chosen, batch)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            _log.info("vmap does not take this model (%s); rows are formed one sample at a time", error)
            found = self._rows_one_by_one(wrapper, chosen, batch, k)
        return {name: found[f"model.{name}"].detach().flatten(2) for name in names}

    def _rows_one_by_one(self, wrapper, chosen, batch, k: int) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in chosen}
        for i in range(batch_length(batch)):
            leaves = {name: p.clone().requires_grad_() for name, p in chosen.items()}
            sample = tree_map(lambda x, i=i: x[i : i + 1], batch)
            out = functional_call(wrapper, leaves, (sample,), tie_weights=False)[0]
            rows = [
                torch.autograd.grad(out[c], list(leaves.values()), retain_graph=c + 1 < k, allow_unused=True)
                if out.requires_grad
                else [None] * len(leaves)
                for c in range(k)
            ]
            for j, (name, leaf) in enumerate(leaves.items()):
                parts[name].append(torch.stack([torch.zeros_like(leaf) if r[j] is None else r[j] for r in rows]))
        return {name: torch.stack(rows) for name, rows in parts.items()}

    def functional(self) -> Callable[[dict[str, Tensor], Any], Tensor]:
        """f(parameters by name, batch) -> outputs [b, k], for torch.func; parameters not given stay as they are."""
        wrapper = _Functional(self)

        def call(parameters: dict[str, Tensor], batch: Any) -> Tensor:
            named = {f"model.{name}": p for name, p in parameters.items()}
            return functional_call(wrapper, named, (batch,), tie_weights=False)

        return call

    def autograd_vjp(self, batch: Any, cotangent: Tensor) -> dict[str, Tensor]:
        """J^T c by one plain backward pass over copies of the parameters: what the factors are compared with."""
        wrapper = _Functional(self)
        leaves = {f"model.{name}": p.detach().clone().requires_grad_() for name, p in self.parameters.items()}
        out = functional_call(wrapper, leaves, (batch,), tie_weights=False)
        if not out.requires_grad:
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        found = torch.autograd.grad((out * cotangent).sum(), list(leaves.values()), allow_unused=True)
        pairs = zip(self.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


@dataclass
class Captured:
    """One batch: outputs [b, k], uses, parameters no rule serves, and per output the gradients [b, ...] of all uses."""

    outputs: Tensor
    uses: list[Use]
    unruled: dict[str, str]
    shapes: list[torch.Size]
    gradients: Iterator[tuple[Tensor | None, ...]]


def _backward(out: Tensor, edges: list[Any]) -> Iterator[tuple[Tensor | None, ...]]:
    k = out.shape[1]
    for c in range(k):
        if edges and out.requires_grad:
            seed = torch.zeros_like(out)
            seed[:, c] = 1
            yield torch.autograd.grad(out, edges, seed, retain_graph=c + 1 < k, allow_unused=True)
        else:
            yield (None,) * len(edges)


class _Functional(nn.Module):
    """The model behind its outputs function, for torch.func.functional_call."""

    def __init__(self, evaluator: Evaluator):
        super().__init__()
        self.model = evaluator.model
        self.__dict__["evaluator"] = evaluator

    def forward(self, batch):
        return self.evaluator(batch)


def _transformed_any(batch: Any) -> bool:
    return any(isinstance(x, Tensor) and _transformed(x) for x in tree_flatten(batch)[0])


def _transformed(x: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def choose_parameters(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    """Chosen parameters by name, each tensor once, in the order of named_parameters()."""
    named = dict(model.named_parameters())
    if params == "trainable":
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif params == "all":
        chosen = named
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name, p)}
    elif isinstance(params, list | tuple | set) and all(isinstance(name, str) for name in params):
        chosen = {}
        for wanted in params:
            hits = {n: p for n, p in named.items() if n == wanted or n.startswith(wanted + ".")}
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
