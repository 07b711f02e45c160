"""C++ kernel of quadratic forms (csrc/cpu/triangular.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu


def triangular_sqnorm(c: Tensor, x: Tensor) -> Tensor:
    """See the op of the same name."""
    c, x = (held.detach().contiguous() for held in (c, x))
    out = x.new_empty(len(x))
    _cpu.triangular_sqnorm(
        c.data_ptr(), *c.shape, x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return out


def refuse_triangular_sqnorm(c: Tensor, x: Tensor) -> str | None:
    if _cpu.instruction_set() == "baseline":
        return "vectors of two numbers, with which the matrix product is faster"
    return None
