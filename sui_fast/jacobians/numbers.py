"""Arrays, lists and scalars of a user as tensors, or what is in the place of a number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import DataError, complaint


def is_text(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return x.dtype.kind in "US" or x.dtype == object and is_text(x.ravel().tolist())
    return isinstance(x, list | tuple) and any(isinstance(value, str | bytes) for value in x)


def refuse_text(x: Any, argument: str, what: str) -> None:
    """DataError where text is in the place of numbers; x: an array, a list, or some of them."""
    for part in x if isinstance(x, list | tuple) and not is_text(x) else [x]:
        if not is_text(part):
            continue
        values = part.ravel().tolist() if isinstance(part, np.ndarray) else part
        text = next(value for value in values if isinstance(value, str | bytes))
        todo = "Encode it first, with a tokenizer, say, or leave it out."
        if what == "targets":
            todo = "Number the classes: names = sorted(set(labels)); [names.index(name) for name in labels]."
        raise DataError(complaint(argument, f"{what} that are numbers", f"text ({text!r})", todo))


def as_array(x: Any, argument: str) -> np.ndarray:
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        todo = "Pass inputs alone where no targets are wanted, and samples of one shape."
        raise DataError(complaint(argument, "one array of inputs", str(error), todo)) from None


def as_tensor(x: Any, argument: str, what: str = "inputs") -> Tensor:
    if not isinstance(x, Tensor):
        refuse_text(x, argument, what)
        array = as_array(x, argument)
        if array.dtype.kind not in "fiub":
            others = (type(value).__name__ for value in array.ravel().tolist() if not isinstance(value, int | float))
            got, todo = f"{next(others, array.dtype)} among them", "Encode it as numbers first."
            raise DataError(complaint(argument, f"{what} that are numbers", got, todo))
        if np.ma.is_masked(x):
            raise DataError(complaint(argument, "a number everywhere", "a masked array", "Call .filled() first."))
        x = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))  # a copy: strides, bytes, flags are fine
    if x.is_nested:
        raise DataError(complaint(argument, "dense tensors", "a nested one", "Pad it with .to_padded_tensor(0.0)."))
    if x.layout != torch.strided or x.is_quantized:
        raise DataError(complaint(argument, "dense tensors", f"layout {x.layout}", "Call .to_dense() first."))
    if x.device.type == "meta":
        raise DataError(complaint(argument, "tensors with values", "a meta tensor", "Materialise the data first."))
    return x.detach()
