"""The two ways through a run: the exact kernel, and one of low rank."""

from __future__ import annotations

import math
import re
import time as clock
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ._errors import ArgumentError, complaint
from ._memory import return_memory
from ._waiting import beat
from .jacobians import jacobian
from .jacobians.capture import choose_parameters
from .jacobians.finite import check_squares
from .loo import (
    Removal,
    WeightedProblem,
    WeightedRemoval,
    add_to_kernel,
    check_stability,
    leave_one_out,
    loo_error_curve,
    make_blocks,
    make_filter,
    remove_from_spectrum,
)
from .losses import Goal, is_certain, name_of
from .measures import SgdNoise, feature_neighbours, information, kernel_neighbours, sgd_information, sgd_noise
from .parts import Merged, Part, begin_anew, open_parts, open_store
from .probing import drawn, quality, warn_of_rank, warn_of_rest
from .processes import Processes, Source
from .spectra import dense_spectrum, feature_spectrum, fingerprint_of, project, projection_matrix
from .streaming import LowRank, collect, fit_map, moments_of, run_fingerprint

_SHARE = "si_sgd_jitter_share"


class Stages:
    """Seconds per stage, and a progress bar for runs longer than two seconds."""

    def __init__(self, total: int, progress: bool):
        self.seconds: dict[str, float] = {}
        self._bar = tqdm(total=total, desc="score", delay=2, leave=False, disable=not progress)
        self.close = beat(self._bar)

    @contextmanager
    def __call__(self, name: str):
        self._bar.total = max(self._bar.total, self._bar.n + 1)  # some runs have a stage more
        self._bar.set_description(f"score: {name}", refresh=False)
        return_memory()
        start = clock.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + clock.perf_counter() - start
        self._bar.update()


