"""How the uses of all parameters are found on a few samples, and proven complete by autograd."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._errors import CoverageError, ModelError, complaint
from .arriving import Ways
from .capture import Captured, Evaluator
from .data import batch_length, to_device
from .jacobian import Jacobian
from .survey import Call

_log = logging.getLogger("sui_fast")
Collect = Callable[[Evaluator, Captured, dict[str, Tensor]], Jacobian]
CHECKED = 8  # samples on which the factors are compared with autograd


@dataclass
class Plan:
    """What is known about a model: the decision about each call, and the parameters that need torch.func."""

    calls: list[Call]
    general: dict[str, str]
    outputs: int  # k
    samples: int  # on which it was proven
    ways: Ways | None = None  # of its factors into a sketch, where it is known
    weights: list[tuple[int, int]] | None = None  # which parameters, and which version of them, it was proven at


def prove(evaluator: Evaluator, batch: Any, collect: Collect, general: dict[str, str] | None = None) -> Plan:
    """``_proven``; what autograd refuses is the model's error."""
    try:
        return _proven(evaluator, batch, collect, general)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        got, todo = f"RuntimeError: {error}", "Check that loss.backward() works for this model."
        raise ModelError(complaint("model", "outputs that can be differentiated", got, todo)) from error


def _proven(evaluator: Evaluator, batch: Any, collect: Collect, general: dict[str, str] | None) -> Plan:
    """The plan for a model and inputs like these.

    Two passes with different numbers of samples show where the samples lie in every call and that no output depends on
    another sample. Then J^T c of random projections of the outputs is compared with autograd: what the record misses
    shows there and moves to torch.func.

    Args:
        batch: samples; the first ones are used. collect: Jacobian of one captured batch.
        general: parameters that are known to need torch.func.
    Raises:
        CoverageError: samples act on one another, or neither path agrees with autograd.
    """
    few = _rows(batch, list(range(min(batch_length(batch), CHECKED))))
    size = batch_length(few)
    survey, more = evaluator.survey(_rows(few, [i % size for i in range(size + min(size, 3))]))
    tolerance = _tolerance(evaluator.dtype, *survey.dtypes)
    if size > 1:  # fewer samples, as control flow may depend on all of a batch
        half = list(range(0, size, 2))
        _, fewer = evaluator.survey(_rows(few, half))
        _refuse_mixing(evaluator, fewer, more[half], tolerance)
    general = dict(general or {})
    turned: set[str] = set()  # parameters for which the other order of a merged axis is under trial
    while True:
        recorder, out = evaluator.decide(few, survey, set(general))
        _refuse_mixing(evaluator, out.detach(), more[:size], tolerance)
        if recorder.unruled:
            general |= recorder.unruled
            continue
        calls, k = recorder.plan, out.shape[1]
        del recorder, out  # with all they hold of the pass
        for call in calls:
            call.positions_first = bool(call.names & turned)
        wrong, outside = _disagreement(evaluator, few, Plan(calls, general, k, size), collect, tolerance)
        if outside and not outside <= set(general):
            general |= dict.fromkeys(outside, "a tensor made of it before the forward pass")
            continue
        if not wrong and not outside:
            return Plan(calls, general, k, size)
        stubborn = [name for name in (*outside, *wrong) if name in general]
        if stubborn:
            _refuse(stubborn[0], general[stubborn[0]])
        guessed = {name for call in calls if call.ambiguous for name in call.names & set(wrong)} - turned
        if guessed:
            turned |= guessed
            continue
        _log.warning("layer rules disagree with autograd for %s; torch.func serves there", ", ".join(wrong))
        general |= dict.fromkeys(wrong, "a use that the rules do not see")


def _rows(batch: Any, numbers: list[int]) -> Any:
    return tree_map(lambda x: x[torch.tensor(numbers, device=x.device)] if isinstance(x, Tensor) else x, batch)


def _refuse(name: str, reason: str) -> None:
    raise CoverageError(
        complaint(
            "model",
            "a Jacobian that agrees with autograd",
            f"another one for parameter {name!r} ({reason})",
            "Check that outputs depend on one sample each and are deterministic in eval mode, or leave the "
            "parameter out with params=.",
        )
    )


