"""Rules: what a call of each kind of layer needs to keep. ``layers.py`` forms the factors from it.

A rule reads the arguments of a call and gives a ``Reading`` (or several: any argument may be the parameter), or None
where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Reading:
    """A call understood.

    Attributes:
        rule: name of the form in ``layers.py``.
        given: role -> tensor that may be a parameter. input: the argument that carries the samples.
        saved: what to keep of it. features: trailing axes of saved and of the result that are no positions.
        turn: how a weight is stored, as a permutation that makes it [*o, *i]; None: it is.
        order: axes of the input, and of the result, that bring positions to the front and features to the end.
    """

    rule: str
    given: dict[str, Tensor]
    input: Tensor
    saved: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    turn: tuple[int, ...] | None = None
    order: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def _arguments(names: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _roles(given: dict[str, Any]) -> dict[str, Tensor]:
    return {role: given[role] for role in ("weight", "bias") if isinstance(given.get(role), Tensor)}


def _linear(args, kwargs):
    given = _arguments("input weight bias", args, kwargs)
    if given["weight"].ndim != 2 or given["input"].ndim < 2:
        return None
    return Reading("linear", _roles(given), given["input"], given["input"], dict(inner=1, outer=1))


def _matmul(args, kwargs):
    given = _arguments("input weight", args, kwargs)
    x, weight = given.get("input"), given.get("weight", given.get("other", given.get("mat2")))
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.ndim != 2 or x.ndim < 2:
        return None
    return Reading("linear", {"weight": weight}, x, x, dict(inner=1, outer=1), turn=(1, 0))


def _addmm(args, kwargs):
    given = _arguments("bias input weight", args, {})
    x, weight, bias = (given.get(name) for name in ("input", "weight", "bias"))
    if kwargs or len(given) != 3 or not isinstance(bias, Tensor) or bias.shape != weight.shape[1:]:
        return None
    return Reading("linear", {"weight": weight, "bias": bias}, x, x, dict(inner=1, outer=1), turn=(1, 0))


def _einsum(args, kwargs):
    """Two operands, one of them the weight, whose letters are each either summed with x or new in the result."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if kwargs or not isinstance(equation, str) or "." in equation or "->" not in equation or len(operands) != 2:
        return None
    left, result = equation.replace(" ", "").split("->")
    letters = left.split(",")
    if any(len(set(part)) != len(part) for part in (*letters, result)):
        return None

    def read(weight_at: int) -> Reading | None:
        """The call with that operand as the weight."""
        x, w = letters[1 - weight_at], letters[weight_at]
        inner, outer = [c for c in w if c in x], [c for c in w if c not in x]
        if any(c in result for c in inner) or any(c not in result for c in outer):
            return None
        kept = [c for c in x if c not in inner]
        if not outer or not inner or any(c not in result for c in kept):
            return None
        order = (
            tuple(x.index(c) for c in (*kept, *inner)),
            tuple(result.index(c) for c in (*kept, *outer)),
        )
        turn = tuple(w.index(c) for c in (*outer, *inner))
        value = operands[1 - weight_at]
        options = dict(inner=len(inner), outer=len(outer))
        return Reading("linear", {"weight": operands[weight_at]}, value, value, options, turn, order)

    return [reading for reading in (read(1), read(0)) if reading is not None]


def _expand(value: Any, dim: int) -> tuple:
    return (value,) * dim if isinstance(value, int) else tuple(value) * (dim if len(value) == 1 else 1)


def _conv(dim: int):
    def rule(args, kwargs):
        given = _arguments("input weight bias stride padding dilation groups", args, kwargs)
        x, weight = given["input"], given["weight"]
        if x.ndim != dim + 2:
            return None
        stride, dilation = _expand(given.get("stride", 1), dim), _expand(given.get("dilation", 1), dim)
        padding = given.get("padding", 0)
        kernel = tuple(weight.shape[2:])
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [(p, p) for p in _expand(0 if padding == "valid" else padding, dim)]
        saved = x
        if any(p for pair in pads for p in pair):
            saved = F.pad(x, [p for pair in reversed(pads) for p in pair])
        options = dict(stride=stride, dilation=dilation, kernel=kernel, groups=given.get("groups", 1))
        return Reading("conv", _roles(given), x, saved, options)

    return rule


def _transposed(dim: int):
    def rule(args, kwargs):
        names = "input weight bias stride padding output_padding groups dilation"
        given = _arguments(names, args, kwargs)
        x = given["input"]
        if x.ndim != dim + 2:
            return None
        options = dict(
            stride=_expand(given.get("stride", 1), dim),
            dilation=_expand(given.get("dilation", 1), dim),
            padding=_expand(given.get("padding", 0), dim),
            kernel=tuple(given["weight"].shape[2:]),
            groups=given.get("groups", 1),
        )
        return Reading("transposed", _roles(given), x, x, options)

    return rule