class Run:
    """The two ways through a run, exact and of low rank; each returns (columns, diagnostics, reg, ids)."""

    def __init__(self, model, wanted, reg, training, convention, groups, sigma, seed, progress):
        self.model, self.wanted, self.reg, self.training = model, wanted, reg, training
        self.convention, self.groups, self.sigma, self.seed, self.progress = convention, groups, sigma, seed, progress
        self.samples = self.probes = self.goal = self.outputs = None  # outputs: those whose Jacobian is trained on
        self.labels = self.candidates = self.new_goal = self.inputs = self.probe_outputs = None
        self.new_values: dict[str, np.ndarray] = {}
        self.left_out: np.ndarray | None = None  # predictions of the model trained without each sample [n, k]
        self.suggested: np.ndarray | None = None
        self.neighbours: dict[str, np.ndarray] | None = None
        self.sgd: dict[str, Any] = {}
        self.projection: tuple[str, int | None] | None = None
        self.sketch = "tensor"  # kind of random map
        self.processes: Processes | None = None  # that share a run of low rank

    def dense(self, stages: Stages, common: dict[str, Any]):
        """The exact kernel."""
        with stages("jacobian"):
            own = {**common, "outputs": self.outputs}
            jac = jacobian(self.model, self.samples, progress=self.progress, **own).wide()
            blocks = make_blocks(jac.n, jac.k, self.groups)
            r0 = self.goal.residual(slice(None), jac.outputs)
        cross, reg, extra = None, self.reg, {}
        if self.probes is not None:
            with stages("validation jacobian"):
                seen = {**common, "outputs": self.probe_outputs}
                probe = jacobian(self.model, self.probes, progress=self.progress, **seen).wide()
        with stages("kernel"):
            theta, features = projected_kernel(jac, self.projection, self.seed, self.progress)
        if self.probes is not None:
            with stages("validation kernel"):
                cross = even_rows(projected_cross(probe, jac, features, self.progress), probe.n, jac.k)
        if is_certain(theta.diagonal(), r0, self.goal):
            return self._weighted(stages, common, None if self.probes is None else probe)
        with stages("leave one out"):
            shared = dict(cross=cross, blocks=blocks, convention=self.convention, as_numpy=False)
            if isinstance(reg, str):
                spectrum, idle = dense_spectrum(theta), (theta == 0).all(1)
                options = dict(self.training, error=self.goal.error, convention=self.convention)
                regs, errors = loo_error_curve(spectrum, r0, blocks, idle, **options)
                reg, extra["reg_curve"] = float(regs[errors.argmin()]), _curve(regs, errors)
                phi = make_filter(jac.n, reg=reg, **self.training)
                removal: Removal = remove_from_spectrum(spectrum, phi, r0, idle=idle, **shared)
            else:
                removal = leave_one_out(
                    theta, r0, reg=reg, cross_ntk=cross, groups=self.groups, convention=self.convention,
                    method="spectral" if "si_sgd" in self.wanted else "auto", **self.training,
                )  # fmt: skip
        with stages("measures"):
            everything = slice(None)
            left_out = torch.as_tensor(removal.loo_residual)
            noise = self._noise([removal], removal.spectrum.s, jac.n, reg) if "si_sgd" in self.wanted else None
            values, more = self._measure(removal, self.goal, everything, noise)
            errors = self.goal.error(everything, left_out)
            self._look_around(theta, jac.k, self.goal, removal)
        if self.candidates is not None:
            with stages("candidates"):
                new = jacobian(self.model, self.candidates, progress=self.progress, **own).wide()
                reach = None if self.probes is None else even_rows(probe.gram(new), probe.n, jac.k)
                phi = make_filter(jac.n, reg=reg, **self.training)
                added = add_to_kernel(
                    theta, r0, new.gram(jac), new.own_blocks(), self.new_goal.residual(everything, new.outputs), phi,
                    cross=cross, reach=reach, convention=self.convention,
                )  # fmt: skip
                self.new_values, _ = self._measure(added, self.new_goal, everything)
        if "loo_margin" in self.wanted:
            self.left_out = self.goal.left_out(everything, left_out).cpu().numpy()
        details = removal.diagnostics
        details = dict(
            **details,
            error_estimate=max(details["eigen_error"], details["filter_error"]),
            **self._about(jac.n, jac.k, jac.shape[1], jac.coverage, common["dtype"]),
            **self._errors(float(self.goal.error(everything, r0).mean()), float(errors.mean())),
            **extra,
            **{name: x.tolist() for name, x in more.items()},
        )
        return values, details, reg, self.samples.ids if self.groups is None else blocks.labels

    def _look_around(self, theta: Tensor, k: int, goal: Goal, removal) -> None:
        """Nearest samples by the kernel, and the classes that the others suggest."""
        if self.groups is not None:
            return
        self.neighbours = kernel_neighbours(theta, k, None if self.labels is None else self.labels.to(theta.device))
        if goal.suggests:
            self.suggested = goal.suggest(slice(None), removal.loo_residual).cpu().numpy()

    def _weighted(self, stages: Stages, common: dict[str, Any], probe):
        """The exact kernel where the loss is certain of some samples."""
        if self.candidates is not None or "si_sgd" in self.wanted or self.reg == 0 and self.training["time"] is None:
            got = "a sample predicted with certainty (curvature of its loss below 1e-8 of the largest)"
            todo = "Pass reg > 0 or a finite time, without candidates and 'si_sgd'; or use loss='mse'."
            raise ArgumentError(complaint("loss", "predictions short of certainty for this call", got, todo))
        with stages("kernel"):
            jac = jacobian(self.model, self.inputs, progress=self.progress, **common).wide()
            cross = None if probe is None else probe.gram(jac, progress=self.progress).to(torch.float64)
            theta = jac.gram(progress=self.progress).to(torch.float64)
        blocks = make_blocks(jac.n, jac.k, self.groups)
        n, goal, everything, extra, reg = jac.n, self.goal.of_moves(), slice(None), {}, self.reg
        with stages("leave one out"):
            problem = WeightedProblem(theta, *goal.derivatives(), cross)

            def remove(reg: float) -> WeightedRemoval:
                return WeightedRemoval(problem, make_filter(n, reg=reg, **self.training), self.convention, blocks)

            if isinstance(reg, str):
                regs = float(problem.s[-1]) / n * np.logspace(-9, 1, 31)
                errors = np.array([float(goal.error(everything, remove(float(x)).loo_residual).mean()) for x in regs])
                reg, extra["reg_curve"] = float(regs[errors.argmin()]), _curve(regs, errors)
            removal = remove(reg)
        with stages("measures"):
            values, more = self._measure(removal, goal, everything)
            moved = removal.loo_residual
            self._look_around(theta, jac.k, goal, removal)
            errors = [float(goal.error(everything, x).mean()) for x in (torch.zeros_like(moved), moved)]
        details = dict(
            **removal.diagnostics,
            error_estimate=removal.diagnostics["filter_error"],
            **self._about(n, jac.k, jac.shape[1], jac.coverage, common["dtype"]),
            **self._errors(*errors),
            **extra,
            **{name: x.tolist() for name, x in more.items()},
        )
        return values, details, reg, self.samples.ids if self.groups is None else blocks.labels

    def agree(self, loss, **given) -> None:
        """What must not differ among the processes of a run, or they would wait for each other, or mix two runs."""
        counts = {name: x and x.n for name, x in (("val", self.probes), ("candidates", self.candidates))}
        own = dict(measures=self.wanted, reg=self.reg, convention=self.convention, sigma=self.sigma, sketch=self.sketch)
        own.update(given, loss=name_of(loss), train=self.samples.n, seed=self.seed, groups=self.groups is not None)
        self.processes.agree({**own, **counts, **self.training})

    def sources(self, common: dict[str, Any]) -> dict[str, Source]:
        """The samples of this process by the name of their argument, with what they are captured by."""
        found = {}
        for name, samples in (("train", self.samples), ("val", self.probes), ("candidates", self.candidates)):
            if samples is not None:
                options = {**common, "outputs": self.probe_outputs if name == "val" else self.outputs}
                found[name] = Source(self.model, samples, options, *self.processes.slice(samples.n))
        return found

    def low_rank(self, stages: Stages, common: dict[str, Any], method: str, rank: int, store, resume: bool):
        """A kernel of low rank, shard by shard; nothing where this run is but a part."""
        n, processes = self.samples.n, self.processes
        alone, merged = isinstance(processes, Part), isinstance(processes, Merged)
        open_ = open_parts if merged else open_store
        source = Source(self.model, self.samples, {**common, "outputs": self.outputs}, *processes.slice(n))
        if self.groups is not None and processes.count > 1 and not alone:
            raise ArgumentError(complaint("groups", "None in a run of several processes", "some", "Use one process."))
        with stages(f"{method} map"):
            fmap = fit_map(source, self.goal, method, rank, self.seed, processes, self.sketch)
        some = None
        if fmap.portion is not None:
            with stages("probes"):
                some = drawn(source, fmap, self.seed, ahead=True, kernel=not alone)
                source.ahead = some.ahead
        options = {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x)) for name, x in common.items()}  # the same tomorrow
        about = dict(options, method=method, rank=fmap.rank, rank_asked=int(rank), seed=self.seed)
        if method == "sketch":
            about["sketch"] = self.sketch
        about["parameters"] = ", ".join(choose_parameters(self.model, common["params"]))
        about["rows"], about["targets"] = self.goal.rows, fingerprint_of({"targets": self.goal.y})
        if self.goal.kind != "mse":
            known = {"outputs": self.goal.f0, "residual": self.goal.residual(slice(None), self.goal.f0)}
            about["loss"] = f"{self.goal.kind} {fingerprint_of(known)}"
        stores, version = [], metadata.version("sui-fast")
        try:
            with stages("features"):
                if not resume and not merged:
                    begin_anew(store, processes)
                print_ = run_fingerprint(self.model, self.samples, about, version)
                processes.agree(print_)
                stores.append(open_(store, print_, "train", processes, resume))
                collect(source, fmap, self.goal, stores[0], self.progress)
            if self.probes is not None:
                with stages("validation features"):
                    options = {**common, "outputs": self.probe_outputs}
                    probes = Source(self.model, self.probes, options, *processes.slice(self.probes.n))
                    print_ = run_fingerprint(self.model, self.probes, about, version)
                    processes.agree(print_)
                    stores.append(open_(store, print_, "validation", processes, resume))
                    collect(probes, fmap, None, stores[1], self.progress)
            if alone:
                return None
            moment = seen = None
            with stages("spectrum"):
                device, k = source.device, self.goal.rows
                moments = moments_of(stores[0], n, fmap.rank, device, n * k < fmap.rank, processes)
                check_squares(moments.mean_square, common["dtype"] or next(self.model.parameters()).dtype)
                spectrum = feature_spectrum(moments)
                del moments
                return_memory()
                if self.probes is not None:
                    m = self.probes.n
                    seen = moments_of(stores[1], m, fmap.rank, device, m * k < fmap.rank, processes)
                    moment = spectrum.moment(seen)
                    seen = seen if self.candidates is not None else None
            with stages("leave one out"):
                solver = LowRank(
                    stores[0], spectrum, self.goal.rows, moment=moment, convention=self.convention, groups=self.groups,
                    device=device,
                )  # fmt: skip
                reg, extra = self.reg, {}
                if isinstance(reg, str):
                    options = (processes.gather, self.goal.error, source.begin)
                    regs, errors = solver.loo_error_curve(*options, **self.training)
                    reg, extra["reg_curve"] = float(regs[errors.argmin()]), _curve(regs, errors)
                phi = make_filter(n, reg=reg, **self.training)
                check_stability(phi, float(spectrum.s[-1]), n)
                noise = None
                if "si_sgd" in self.wanted:
                    removals = (solver.removal(shard, phi) for shard in solver.shards())
                    noise = self._noise(removals, spectrum.s, n, reg, processes.every)
                values, about = self._pass_two(solver, phi, noise, source.begin)
                details = next(filter(None, processes.objects(about)))
                values = processes.gather(values)
                if noise is not None:
                    extra[_SHARE] = values.pop(_SHARE).tolist()
                self.left_out, self.suggested = values.pop("left_out", None), values.pop("suggested", None)
                first_error, lost, missed = (float(values.pop(name).sum()) for name in ("first", "last", "missed"))
                if self.suggested is not None and self.groups is None:
                    doubt = np.flatnonzero(self.suggested != self.labels.cpu().numpy())
                    measure = next(iter(values))
                    worst = values["loo_margin"][doubt] if "loo_margin" in values else -values[measure][doubt]
                    self.neighbours = feature_neighbours(
                        lambda: (shard["features"] for shard in solver.shards()), (n, k, fmap.rank), self.labels,
                        doubt[worst.argsort()], first=source.begin, gather=processes.gather,
                    )  # fmt: skip
                kept = float((spectrum.s * torch.from_numpy(phi(spectrum.s.cpu().numpy())).to(device)).sum())
            if self.candidates is not None:
                with stages("candidates"):
                    new = Source(self.model, self.candidates, source.options, *processes.slice(self.candidates.n))
                    old = replace(probes, begin=0, end=self.probes.n, kept={}) if seen and method != "sketch" else None
                    columns, begin = [], new.begin
                    for added in solver.additions(new, fmap, self.new_goal, phi, seen, old, self.progress):
                        part = slice(begin, begin + len(added.rows))
                        columns.append(self._measure(added, self.new_goal, part)[0])
                        begin = part.stop
                    self.new_values = processes.gather(_joined(columns))
            with stages("error estimate"):
                found = quality(
                    source, fmap, some, self.goal, phi, self.seed, float(spectrum.s[-1]), kept, missed,
                    reg if isinstance(self.reg, str) else None, dict(self.training, convention=self.convention),
                )  # fmt: skip
                details["effective_dimension"] = found.dimension
                # fewer columns than asked for explain all there is; no rank has more than rows or parameters
                most = fmap.rank if fmap.rank < rank else min(n * self.goal.rows, found.parameters)
                softmax = self.goal.kind == "cross_entropy" and self.probes is not None
                share = missed / kept if kept > 0 else 0.0
                better = warn_of_rank(method, fmap.rank, found.asked, most, share, softmax)
                if self.goal.kind == "mse":
                    warn_of_rest(first_error, lost)
        finally:
            for held in stores:
                held.close()
        first, first_parameter = source.first, next(self.model.parameters())
        details = dict(
            details,
            error_estimate=found.error,
            features=fmap.rank,
            rank_wanted=better,
            **self._about(n, first.k, first.shape[1], first.coverage, common["dtype"] or first_parameter.dtype),
            **self._errors(first_error / n, lost / n),
            **extra,
        )
        processes.objects(None)  # none begins another run before this one is over for all
        return values, details, reg, self.samples.ids if self.groups is None else np.unique(np.asarray(self.groups))

    def _pass_two(self, solver: LowRank, phi, noise: SgdNoise | None, begin: int):
        """(columns, what is to be said about them) of the samples of a store, from ``begin`` on."""
        columns, about, first = {}, None, begin
        for shard in solver.shards():
            removal = solver.removal(shard, phi)
            part = slice(begin, begin + len(shard["features"]))
            v, missed = removal.loo_residual, removal.missed_leverage.expand(part.stop - begin)
            found, more = self._measure(removal, self.goal, part, noise)
            own = {"first": self.goal.error(part, removal.residual), "last": self.goal.error(part, v), "missed": missed}
            if self.goal.suggests and self.groups is None:
                own["suggested"] = self.goal.suggest(part, v)
            if "loo_margin" in self.wanted:
                own["left_out"] = self.goal.left_out(part, v)
            fresh = found | more | {name: x.cpu().numpy() for name, x in own.items()}
            if not columns:  # in one place: small arrays would lie among what portions leave; groups come all at once
                rows = solver.store.rows
                empty = {name: np.empty((rows, *x.shape[1:]), x.dtype) for name, x in fresh.items()}
                columns = empty if self.groups is None else fresh
            for name, x in fresh.items():
                columns[name][begin - first :][: len(x)] = x
            about, begin = removal.diagnostics, part.stop
            del removal  # or its rows lie beside those of the next portion
        return columns, about

    @staticmethod
    def _about(n: int, k: int, parameters: int, coverage: float, dtype) -> dict[str, Any]:
        return dict(samples=n, outputs=k, parameters=parameters, coverage=coverage, dtype=dtype)

    def _errors(self, initial: float, left_out: float) -> dict[str, float]:
        what = "mse" if self.goal.kind == "mse" else "loss"
        return {f"initial_{what}": initial, f"loo_{what}": left_out}

    def _measure(self, removal: Removal, goal: Goal, part: slice, noise: SgdNoise | None = None):
        return _measure(removal, self.wanted, self.sigma, goal, part, noise)

    def _noise(self, removals, s: Tensor, n: int, reg: float, every=None) -> SgdNoise:
        return sgd_noise(removals, s, n, shift=n * reg, **self.sgd, every=every)


