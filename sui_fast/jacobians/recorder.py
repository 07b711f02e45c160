"""The recorder: a function mode that sees every call taking a chosen parameter.

Where the samples lie in a call is learnt from two forward passes with different numbers of samples: an axis that
grows with them carries them. The ``Survey`` notes the shapes of all calls of the first pass; the ``Recorder`` compares
those of the second and decides call by call; later passes follow these decisions.

* ``rule``: the call has a form in ``layers.py``; parameters go in detached, and the result's gradient is asked for.
* ``given``: every sample gets its own (expanded) copy of the parameter, in an elementwise call or a copy.
* ``mapped``: the same through torch.func.vmap of this one call.
* ``derived``: the result depends on parameters alone; it is followed to where it meets the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layers import Use
from .origins import Origins, tensors
from .recurrent import taken_apart
from .rules import COPIES, ELEMENTWISE, RULES, Reading, plain_name, repeated, wide_attention
from .survey import Axis, Call, Survey, transformed

_CUTS = (torch.Tensor.detach, torch.Tensor.data.__get__, torch.detach)
_FUSED = F.scaled_dot_product_attention
_STORES = (torch.Tensor.__setitem__,)


class Recorder(TorchFunctionMode):
    """Records the calls that take chosen parameters; those it cannot take end in ``unruled``.

    Args:
        parameters: the chosen ones by name. batch: samples in this pass.
        survey: shapes of a pass with another number of samples; decisions are made and kept in ``plan``.
        plan: decisions to follow, where there is no survey.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        batch: int,
        survey: Survey | None = None,
        plan: list[Call] | None = None,
    ):
        super().__init__()
        self.parameters, self.batch, self._survey = parameters, batch, survey
        self.plan: list[Call] = [] if plan is None else plan
        self.uses: list[Use] = []
        self.targets: list[Any] = []
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.unruled: dict[str, str] = {}
        self._origins = Origins(parameters)
        self._seen = self._met = 0
        self._turns: list[tuple | None] = []  # no closures: a cycle would keep the batch until the next collection
        self._versions: list[tuple[int, Call]] = []
        self._anchor: Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        apart = taken_apart(function, args, kwargs)
        if apart is not None:
            return apart(self)
        number, self._seen = self._seen, self._seen + 1
        met = self._origins.among(args, kwargs)
        if not met or function in _CUTS or not torch.is_grad_enabled():
            return (wide_attention if function is _FUSED else function)(*args, **kwargs)
        if self._survey is None:
            return self._replay(function, args, kwargs, met)
        return self._decide(number, function, args, kwargs, met)

    # -- decisions ----------------------------------------------------------------------------------------------

    def _replay(self, function, args, kwargs, met: list[Tensor]) -> Any:
        call = self._next(function, met)
        if call is not None and call.kind != "derived":
            self._met += 1
            return self._follow(call, function, args, kwargs, met, None)
        out = function(*self._origins.swapped(args), **self._origins.swapped(kwargs))
        results = tensors(out)
        if call is not None:
            self._met += 1
            self._origins.follow(function, args, kwargs, met, results)
        elif results or function in _STORES:
            self._give_up(met, function)
        return out

    def _decide(self, number: int, function, args, kwargs, met: list[Tensor]) -> Any:
        if any(map(transformed, tensors((args, kwargs)))):  # the model's own vmap: its samples cannot be told here
            self._give_up(met, function)
            return function(*args, **kwargs)
        bare_args, bare_kwargs = self._origins.swapped(args), self._origins.swapped(kwargs)
        if in_place := _in_place(function):  # tried on a copy, as it will run once more
            bare_args = (args[0].detach().clone(), *bare_args[1:]) if isinstance(args[0], Tensor) else bare_args
        out = function(*bare_args, **bare_kwargs)
        results = tensors(out)
        if not results and function not in _STORES:
            return out
        call = None if function in _STORES else self._judge(number, function, args, kwargs, met, results)
        if call is not None and call.kind == "derived" and not in_place:
            self.plan.append(call)
            self._origins.follow(function, args, kwargs, met, results)
            return out
        for kind in () if call is None or call.kind else self._kinds(function):
            call.kind = kind
            try:
                found = self._follow(call, function, args, kwargs, met, results[0].shape)
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                continue
            if found is not None and torch.allclose(found, out, rtol=1e-2, atol=1e-4, equal_nan=True):
                self.plan.append(call)
                return found
            if found is not None and call.kind != "rule":  # one sample at a time this function means something else
                self._forget(met)
        self._give_up(met, function)
        return function(*self._origins.swapped(args), **self._origins.swapped(kwargs)) if in_place else out

    @staticmethod
    def _kinds(function) -> list[str]:
        kinds = ["rule"] if function in RULES else []
        name = plain_name(function)
        return kinds + (["given"] if name in ELEMENTWISE or name in COPIES or function is _FUSED else []) + ["mapped"]

    def _next(self, function, met: list[Tensor]) -> Call | None:
        """The decision about this call, None where the pass has left the plan."""
        if self._met < len(self.plan):
            call = self.plan[self._met]
            if call.function == function and call.names == self._origins.names(met):
                return call
        return None

    def _judge(self, number: int, function, args, kwargs, met, results: list[Tensor]) -> Call | None:
        """Where the samples are in the arguments and results of a call; None where that has no simple answer."""
        calls = self._survey.calls
        if number >= len(calls) or calls[number].function != function:
            return None
        given, seen = tensors((args, kwargs)), calls[number]
        if len(seen.inputs) != len(given) or len(seen.results) != len(results):
            return None
        try:
            inputs = [self._axis(x.shape, other) for x, other in zip(given, seen.inputs, strict=True)]
            axes = [self._axis(x.shape, other) for x, other in zip(results, seen.results, strict=True)]
        except ValueError:
            return None
        names = self._origins.names(met)
        if all(axis is None for axis in axes):
            others = [x for x in given if x not in self._origins]
            if any(axis is not None for axis in inputs) or any(x.requires_grad for x in others):
                return None
            return Call(function, "derived", None, inputs, names)
        if len(results) != 1 or not results[0].is_floating_point():
            return None
        return Call(function, "", axes[0], inputs, names)

    def _axis(self, here: torch.Size, there: torch.Size) -> Axis | None:
        if here == there:
            return None
        changed = [dim for dim, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
        if len(here) != len(there) or len(changed) != 1:
            raise ValueError
        (dim,) = changed
        size, other = here[dim], there[dim]
        if size % self.batch or other * self.batch != size * self._survey.batch:
            raise ValueError
        return Axis(dim, size != self.batch)

    # -- carrying them out --------------------------------------------------------------------------------------

    def _follow(self, call: Call, function, args, kwargs, met, wanted) -> Tensor | None:
        """The result of a call as decided, recorded; None where this kind does not apply (``wanted``: its shape)."""
        if call.kind == "rule":
            return self._by_rule(call, function, args, kwargs)
        unique = list({id(x): x for x in met}.values())
        copies = [x.detach().expand(self.batch, *x.shape).requires_grad_() for x in unique]
        if call.kind == "given":
            out = self._given(call, function, args, kwargs, unique, copies)
        else:
            out = self._mapped(call, function, args, kwargs, dict(zip(map(id, unique), copies, strict=True)))
        if wanted is not None and (not isinstance(out, Tensor) or out.shape != wanted):
            return None
        for x, q in zip(unique, copies, strict=True):
            use = Use("given", {"rows": self._origins[x]}, q.detach().new_empty(self.batch, 0))
            self._record(call, use, q, q.shape, q.dtype, None)
        return out

    def _given(self, call: Call, function, args, kwargs, unique: list[Tensor], copies: list[Tensor]) -> Tensor:
        if plain_name(function) in COPIES:
            shape = function(*self._origins.swapped(args), **self._origins.swapped(kwargs)).shape
            made = repeated(shape, self._aligned(copies[0], unique[0], shape, call))
            return made.contiguous() if plain_name(function) == "repeat" else made  # a view may follow, as after repeat
        if function is _FUSED:  # a bias of attention
            shape = torch.Size((*args[0].shape[:-1], args[1].shape[-2]))
        else:
            shape = torch.broadcast_shapes(*(x.shape for x in tensors((args, kwargs))))
        placed = [self._aligned(q, x, shape, call) for q, x in zip(copies, unique, strict=True)]
        swap = dict(zip(map(id, unique), placed, strict=True))
        return function(*self._origins.swapped(args, swap), **self._origins.swapped(kwargs, swap))

    def _aligned(self, q: Tensor, x: Tensor, shape: torch.Size, call: Call) -> Tensor:
        """Copies [b, *x.shape] of x as an argument whose batch axis is that of the result."""
        dim = call.result.dim
        full = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
        times = shape[dim] // self.batch
        if full[dim] == times > 1 and plain_name(call.function) in COPIES:  # repeated along an axis that it has
            return q.reshape(self.batch, *full).movedim(0, dim).flatten(dim, dim + 1)
        if full[dim] != 1:
            raise ValueError
        q = q.reshape(self.batch, *full[:dim], *full[dim + 1 :]).movedim(0, dim)
        if times == 1:
            return q
        if call.positions_first:
            return torch.cat([q] * times, dim)
        return q.repeat_interleave(times, dim)

    def _mapped(self, call: Call, function, args, kwargs, copies: dict[int, Tensor]) -> Tensor:
        leaves, structure = tree_flatten((args, kwargs))
        axes = iter(call.inputs)
        values, dims, restore = [], [], []
        for leaf in leaves:
            axis = next(axes) if isinstance(leaf, Tensor) else None
            dim, again = None, False
            if id(leaf) in copies:
                leaf, dim = copies[id(leaf)], 0
            elif axis is not None and not axis.merged:
                dim, again = axis.dim, True
            elif axis is not None:
                leaf, dim = self._split(leaf, axis.dim, call), axis.dim + int(call.positions_first)
            values.append(leaf)
            dims.append(dim)
            restore.append(axis.dim if again else None)
        places = [i for i, dim in enumerate(dims) if dim is not None]
        result = call.result

        def one(*samples):
            filled = list(values)
            for i, sample in zip(places, samples, strict=True):
                filled[i] = sample if restore[i] is None else sample.unsqueeze(restore[i])
            inner_args, inner_kwargs = tree_unflatten(filled, structure)
            out = function(*inner_args, **inner_kwargs)
            return out if result.merged else out.squeeze(result.dim)

        out_dim = result.dim + int(result.merged and call.positions_first)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            out = vmap(one, in_dims=tuple(dims[i] for i in places), out_dims=out_dim)(*(values[i] for i in places))
        return out.flatten(result.dim, result.dim + 1) if result.merged else out

    def _split(self, x: Tensor, dim: int, call: Call) -> Tensor:
        sizes = (-1, self.batch) if call.positions_first else (self.batch, -1)
        return x.unflatten(dim, sizes)

    def _by_rule(self, call: Call, function, args, kwargs) -> Tensor | None:
        with torch.no_grad():
            found = RULES[function](args, kwargs)
        given = tensors((args, kwargs))
        for reading in found if isinstance(found, list) else [found]:
            axis = None if reading is None else self._fitting(call, reading, given)
            if axis is not None:
                break
        else:
            return None
        origins = {
            role: self._origins.role(x, reading, role) for role, x in reading.given.items() if x in self._origins
        }
        saved = self._by_sample(reading.saved.detach(), axis, call, reading.order and reading.order[0])
        if call.copy:
            saved = saved.clone()
        x, swap = reading.input, None
        if function is F.linear and not x.is_contiguous() and not torch.is_autocast_enabled(x.device.type):
            swap = {id(x): x.contiguous()}  # one product as in training, not one for each first index
        out = function(*self._origins.swapped(args, swap), **self._origins.swapped(kwargs, swap))
        if not out.requires_grad:
            if self._anchor is None:
                self._anchor = torch.zeros(1, requires_grad=True, device=out.device)
            out = _Attach.apply(out, self._anchor)
        order = reading.order and reading.order[1]
        shape = self._by_sample(out.detach(), call.result, call, order).shape
        use = Use(reading.rule, origins, saved, reading.options)
        turn = None if call.result == Axis(0, False) and order is None else (call.result, call, order)
        self._record(call, use, torch.autograd.graph.get_gradient_edge(out), shape, out.dtype, turn)
        return out

    def _fitting(self, call: Call, reading: Reading, given: list[Tensor]) -> Axis | None:
        """The axis of the samples, where the form takes them there and all tracked tensors of a call have a role."""
        roles = {id(x) for x in reading.given.values() if x in self._origins}
        axis = next((axis for x, axis in zip(given, call.inputs, strict=True) if x is reading.input), None)
        if axis is None or roles != {id(x) for x in given if x in self._origins}:
            return None
        ndim, rule, options = reading.input.ndim, reading.rule, reading.options
        if rule == "linear":
            front = range(ndim) if reading.order is None else reading.order[0]
            fits = axis.dim in tuple(front)[: ndim - options["inner"]]
        elif rule == "embedding":
            fits = True
        elif rule == "norm" and options["dims"] is not None:
            fits = axis.dim < ndim - options["dims"]
        else:
            fits = axis.dim == 0 and not (rule == "transposed" and axis.merged)
        return axis if fits else None

    def _by_sample(self, x: Tensor, axis: Axis, call: Call, order: tuple[int, ...] | None) -> Tensor:
        """The tensor as [b, ...], its other axes in order (positions of a merged axis first)."""
        dim = axis.dim
        if order is not None:
            x, dim = x.permute(order), order.index(dim)
        if not axis.merged:
            return x if dim == 0 else x.movedim(dim, 0)
        x = self._split(x, dim, call)
        return x.movedim(dim + int(call.positions_first), 0)

    def _record(self, call: Call, use: Use, target: Any, shape: torch.Size, dtype, turn: tuple | None) -> None:
        self.uses.append(use)
        self.targets.append(target)
        self.shapes.append(shape)
        self.dtypes.append(dtype)
        self._turns.append(turn)
        self._versions.append((use.saved._version, call))

    def turned(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the targets, each as [b, ...]."""
        return tuple(None if g is None else self.turned_one(i, g) for i, g in enumerate(gradients))

    def turned_one(self, number: int, gradient: Tensor) -> Tensor:
        """Gradient of one target as [b, ...]."""
        turn = self._turns[number]
        return gradient if turn is None else self._by_sample(gradient, *turn)

    def spoiled(self) -> list[Use]:
        """Uses whose saved input was overwritten later; their calls will copy it from now on."""
        found = []
        for use, (version, call) in zip(self.uses, self._versions, strict=True):
            if use.saved._version != version:
                call.copy = True
                found.append(use)
        return found

    def _forget(self, met: list[Tensor]) -> None:
        """Drop the uses that the last call has recorded."""
        for kept in (self.uses, self.targets, self.shapes, self.dtypes, self._turns, self._versions):
            del kept[len(kept) - len({id(x) for x in met}) :]

    def _give_up(self, met: list[Tensor], function: Callable) -> None:
        for name in self._origins.names(met):
            self.unruled.setdefault(name, getattr(function, "__name__", repr(function)))


class Replay(Recorder):
    """Repeats a recorder's treatment of calls while a checkpoint computes its part once more; records nothing."""

    def __init__(self, recorder: Recorder):
        super().__init__(recorder.parameters, recorder.batch, plan=recorder.plan)
        self._by_key = {(call.function, call.names): call for call in recorder.plan}

    def _next(self, function, met: list[Tensor]) -> Call | None:
        return self._by_key.get((function, self._origins.names(met)))

    def _record(self, *use) -> None:
        pass


class _Attach(torch.autograd.Function):
    """Puts a result that needs no gradient on the tape, without a copy; in-place functions may still follow."""

    @staticmethod
    def forward(ctx, out: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def _in_place(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__")
    return name.endswith("_")
