"""Nearest samples: those of another class speak against a label, those of the same class make a sample redundant."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 24  # similarities at a time


def kernel_neighbours(theta: Tensor, k: int, labels: Tensor | None, most: int = 3) -> dict[str, np.ndarray]:
    """The samples whose gradients point most nearly the same way.

    ::

        similarity(i, j) = tr Theta_ij / sqrt(tr Theta_ii tr Theta_jj),   Theta_ij the k x k block of two samples

    Args:
        theta: NTK [N, N], N = n k, rows ordered by sample. k: outputs.
        labels: class of each sample, [n], or None.
        most: neighbours of each kind.
    Returns:
        As ``nearest``.
    """
    traces = sum(theta[c::k, c::k] for c in range(k)) if k > 1 else theta
    norms = traces.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))

    def similarities(rows: Tensor) -> Tensor:
        return traces[rows] * inverse[rows, None] * inverse

    return nearest(similarities, torch.arange(len(norms), device=theta.device), len(norms), labels, most)


def input_neighbours(
    inputs: np.ndarray, labels: np.ndarray | None, most: int = 3, rows: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The samples whose inputs are most alike: cosine between inputs less their mean.

    Args:
        inputs: [n, ...]. labels: class of each sample, [n], or None. most: neighbours of each kind. rows: the samples
            whose neighbours are wanted; default: all.
    Returns:
        As ``nearest``.
    """
    flat = torch.from_numpy(np.asarray(inputs, dtype=np.float32).reshape(len(inputs), -1))
    flat = flat - flat.mean(0)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    known = None if labels is None else torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    wanted = torch.arange(len(flat)) if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64))
    return nearest(lambda chosen: flat[chosen] @ flat.T, wanted, len(flat), known, most)


def nearest(similarities, rows: Tensor, n: int, labels: Tensor | None, most: int) -> dict[str, np.ndarray]:
    """The most similar samples of another class and of the same class.

    Args:
        similarities: function of sample numbers [b] -> [b, n]. rows: sample numbers. n: samples.
        labels: class of each sample, [n]; None: all are of the same class. most: neighbours of each kind.
    Returns:
        {"other", "same"}: sample numbers int64 [n, q], nearest first, -1 where there are fewer;
        {"other_similarity", "same_similarity"}: float32 [n, q], at most 1.
    """
    most = max(min(most, n - 1), 0)
    found: dict[str, list[Tensor]] = {name: [] for name in ("other", "other_similarity", "same", "same_similarity")}
    step = max(1, _CHUNK // max(n, 1))
    for own in rows.split(step):
        similar = similarities(own).to(torch.float32)
        alike = torch.ones_like(similar, dtype=torch.bool) if labels is None else labels[own, None] == labels
        for name, mask in (("other", ~alike), ("same", alike)):
            masked = similar.masked_fill(~mask, -torch.inf)
            masked[torch.arange(len(own), device=own.device), own] = -torch.inf
            value, place = masked.topk(most, dim=1)
            missing = value == -torch.inf
            found[name].append(place.masked_fill(missing, -1))
            found[f"{name}_similarity"].append(value.masked_fill(missing, 0.0).clamp(-1.0, 1.0))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}
