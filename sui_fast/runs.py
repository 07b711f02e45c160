"""The two ways through a run: the exact kernel, and one of low rank."""

from __future__ import annotations

import time as clock
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ._errors import ArgumentError, complaint
from .jacobians import jacobian
from .loo import (
    Removal,
    add_to_kernel,
    check_stability,
    leave_one_out,
    loo_error_curve,
    make_blocks,
    make_filter,
    remove_from_spectrum,
)
from .measures import (
    feature_neighbours,
    information,
    kernel_neighbours,
    loo_margin,
    sgd_information,
    suggested_label,
)
from .spectra import dense_spectrum, feature_spectrum
from .streaming import (
    LowRank,
    Processes,
    Source,
    collect,
    features_of,
    fit_map,
    kernel_error,
    moments_of,
    open_store,
    run_fingerprint,
    warn_of_rank,
)


class Stages:
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


class Run:
    """The two ways through a run, exact and of low rank; each returns (columns, diagnostics, reg, ids)."""

    def __init__(self, model, wanted, reg, training, convention, groups, sigma, seed, progress):
        self.model, self.wanted, self.reg, self.training = model, wanted, reg, training
        self.convention, self.groups, self.sigma, self.seed, self.progress = convention, groups, sigma, seed, progress
        self.samples = self.probes = self.y = self.labels = None
        self.candidates = self.new_y = self.new_labels = None
        self.new_values: dict[str, np.ndarray] = {}
        self.suggested: np.ndarray | None = None
        self.neighbours: dict[str, np.ndarray] | None = None
        self.sgd: dict[str, Any] = {}

    def dense(self, stages: Stages, common: dict[str, Any]):
        """The exact kernel."""
        with stages("jacobian"):
            jac = jacobian(self.model, self.samples, progress=self.progress, **common)
            blocks = make_blocks(jac.n, jac.k, self.groups)
            r0 = self.y - jac.outputs.to(torch.float64)
        cross, reg, extra = None, self.reg, {}
        if self.probes is not None:
            with stages("validation jacobian"):
                probe = jacobian(self.model, self.probes, progress=self.progress, **common)
        with stages("kernel"):
            theta = jac.gram(progress=self.progress).to(torch.float64)
        if self.probes is not None:
            with stages("validation kernel"):
                cross = probe.gram(jac, progress=self.progress).to(torch.float64)
        with stages("leave one out"):
            shared = dict(cross=cross, blocks=blocks, convention=self.convention, as_numpy=False)
            if isinstance(reg, str):
                spectrum, idle = dense_spectrum(theta), (theta == 0).all(1)
                regs, errors = loo_error_curve(
                    spectrum, r0, blocks, idle, convention=self.convention, **self.training
                )
                reg, extra["reg_curve"] = float(regs[errors.argmin()]), _curve(regs, errors)
                phi = make_filter(jac.n, reg=reg, **self.training)
                removal: Removal = remove_from_spectrum(spectrum, phi, r0, idle=idle, **shared)
            else:
                removal = leave_one_out(
                    theta, r0, reg=reg, cross_ntk=cross, groups=self.groups, convention=self.convention,
                    method="spectral" if "si_sgd" in self.wanted else "auto", **self.training,
                )  # fmt: skip
        with stages("measures"):
            values, more = self._measure(removal, self.y, self.labels, jac.n * reg)
            if self.groups is None:
                classes = None if self.labels is None else self.labels.to(theta.device)
                self.neighbours = kernel_neighbours(theta, jac.k, classes)
                if classes is not None:
                    self.suggested = suggested_label(self.y, removal.loo_residual).cpu().numpy()
        if self.candidates is not None:
            with stages("candidates"):
                new = jacobian(self.model, self.candidates, progress=self.progress, **common)
                reach = None if self.probes is None else probe.gram(new)
                phi = make_filter(jac.n, reg=reg, **self.training)
                added = add_to_kernel(
                    theta, r0, new.gram(jac), new.own_blocks(), self.new_y - new.outputs.to(torch.float64), phi,
                    cross=cross, reach=reach, convention=self.convention,
                )  # fmt: skip
                self.new_values, _ = self._measure(added, self.new_y, self.new_labels, jac.n * reg)
        details = removal.diagnostics
        details = dict(
            **details,
            error_estimate=max(details["eigen_error"], details["filter_error"]),
            **self._about(jac.n, jac.k, jac.shape[1], jac.coverage, common["dtype"]),
            initial_mse=float(r0.square().sum(1).mean()),
            loo_mse=float(torch.as_tensor(removal.loo_residual).square().sum(1).mean()),
            **extra,
            **more,
        )
        return values, details, reg, self.samples.ids if self.groups is None else blocks.labels

    def low_rank(self, stages: Stages, common: dict[str, Any], method: str, rank: int, store, resume: bool):
        """A kernel of low rank, shard by shard."""
        n, processes = self.samples.n, Processes()
        source = Source(self.model, self.samples, common, *processes.slice(n))
        whole = self.groups is not None or "si_sgd" in self.wanted
        if whole and processes.count > 1:
            raise ArgumentError(
                complaint("groups", "None in a run of several processes", "groups or 'si_sgd'", "Use one process.")
            )
        with stages(f"{method} map"):
            fmap = fit_map(source, method, rank, self.seed, processes)
        about = dict(method=method, rank=fmap.rank, seed=self.seed, options=repr(sorted(common.items(), key=str)))
        stores = []
        try:
            with stages("features"):
                print_ = run_fingerprint(self.model, self.samples, about, _version())
                stores.append(open_store(store, print_, "train", processes, resume))
                collect(source, fmap, self.y, stores[0], self.progress)
                device = self.y.device
                moments = moments_of(stores[0], fmap.rank, device)
                moments.reduce(processes.total)
                spectrum = feature_spectrum(moments)
            moment = seen = None
            if self.probes is not None:
                with stages("validation features"):
                    probes = Source(self.model, self.probes, common, *processes.slice(self.probes.n))
                    print_ = run_fingerprint(self.model, self.probes, about, _version())
                    stores.append(open_store(store, print_, "validation", processes, resume))
                    collect(probes, fmap, None, stores[1], self.progress)
                    seen = moments_of(stores[1], fmap.rank, device)
                    seen.reduce(processes.total)
                    moment = spectrum.moment(seen.gram, seen.samples)
            with stages("leave one out"):
                groups = self.groups if self.groups is not None or not whole else np.arange(n)
                solver = LowRank(
                    stores[0], spectrum, self.y.shape[1], moment=moment, convention=self.convention, groups=groups,
                    device=device,
                )  # fmt: skip
                reg, extra = self.reg, {}
                if isinstance(reg, str):
                    regs, errors = solver.loo_error_curve(processes.total, **self.training)
                    reg, extra["reg_curve"] = float(regs[errors.argmin()]), _curve(regs, errors)
                phi = make_filter(n, reg=reg, **self.training)
                check_stability(phi, float(spectrum.s[-1]), n)
                columns, more, begin, lost, missed = [], {}, source.begin, 0.0, 0.0
                details: dict[str, Any] = {}
                suggest = self.labels is not None and self.groups is None
                for shard in solver.shards():
                    removal = solver.removal(shard, phi)
                    count = len(shard["features"])
                    part = slice(begin, begin + count)
                    labels = None if self.labels is None else self.labels[part]
                    found, more = self._measure(removal, self.y[part], labels, n * reg)
                    if suggest:
                        found["suggested"] = suggested_label(self.y[part], removal.loo_residual).cpu().numpy()
                    columns.append(found)
                    lost += float(removal.loo_residual.square().sum())
                    missed += float(removal.missed_leverage.sum())
                    details, begin = removal.diagnostics, begin + count
                values = processes.gather(self._join(columns, ("suggested",) * suggest))
                if suggest:
                    self.suggested = values.pop("suggested").astype(np.int64)
                if suggest and groups is None and processes.count == 1:
                    doubt = np.flatnonzero(self.suggested != self.labels.cpu().numpy())
                    measure = next(iter(values))
                    worst = values["loo_margin"][doubt] if "loo_margin" in values else -values[measure][doubt]
                    self.neighbours = feature_neighbours(
                        lambda: (shard["features"] for shard in solver.shards()), n, self.labels, doubt[worst.argsort()]
                    )
                lost, missed = processes.total(torch.tensor([lost, missed], dtype=torch.float64)).tolist()
                edf = missed + float((spectrum.s * torch.from_numpy(phi(spectrum.s.cpu().numpy())).to(device)).sum())
            if self.candidates is not None:
                with stages("candidates"):
                    new = Source(self.model, self.candidates, common, *processes.slice(self.candidates.n))
                    columns, begin = [], new.begin
                    for sample in features_of(new, fmap, self.new_y, begin, self.progress):
                        part = slice(begin, begin + len(sample["features"]))
                        added = solver.addition(sample, phi, seen)
                        labels = None if self.new_labels is None else self.new_labels[part]
                        columns.append(self._measure(added, self.new_y[part], labels, n * reg)[0])
                        begin = part.stop
                    self.new_values = processes.gather(self._join(columns))
            with stages("error estimate"):
                error, exact_edf = kernel_error(source, fmap, n * reg, self.seed)
                details["effective_dimension"] = edf = max(edf, exact_edf) if phi.converged else edf
                better = warn_of_rank(method, fmap.rank, edf, n * self.y.shape[1])
        finally:
            for held in stores:
                held.close()
        first = source.part(0, 1)
        details = dict(
            details,
            error_estimate=error,
            features=fmap.rank,
            rank_wanted=better,
            **self._about(n, first.k, first.shape[1], first.coverage, first.dtype),
            initial_mse=moments.energy / n,
            loo_mse=lost / n,
            **extra,
            **more,
        )
        return values, details, reg, self.samples.ids if self.groups is None else np.unique(np.asarray(self.groups))

    def _join(self, columns: list[dict[str, np.ndarray]], more: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        names = (*self.wanted, *more)
        nothing = [{name: np.zeros(0) for name in names}]  # of a process without samples
        return {name: np.concatenate([column[name] for column in columns or nothing]) for name in names}

    @staticmethod
    def _about(n: int, k: int, parameters: int, coverage: float, dtype) -> dict[str, Any]:
        return dict(samples=n, outputs=k, parameters=parameters, coverage=coverage, dtype=dtype)

    def _measure(self, removal: Removal, y, labels, shift: float):
        return _measure(removal, self.wanted, self.sigma, y, labels, shift=shift, **self.sgd)


def _curve(regs: np.ndarray, errors: np.ndarray) -> dict[str, list[float]]:
    return {"reg": regs.tolist(), "loo_error": errors.tolist()}


def _version() -> str:
    return metadata.version("sui-fast")


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
