"""Layers as modules: what a hook on a module keeps, and the factors of its own parameters made from it.

Training runs unaltered, so no function mode sees its calls; a module's class tells which rule of ``rules.py`` its call
has. A module of any other class is asked: where its result is affine in its vectors, entry by entry (norms and scales
of all kinds), two more calls tell the factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..ops.sketching.window import Window
from .layers import Factor, Part, Place, Rows, Use, make_factors
from .rules import RULES, Reading

Reader = Callable[[nn.Module, Tensor], Reading | None]
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_TRANSPOSED = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def window_of(m: nn.Module) -> Window | None:
    """How a convolution reads its images; None where a rule has to form its factors."""
    if not isinstance(m, tuple(_CONVOLUTIONS)) or m.padding_mode != "zeros" or m.groups > 1:
        return None
    if isinstance(m.padding, str):  # those of "same" that are uneven have one more behind
        total = [d * (k - 1) if m.padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in m.padding)
    return Window(m.kernel_size, m.stride, m.dilation, pads)


def _convolution(m, x: Tensor) -> Reading | None:
    rule = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(m, kind))
    if m.padding_mode != "zeros":
        return None
    return RULES[rule]((x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups), {})


def _transposed(m, x: Tensor) -> Reading | None:
    rule = next(function for kind, function in _TRANSPOSED.items() if isinstance(m, kind))
    return RULES[rule]((x, m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation), {})


def _batch_norm(m, x: Tensor) -> Reading | None:
    return RULES[F.batch_norm]((x, m.running_mean, m.running_var, m.weight, m.bias), dict(eps=m.eps))


READERS: dict[type, Reader] = {
    nn.Linear: lambda m, x: RULES[F.linear]((x, m.weight, m.bias), {}),
    nn.Embedding: lambda m, x: RULES[F.embedding]((x, m.weight, m.padding_idx, m.max_norm), {}),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_TRANSPOSED, _transposed),
    nn.LayerNorm: lambda m, x: RULES[F.layer_norm]((x, m.normalized_shape, m.weight, m.bias, m.eps), {}),
    nn.GroupNorm: lambda m, x: RULES[F.group_norm]((x, m.num_groups, m.weight, m.bias, m.eps), {}),
    nn.modules.batchnorm._BatchNorm: _batch_norm,
}
if hasattr(nn, "RMSNorm"):
    READERS[nn.RMSNorm] = lambda m, x: RULES[F.rms_norm]((x, m.normalized_shape, m.weight, m.eps), {})


def reader_of(module: nn.Module) -> Reader | None:
    """How the call of a module of this class is read; None: by ``affine``."""
    own = type(module).forward
    for kind, reader in READERS.items():
        if isinstance(module, kind) and (own is kind.forward or kind is nn.modules.batchnorm._BatchNorm):
            return reader
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers: a linear layer turned
        return lambda m, x: RULES[torch.addmm]((m.bias, x, m.weight), {})
    return None


def factors_of(module: nn.Module, names: dict[str, str], x: Tensor, g: Tensor) -> list[Factor] | None:
    """Factors of the parameters with these names (own name -> name in the model); None where nothing tells them.

    Args:
        x: first input [n, ...]. g: gradient of the result [n, ...], a sum over samples.
    """
    reader = reader_of(module)
    if reader is None:
        return _affine(module, names, x, g)
    reading = reader(module, x)
    if reading is None or set(names) - {"weight", "bias"}:
        return None
    origins = {}
    for role, name in names.items():
        weight = getattr(module, role)
        place = None
        if role == "weight" and reading.turn is not None:
            turned = weight.permute(reading.turn)
            place = Place(tuple(turned.shape), turned.stride(), 0)
        origins[role] = Part(name, place)
    return make_factors(Use(reading.rule, origins, reading.saved, reading.options), g[:, None])


def _affine(module: nn.Module, names: dict[str, str], x: Tensor, g: Tensor) -> list[Factor] | None:
    """Rows sum_s g D of vectors p where result = rest + D p, entry by entry along the last axis; proven on the spot."""
    own = dict(module.named_parameters(recurse=False))
    size = g.shape[-1]
    if any(p.shape != (size,) for p in own.values()) or any(True for _ in module.children()):
        return None

    def at(**values: Tensor) -> Tensor:
        given = {name: values.get(name, torch.zeros_like(p)) for name, p in own.items()}
        return functional_call(module, given, (x,))

    try:
        rest = at()
        slopes = {name: at(**{name: torch.ones_like(p)}) - rest for name, p in own.items()}
        true = at(**own)
    except (RuntimeError, TypeError, ValueError):
        return None
    made = rest + sum(slope * own[name] for name, slope in slopes.items())
    limit = 1e-2 if true.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if made.shape != g.shape or not torch.allclose(made, true, rtol=limit, atol=limit * float(true.abs().max())):
        return None
    n, found = len(g), []
    for name, full in names.items():
        rows = (
            (g * slopes[name].to(g.dtype))
            .reshape(n, -1, size)
            .sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
        )
        found.append(Rows({"rows": full}, rows[:, None]))
    return found
