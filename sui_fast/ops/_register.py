"""Registration of an op with PyTorch: schema, fake tensors, vmap and a derivative through the body."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register(declared: Any) -> Callable:
    """Make the custom op sui_fast::name of a declared op; its backward pass is an opaque op of its own."""
    schema = torch.library.infer_schema(declared.body, mutates_args=())

    def implementation(*args):
        args = declared.bind(args, {})
        return declared._run(declared.choose(args)[1], args)

    def fake(*args):
        args = declared.bind(args, {})  # the dispatcher drops arguments that equal their defaults
        declared.border(args)
        sizes = {
            name: value
            for name, value in zip(declared.parameters, args, strict=True)
            if isinstance(value, int | torch.SymInt)
        }
        for position, _, letters, _ in declared.tensors:
            sizes.update(zip(letters, args[position].shape, strict=True))
        first = args[declared.tensors[0][0]]
        dtype = declared._result_dtype or wide_dtype(first.dtype)
        outputs = [
            first.new_empty([_product(size, sizes) for size in shape], dtype=dtype) for shape in declared._result
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(inputs[position] for position, *_ in declared.tensors))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx, *gradients):
        args = list(ctx.others)
        for (position, *_), tensor in zip(declared.tensors, ctx.saved_tensors, strict=True):
            args[position] = tensor
        needs = [bool(ctx.needs_input_grad[position]) for position, *_ in declared.tensors]
        parts = iter(backward_op(list(gradients), needs, *args))
        result = [None] * len(args)
        for (position, *_), needed in zip(declared.tensors, needs, strict=True):
            result[position] = next(parts) if needed else None
        return tuple(result)

    def backward_implementation(gradients, needs, *args):
        args = list(args)
        with _autograd_again(), torch.enable_grad():
            inputs = []
            for (position, *_), needed in zip(declared.tensors, needs, strict=True):
                args[position] = args[position].detach().requires_grad_(needed)
                inputs += [args[position]] if needed else []
            outputs = [output for output in as_tuple(declared._run(declared.body, tuple(args)))]
            pairs = [
                (output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output.requires_grad
            ]
            parts = (
                torch.autograd.grad([p[0] for p in pairs], inputs, [p[1] for p in pairs], allow_unused=True)
                if pairs
                else [None] * len(inputs)
            )
        return [
            torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            if part is None
            else part.detach().clone(memory_format=torch.contiguous_format)
            for part, tensor in zip(parts, inputs, strict=True)
        ]

    def backward_fake(gradients, needs, *args):
        return [
            torch.empty_like(args[position], memory_format=torch.contiguous_format)
            for (position, *_), needed in zip(declared.tensors, needs, strict=True)
            if needed
        ]

    def vmap(info, in_dims, *args):
        count = len(declared._result)
        return torch.vmap(declared.body, in_dims=tuple(in_dims))(*args), 0 if count == 1 else (0,) * count

    definition = torch.library.custom_op(f"sui_fast::{declared.name}", implementation, mutates_args=(), schema=schema)
    definition.register_fake(fake)
    definition.register_autograd(backward, setup_context=setup_context)
    definition.register_vmap(vmap)
    inside = schema[1 : schema.index(") ->")]
    backward_op = torch.library.custom_op(
        f"sui_fast::{declared.name}_backward",
        backward_implementation,
        mutates_args=(),
        schema=f"(Tensor[] gradients, bool[] needs, {inside}) -> Tensor[]",
    )
    backward_op.register_fake(backward_fake)
    return getattr(torch.ops.sui_fast, declared.name).default


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation and result dtype: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _product(term: str, sizes: dict[str, int]) -> int:
    return functools.reduce(lambda a, b: a * b, (sizes[name] for name in term.split("*")))


def _autograd_again() -> Any:
    """Lift the exclusion of autograd that surrounds the implementation of a custom op."""
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set() & torch._C._after_autograd_keyset,
    )