def projected_kernel(jac, projection, seed: int, progress: bool):
    """Theta [N, N] and, with a projection, (its matrix, the projected rows)."""
    if projection is None:
        return jac.gram(progress=progress).to(torch.float64), None
    matrix = projection_matrix(jac, *projection, seed=seed)
    rows = project(jac, matrix).to(torch.float64)
    return rows @ rows.T, (matrix, rows)


def projected_cross(probe, jac, features, progress: bool):
    """Theta(validation, train) that goes with ``projected_kernel``."""
    if features is None:
        return probe.gram(jac, progress=progress).to(torch.float64)
    return project(probe, features[0]).to(torch.float64) @ features[1].T


def _joined(columns: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([column[name] for column in columns]) for name in columns[0]} if columns else {}


def _curve(regs: np.ndarray, errors: np.ndarray) -> dict[str, list[float]]:
    return {"reg": regs.tolist(), "loo_error": errors.tolist()}


def even_rows(cross: Tensor, m: int, rows: int) -> Tensor:
    """The cross kernel as the solver takes it, ``rows`` to a validation sample, with the same mean of squares.

    Training on logits has a row less per sample than there are logits; the solver knows one number for both.
    """
    if len(cross) == m * rows:
        return cross
    fill = -len(cross) % rows
    even = torch.cat([cross, cross.new_zeros(fill, cross.shape[1])])
    return even * math.sqrt(len(even) / (m * rows))


def _measure(
    removal: Removal, wanted, sigma: float, goal: Goal, part: slice, noise: SgdNoise | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The columns asked for, in the order asked for, and what is to be said about them."""
    extra: dict[str, np.ndarray] = {}

    def column(name: str):
        if name == "si":
            return information(removal.weight_sqnorm, sigma)
        if name == "fsi":
            return information(removal.prediction_sqnorm, sigma)
        if name == "si_langevin":
            return information(removal.hessian_sqnorm, sigma)
        if name == "si_sgd":
            value, share = sgd_information(removal, noise)
            extra[_SHARE] = share.cpu().numpy()
            return value / sigma**2
        if name == "leverage":
            return removal.leverage
        if name == "loo_residual":
            return removal.sum_over_blocks(goal.slope(part, removal.loo_residual).square().sum(1)).sqrt()
        return goal.margin(part, removal.loo_residual)

    return {name: column(name).cpu().numpy().astype(np.float64) for name in wanted}, extra