def _embedding(args, kwargs):
    given = _arguments("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
    if given.get("max_norm") is not None:
        return None
    options = dict(padding_idx=given.get("padding_idx"), rows=len(given["weight"]))
    return Reading("embedding", {"weight": given["weight"]}, given["input"], given["input"], options)


def _layer_norm(args, kwargs):
    given = _arguments("input normalized_shape weight bias eps", args, kwargs)
    hat = F.layer_norm(given["input"], given["normalized_shape"], eps=given.get("eps", 1e-5))
    return Reading("norm", _roles(given), given["input"], hat, {"dims": len(given["normalized_shape"])})


def _rms_norm(args, kwargs):
    given = _arguments("input normalized_shape weight eps", args, kwargs)
    hat = F.rms_norm(given["input"], given["normalized_shape"], eps=given.get("eps"))
    return Reading("norm", _roles(given), given["input"], hat, {"dims": len(given["normalized_shape"])})


def _group_norm(args, kwargs):
    given = _arguments("input num_groups weight bias eps", args, kwargs)
    x = given["input"]
    hat = F.group_norm(x, given["num_groups"], eps=given.get("eps", 1e-5))
    return Reading("norm", _roles(given), x, hat, {"dims": None, "space": x.ndim - 2})


def _instance_norm(args, kwargs):
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    given = _arguments(names, args, kwargs)
    x = given["input"]
    if x.ndim < 3:
        return None
    own = given.get("use_input_stats", True)
    hat = F.instance_norm(
        x,
        None if own else given["running_mean"],
        None if own else given["running_var"],
        use_input_stats=own,
        eps=given.get("eps", 1e-5),
    )
    return Reading("norm", _roles(given), x, hat, {"dims": None, "space": x.ndim - 2})


def _batch_norm(args, kwargs):
    names = "input running_mean running_var weight bias training momentum eps"
    given = _arguments(names, args, kwargs)
    if given.get("training") or given.get("running_mean") is None:
        return None
    x = given["input"]
    hat = F.batch_norm(x, given["running_mean"], given["running_var"], eps=given.get("eps", 1e-5))
    return Reading("norm", _roles(given), x, hat, {"dims": None, "space": x.ndim - 2})


RULES: dict[Callable, Callable] = {
    F.linear: _linear,
    F.conv1d: _conv(1),
    F.conv2d: _conv(2),
    F.conv3d: _conv(3),
    F.conv_transpose1d: _transposed(1),
    F.conv_transpose2d: _transposed(2),
    F.conv_transpose3d: _transposed(3),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.einsum: _einsum,
}

# results in which each entry needs the matching entries of the arguments alone, after broadcasting
ELEMENTWISE = frozenset(
    "add sub mul div true_divide divide multiply subtract pow where maximum minimum rsub addcmul addcdiv lerp copy "
    "atan2 fmod remainder clamp_min clamp_max".split()
)
COPIES = frozenset("expand expand_as broadcast_to repeat".split())
CASTS = frozenset("to type type_as float double half bfloat16 contiguous clone cpu cuda".split())


def plain_name(function: Callable) -> str:
    """Name of a function without what marks it as in-place, reflected or an operator."""
    name = getattr(function, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2].removeprefix("i" if name[2:-2] in _IN_PLACE else "")
        return {"truediv": "div", "rmul": "mul", "radd": "add", "rtruediv": "div", "rdiv": "div"}.get(name, name)
    return name.rstrip("_")


_IN_PLACE = frozenset("iadd isub imul idiv itruediv ipow".split())


def repeated(result: tuple[int, ...], part: Tensor) -> Tensor:
    """The tensor, repeated or expanded to a shape of the same number of axes."""
    if all(size in (1, wanted) for size, wanted in zip(part.shape, result, strict=True)):
        return part.expand(result)
    return part.repeat([wanted // size for size, wanted in zip(part.shape, result, strict=True)])


def wide_attention(query: Tensor, *others, **kwargs) -> Tensor:
    """Fused attention; half precision on a CPU in float32: its backward pass is four times as fast there."""
    fused = F.scaled_dot_product_attention
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return fused(query, *others, **kwargs)

    def widen(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype == query.dtype else x

    wide = fused(query.float(), *map(widen, others), **{name: widen(x) for name, x in kwargs.items()})
    return wide.to(query.dtype)
