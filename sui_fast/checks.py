"""The arguments of score() and plan(), checked before anything long begins."""

from __future__ import annotations

from ._errors import ArgumentError, complaint, flag, number, one_of, path_of, whole
from .loo import CONVENTIONS, make_filter
from .losses import check_loss
from .measures import MEASURES
from .ops.sketching import KINDS
from .planning import METHODS
from .projections import MODES
from .spectra import PROJECTIONS


def check_arguments(
    *, measures, loss, sigma, method, rank, reg, time, lr, dynamics, convention, batch_size, seed, store, resume,
    progress, output_mode, output_rank, sgd_batch_size, sgd_lr, sgd_jitter, sketch,
    **others,
) -> tuple[str, ...]:  # fmt: skip
    """The measures asked for, each once.

    Raises:
        ArgumentError: an argument that has no meaning, also where this call would not use it.
    """
    wanted = (measures,) if isinstance(measures, str) else ()
    if isinstance(measures, list | tuple | set | frozenset):
        wanted = tuple(measures)
    unknown = [name for name in wanted if not isinstance(name, str) or name not in MEASURES]
    if unknown or not wanted:
        got = repr(unknown or measures)
        raise ArgumentError(complaint("measures", f"some of {', '.join(MEASURES)}", got, "Choose from the list."))
    check_loss(loss)
    one_of("method", method, METHODS)
    if rank is not None:
        whole("rank", rank, 1)
        if method == "dense":
            todo = "It belongs to methods of low rank."
            raise ArgumentError(complaint("rank", "None with an exact method", repr(rank), todo))
    one_of("sketch", sketch, KINDS)
    if sketch != "tensor" and method != "sketch":
        todo = "Pass method='sketch' as well, or drop it."
        raise ArgumentError(complaint("sketch", f"'tensor' with method={method!r}", repr(sketch), todo))
    automatic = isinstance(reg, str)
    if automatic and reg != "auto":
        raise ArgumentError(complaint("reg", "a number >= 0 or 'auto'", repr(reg), "Choose one."))
    make_filter(1, reg=0.0 if automatic else reg, time=time, lr=lr, dynamics=dynamics)
    one_of("convention", convention, CONVENTIONS)
    one_of("output_mode", output_mode, MODES)
    for name, value in (("batch_size", batch_size), ("output_rank", output_rank)):
        whole(name, value, 1)
    whole("seed", seed)
    for name, value in (("resume", resume), ("progress", progress)):
        flag(name, value)
    if store is not None:
        path_of("store", store)
        if method == "dense":
            raise ArgumentError(complaint("store", "None with an exact method", repr(store), "Drop it."))
    sgd_lr = 1.0 if sgd_lr is None else sgd_lr
    for name, value in dict(sigma=sigma, sgd_batch_size=sgd_batch_size, sgd_lr=sgd_lr, sgd_jitter=sgd_jitter).items():
        number(name, value, positive=True)
    return tuple(dict.fromkeys(wanted))


def authors_definitions(compat: str | None, convention: str, method: str, rank: int | None):
    """(convention, method, rank, projection) that ``compat`` stands for."""
    if compat is None:
        return convention, method, rank, None
    one_of("compat", compat, ("iclr2021",))
    one_of("convention", convention, CONVENTIONS)
    one_of("method", method, (*METHODS, *PROJECTIONS))
    if convention not in ("sum", "iclr2021"):
        got, todo = repr(convention), "Drop one of the two."
        raise ArgumentError(complaint("convention", "the one that compat='iclr2021' brings", got, todo))
    if method not in PROJECTIONS:
        return "iclr2021", method, rank, None
    if rank is not None:
        whole("rank", rank, 1)
    return "iclr2021", "dense", None, (method, rank)
