"""Leaving blocks of rows out of a resolvent: small solves, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import ArgumentError, complaint
from .._op import op
from ..forms import check_triangular, triangular_sqnorm

_ELEMENTS = 1 << 23  # of one intermediate

_DOUBLE, _COMPLEX = (torch.float64,), (torch.complex128,)
_DTYPES = {"u": (torch.float32, torch.float64), "s": _DOUBLE, "g": _DOUBLE, "rest": _DOUBLE, "null": _DOUBLE}
_SHAPES = {"u": "b m r", "s": "r", "g": "r", "rest": "b m", "null": "b m m"}


def _example(device, m: int):
    rng = torch.Generator().manual_seed(m)
    u = 0.2 * torch.randn(6, m, 5, generator=rng, dtype=torch.float64)
    s = torch.rand(5, generator=rng, dtype=torch.float64)
    g, rest, r0 = torch.randn(5, generator=rng), torch.randn(6, m, generator=rng), torch.randn(6, m, generator=rng)
    null = torch.eye(m, dtype=torch.float64) - u @ u.transpose(1, 2)
    return [x.to(device, torch.float64) for x in (u, s, g, rest, null, r0)]


def _converged_examples(device):
    return [(*_example(device, m)[:5], 0.1) for m in (1, 3)]


def _rational_examples(device):
    poles = torch.tensor([-0.3 + 0.2j, -0.1 + 0j], dtype=torch.complex128, device=device)
    residues = torch.tensor([0.5 - 1j, 2.0 + 0j], dtype=torch.complex128, device=device)
    return [(*_example(device, m), poles, residues, 0.7) for m in (1, 3)]


def _sums_examples(device):
    return [
        (u, s, g, r0, outside, *filter_, g * 0.1, g * 0.3, torch.triu(torch.outer(s, g))[:4].contiguous())
        for u, s, g, _, _, r0, *filter_ in _rational_examples(device)
        for outside in (False, True)
    ]


def _check_shift(u, s, g, rest, null, shift) -> None:
    if not shift > 0:
        raise ArgumentError(complaint("shift of converged_removal", "a number > 0", shift, "Use the limit in loo/."))


@op(
    shapes=_SHAPES,
    result="b m,b r",
    examples=_converged_examples,
    dtypes=_DTYPES,
    result_dtype=torch.float64,
    check=_check_shift,
)
def converged_removal(
    u: Tensor, s: Tensor, g: Tensor, rest: Tensor, null: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """Left-out residual and change of the ridge solution when a block of rows leaves.

    ::

        w    = 1 / (s + shift)
        v    = (u diag(w) u^T + null / shift)^-1 (u (w g) + rest / shift)
        coef = -w (u^T v)

    Args:
        u: removed rows of the eigenvectors [b, m, r], float32 or float64. s: eigenvalues [r]. g: U^T r0 [r].
        rest: part of the removed residual outside span(U) [b, m]. null: removed block of 1 - U U^T [b, m, m].
        shift: lambda > 0.
    Returns:
        v [b, m], the left-out residual, and coef [b, r], the change of the dual weights on U; float64.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree; shift <= 0.
    Source: docs/math.md, section 5.
    """
    weight = 1 / (s + shift)
    results = []
    step = max(1, _ELEMENTS // max(1, u.shape[1] * u.shape[2]))
    for begin in range(0, len(u), step):
        part = slice(begin, begin + step)
        block = u[part].to(torch.float64)
        scaled = block * weight
        kernel = scaled @ block.transpose(1, 2) + null[part] / shift
        right = scaled @ g + rest[part] / shift
        v = torch.linalg.solve(kernel, right) if kernel.shape[1] != 1 else right / kernel[:, 0]
        results.append((v, -torch.einsum("bmr,bm->br", scaled, v)))
    if not results:
        return rest.clone(), s.new_zeros(0, len(s))
    return torch.cat([v for v, _ in results]), torch.cat([coef for _, coef in results])


@op(
    shapes=_SHAPES | {"r0": "b m", "poles": "q", "residues": "q"},
    result="b r",
    examples=_rational_examples,
    dtypes=_DTYPES | {"r0": _DOUBLE, "poles": _COMPLEX, "residues": _COMPLEX},
    result_dtype=torch.float64,
)
def rational_removal(
    u: Tensor,
    s: Tensor,
    g: Tensor,
    rest: Tensor,
    null: Tensor,
    r0: Tensor,
    poles: Tensor,
    residues: Tensor,
    constant: float,
) -> Tensor:
    """Change of constant r0 + sum_q Re residue_q (Theta - pole_q)^-1 r0 when a block of rows leaves.

    ::

        S_q  = 1 / (s - pole_q)
        y_q  = (u diag(S_q) u^T - null / pole_q)^-1 (u (S_q g) - rest / pole_q)
        coef = -constant u^T r0 - sum_q Re(residue_q S_q (u^T y_q))

    Args:
        u, s, g, rest, null: as in ``converged_removal``. r0: removed residual [b, m].
        poles, residues: complex128 [q]; one pole of each conjugate pair, its residue doubled; off the spectrum.
        constant: value of the filter at infinity.
    Returns:
        coef [b, r] float64: the change on U, zero filled at the removed rows.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree.
    Source: docs/math.md, section 6.
    """
    resolvent = 1 / (s[:, None] - poles)  # [r, q]
    results = []
    step = max(1, _ELEMENTS // max(1, u.shape[1] * max(u.shape[2], 2 * len(poles))))
    for begin in range(0, len(u), step):
        part = slice(begin, begin + step)
        block = u[part].to(torch.float64)
        remove = _remove_row if u.shape[1] == 1 else _remove_block
        results.append(remove(block, resolvent, g, rest[part], null[part], r0[part], poles, residues, constant))
    return torch.cat(results) if results else s.new_zeros(0, len(s))


_REAL = dict.fromkeys(("u", "s", "g", "r0", "base", "trained", "c"), _DOUBLE)


@op(
    shapes=dict(u="b m r", s="r", g="r", r0="b m", poles="q", residues="q", base="r", trained="r", c="p r"),
    result="b m,b,b",
    examples=_sums_examples,
    dtypes=_REAL | {"poles": _COMPLEX, "residues": _COMPLEX},
    result_dtype=torch.float64,
    check=lambda *args: check_triangular(args[-1]),
)
def rational_sums(
    u: Tensor,
    s: Tensor,
    g: Tensor,
    r0: Tensor,
    outside: bool,
    poles: Tensor,
    residues: Tensor,
    constant: float,
    base: Tensor,
    trained: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the change of ``rational_removal``, which itself is not kept.

    ::

        rest, null = r0 - u g, 1 - u u^T where outside, else 0, 0
        coef    = base + rational_removal(u, s, g, rest, null, r0, poles, residues, constant)
        reached = u (s (coef + trained))
        sqnorm  = sum_l s_l coef_l^2
        form    = ||c coef||^2

    Args:
        u .. constant: as in ``rational_removal``, u float64. outside: whether the eigenvectors do not span everything.
            base: added to every change [r]. trained: weights on the eigenvectors before it [r]. c: upper triangular
            [p, r], p <= r; what lies below its diagonal counts as zero.
    Returns:
        reached [b, m], sqnorm [b], form [b]; float64.
    Raises:
        ArgumentError: shapes, dtypes or devices that disagree; p > r.
    Source: docs/math.md, sections 6 and 11.
    """
    rest, null = missed_by(u, g, r0, outside)
    coef = base + rational_removal(u, s, g, rest, null, r0, poles, residues, constant)
    reached = torch.einsum("bmr,br->bm", u, s * (coef + trained))
    return reached, (s * coef * coef).sum(1), triangular_sqnorm(c, coef)


