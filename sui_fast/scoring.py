"""score(): from a model and a data set to a table, one stage after the other."""

from __future__ import annotations

import copy
import math
import sys
import time as clock
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ._errors import ArgumentError, complaint
from .jacobians import jacobian
from .jacobians.data import as_samples
from .loo import Removal, leave_one_out, loo_error_curve, make_blocks, make_filter, remove_from_spectrum
from .measures import MEASURES, UNITS, information, loo_margin, sgd_information
from .scores import Scores
from .spectra import dense_spectrum
from .targets import regression_targets

try:
    import resource
except ImportError:  # not on Windows
    resource = None

LOSSES = ("mse",)
METHODS = ("auto", "dense")


class _Stages:
    """Seconds per stage, and a progress bar for runs longer than two seconds."""

    def __init__(self, total: int, progress: bool):
        self.seconds: dict[str, float] = {}
        self._bar = tqdm(total=total, desc="score", delay=2, leave=False, disable=not progress)

    @contextmanager
    def __call__(self, name: str):
        self._bar.set_description(f"score: {name}", refresh=False)
        start = clock.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + clock.perf_counter() - start
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def score(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    measures=("si", "fsi"),
    loss: str = "mse",
    reg: float | str = 0.0,
    time: float | None = None,
    lr: float | None = None,
    dynamics: str = "gd",
    sigma: float = 1.0,
    method: str = "auto",
    rank: int | None = None,
    params="trainable",
    outputs=None,
    batch_size: int = 64,
    device=None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    groups=None,
    convention: str = "sum",
    store=None,
    resume: bool = True,
    progress: bool = True,
    sgd_batch_size: int = 1,
    sgd_lr: float | None = None,
    sgd_jitter: float = 1e-9,
) -> Scores:
    """How much unique information each training sample gives to the weights (SI) and the predictions (F-SI).

    ::

        SI_i   = ||w_-i - w||^2 / (2 sigma^2)
        F-SI_i = mean over validation x of ||f_-i(x) - f(x)||^2 / (2 sigma^2)         in nats

    for the network linearised at its present weights, trained on the mean squared loss with
    reg/2 ||w - w0||^2, and exactly retrained without each sample. The model runs in eval mode and is left as found.

    Args:
        model: any module with k outputs per sample.
        train: Dataset, unshuffled DataLoader, (inputs, targets), Hugging Face Dataset or list of batches. Targets:
            float [n, k] or [n], or integer classes (one-hot for k > 1, {0, 1} for k = 1).
        val: the same, targets not needed; required by "fsi".
        measures: of "si", "fsi", "si_langevin", "si_sgd", "leverage", "loo_residual", "loo_margin".
        loss: "mse".
        reg: lambda' of the mean loss, or "auto": the value with the smallest exact leave-one-out error.
        time: training steps ("gd") or time ("flow"); None: trained to convergence. lr: step size of the mean loss.
        dynamics: "gd" or "flow".
        sigma: standard deviation of the noise, in units of the weights (SI) or outputs (F-SI).
        method: "auto" or "dense" (exact).
        rank, store, resume: for methods of low rank; rank and store must be None here.
        params: "trainable", "all", names, or a predicate: the parameters that count.
        outputs: function (model, batch) -> [b, k]; default: the model's tensor, or its ``.logits``.
        batch_size: samples per forward pass; no effect on the result.
        device: where to compute (default: where the model is); dtype: of the Jacobian (default float64).
        seed: recorded; an exact run draws no random numbers.
        groups: one label per sample, [n]: samples with equal labels are removed together, one row of scores each.
        convention: "sum", "mean" or "iclr2021" (see ``leave_one_out``).
        progress: show a bar on runs longer than two seconds.
        sgd_batch_size, sgd_lr, sgd_jitter: noise of "si_sgd" (lr: default ``lr``, else 1).
    Returns:
        Scores, one row per sample in the order of ``train``.
    Raises:
        ArgumentError, DataError, StabilityError, CoverageError, SpectrumError; each names the argument and the remedy.
    Source: Harutyunyan et al., ICLR 2021, Definitions 3.1 and 4.1, eqs. 5 and 16.
    """
    wanted = _check_arguments(measures, loss, sigma, method, rank, store, val, convention, sgd_batch_size, sgd_jitter)
    sgd_lr = sgd_lr if sgd_lr is not None else (lr if lr is not None else 1.0)
    if not (isinstance(sgd_lr, int | float) and math.isfinite(sgd_lr) and sgd_lr > 0):
        raise ArgumentError(complaint("sgd_lr", "a finite number > 0", repr(sgd_lr), "Pass the step size of SGD."))
    automatic = isinstance(reg, str)
    if automatic and reg != "auto":
        raise ArgumentError(complaint("reg", "a number >= 0 or 'auto'", repr(reg), "Choose one."))
    make_filter(1, reg=0.0 if automatic else reg, time=time, lr=lr, dynamics=dynamics)  # fail before the long part
    if device is not None and _device_of(model) != torch.device(device):
        model = copy.deepcopy(model).to(device)

    stages = _Stages(5 + ("fsi" in wanted) * 2, progress)
    try:
        with stages("data"):
            samples = as_samples(train, with_targets=True, argument="train")
        common = dict(outputs=outputs, params=params, batch_size=batch_size, dtype=dtype or torch.float64)
        with stages("jacobian"):
            jac = jacobian(model, samples, progress=progress, **common)
            y, labels = regression_targets(samples.targets, jac.k)
            blocks = make_blocks(jac.n, jac.k, groups)
            r0 = y.to(jac.device) - jac.outputs.to(torch.float64)
            if "loo_margin" in wanted:
                _check_labels(labels, groups)
        cross = None
        if "fsi" in wanted:
            with stages("validation jacobian"):
                probe = jacobian(model, as_samples(val, with_targets=None, argument="val"), progress=progress, **common)
        with stages("kernel"):
            theta = jac.gram(progress=progress).to(torch.float64)
        if "fsi" in wanted:
            with stages("validation kernel"):
                cross = probe.gram(jac, progress=progress).to(torch.float64)
        curve = None
        with stages("leave one out"):
            shared = dict(time=time, lr=lr, dynamics=dynamics)
            if automatic:
                spectrum, idle = dense_spectrum(theta), (theta == 0).all(1)
                regs, errors = loo_error_curve(spectrum, r0, blocks, idle, convention=convention, **shared)
                reg, curve = float(regs[errors.argmin()]), {"reg": regs.tolist(), "loo_error": errors.tolist()}
                removal: Removal = remove_from_spectrum(
                    spectrum,
                    make_filter(jac.n, reg=reg, **shared),
                    r0,
                    cross=cross,
                    blocks=blocks,
                    convention=convention,
                    as_numpy=False,
                    idle=idle,
                )
            else:
                removal = leave_one_out(
                    theta,
                    r0,
                    reg=reg,
                    cross_ntk=cross,
                    groups=groups,
                    convention=convention,
                    method="spectral" if "si_sgd" in wanted else "auto",
                    **shared,
                )
        with stages("measures"):
            values, extra = _measure(
                removal,
                wanted,
                sigma,
                y.to(jac.device),
                labels,
                shift=jac.n * reg,
                lr=sgd_lr,
                batch_size=sgd_batch_size,
                jitter=sgd_jitter,
            )
    finally:
        stages.close()

    settings = dict(
        measures=list(wanted),
        loss=loss,
        reg=reg,
        time=time,
        lr=lr,
        dynamics=dynamics,
        sigma=sigma,
        method="dense",
        params=params if isinstance(params, str) else repr(params),
        batch_size=batch_size,
        dtype=str(common["dtype"]).removeprefix("torch."),
        seed=seed,
        convention=convention,
        grouped=groups is not None,
    )
    if "si_sgd" in wanted:
        settings.update(sgd_batch_size=sgd_batch_size, sgd_lr=sgd_lr, sgd_jitter=sgd_jitter)
    details = removal.diagnostics
    diagnostics: dict[str, Any] = dict(
        method="dense",
        **details,
        error_estimate=max(details["eigen_error"], details["filter_error"]),
        samples=jac.n,
        outputs=jac.k,
        parameters=jac.shape[1],
        coverage=jac.coverage,
        initial_mse=float(r0.square().sum(1).mean()),
        loo_mse=float(torch.as_tensor(removal.loo_residual).square().sum(1).mean()),
        seconds=stages.seconds,
        peak_bytes=_peak_bytes(jac.device),
        **extra,
    )
    if curve is not None:
        diagnostics["reg_curve"] = curve
    return Scores(
        ids=samples.ids if groups is None else blocks.labels,
        values=values,
        settings=settings,
        diagnostics=diagnostics,
        units={name: UNITS[name] for name in values},
        labels=labels.cpu().numpy() if labels is not None and groups is None else None,
        inputs=_small_inputs(samples) if groups is None else None,
    )


