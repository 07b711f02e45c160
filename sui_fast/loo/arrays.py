"""Arrays at the border: anything that speaks DLPack or NumPy becomes a checked float64 tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError, complaint


def as_tensor(x: object, argument: str) -> Tensor:
    """A dense, finite, real float64 tensor on the device of ``x``; raises ArgumentError otherwise."""
    if isinstance(x, torch.Tensor):
        tensor = x.detach()
    elif isinstance(x, np.ndarray | np.generic | list | tuple | int | float):
        array = np.asarray(x)
        if array.dtype.kind not in "fiub":
            raise ArgumentError(complaint(argument, "numbers", f"dtype {array.dtype}", "Pass a real numeric array."))
        tensor = torch.from_numpy(np.array(array, dtype=np.float64))  # a copy: read-only and reversed arrays are fine
    elif hasattr(x, "__dlpack__"):
        tensor = torch.from_dlpack(x)
    else:
        raise ArgumentError(
            complaint(
                argument,
                "a NumPy array, a torch tensor or an object with __dlpack__",
                type(x).__name__,
                "Convert it first.",
            )
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ArgumentError(complaint(argument, "a dense tensor", f"layout {tensor.layout}", "Call .to_dense() first."))
    if tensor.device.type == "meta":
        raise ArgumentError(complaint(argument, "a tensor with values", "a meta tensor", "Materialise it first."))
    if tensor.is_complex():
        raise ArgumentError(complaint(argument, "real numbers", f"dtype {tensor.dtype}", "Pass its real part."))
    tensor = tensor.to(torch.float64)
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():  # one pass where all is well
        place = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        raise ArgumentError(
            complaint(
                argument,
                "finite numbers",
                f"{float(tensor[tuple(place)])} at index {place}",
                "Remove or repair that sample; a score computed from it would be meaningless.",
            )
        )
    return tensor


def is_torch(*arrays: object) -> bool:
    """Whether the caller works in torch (any argument is a tensor, or something that is not NumPy)."""
    return any(x is not None and not isinstance(x, np.ndarray | np.generic | list | tuple) for x in arrays)


def precision_of(x: object) -> float:
    """Relative rounding of the entries of ``x``: eps of a narrow float type, else that of float64."""
    name = str(getattr(x, "dtype", "")).removeprefix("torch.")
    return {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}.get(name, 2.0**-52)