def missed_by(u: Tensor, g: Tensor, r0: Tensor, outside: bool) -> tuple[Tensor, Tensor]:
    """What rows u [b, m, r] of the eigenvectors miss of the residual r0 [b, m], and their block of 1 - U U^T [b, m, m].

    Both zero where nothing lies ``outside``.
    """
    m = u.shape[1]
    if not outside:
        return torch.zeros_like(r0), u.new_zeros(len(u), m, m)
    rest = r0 - u @ g
    if m == 1:
        return rest, 1 - torch.linalg.vector_norm(u, dim=2, keepdim=True).square()
    return rest, torch.eye(m, dtype=u.dtype, device=u.device) - u @ u.transpose(1, 2)


def _times(real: Tensor, factor: Tensor) -> Tensor:
    """A real matrix times a complex one, as two real products."""
    return torch.complex(real @ factor.real, real @ factor.imag)


def _remove_row(u, resolvent, g, rest, null, r0, poles, residues, constant) -> Tensor:
    row = u[:, 0]
    kernel = _times(row.square(), resolvent) - null[:, 0] / poles
    right = _times(row, resolvent * g[:, None]) - rest / poles
    y = right / kernel * residues
    back = y.real @ resolvent.real.T - y.imag @ resolvent.imag.T
    return -row * (back + constant * r0)


def _remove_block(u, resolvent, g, rest, null, r0, poles, residues, constant) -> Tensor:
    total = -constant * torch.einsum("bmr,bm->br", u, r0)
    for q in range(len(poles)):
        weight = resolvent[:, q]
        kernel = torch.complex((u * weight.real) @ u.transpose(1, 2), (u * weight.imag) @ u.transpose(1, 2))
        right = _times(u, (weight * g)[:, None])[..., 0] - rest / poles[q]
        y = torch.linalg.solve(kernel - null / poles[q], right) * residues[q]
        back = [torch.einsum("bmr,bm->br", u, part) for part in (y.real, y.imag)]
        total = total - weight.real * back[0] + weight.imag * back[1]
    return total