def _measure(
    removal: Removal, wanted, sigma: float, y, labels, *, shift: float, lr: float, batch_size: int, jitter: float
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns asked for, in the order asked for, and what is to be said about them."""
    extra: dict[str, Any] = {}

    def column(name: str):
        if name == "si":
            return information(removal.weight_sqnorm, sigma)
        if name == "fsi":
            return information(removal.prediction_sqnorm, sigma)
        if name == "si_langevin":
            return information(removal.hessian_sqnorm, sigma)
        if name == "si_sgd":
            value, share = sgd_information(removal, shift=shift, lr=lr, batch_size=batch_size, jitter=jitter)
            extra["si_sgd_jitter_share"] = share.cpu().tolist()
            return value / sigma**2
        if name == "leverage":
            return removal.leverage
        if name == "loo_residual":
            return removal.sum_over_blocks(removal.loo_residual.square().sum(1)).sqrt()
        return loo_margin(y, removal.loo_residual, labels.to(y.device))

    return {name: column(name).cpu().numpy().astype(np.float64) for name in wanted}, extra


def _check_arguments(measures, loss, sigma, method, rank, store, val, convention, sgd_batch_size, sgd_jitter):
    wanted = (measures,) if isinstance(measures, str) else tuple(measures)
    unknown = [name for name in wanted if name not in MEASURES]
    if unknown or not wanted:
        raise ArgumentError(
            complaint("measures", f"some of {', '.join(MEASURES)}", repr(unknown or wanted), "Choose from the list.")
        )
    if loss not in LOSSES:
        raise ArgumentError(complaint("loss", "'mse'", repr(loss), "One-hot squared loss serves classification."))
    if method not in METHODS:
        raise ArgumentError(
            complaint(
                "method",
                f"one of {', '.join(map(repr, METHODS))}",
                repr(method),
                "This version computes exact scores only.",
            )
        )
    for name, value in (("rank", rank), ("store", store)):
        if value is not None:
            raise ArgumentError(
                complaint(name, "None with an exact method", repr(value), "It belongs to methods of low rank.")
            )
    if "fsi" in wanted and val is None:
        raise ArgumentError(
            complaint("val", "validation samples for the measure 'fsi'", None, "Pass val=..., or measures=('si',).")
        )
    for name, value in (("sigma", sigma), ("sgd_batch_size", sgd_batch_size), ("sgd_jitter", sgd_jitter)):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
            raise ArgumentError(complaint(name, "a finite number > 0", repr(value), "Pass a positive number."))
    return tuple(dict.fromkeys(wanted))


def _check_labels(labels, groups) -> None:
    if labels is None or groups is not None:
        raise ArgumentError(
            complaint(
                "measures",
                "classes as targets and single samples for 'loo_margin'",
                "groups" if groups is not None else "float targets that name no class",
                "Pass integer classes, or use 'loo_residual'.",
            )
        )


def _device_of(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _small_inputs(samples, most: int = 16_384) -> np.ndarray | None:
    """The inputs for the report, where they are one array of at most ``most`` numbers a sample."""
    parts = []
    for batch in samples.batches(256):
        if not isinstance(batch, torch.Tensor) or batch[0].numel() > most:
            return None
        parts.append(batch.detach().cpu().to(torch.float32).numpy())
    stacked = np.concatenate(parts)
    return stacked if stacked.nbytes < 1 << 28 else None
