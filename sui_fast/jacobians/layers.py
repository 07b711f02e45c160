"""Rules: how each kind of layer turns its input and the gradient of its output into Jacobian rows.

A ``Use`` is one call of a function that takes chosen parameters, with the input it saw. It yields factors of
three kinds:

* ``outer``: rows sum_s g[n,k,s] a[n,s]^T of a weight [o, i], its bias as one more column of ones;
* ``index``: the same for one-hot a (embeddings), as token numbers [n, s];
* ``rows``: explicit rows [n, k, p], for small parameters (norms, scales, biases) and for whatever has no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Use:
    """One call: which rule, which parameters in which role, and what is needed to form the factors.

    Attributes:
        rule: name of the rule.
        names: {"weight": parameter name, "bias": ...}, the chosen ones only.
        saved: input of the call, in the form that the rule stores.
        options: static facts (stride, groups ...).
    """

    rule: str
    names: dict[str, str]
    saved: Tensor
    options: dict[str, Any]

    @property
    def key(self) -> tuple:
        return (self.rule, tuple(sorted(self.names.items())))


def _arguments(names: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _linear(args, kwargs):
    given = _arguments("input weight bias", args, kwargs)
    return given, given["input"], {}


def _conv(dim: int):
    def rule(args, kwargs):
        given = _arguments("input weight bias stride padding dilation groups", args, kwargs)
        x, weight = given["input"], given["weight"]
        expand = lambda v: (v,) * dim if isinstance(v, int) else tuple(v) * (dim if len(v) == 1 else 1)  # noqa: E731
        stride, dilation = expand(given.get("stride", 1)), expand(given.get("dilation", 1))
        padding = given.get("padding", 0)
        kernel = tuple(weight.shape[2:])
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [(p, p) for p in expand(0 if padding == "valid" else padding)]
        if any(p for pair in pads for p in pair):
            x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        return given, x, dict(stride=stride, dilation=dilation, kernel=kernel, groups=given.get("groups", 1))

    return rule


def _embedding(args, kwargs):
    given = _arguments("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
    if given.get("max_norm") is not None:
        return None
    return given, given["input"], {"padding_idx": given.get("padding_idx")}


def _layer_norm(args, kwargs):
    given = _arguments("input normalized_shape weight bias eps", args, kwargs)
    hat = F.layer_norm(given["input"], given["normalized_shape"], eps=given.get("eps", 1e-5))
    return given, hat, {"channel": None, "dims": len(given["normalized_shape"])}


def _rms_norm(args, kwargs):
    given = _arguments("input normalized_shape weight eps", args, kwargs)
    hat = F.rms_norm(given["input"], given["normalized_shape"], eps=given.get("eps"))
    return given, hat, {"channel": None, "dims": len(given["normalized_shape"])}


def _group_norm(args, kwargs):
    given = _arguments("input num_groups weight bias eps", args, kwargs)
    return given, F.group_norm(given["input"], given["num_groups"], eps=given.get("eps", 1e-5)), {"channel": 1}


def _batch_norm(args, kwargs):
    names = "input running_mean running_var weight bias training momentum eps"
    given = _arguments(names, args, kwargs)
    if given.get("training") or given.get("running_mean") is None:
        return None
    hat = F.batch_norm(given["input"], given["running_mean"], given["running_var"], eps=given.get("eps", 1e-5))
    return given, hat, {"channel": 1}


RULES: dict[Callable, tuple[str, Callable]] = {
    F.linear: ("linear", _linear),
    F.conv1d: ("conv", _conv(1)),
    F.conv2d: ("conv", _conv(2)),
    F.conv3d: ("conv", _conv(3)),
    F.embedding: ("embedding", _embedding),
    F.layer_norm: ("norm", _layer_norm),
    F.group_norm: ("norm", _group_norm),
    F.batch_norm: ("norm", _batch_norm),
}
if hasattr(F, "rms_norm"):
    RULES[F.rms_norm] = ("norm", _rms_norm)


@dataclass
class Outer:
    """rows = sum_s g[n,k,s]^T a[n,s]: parameters weight [o, i] and, as a last column, bias [o]."""

    names: dict[str, str]
    a: Tensor  # [n, s, i]
    g: Tensor  # [n, k, s, o]

    def augmented(self) -> Tensor:
        """a [n, s, i + 1] with the ones of the bias, or a."""
        return torch.cat([self.a, self.a.new_ones(*self.a.shape[:2], 1)], 2) if "bias" in self.names else self.a


@dataclass
class Index:
    """rows[token[n,s]] += g[n,k,s]: an embedding [V, o]."""

    names: dict[str, str]
    token: Tensor  # int64 [n, s], -1 for padding
    g: Tensor  # [n, k, s, o]


@dataclass
class Rows:
    """Explicit rows [n, k, p] of one parameter."""

    names: dict[str, str]
    rows: Tensor


Factor = Outer | Index | Rows


def make_factors(use: Use, g: Tensor) -> list[Factor]:
    """Factors of one use from the gradients of the outputs with respect to its result, g [n, k, ...]."""
    return {"linear": _linear_factors, "conv": _conv_factors, "embedding": _embedding_factors, "norm": _norm_factors}[
        use.rule
    ](use, g)


def _outer(use: Use, a: Tensor, g: Tensor) -> list[Factor]:
    if "weight" in use.names:
        return [Outer(use.names, a, g)]
    return [Rows({"rows": use.names["bias"]}, g.sum(2))]


def _linear_factors(use: Use, g: Tensor) -> list[Factor]:
    x = use.saved
    return _outer(use, x.reshape(len(x), -1, x.shape[-1]), g.reshape(*g.shape[:2], -1, g.shape[-1]))


def _conv_factors(use: Use, g: Tensor) -> list[Factor]:
    x, options = use.saved, use.options
    n, k, out = g.shape[:3]
    for axis, (size, stride, dilation) in enumerate(
        zip(options["kernel"], options["stride"], options["dilation"], strict=True)
    ):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    dim, groups = len(options["kernel"]), options["groups"]
    # positions innermost: the copy runs along the image, and a is its transpose without another one
    a = x.permute(0, 1, *range(2 + dim, 2 + 2 * dim), *range(2, 2 + dim)).flatten(2 + dim).flatten(1, 1 + dim)
    a = a.transpose(1, 2)  # [n, s, c *kernel]
    g = g.flatten(3).transpose(2, 3)  # [n, k, s, o]
    if groups == 1:
        return _outer(use, a, g)
    found: list[Factor] = []
    if "weight" in use.names:
        split = g.unflatten(3, (groups, out // groups)), a.unflatten(2, (groups, -1))
        rows = torch.einsum("nksqo,nsqi->nkqoi", *split)
        found.append(Rows({"rows": use.names["weight"]}, rows.reshape(n, k, -1)))
    if "bias" in use.names:
        found.append(Rows({"rows": use.names["bias"]}, g.sum(2)))
    return found


def _embedding_factors(use: Use, g: Tensor) -> list[Factor]:
    token = use.saved.reshape(len(use.saved), -1)
    if use.options["padding_idx"] is not None:
        token = torch.where(token == use.options["padding_idx"] % use.options["rows"], -1, token)
    return [Index(use.names, token, g.reshape(*g.shape[:2], -1, g.shape[-1]))]


def _norm_factors(use: Use, g: Tensor) -> list[Factor]:
    hat = use.saved
    if use.options["channel"] is None:
        keep = use.options["dims"]
        shape = (-1, hat[(0,) * (hat.ndim - keep)].numel())
        hat, g = hat.reshape(len(hat), *shape), g.reshape(*g.shape[:2], *shape)
    else:
        hat = hat.reshape(*hat.shape[:2], -1).transpose(1, 2)
        g = g.reshape(*g.shape[:3], -1).transpose(2, 3)
    found: list[Factor] = []
    if "weight" in use.names:
        found.append(Rows({"rows": use.names["weight"]}, torch.einsum("nksc,nsc->nkc", g, hat)))
    if "bias" in use.names:
        found.append(Rows({"rows": use.names["bias"]}, g.sum(2)))
    return found
