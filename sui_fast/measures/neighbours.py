"""Nearest samples: those of another class speak against a label, those of the same class make a sample redundant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 24  # similarities at a time
_PRODUCTS, _SUSPECTS = 1e11, 256  # of a run of low rank: a few seconds at most


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


def feature_neighbours(
    shards: Callable[[], Iterable[Tensor]],
    shape: tuple[int, int, int],
    labels: Tensor,
    suspects: np.ndarray,
    most: int = 3,
    *,
    first: int = 0,
    gather: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
) -> dict[str, np.ndarray] | None:
    """Neighbours of a few samples by a kernel of low rank, in two passes over the features.

    Args:
        shards: gives an iterable over the features [b, k, r] of all samples, in order; called twice.
        shape: (n, k, r) of all. labels: class of each sample, [n]. suspects: rows whose neighbours are wanted, most
            wanted first; as many are taken as some seconds allow. most: neighbours of each kind.
        first, gather: where this process has but some shards: the number of its first sample, and a function that puts
            the arrays of all processes together.
    Returns:
        As ``nearest``, for all n samples, -1 for those that were not looked at; None where nothing was looked at.
    """
    n, most = shape[0], max(min(most, shape[0] - 1), 0)
    rows = torch.from_numpy(np.sort(suspects[: min(int(_PRODUCTS / math.prod(shape)), _SUSPECTS)]))
    if not len(rows):
        return None
    own, begin = [], first
    for features in shards():
        here = rows[(rows >= begin) & (rows < begin + len(features))] - begin
        own.append(features[here.to(features.device)].flatten(1).to("cpu", torch.float32).numpy())
        begin += len(features)
    few = torch.from_numpy(gather({"few": np.concatenate(own)} if own else {})["few"])
    few, begin = torch.nn.functional.normalize(few), first
    best: dict[str, tuple[Tensor, Tensor]] = {
        kind: (few.new_empty(len(few), 0), rows.new_empty(len(few), 0)) for kind in ("other", "same")
    }
    for features in shards():
        few, rows, labels = (x.to(features.device) for x in (few, rows, labels))
        numbers = torch.arange(begin, begin + len(features), device=few.device)
        similar = few @ torch.nn.functional.normalize(features.flatten(1).to(torch.float32)).T
        alike = labels[rows, None] == labels[numbers]
        for kind, mask in (("other", ~alike), ("same", alike & (rows[:, None] != numbers))):
            value, at = similar.masked_fill(~mask, -torch.inf).topk(min(most, len(numbers)), dim=1)
            pairs = zip(best[kind], (value, numbers[at]), strict=True)
            best[kind] = _leading(*(torch.cat([x.to(y), y], 1) for x, y in pairs), most)
        begin += len(features)
    found: dict[str, np.ndarray] = {}
    for kind, pair in best.items():
        every = gather(dict(zip(("value", "place"), (x.T.cpu().numpy() for x in pair), strict=True)))
        value, place = _leading(*(torch.from_numpy(every[name]).T for name in ("value", "place")), most)
        missing = value == -torch.inf
        found[kind] = np.full((n, most), -1, dtype=np.int64)
        found[f"{kind}_similarity"] = np.zeros((n, most), dtype=np.float32)
        found[kind][rows.cpu().numpy()] = place.masked_fill(missing, -1).numpy()
        found[f"{kind}_similarity"][rows.cpu().numpy()] = value.masked_fill(missing, 0.0).clamp(-1.0, 1.0).numpy()
    return found


def _leading(value: Tensor, place: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row and their places, the first of equal ones first."""
    value, at = value.sort(dim=1, descending=True, stable=True)
    return value[:, :most], place.gather(1, at[:, :most])


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