def _tolerance(*dtypes: torch.dtype) -> float:
    """Relative, for sums in the least exact of these types: wide of rounding, narrow of a use that was missed."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return min(200 * eps**0.75, 0.1)


def _refuse_mixing(evaluator: Evaluator, out: Tensor, more: Tensor, tolerance: float) -> None:
    limit = tolerance * max(float(out.abs().max()), 1e-30)
    difference = (more - out).abs().amax(1)
    if float(difference.max()) > limit:
        name = next(iter(evaluator.parameters))
        raise CoverageError(
            complaint(
                "model",
                "outputs that depend on one sample each, the same in every pass",
                f"others for sample {int(difference.argmax())} in other company (parameters {name!r} and the others)",
                "Check that the model is deterministic in eval mode and does not mix the samples of a batch.",
            )
        )


def _disagreement(
    evaluator: Evaluator, batch: Any, plan: Plan, collect: Collect, tolerance: float
) -> tuple[list[str], set[str]]:
    """Parameters whose J^T c is not the one of autograd, and those that act through tensors made before.

    In bfloat16, float16 and under autocast rounding hides what is to be seen: a float32 copy of the model is asked too.
    """
    exact = evaluator.exact()
    apart = exact.dtype.itemsize > 2  # in half precision another batch rounds more than there is to see
    if exact is not evaluator:
        precise = to_device(batch, exact.device, exact.dtype)
        found = _compare(exact, precise, plan, collect, _tolerance(exact.dtype), apart)
        if found is not None and not found[0]:
            return found
        wrong = [] if found is None else found[0]
    found = _compare(evaluator, batch, plan, collect, tolerance, apart)
    if found is None:
        raise CoverageError(
            complaint(
                "model",
                "the same use of every parameter in every pass",
                "other calls in the second pass",
                "Remove control flow that depends on anything but the inputs.",
            )
        )
    if exact is not evaluator and wrong:
        return [name for name in found[0] if name in wrong], found[1]
    return found


def _compare(
    evaluator: Evaluator, batch: Any, plan: Plan, collect: Collect, tolerance: float, apart: bool
) -> tuple[list[str], set[str]] | None:
    """``_disagreement`` in one precision; None where the calls are not those of the plan.

    Args:
        apart: autograd sees the samples in two halves. Where one acts on the gradients of another, though not on its
            outputs at these weights (behind a gate that is zero), other company makes other gradients.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    k = plan.outputs
    project = torch.eye(k) if k <= 2 else draw(k, 2) / k**0.5
    project = project.to(evaluator.device, evaluator.dtype)
    captured = evaluator.capture(batch, plan.calls, set(plan.general), project)
    if captured.unruled:
        return None
    rows = evaluator.general_rows(batch, list(plan.general), project) if plan.general else {}
    found = collect(evaluator, captured, rows)
    c = draw(found.n, found.k).to(found.outputs)
    flat, columns = found.vjp(c.reshape(-1)), {name: found.columns(name) for name in evaluator.parameters}
    c, everyone = c.to(captured.outputs), list(range(found.n))
    del captured, rows, found  # a model's gradients take their place
    sizes, outside = dict.fromkeys(columns, 0.0), set()

    def take(name: str, grad: Tensor) -> None:
        sizes[name] = max(sizes[name], _largest(grad))
        flat[columns[name]].sub_(grad.reshape(-1))

    halves = [everyone[::2], everyone[1::2]] if apart else [everyone]
    for half in filter(None, halves):
        outside |= evaluator.autograd_vjp(_rows(batch, half), c[half], project, take)
    errors = {name: _largest(flat[part]) for name, part in columns.items()}
    largest = max(sizes.values())
    wrong = [name for name in columns if not errors[name] <= tolerance * max(sizes[name], 1e-3 * largest)]
    return wrong, outside


def _largest(x: Tensor) -> float:
    """max |x|, NaN where there is one, without a copy."""
    return float(torch.linalg.vector_norm(x.reshape(-1), float("inf")))
