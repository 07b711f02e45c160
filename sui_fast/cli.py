"""Command line: sui-fast demo | score | merge | plan | report | compare | validate | doctor."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from . import __version__
from ._errors import ArgumentError, SuiError, complaint
from .apps import validate_linearization
from .demo import run_demo
from .demo_text import run_text_demo
from .doctor import doctor
from .losses import LOSSES
from .measures import MEASURES
from .merging import merge
from .ops.sketching import KINDS
from .parts import as_part
from .planning import METHODS
from .processes import Processes
from .projections import MODES
from .report import compare
from .scores import Scores
from .scoring import plan, score

COMMANDS = "demo | score | merge | plan | report | compare | validate | doctor"
_DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where doctor finds a fault, 2 for an error the user can mend."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    arguments.command = shlex.join(["sui-fast", *given])
    try:
        return arguments.run(arguments)
    except (SuiError, OSError, ImportError) as error:
        if arguments.traceback:
            raise
        print(f"sui-fast: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sui-fast", description="What does each training sample teach the model?")
    parser.add_argument("--version", action="version", version=f"sui-fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(required=True, metavar=COMMANDS)

    demo = commands.add_parser("demo", help="score scikit-learn's digits with wrong labels mixed in")
    demo.add_argument("--out", help="folder for scores.parquet and report.html (demo_out, demo_out_text)")
    demo.add_argument("--text", action="store_true", help="docstrings and a sentence encoder instead (extra [text])")
    demo.set_defaults(run=_demo)

    run = commands.add_parser("score", help="score your own model and data")
    _add_run(run)
    run.set_defaults(run=_score)

    join = commands.add_parser("merge", help="scores from the stores that score --part i/count left, for every i")
    _add_method(join, None)
    _add_scores(join)
    join.add_argument("--seed", type=int, help="as the parts had it (read from them)")
    join.add_argument("--store", required=True, help="the folder of the parts")
    join.set_defaults(run=_merge)

    plan_ = commands.add_parser("plan", help="what score would do: method, rank, passes, bytes, seconds")
    _add_run(plan_)
    plan_.set_defaults(run=_plan)

    report = commands.add_parser("report", help="draw a report from saved scores")
    report.add_argument("scores", help="Parquet file written by score")
    report.add_argument("-o", "--out", default="report.html", help="HTML file to write")
    report.add_argument("--title", default="Unique information of samples", help="heading")
    report.add_argument("--texts", help="file with the text of each sample, one a line")
    report.add_argument("--class-names", nargs="+", help="a name per class, in the order of the labels")
    report.set_defaults(run=_report)

    two = commands.add_parser("compare", help="two score files of the same samples: ranks, movers, classes")
    two.add_argument("a", help="Parquet file written by score")
    two.add_argument("b", help="another one")
    two.add_argument("-o", "--out", default="compare.html", help="HTML file to write")
    two.add_argument("--measure", help="the one that ranks (default: fsi where both have it)")
    two.set_defaults(run=_compare)

    judge = commands.add_parser("validate", help="real retraining without some samples, against the linearised model")
    judge.add_argument("source", metavar="module:function", help="a function that returns (model, train, val)")
    judge.add_argument("--samples", type=int, default=30, help="how many are left out, one after the other")
    judge.add_argument("--time", type=int, default=1000, help="steps of full-batch gradient descent")
    judge.add_argument("--lr", type=float, help="step size of the mean loss (default: half of what is stable)")
    judge.add_argument("--reg", type=float, default=0.0, help="regularisation of the mean loss")
    judge.add_argument("--influence", default="auto", help="auto, exact, cg, lissa: compared as well; none")
    judge.add_argument("--params", nargs="+", help="parameter names or prefixes, or trainable, or all")
    judge.add_argument("--outputs", metavar="module:function", help="f(model, batch) -> [b, k]")
    judge.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    judge.add_argument("--out", default="validation.parquet", help="Parquet file to write")
    judge.add_argument("--plot", help="picture to write as well (extra [report])")
    judge.add_argument("--no-progress", action="store_true", help="no bars")
    judge.set_defaults(run=_validate)

    commands.add_parser("doctor", help="versions, backends, self-tests").set_defaults(
        run=lambda a: 0 if doctor()["healthy"] else 1
    )
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_method(parser)
    _add_scores(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", help="folder for the features of a method of low rank; an interrupted run goes on")
    parser.add_argument("--no-resume", action="store_true", help="empty the store first")
    parser.add_argument("--part", help="i/count: the features of one of count slices alone, into --store; see merge")


def _add_method(parser: argparse.ArgumentParser, method: str | None = "auto") -> None:
    parser.add_argument("source", metavar="module:function", help="a function that returns (model, train, val)")
    parser.add_argument("--method", default=method, help=", ".join(METHODS) if method else "as the parts had it")
    parser.add_argument("--rank", type=int, help="features of a method of low rank")
    parser.add_argument("--sketch", default="tensor" if method else None, help=f"kind of sketch: {', '.join(KINDS)}")
    parser.add_argument("--params", nargs="+", help="parameter names or prefixes, or trainable, or all")
    parser.add_argument("--outputs", metavar="module:function", help="f(model, batch) -> [b, k]")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per forward pass")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="of the Jacobian")
    parser.add_argument("--groups", metavar="FILE", help="a label per sample, one a line: equal ones leave together")


def _add_scores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="scores.parquet", help="Parquet file to write")
    parser.add_argument("--report", help="HTML file to write as well")
    parser.add_argument("--measures", nargs="+", default=["si", "fsi"], help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--loss", default="mse", help=f"{', '.join(LOSSES)}, or module:function")
    parser.add_argument("--reg", default="0", help="regularisation of the mean loss, or auto")
    parser.add_argument("--time", type=float, help="training steps or time; left out: to convergence")
    parser.add_argument("--lr", type=float, help="step size of the mean loss")
    parser.add_argument("--dynamics", default="gd", help="gd or flow")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the noise")
    parser.add_argument("--convention", default="sum", help="sum, mean or iclr2021")
    parser.add_argument("--compat", help="iclr2021: the definitions of the authors' code")
    parser.add_argument("--device", help="where to compute, as cuda:0")
    parser.add_argument("--output-mode", default="all", help=f"for many outputs: {', '.join(MODES)}")
    parser.add_argument("--output-rank", type=int, default=16, help="rows per sample in place of many outputs")
    more = "a function that returns samples which are not trained on; scored as well, into --candidates-out"
    parser.add_argument("--candidates", metavar="module:function", help=more)
    parser.add_argument("--candidates-out", default="candidates.parquet", help="Parquet file to write")
    parser.add_argument("--no-progress", action="store_true", help="no bars")
    parser.add_argument("--sgd-batch-size", type=int, default=1, help="noise of si_sgd")
    parser.add_argument("--sgd-lr", type=float, help="noise of si_sgd")
    parser.add_argument("--sgd-jitter", type=float, default=1e-9, help="noise of si_sgd")


def _params(a: argparse.Namespace):
    return "trainable" if a.params is None else a.params[0] if a.params in (["all"], ["trainable"]) else a.params


def _demo(a: argparse.Namespace) -> int:
    if a.text:
        run_text_demo(a.out or "demo_out_text")
    else:
        run_demo(a.out or "demo_out")
    return 0


def _plan(a: argparse.Namespace) -> int:
    print(plan(*_load(a.source), **_run(a)))
    return 0


def _score(a: argparse.Namespace) -> int:
    _check_files(a)
    scores = score(*_load(a.source), **_run(a))
    if scores is None:
        part = as_part(a.part)
        print(f"part {part.number + 1} of {part.count} is in {a.store}; sui-fast merge scores when all are there")
        return 0
    return _write(a, scores)


def _merge(a: argparse.Namespace) -> int:
    _check_files(a)
    given = {name: value for name, value in dict(**_asked(a), seed=a.seed).items() if value is not None}
    return _write(a, merge(*_load(a.source), store=a.store, **given, **_given(a)))


def _run(a: argparse.Namespace) -> dict[str, Any]:
    """What score and plan are both told."""
    return dict(resume=not a.no_resume, part=a.part, store=a.store, seed=a.seed, **_asked(a), **_given(a))


def _asked(a: argparse.Namespace) -> dict[str, Any]:
    """What score, merge and plan are told of the method."""
    return dict(
        method=a.method,
        rank=a.rank,
        sketch=a.sketch,
        params=_params(a),
        outputs=_named(a.outputs, "--outputs"),
        batch_size=a.batch_size,
        dtype=None if a.dtype is None else _DTYPES[a.dtype],
        groups=None if a.groups is None else _labels(a.groups),
    )


def _given(a: argparse.Namespace) -> dict[str, Any]:
    """What score, merge and plan are told of the scores."""
    try:
        reg = a.reg if a.reg == "auto" else float(a.reg)
    except ValueError:
        raise ArgumentError(complaint("--reg", "a number or auto", repr(a.reg), "Pass one of them.")) from None
    return dict(
        measures=tuple(a.measures),
        loss=_named(a.loss, "--loss") if ":" in a.loss else a.loss,
        reg=reg,
        time=a.time,
        lr=a.lr,
        dynamics=a.dynamics,
        sigma=a.sigma,
        convention=a.convention,
        compat=a.compat,
        device=a.device,
        output_mode=a.output_mode,
        output_rank=a.output_rank,
        candidates=None if a.candidates is None else _named(a.candidates, "--candidates")(),
        progress=not a.no_progress,
        sgd_batch_size=a.sgd_batch_size,
        sgd_lr=a.sgd_lr,
        sgd_jitter=a.sgd_jitter,
    )


def _check_files(a: argparse.Namespace) -> None:
    """ArgumentError, before the work and not after it, where a file to write has no folder to be in."""
    for name in ("out", "report", "candidates_out", "plot"):
        folder = Path(getattr(a, name, None) or ".").parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            argument, got = "--" + name.replace("_", "-"), repr(getattr(a, name))
            raise ArgumentError(complaint(argument, "a file in a folder that can be written", got, "Make it first."))


def _write(a: argparse.Namespace, scores: Scores) -> int:
    scores.diagnostics["command"] = a.command
    if Processes(meet=False).number:  # one of several writes what all of them have
        return 0
    print(scores)
    print(f"wrote {scores.save(a.out)}")
    if scores.candidates is not None:
        scores.candidates.diagnostics["command"] = a.command
        print(f"wrote {scores.candidates.save(a.candidates_out)}")
    if a.report:
        print(f"wrote {scores.report(a.report)}")
    return 0


def _report(a: argparse.Namespace) -> int:
    scores = Scores.load(a.scores)
    texts = None if a.texts is None else _lines(a.texts)
    print(f"wrote {scores.report(a.out, title=a.title, texts=texts, class_names=a.class_names)}")
    return 0


def _compare(a: argparse.Namespace) -> int:
    found = compare(a.a, a.b, measure=a.measure)
    print(found.summary())
    print(f"wrote {found.report(a.out)}")
    return 0


def _validate(a: argparse.Namespace) -> int:
    _check_files(a)
    found = validate_linearization(
        *_load(a.source),
        samples=a.samples,
        time=a.time,
        lr=a.lr,
        reg=a.reg,
        influence=None if a.influence == "none" else a.influence,
        params=_params(a),
        outputs=_named(a.outputs, "--outputs"),
        seed=a.seed,
        progress=not a.no_progress,
    )
    print(found)
    pq.write_table(found.table, a.out)
    print(f"wrote {a.out}")
    if a.plot:
        found.plot(a.plot)
        print(f"wrote {a.plot}")
    return 0


def _lines(path: str) -> list[str]:
    """Lines of a file; other characters that part lines in text, as U+2028, belong to them."""
    return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")


def _labels(path: str) -> np.ndarray:
    """A label a line, as numbers where all of them are."""
    labels = np.array(_lines(path))
    try:
        return labels.astype(np.int64)
    except ValueError:
        return labels


def _named(text: str | None, argument: str) -> Callable | None:
    """The function that module:function names, modules of the present folder included."""
    if text is None:
        return None
    module, _, function = text.partition(":")
    if not module or not function:
        raise ArgumentError(complaint(argument, "module:function", repr(text), "As in: sui-fast score my_task:build"))
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ArgumentError(complaint(argument, f"a function {function} in {module}", repr(found), "Check the name."))
    return found


def _load(source: str):
    found = _named(source, "source")()
    if not isinstance(found, tuple) or len(found) != 3:
        raise ArgumentError(
            complaint(
                "source",
                "a function that returns (model, train, val)",
                type(found).__name__,
                "val may be None where fsi is not asked for.",
            )
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
