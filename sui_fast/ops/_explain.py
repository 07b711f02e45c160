"""What would run and why, which backends live, and whether every kernel agrees with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._errors import ArgumentError, complaint
from ._backends import BACKENDS, refuse_backend
from ._op import OPS, Op


@dataclass(frozen=True)
class Explanation:
    """Choice for one call: ``backend`` runs; ``reasons`` tells for every other backend why it does not."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.op}: {self.backend}", *(f"  not {name}: {why}" for name, why in self.reasons.items())]
        )


def explain(op: Callable | str, *args, **kwargs) -> Explanation:
    """Which backend an op would run on for these arguments, and why the others would not.

    Args:
        op: a function of sui_fast.ops, or its name. args, kwargs: as in the call.
    Raises:
        ArgumentError: no such op, or arguments it does not take. BackendError: a named backend refuses.
    """
    declared = OPS.get(op) if isinstance(op, str) else getattr(op, "op", None)
    if not isinstance(declared, Op):
        raise ArgumentError(complaint("op", f"one of {', '.join(OPS)}", repr(op), "Pass a function of sui_fast.ops."))
    bound = declared.bind(args, kwargs)
    declared.border(bound)
    backend, _ = declared.choose(bound)
    reasons = {}
    for name in BACKENDS:
        if name != backend:
            found = declared.refusal(name, bound)
            reasons[name] = found or f"{backend} was named" if declared.named() else found or f"{backend} comes first"
    return Explanation(declared.name, backend, reasons)


def backends() -> dict[str, str | None]:
    """{backend: None where it lives here, else the reason and what to install}; loads neither Triton nor CuPy."""
    return {name: refuse_backend(name) for name in BACKENDS}


def self_test() -> dict[str, dict[str, str | None]]:
    """{op: {backend: None where the kernel agrees with the reference on this machine, else the reason}}."""
    found: dict[str, dict[str, str | None]] = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, declared in OPS.items():
        found[name] = {}
        for backend in declared.kernels:
            for device in devices:
                if refuse_backend(backend, device) is None:
                    loaded = declared.kernel(backend)
                    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
                    reason = loaded if isinstance(loaded, str) else declared.distrust(backend, where)
                    found[name][f"{backend} on {device}"] = reason
    return found
