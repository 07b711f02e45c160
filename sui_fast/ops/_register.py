"""Registration of an op with PyTorch: schema, fake tensors, vmap and a derivative through the body."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


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
        tensors = declared.flat(args)
        for tensor, (_, letters, _) in zip(tensors, declared.pieces(declared.length(args)), strict=True):
            sizes.update(zip(letters, tensor.shape, strict=True))
        first = tensors[0]
        dtype = declared._result_dtype or wide_dtype(first.dtype)
        outputs = [
            first.new_empty([_product(size, sizes) for size in shape], dtype=dtype) for shape in declared._result
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def setup_context(ctx, inputs, output):
        tensors = declared.flat(inputs)
        ctx.save_for_backward(*tensors)
        ctx.others = declared.refill(inputs, [None] * len(tensors))

    def backward(ctx, *gradients):
        args = declared.refill(ctx.others, list(ctx.saved_tensors))
        needs = [bool(needed) for needed in declared.flat(ctx.needs_input_grad)]
        parts = iter(backward_op(list(gradients), needs, *args))
        found = declared.refill(args, [next(parts) if needed else None for needed in needs])
        tensors = {place for place, *_ in declared.tensors}
        return tuple(value if place in tensors else None for place, value in enumerate(found))

    def backward_implementation(gradients, needs, *args):
        with _autograd_again(), torch.enable_grad():
            pairs = zip(declared.flat(args), needs, strict=True)
            tensors = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            inputs = [tensor for tensor in tensors if tensor.requires_grad]
            outputs = [output for output in as_tuple(declared._run(declared.body, declared.refill(args, tensors)))]
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
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor, needed in zip(declared.flat(args), needs, strict=True)
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
