"""Several sources of data for one task: what each gives, to itself and to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .._errors import ArgumentError, complaint, number
from .._waiting import waited_for
from ..jacobians import Samples, as_samples
from .kernel import linear_problem
from .results import Result, plain


@dataclass(frozen=True, eq=False)
class Sources(Result):
    """What each of q sources gives.

    Attributes:
        names: of the sources; sizes: samples [q]; targets: names of the validation sets [v].
        si, fsi: mean information of a sample of each source, nats [q] and for each validation set [q, v].
        group_si, group_fsi: information of each source left out as a whole [q], [q, v].
        overlap_si, overlap_fsi: information of two sources one by one minus together, [q, q], for fsi over all
            validation samples; negative: they stand in for each other.
        sample_si, sample_fsi, source: of every sample, in the order of the sources.
    """

    title: ClassVar[str] = "Sources compared"
    names: list[str]
    sizes: np.ndarray
    targets: list[str]
    si: np.ndarray
    fsi: np.ndarray
    group_si: np.ndarray
    group_fsi: np.ndarray
    overlap_si: np.ndarray
    overlap_fsi: np.ndarray
    sample_si: np.ndarray
    sample_fsi: np.ndarray
    source: np.ndarray

    def summary(self) -> str:
        lines = []
        for j, target in enumerate(self.targets):
            best, whole = int(self.fsi[:, j].argmax()), int(self.group_fsi[:, j].argmax())
            lines.append(
                f"For {target}, a sample of {self.names[best]} tells most ({self.fsi[best, j]:.3g} nats on average), "
                f"and {self.names[whole]} as a whole ({self.group_fsi[whole, j]:.3g} nats)."
            )
        return " ".join(lines)

    def columns(self) -> dict[str, np.ndarray]:
        found = {"source": np.array(self.names), "samples": self.sizes, "si": self.si, "group_si": self.group_si}
        for j, target in enumerate(self.targets):
            found |= {f"fsi_for_{target}": self.fsi[:, j], f"group_fsi_for_{target}": self.group_fsi[:, j]}
        for j, other in enumerate(self.names):
            found[f"overlap_with_{other}"] = self.overlap_fsi[:, j]
        return found

    def _draw(self, ax) -> None:
        width = 0.8 / max(len(self.names), 1)
        for i, name in enumerate(self.names):
            ax.bar(np.arange(len(self.targets)) + i * width, self.fsi[i], width, label=plain(name))
        ax.set_xticks(np.arange(len(self.targets)) + 0.4 - width / 2, [plain(x) for x in self.targets])
        ax.set(xlabel="validation set", ylabel="mean F-SI of a sample, nats")
        ax.legend(title="source")


@waited_for
def compare_sources(
    model: torch.nn.Module,
    sources: Mapping[str, object],
    val: Mapping[str, object],
    *,
    reg: float | str = "auto",
    sigma: float = 1.0,
    **arguments,
) -> Sources:
    """Train on all sources together; how informative is each, for each validation set, and what do two share?

    Args:
        model: as in ``score``.
        sources: {name: training data as in ``score``}, at least two, of one kind.
        val: {name: validation data}; one per source, or any others.
        reg, sigma, arguments: of ``score``.
    Returns:
        Sources.
    Raises:
        ArgumentError; as ``score``.
    Source: Harutyunyan et al., ICLR 2021, section 6 (data sources).
    """
    sigma = number("sigma", sigma, positive=True)
    for name, value, least in (("sources", sources, 2), ("val", val, 1)):
        if not isinstance(value, Mapping) or len(value) < least:
            got = type(value).__name__ if not isinstance(value, Mapping) else f"{len(value)} entries"
            what = f"a dict {{name: data}} with at least {least} entr{'y' if least == 1 else 'ies'}"
            raise ArgumentError(complaint(name, what, got, "Name the data, {'a': (x, y), 'b': (x, y)}."))
    parts = {name: as_samples(data, with_targets=True, argument=f"sources[{name!r}]") for name, data in sources.items()}
    probes = {name: as_samples(data, with_targets=None, argument=f"val[{name!r}]") for name, data in val.items()}
    names, targets = list(parts), list(probes)
    together = _together(parts, "sources", True), _together(probes, "val", False)
    problem = linear_problem(model, *together, reg=reg, **arguments)
    source = np.repeat(np.arange(len(names)), [part.n for part in parts.values()])
    own = np.repeat(np.arange(len(targets)), [part.n for part in probes.values()])
    views = [problem.cross_of(own == j) for j in range(len(targets))]
    members = [np.flatnonzero(source == i) for i in range(len(names))]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    scale = 2 * sigma**2
    removal = problem.removal()
    sample_si = removal.weight_sqnorm.cpu().numpy() / scale
    seen = [problem.removal(cross=view).prediction_sqnorm.cpu().numpy() for view in views]
    sample_fsi = np.stack(seen, -1) / scale
    group_fsi = np.stack([problem.without(members, view)[1] for view in views], -1) / scale
    sets = [*members, *(np.union1d(members[i], members[j]) for i, j in pairs)]
    q = len(names)
    overlaps = []
    group_si = None
    for found in problem.without(sets):
        alone, joint = found[:q] / scale, found[q:] / scale
        group_si = alone if group_si is None else group_si
        matrix = np.diag(alone)
        for (i, j), both in zip(pairs, joint, strict=True):
            matrix[i, j] = matrix[j, i] = alone[i] + alone[j] - both
        overlaps.append(matrix)
    return Sources(
        names=[str(name) for name in names],
        sizes=np.array([part.n for part in parts.values()]),
        targets=[str(name) for name in targets],
        si=np.array([sample_si[m].mean() for m in members]),
        fsi=np.stack([sample_fsi[m].mean(0) for m in members]),
        group_si=group_si,
        group_fsi=group_fsi,
        overlap_si=overlaps[0],
        overlap_fsi=overlaps[1],
        sample_si=sample_si,
        sample_fsi=sample_fsi,
        source=source,
    )


def _together(parts: Mapping[str, Samples], argument: str, with_targets: bool) -> Samples:
    """All parts as one data set."""
    chunks = [chunk for part in parts.values() for chunk in part._chunks]
    found = [part.targets for part in parts.values()]
    if not with_targets:
        return Samples(chunks, None, None, argument)
    kinds = {(t.is_floating_point(), t.ndim) for t in found}
    if len(kinds) > 1:
        got, todo = "classes in one and numbers in another, or other shapes", "Give all the same kind."
        raise ArgumentError(complaint(argument, "targets of one kind", got, todo))
    return Samples(chunks, torch.cat(found), None, argument)
