"""jacobian() and ntk(): a pass over the data, batch by batch, proven by autograd once for a model and its weights."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm.auto import tqdm

from .._errors import CoverageError, SpectrumError, complaint, whole
from .arriving import LARGE, Ways, held_batch, sketch_arriving, ways_of
from .capture import Captured, Evaluator
from .data import Samples, as_samples, batch_length, to_device
from .jacobian import Jacobian
from .layers import Gather, Origin, Part, Use
from .proof import CHECKED, Plan, prove

_proven: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Plan]] = weakref.WeakKeyDictionary()


def jacobian(
    model: nn.Module,
    data: Any,
    *,
    outputs: Callable | None = None,
    params: Any = "trainable",
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Jacobian:
    """Jacobian of a model's outputs for a data set, as per-layer factors.

    One batched forward pass and k batched backward passes per batch, no weight gradients. The model runs in eval mode
    (dropout off, BatchNorm with its running statistics) and is left exactly as found. Layers without a rule go through
    torch.func; on first use with a model, and again when its weights have changed, the factors are compared with
    autograd.

    Args:
        model: any module.
        data: anything ``score`` takes; targets are ignored.
        outputs: function (model, batch) -> [b, k]; default: the model's tensor, or its ``.logits``.
        params: "trainable", "all", names or prefixes, or f(name, parameter) -> bool.
        batch_size: samples per forward pass.
        dtype: compute in this type, on a private copy of the model; default: the model's.
        progress: show a bar on runs longer than two seconds.
    Returns:
        Jacobian.
    Raises:
        ArgumentError, DataError (not finite, with the sample), CoverageError (with the parameter).
    """
    store, evaluator, general = _pass(model, data, _Store, outputs, params, batch_size, dtype, progress)
    return store.jacobian(evaluator, general)


def sketches(
    model: nn.Module,
    data: Any,
    rank: int,
    seed: int = 0,
    kind: str = "tensor",
    *,
    outputs: Callable | None = None,
    params: Any = "trainable",
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """``jacobian(...).sketch(rank, seed, kind)``, each batch sketched as soon as its factors exist: no more is held.

    Returns:
        (outputs [n, k], sketches [n, k, rank]).
    """
    common = dict(outputs=outputs, params=params, batch_size=batch_size, dtype=dtype, progress=progress)

    return portions(model, data, Sketch(rank, seed, kind), **common)


@dataclass(frozen=True)
class Sketch:
    """The function for ``portions`` that sketches: of large batches every layer as soon as the pass reaches it."""

    rank: int
    seed: int
    kind: str

    def __call__(self, jac: Jacobian) -> tuple[Tensor, list]:
        return jac.sketch_of_uses(self.rank, self.seed, self.kind)


def portions(
    model: nn.Module,
    data: Any,
    function: Callable[[Jacobian], tuple],
    *,
    outputs: Callable | None = None,
    params: Any = "trainable",
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[Tensor, ...]:
    """What a function makes of the Jacobian of each batch, whose factors go with it.

    Args:
        function: Jacobian -> (tensors with a row per sample ..., layers); layers must be equal in all batches.
        model, data and the others: as in ``jacobian``.
    Returns:
        (outputs [n, k], tensors [n, ...] ...).
    """
    make = functools.partial(_Portions, function)
    store, _, _ = _pass(model, data, make, outputs, params, batch_size, dtype, progress)
    return tuple(map(torch.cat, zip(*store.found, strict=True)))


def _pass(model, data, make, outputs, params, batch_size, dtype, progress):
    """All batches through the store that ``make(n)`` returns; with it the evaluator and the general parameters."""
    batch_size = whole("batch_size", batch_size, 1)
    with torch.inference_mode(False):
        samples = as_samples(data, with_targets=None, argument="data")
        evaluator = Evaluator(model, outputs, params, dtype)
    with evaluator.quiet():
        batch = to_device(next(samples.batches(CHECKED)), evaluator.device, evaluator.dtype)
        key = (tuple(evaluator.parameters), outputs, evaluator.dtype, _signature(batch))
        known = _proven.setdefault(model, {})
        weights = [(id(p), 0 if p.is_inference() else p._version) for p in model.parameters()]
        plan = known.get(key)
        # one sample cannot show that others mix in, nor can weights from before a training what it made of them
        if plan is None or plan.samples < batch_length(batch) or plan.weights != weights:
            known[key] = prove(evaluator, batch, _collect, plan and plan.general)
        for _ in range(2):
            known[key].weights = weights
            sketched = make is not _Store and isinstance(make.args[0], Sketch)
            if sketched and known[key].outputs == 1 and known[key].ways is None:
                known[key].ways = _ways(evaluator, batch, known[key])
            ways = known[key].ways if sketched and evaluator.device.type == "cpu" else None
            few = batch_size if ways is None else min(batch_size, held_batch(ways.numbers))
            store = _run(evaluator, make(samples.n), samples, few, known[key], progress)
            if not isinstance(store, dict):
                break
            known[key] = prove(evaluator, batch, _collect, known[key].general | store)
        else:
            name, function = next(iter(store.items()))
            raise CoverageError(
                complaint(
                    "model",
                    "the same use of every parameter in every batch",
                    f"parameter {name!r} used by {function} in some",
                    "Remove control flow that depends on the batch, or leave the parameter out with params=.",
                )
            )
    return store, evaluator, known[key].general


def predict(
    model: nn.Module,
    samples: Samples,
    *,
    outputs: Callable | None = None,
    params: Any = "trainable",
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Outputs [n, k] of all samples, as ``jacobian`` would find them, from forward passes alone."""
    batch_size = whole("batch_size", batch_size, 1)
    evaluator, found = Evaluator(model, outputs, params, dtype), []
    total = -(-samples.n // batch_size)
    with evaluator.quiet(), torch.no_grad():
        done = 0
        for raw in tqdm(samples.batches(batch_size), total=total, desc="outputs", delay=2, leave=False,
                        disable=not progress):  # fmt: skip
            number = lambda i: samples.number(done + i)  # noqa: E731, B023
            found.append(evaluator(to_device(raw, evaluator.device, evaluator.dtype), number))
            done += len(found[-1])
    return torch.cat(found)


def _run(
    evaluator: Evaluator, store: _Store | _Portions, samples: Samples, batch_size: int, plan: Plan, progress: bool
) -> _Store | _Portions | dict[str, str]:
    """All batches; or the parameters that turned out to need the general path."""
    total = -(-samples.n // batch_size)
    bar = tqdm(samples.batches(batch_size), total=total, desc="jacobian", delay=2, leave=False, disable=not progress)
    for raw in bar:
        batch = to_device(raw, evaluator.device, evaluator.dtype)
        number = lambda i: samples.number(store.filled + i)  # noqa: E731
        captured = evaluator.capture(batch, plan.calls, set(plan.general), number=number)
        if captured.unruled:
            return captured.unruled
        rows = evaluator.general_rows(batch, list(plan.general)) if plan.general else {}
        store.add(captured, rows, evaluator, plan)
    return store


def _ways(evaluator: Evaluator, batch: Any, plan: Plan) -> Ways | None:
    captured = evaluator.capture(batch, plan.calls, set(plan.general))
    if captured.unruled:
        return None
    rows = evaluator.general_rows(batch, list(plan.general)) if plan.general else {}
    return ways_of(_collect(evaluator, captured, rows))


def _collect(evaluator: Evaluator, captured: Captured, rows: dict[str, Tensor]) -> Jacobian:
    """Jacobian of one batch."""
    store = _Store(len(captured.outputs))
    store.add(captured, rows)
    return store.jacobian(evaluator, dict.fromkeys(rows, ""))


def _refuse(sample: int) -> None:
    raise CoverageError(
        complaint(
            "model",
            "the same layers and shapes in every batch",
            f"others in the batch at sample {sample}",
            "Pad the inputs to one length, or remove control flow that depends on the data.",
        )
    )


class _Portions:
    """What a function makes of every batch; the factors of a batch go with it."""

    def __init__(self, function: Callable[[Jacobian], tuple], n: int):
        self.function, self.filled = function, 0
        self.found: list[tuple[Tensor, ...]] = []
        self._layers: tuple | None = None

    def add(self, captured: Captured, rows: dict[str, Tensor], evaluator: Evaluator, plan: Plan) -> None:
        (n, k), known = captured.outputs.shape, plan.ways
        sketch = self.function if isinstance(self.function, Sketch) and self.function.kind == "tensor" else None
        if sketch and k == 1 and known and n * known.numbers > LARGE and known.fits(captured.uses):
            shapes = {name: p.shape for name, p in evaluator.parameters.items()}
            jac = Jacobian(captured.outputs, shapes, [], rows, {}, None, evaluator.dtype)
            tensors = [sketch_arriving(jac, captured.uses, captured.arriving, known, sketch.rank, sketch.seed)]
            layers = known.order
        else:
            jac = _collect(evaluator, captured, rows)
            *tensors, layers = self.function(jac)
        if self._layers not in (None, (jac.k, layers)):
            _refuse(self.filled)
        self._layers = jac.k, layers
        self.found.append((jac.outputs, *tensors))
        self.filled += jac.n


class _Store:
    """Factors of all batches, each written once into its place."""

    def __init__(self, n: int):
        self.n, self.filled = n, 0
        self._outputs: Tensor | None = None
        self._uses: list[Use] = []
        self._saved: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._rows: dict[str, Tensor] = {}

    def add(
        self,
        captured: Captured,
        rows: dict[str, Tensor],
        evaluator: Evaluator | None = None,
        plan: Plan | None = None,
    ) -> None:
        out, uses = captured.outputs, captured.uses
        b, k = out.shape
        whole = b == self.n and k == 1  # one batch, one backward pass: what it returns is kept, nothing is copied
        if self._outputs is None:
            self._uses = [use.at(slice(0, 0)) for use in uses]
            self._outputs = self._room(out)
            # a single batch is kept as it is
            self._saved = [use.saved if b == self.n else self._room(use.saved) for use in uses]
            if not whole:
                pairs = zip(captured.shapes, captured.dtypes, strict=True)
                self._grads = [out.new_empty(self.n, k, *shape[1:], dtype=dtype) for shape, dtype in pairs]
            self._rows = {name: self._room(value) for name, value in rows.items()}
        same = (
            whole
            or len(uses) == len(self._uses)
            and all(
                mine.key == use.key and use.saved.ndim == saved.ndim and len(shape) + 1 == grads.ndim
                for mine, use, saved, grads, shape in zip(
                    self._uses, uses, self._saved, self._grads, captured.shapes, strict=True
                )
            )
        )
        if not same or k != self._outputs.shape[1]:
            self._refuse()
        if not whole:
            self._widen(captured)
        part = slice(self.filled, self.filled + b)
        self._outputs[part] = out
        for use, saved in zip(uses, self._saved, strict=True):
            if use.saved is not saved:
                _fill(saved[part], use.saved)
        if whole:
            pairs = zip(captured.shapes, next(captured.gradients), strict=True)
            self._grads = [out.new_zeros(b, 1, *x[1:]) if g is None else g[:, None] for x, g in pairs]
        for c, found in enumerate(captured.gradients):
            for grads, gradient in zip(self._grads, found, strict=True):
                _fill(grads[part, c], gradient)
        for name, value in rows.items():
            self._rows[name][part] = value
        self.filled += b

    def _refuse(self) -> None:
        _refuse(self.filled)

    def _widen(self, captured: Captured) -> None:
        """Room for longer sequences than before: zeros where a batch has no positions add nothing."""
        for i, (use, shape) in enumerate(zip(captured.uses, captured.shapes, strict=True)):
            mine = self._uses[i]
            if use.rule == "given" and shape[1:] != self._grads[i].shape[2:]:
                wider = shape[1:].numel() > self._grads[i].shape[2:].numel()
                small, large = (mine, use) if wider else (use, mine)
                if not _is_prefix(small.origins["rows"], large.origins["rows"]):
                    self._refuse()
                mine.origins = large.origins
            self._saved[i] = _padded(self._saved[i], 1, use.saved.shape[1:])
            self._grads[i] = _padded(self._grads[i], 2, shape[1:])

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(self.n, *like.shape[1:])

    def jacobian(self, evaluator: Evaluator, general: dict[str, str]) -> Jacobian:
        uses = [
            (Use(use.rule, use.origins, saved, use.options), grads)
            for use, saved, grads in zip(self._uses, self._saved, self._grads, strict=True)
        ]
        shapes = {name: p.shape for name, p in evaluator.parameters.items()}
        engines = dict.fromkeys(general, "one by one" if evaluator.one_by_one else "torch.func")
        return Jacobian(self._outputs, shapes, uses, self._rows, dict(general), engines, evaluator.dtype)


def _fill(target: Tensor, value: Tensor | None) -> None:
    """Write a value into the corner of a target, zeros around it."""
    if value is None or value.shape != target.shape:
        target.zero_()
    if value is not None:
        target[tuple(slice(size) for size in value.shape)] = value


def _padded(x: Tensor, first: int, shape: torch.Size) -> Tensor:
    """x with its axes from ``first`` on at least as long as in the shape."""
    wanted = [max(a, b) for a, b in zip(x.shape[first:], shape, strict=True)]
    if wanted == list(x.shape[first:]):
        return x
    wide = x.new_zeros(*x.shape[:first], *wanted)
    wide[tuple(slice(size) for size in x.shape)] = x
    return wide


def _is_prefix(small: Origin, large: Origin) -> bool:
    """Whether the entries of one tensor are the first ones of the other, along each axis."""
    if isinstance(small, Part) and isinstance(large, Part):
        return small.place is not None and large.place is not None  # their strides and offsets are equal
    if not isinstance(small, Gather) or not isinstance(large, Gather) or small.token.ndim != large.token.ndim:
        return False
    corner = large.token[tuple(slice(size) for size in small.token.shape)]
    return torch.equal(corner, small.token)


def _signature(batch: Any) -> tuple:
    leaves, structure = tree_flatten(batch)
    return str(structure), tuple((tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x for x in leaves)


def ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    outputs: Callable | None = None,
    params: Any = "trainable",
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Empirical neural tangent kernel Theta(x1, x2) = J(x1) J(x2)^T, exact.

    Args:
        model, outputs, params, batch_size, dtype: as in ``jacobian``.
        x1, x2: samples (a tensor or a dict of tensors is one batch of inputs); x2 None: x1.
    Returns:
        [n1 * k, n2 * k]; row i * k + c is output c of sample i.
    Raises:
        As ``jacobian``; SpectrumError where gradients are too large for the dtype.
    Source: Jacot et al. 2018; Harutyunyan et al., ICLR 2021.
    """
    common = dict(outputs=outputs, params=params, batch_size=batch_size, dtype=dtype)
    first = jacobian(model, as_samples(x1, with_targets=False, argument="x1"), **common)
    other = None if x2 is None else jacobian(model, as_samples(x2, with_targets=False, argument="x2"), **common)
    theta = first.gram(other)
    if not torch.isfinite(theta).all():
        got, todo = f"an overflow of {theta.dtype}", "Pass dtype=torch.float64, or scale the inputs."
        raise SpectrumError(complaint("x1", "gradients whose products are finite", got, todo))
    return theta
