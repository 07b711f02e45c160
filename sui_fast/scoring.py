"""score(): from a model and a data set to a table, one stage after the other."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ._errors import ArgumentError, complaint
from ._memory import free_memory, return_memory
from .aims import aim, aim_at_few, check_mode, warn_of_rows
from .aims import targets as targets_of
from .checks import authors_definitions, check_arguments
from .extremes import solvable
from .jacobians import as_samples, jacobian, read_samples
from .jacobians.capture import unwrapped
from .jacobians.engine import predict
from .jacobians.finite import check_products
from .jacobians.quiet import alone_with
from .loo import make_filter
from .losses import name_of
from .measures import UNITS
from .operations import Operations, needs_spectrum
from .parts import Part, check_layout, check_part
from .planning import Plan, choose_method, make_plan
from .probing import Probes, probed_dimension
from .processes import Processes, Source, processes_of
from .projections import Shared, Signed
from .runcard import dtypes, model_digest, peak_bytes, versions
from .runs import Run, Stages
from .scores import Scores
from .showing import MOST_INPUTS, shown, small_inputs, texts_of
from .targets import loss_targets
from .timing import least_seconds

_FEW = 1024  # rows of the kernel that tell the effective dimension before a run, of 128 samples at most


def score(
    model: torch.nn.Module,
    train,
    val=None,
    *,
    measures=("si", "fsi"),
    loss="mse",
    reg: float | str = 0.0,
    time: float | None = None,
    lr: float | None = None,
    dynamics: str = "gd",
    sigma: float = 1.0,
    method: str = "auto",
    rank: int | None = None,
    sketch: str = "tensor",
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
    part=None,
    progress: bool = True,
    candidates=None,
    compat: str | None = None,
    output_mode: str = "all",
    output_rank: int = 16,
    sgd_batch_size: int = 1,
    sgd_lr: float | None = None,
    sgd_jitter: float = 1e-9,
) -> Scores:
    """How much unique information each training sample gives to the weights (SI) and the predictions (F-SI).

    ::

        SI_i   = ||w_-i - w||^2 / (2 sigma^2)
        F-SI_i = mean over validation x of ||f_-i(x) - f(x)||^2 / (2 sigma^2)         in nats

    for the network linearised at its present weights, trained on the mean loss with
    reg/2 ||w - w0||^2, and exactly retrained without each sample. The model runs in eval mode and is left as found.

    Args:
        model: any module with k outputs per sample.
        train: Dataset, IterableDataset, unshuffled DataLoader, (inputs, targets), Hugging Face Dataset or list of
            batches. Targets: float [n, k] or [n], or integer classes (one-hot for k > 1, {0, 1} for k = 1).
        val: the same, targets not needed; required by "fsi".
        measures: of "si", "fsi", "si_langevin", "si_sgd", "leverage", "loo_residual", "loo_margin".
        loss: "mse"; "cross_entropy" (logits, k > 1) and "binary_cross_entropy" (logits, each output for itself), or a
            function (outputs [b, k], targets) -> [b], convex in the outputs: in generalised Gauss-Newton form at the
            present weights, so that leaving out is one Newton step of the problem without the sample. "fsi" stays
            the change of the outputs (logits).
        reg: lambda' of the mean loss, or "auto": the value with the smallest exact leave-one-out error.
        time: training steps ("gd") or time ("flow"); None: trained to convergence. lr: step size of the mean loss.
        dynamics: "gd" or "flow".
        sigma: standard deviation of the noise, in units of the weights (SI) or outputs (F-SI).
        method: "dense" (exact), "nystrom", "subspace", "sketch" (low rank, docs/math.md), or "auto".
        rank: features of a method of low rank (default 1024, for "auto" what the regularisation and time want, by an
            estimate of the effective dimension); a warning names a better one where it is too small.
        sketch: the random map of method "sketch": "tensor" (default), "sjlt", "rademacher" (dense signs: the most
            faithful, and the slowest by far) or "two_sided" (the cheapest, and by far the least faithful).
        store: folder for the features of a method of low rank, so that memory does not grow with the samples
            (Datasets and DataLoaders are read again for every pass) and a run that was interrupted goes on
            (resume=True) with the same scores, with as many processes or parts; resume=False begins anew. Under
            torchrun all processes make the same call: a run of low rank shares the samples among them, and each returns
            what one process of as many threads would. What fails in one fails in all (ProcessError), from the beginning
            of ``score`` on; of your own code before it they hear nothing. With method="dense" each runs for itself, and
            one may alone.
        part: (i, count), i from 1: only the features of the i-th of ``count`` slices of the samples, into ``store``,
            without the other processes; returns None. ``merge`` scores from all parts ("sketch" and "nystrom").
        params: "trainable", "all", names, or a predicate: the parameters that count.
        outputs: function (model, batch) -> [b, k]; default: the model's tensor, or its ``.logits``; ready-made ones,
            of language models too, in ``sui_fast.outputs``.
        batch_size: samples per forward pass; no effect on the result.
        device: where to compute (default: where the model is).
        dtype: of the Jacobian (default float64; for methods of low rank the model's).
        seed: of the random numbers of a method of low rank; an exact run draws none.
        groups: one label per sample, [n]: samples with equal labels are removed together, one row of scores each. A run
            of low rank then takes one process, and memory for the features of all samples at once.
        convention: "sum", "mean" or "iclr2021" (see ``leave_one_out``).
        progress: show a bar on runs longer than two seconds.
        candidates: samples with targets that are not trained on: what each would add. Their scores are
            ``Scores.candidates``, with the measures of ``train`` (not "si_sgd"); the left-out residual and margin are
            those of the model as it is. For "fsi" methods "nystrom" and "subspace" take their kernel with ``val``: the
            features span gradients of ``train`` alone.
        compat: "iclr2021": the definitions of the authors' code: convention "iclr2021", and method also "random-subset"
            or "very-sparse", their projections of each parameter, with rank as their count.
        output_mode: what stands for the k outputs where they are many (docs/math.md, section 13): "all"; "random":
            ``output_rank`` rows per sample, the loss's own direction and random ones ("mse", "cross_entropy" of
            classes, "binary_cross_entropy"; not "loo_residual", "loo_margin"); "top": the ``output_rank`` likeliest
            classes and the rest as one ("cross_entropy" of classes).
        sgd_batch_size, sgd_lr, sgd_jitter: noise of "si_sgd" (lr: default ``lr``, else 1).
    Returns:
        Scores, one row per sample in the order of ``train``; None with ``part``.
    Raises:
        ArgumentError, DataError, StabilityError, CoverageError, SpectrumError, StoreError, ProcessError; each names the
        argument and the remedy.
    Source: Harutyunyan et al., ICLR 2021, Definitions 3.1 and 4.1, eqs. 5 and 16.
    """
    processes = processes_of(method, part)
    with processes.together(), contextlib.ExitStack() as held:
        apart = check_part(part, method, store)
        convention, method, rank, projection = authors_definitions(compat, convention, method, rank)
        wanted = check_arguments(
            measures=measures, loss=loss, sigma=sigma, method=method, rank=rank, reg=reg, time=time, lr=lr,
            dynamics=dynamics, convention=convention, batch_size=batch_size, seed=seed, store=store, resume=resume,
            progress=progress, output_mode=output_mode, output_rank=output_rank, sgd_batch_size=sgd_batch_size,
            sgd_lr=sgd_lr, sgd_jitter=sgd_jitter, sketch=sketch,
        )  # fmt: skip
        if candidates is not None and "si_sgd" in wanted:
            got, todo = "'si_sgd', whose noise depends on the sample", "Score them in two calls."
            raise ArgumentError(complaint("measures", "measures that candidates have", got, todo))
        if "fsi" in wanted and val is None:
            todo = "Pass val=..., or measures=('si',)."
            raise ArgumentError(complaint("val", "validation samples for the measure 'fsi'", None, todo))
        reg = reg if isinstance(reg, str) else float(reg)
        sgd_lr = sgd_lr if sgd_lr is not None else (lr or 1.0)
        model = _placed(model.module if isinstance(model, DistributedDataParallel) else model, device)
        if isinstance(model, torch.nn.Module):
            held.enter_context(alone_with(unwrapped(model)))

        stages, training = Stages(7 + ("fsi" in wanted) * 2, progress), dict(time=time, lr=lr, dynamics=dynamics)
        held.callback(return_memory)
        held.callback(stages.close)
        run = Run(model, wanted, reg, training, convention, groups, sigma, seed, progress)
        run.projection, run.sketch, run.processes = projection, sketch, apart or processes
        run.sgd = dict(lr=sgd_lr, batch_size=sgd_batch_size, jitter=sgd_jitter)
        with stages("data"):
            own = getattr(outputs, "target", None)  # language models predict their inputs
            need = True if own is None else None
            # with a store memory must not grow with the samples: what can be read again is not kept
            read = as_samples if store is None else functools.partial(read_samples, progress=progress)
            run.samples = read(train, with_targets=need, argument="train")
            if "fsi" in wanted:
                run.probes = read(val, with_targets=None, argument="val")
            if candidates is not None:
                run.candidates = read(candidates, with_targets=need, argument="candidates")
        common = dict(outputs=outputs, params=params, batch_size=batch_size)
        with stages("look"):
            k = predict(model, run.samples.slice(0, 1), dtype=dtype, **common).shape[1]
            rows, few = _rows(k, loss, output_mode, output_rank)
            targets = loss_targets(loss, targets_of(run.samples, own, k), k)
            labels, inputs = targets[1], run.samples
            run.inputs, run.labels, run.probe_outputs = inputs, labels, outputs
            look = dict(common, outputs=Signed(outputs, 1, seed)) if few else common
            one = run.samples.slice(0, 1)
            first = jacobian(model, one.beside(torch.zeros(1, dtype=torch.long)) if few else one, dtype=dtype, **look)
            if few:
                check_mode(output_mode, loss, labels, wanted, candidates)
            run.agree(
                loss, method=method, rank=rank, outputs=k, parameters=first.shape[1], output_mode=output_mode,
                output_rank=output_rank, batch_size=batch_size, dtype=str(dtype), store=store is not None,
                resume=resume,
            )  # fmt: skip
            memory = min(run.processes.objects(free_memory(first.device)))
            m = 0 if run.probes is None else run.probes.n
            work = Operations(first, run.samples.n, m, rows, needs_spectrum(reg, time, convention, wanted, candidates))
            chosen, rank, reason = run.processes.one_for_all(
                lambda: choose_method(
                    run.samples.n, rows, first.shape[1], work, method=method, rank=rank, device=first.device,
                    memory=memory, stored=store is not None,
                    dimension=lambda: (
                        None if few else _dimension(model, run.samples, k, reg, training, dict(look, dtype=dtype), seed)
                    ),
                )
            )  # fmt: skip
            if chosen == "dense":
                processes.leave()
            else:
                check_layout(store, run.processes, resume)
            if "loo_margin" in wanted:
                _check_labels(labels, groups)
        common["dtype"] = dtype or torch.float64 if chosen == "dense" else dtype
        with stages("outputs"):
            sees = predict if chosen == "dense" else run.processes.predict
            if few:
                run.goal, run.samples, run.outputs = aim_at_few(
                    model, loss, run.samples, targets, first.device, common, progress, output_mode, output_rank, seed,
                    sees,
                )  # fmt: skip
                if loss == "mse":
                    run.probe_outputs = run.outputs
                elif run.probes is not None:
                    run.probes = run.probes.beside(torch.arange(run.probes.n))
                    run.probe_outputs = Signed(outputs, output_rank, seed + 1)
            else:
                run.goal, run.samples, run.outputs = aim(
                    model, loss, run.samples, targets, first.device, common, progress, sees
                )
            if candidates is not None:
                new_targets = loss_targets(loss, targets_of(run.candidates, own, k), k, "candidates")
                if "loo_margin" in wanted:
                    _check_labels(new_targets[1], None)
                new = run.candidates
                run.new_goal, run.candidates, _ = aim(
                    model, loss, new, new_targets, first.device, common, progress, sees
                )
        if candidates is not None and projection is not None:
            got, todo = "candidates with a projection", "Use method='dense'."
            raise ArgumentError(complaint("candidates", "None with the authors' projections", got, todo))
        with solvable(lambda: run.sources(common)):
            if chosen == "dense":
                found = run.dense(stages, common)
            else:
                found = run.low_rank(stages, common, chosen, rank, store, resume)
        processes.leave()  # it is over for all
        if found is None:
            return None
        values, details, reg, ids = found
        if few and loss == "mse":
            values = {name: column * (k / output_rank) for name, column in values.items()}
        elif few and output_mode == "random" and rows < k - (loss == "cross_entropy"):
            warn_of_rows(rows, run.samples.n, details.get("effective_dimension", 0.0))

    settings = dict(
        measures=list(wanted),
        loss=name_of(loss),
        reg=reg,
        time=time,
        lr=lr,
        dynamics=dynamics,
        sigma=sigma,
        method=chosen,
        rank=None if chosen == "dense" else rank,
        sketch=sketch if chosen == "sketch" else None,
        compat=compat,
        projection=projection,
        params=params if isinstance(params, str) else repr(params),
        batch_size=batch_size,
        dtype=str(details["dtype"]).removeprefix("torch."),
        dtypes=dtypes(details.pop("dtype"), chosen),
        seed=seed,
        convention=convention,
        output_mode=output_mode if few else "all",
        output_rank=output_rank if few else None,
        grouped=groups is not None,
    )
    if "si_sgd" in wanted:
        settings.update(sgd_batch_size=sgd_batch_size, sgd_lr=sgd_lr, sgd_jitter=sgd_jitter)
    diagnostics: dict[str, Any] = dict(
        method=chosen,
        method_reason=reason,
        **details,
        seconds=stages.seconds,
        versions=versions(),
        model_sha256=model_digest(model),
        peak_bytes=peak_bytes(first.device),
    )
    special = dict(zip(("loo_residual", "loo_margin"), run.goal.units, strict=True))
    units = {name: special.get(name, UNITS[name]) for name in values}
    about = dict(settings=settings, diagnostics=diagnostics, units=units)
    scores = Scores(
        ids=ids,
        values=values,
        labels=labels.cpu().numpy() if labels is not None and groups is None else None,
        inputs=small_inputs(inputs) if groups is None else None,
        texts=texts_of(train, inputs) if groups is None else None,
        left_out=run.left_out,
        suggested=run.suggested,
        neighbours=run.neighbours,
        **about,
    )
    if candidates is not None:
        scores.candidates = Scores(
            ids=run.candidates.ids,
            values=run.new_values,
            labels=None if new_targets[1] is None else new_targets[1].cpu().numpy(),
            inputs=small_inputs(new),
            **about,
        )
    return scores


def plan(model: torch.nn.Module, train, val=None, **arguments) -> Plan:
    """What ``score`` would do with these arguments: method, rank, passes, bytes and rough seconds. Nothing is scored.

    Peak memory is the largest resident size of the process during ``score`` minus that just before the call, with the
    libraries imported and the model and the data in memory. Seconds come from a batch of the model, captured and
    multiplied here; the model is left as found. With ``part=``, and under torchrun, they are those of this process,
    by its own free memory.

    Args:
        model, train, val, arguments: as in ``score``.
    Returns:
        Plan; print it.
    Raises:
        As ``score`` does for data and models it cannot take.
    """
    bound = inspect.signature(score).bind(model, train, val, **arguments)
    bound.apply_defaults()
    asked = bound.arguments
    training = {name: asked[name] for name in ("time", "lr", "dynamics")}
    compat, convention, method, rank = (bound.arguments[name] for name in ("compat", "convention", "method", "rank"))
    convention, method, rank, _ = authors_definitions(compat, convention, method, rank)
    check_arguments(**{**bound.arguments, "convention": convention, "method": method, "rank": rank})
    known = ("outputs", "params", "batch_size", "dtype")
    options = {name: arguments[name] for name in known if name in arguments}
    stored = arguments.get("store") is not None
    processes = check_part(asked["part"], method, asked["store"]) or Processes(meet=False)
    read = functools.partial(read_samples, named=False) if stored else as_samples
    samples = read(train, with_targets=None, argument="train")
    m = 0 if val is None else read(val, with_targets=None, argument="val").n
    new = 0 if asked["candidates"] is None else read(asked["candidates"], with_targets=None, argument="candidates").n
    batch = samples.slice(0, min(samples.n, bound.arguments["batch_size"]))
    k, plain = predict(model, samples.slice(0, 1), **options).shape[1], dict(options)
    rows, few = _rows(k, *(asked[name] for name in ("loss", "output_mode", "output_rank")))
    if rows < k:
        options["outputs"] = Shared(asked["outputs"], rows, asked["seed"])  # as many rows, at the same cost
    first = jacobian(model, batch, **options)  # which also proves the capture
    reg, time, measures, candidates = (asked[name] for name in ("reg", "time", "measures", "candidates"))
    spectral, sees = needs_spectrum(reg, time, convention, measures, candidates), m * ("fsi" in measures)
    work = Operations(first, samples.n, sees, rows, spectral)
    method, rank, reason = choose_method(
        samples.n, rows, first.shape[1], work, method=method, rank=rank, device=first.device,
        memory=free_memory(first.device), stored=stored,
        dimension=lambda: (
            None if few else _dimension(model, samples, k, asked["reg"], training, plain, asked["seed"])
        ),
    )  # fmt: skip
    if method == "dense":
        options["dtype"] = bound.arguments["dtype"] or torch.float64
        first = jacobian(model, batch, **options)
    seconds = least_seconds(lambda: jacobian(model, batch, **options))
    small = small_inputs(batch) if shown(samples) else None
    given = 0 if small is None or samples.n * small[0].nbytes >= MOST_INPUTS else small[0].nbytes
    own = processes.slice(samples.n), processes.slice(m) if m else (0, 0)
    found = make_plan(
        first, seconds, samples.n, m, method, rank, reason, stored, given, asked["sketch"], spectral=spectral,
        own=tuple(end - begin for begin, end in own), alone=isinstance(processes, Part),
        grouped=asked["groups"] is not None, new=new,
        softmax=asked["loss"] == "cross_entropy" and not few,
    )  # fmt: skip
    del first
    return_memory()
    return found


def _rows(k: int, loss, output_mode: str, output_rank: int) -> tuple[int, bool]:
    """Rows of the kernel for each sample, and whether they stand for more outputs."""
    few = output_mode != "all" and output_rank + (output_mode == "top") < k
    return output_rank if few else max(1, k - (loss == "cross_entropy")), few


def _dimension(model, samples, k: int, reg, training, options, seed: int) -> float | None:
    """About the effective dimension, from the kernel of a few samples; None where reg is open, or nothing limits it."""
    if isinstance(reg, str) or reg == 0 and training["time"] is None:
        return None
    count = min(samples.n, max(4, min(128, _FEW // k)))
    numbers = np.sort(np.random.default_rng(seed).choice(samples.n, count, replace=False))
    jac = jacobian(model, samples.pick(numbers), **options)
    exact = jac.gram().to("cpu", torch.float64)
    with solvable(lambda: {"train": Source(model, samples, options, 0, samples.n)}):
        check_products(exact)
    probes = Probes((jac.n, jac.k, jac.shape[1]), exact, numbers, exact[:0], numbers, jac.outputs)
    phi = make_filter(samples.n, reg=reg, **training)
    descends = phi.eta > 0 and phi.dynamics == "gd"
    stable = max(2 / phi.eta - phi.shift, 0.0) if descends else math.inf  # the run says where lr is not
    return probed_dimension(samples.n, probes, phi, stable, seed)


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


def _placed(model, device):
    """The model, or a copy of it on the device asked for."""
    if device is None or not isinstance(model, torch.nn.Module):
        return model
    try:
        asked = torch.device(device)
        return model if _device_of(model) == asked else copy.deepcopy(model).to(asked)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        got, todo = f"{device!r} ({error})", "Pass 'cpu' or 'cuda'; sui_fast.doctor() shows what is there."
        raise ArgumentError(complaint("device", "a device of this machine", got, todo)) from None


def _device_of(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
