"""merge(): one table from the parts of a run that were started by hand."""

from __future__ import annotations

import torch

from .parts import Merged, settings_of_parts
from .scores import Scores
from .scoring import score


def merge(model: torch.nn.Module, train, val=None, *, store, **arguments) -> Scores:
    """Scores from the features that ``score(..., store=store, part=(i, count))`` left, for i = 1 .. count.

    Args:
        model, train, val, arguments: as each part had them; method, rank, sketch and seed are those of the parts where
            they are not given. What the features do not depend on (measures, reg, time, sigma, ...) may be chosen here.
        store: the folder of the parts, copied together where they ran on several machines.
    Returns:
        Scores, those of one process that does it all.
    Raises:
        StoreError: a part is missing, incomplete, damaged or of another run; it tells which part and what differs.
        As ``score`` otherwise.
    """
    count, settings = settings_of_parts(store)
    return score(model, train, val, store=store, part=Merged(count), **{**settings, **arguments})
