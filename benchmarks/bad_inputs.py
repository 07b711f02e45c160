"""Bad input against every public function: `python -m benchmarks.bad_inputs [calls] [seed]`.

A good call is spoilt in one or two arguments, drawn from values of every kind. It must end in a named error of four
parts, in the TypeError of an unknown argument, in FileNotFoundError, or in finite numbers (some of the values are
good). What else happens is a defect and is printed.
"""

from __future__ import annotations

import collections
import math
import os
import random
import signal
import sys
import traceback
import warnings
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import sui_fast
from sui_fast import Scores, SuiError

N, K = 12, 2
RNG = torch.Generator().manual_seed(0)
X, V = torch.randn(N, 3, generator=RNG), torch.randn(5, 3, generator=RNG)
Y, VY = torch.tensor([0, 1] * (N // 2)), torch.tensor([0, 1, 0, 1, 1])
J = torch.randn(N * K, 20, generator=RNG, dtype=torch.float64)
THETA, R0 = J @ J.T, torch.randn(N, K, generator=RNG, dtype=torch.float64)

SCALARS: list[Any] = [
    None, 0, -1, 1, 2, 3.5, -0.5, 1e300, -1e300, 5e-324, math.nan, math.inf, -math.inf, True, False, 2**70, 1j,
    "", "x", "auto", "si", "cuda:9", "meta", b"b", [], [1], (), (1, 2, 3), {}, {"a": 1}, set(), range(3), ...,
    np.float64(np.nan), np.ones(3), np.zeros(0), np.array([None, "a"], object), np.datetime64("2020-01-01"),
    torch.ones(2), torch.zeros(0), torch.tensor(math.nan), torch.float32, torch.device("cpu"), object(),
]  # fmt: skip


def layers(inputs: int = 3, outputs: int = K) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(inputs, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs))


def spoilt(x: torch.Tensor) -> list[Any]:
    """Other shapes, dtypes, places and values of a tensor."""
    found = [x[:0], x[:1], x[None], x[..., None], x.flatten(), x.expand(3, *x.shape), x.to("meta"), x.to_sparse()]
    found += [x.numpy(), x.tolist(), x.flip(0).numpy()[::-1], -x, x.to(torch.complex64), x.bool(), x.half(), 1000 * x]
    if x.is_floating_point():
        for value in (math.nan, math.inf, -math.inf, 1e38):
            found.append(x.clone())
            found[-1].view(-1)[x.numel() // 2] = value
        found += [torch.zeros_like(x), 1e30 * x, torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)]
    return found


def data() -> list[Any]:
    both = TensorDataset(X, Y)
    found = [(x, Y) for x in spoilt(X)] + [(X, y) for y in spoilt(Y)] + spoilt(X) + SCALARS
    found += [(X,), (X, Y, Y), [X, Y], [(X, Y)], {"x": X, "y": Y}, {"input": X, "labels": Y}, both, [*both]]
    found += [DataLoader(both, 5), DataLoader(both, 5, drop_last=True), DataLoader(both, 5, shuffle=True)]
    found += [DataLoader(both, 5, sampler=RandomSampler(both)), ((x for x in X), Y)]
    found += [(X, Y + 1), (X, Y.float()), (X, [str(int(y)) for y in Y])]
    return found


def models() -> list[Any]:
    poisoned = layers()
    poisoned[0].weight.data[0, 0] = math.nan
    found = [poisoned, layers(4), layers(3, 1), layers(3, 3), layers().double(), layers().half(), layers().to("meta")]
    after = (torch.nn.BatchNorm1d(2), torch.nn.Softmax(0), torch.nn.Flatten(0), torch.nn.Dropout())
    found += [torch.nn.Sequential(torch.nn.Linear(3, 2), other) for other in after]
    found += [torch.nn.Identity(), torch.nn.Sequential(), torch.nn.Module(), torch.nn.LSTM(3, 2)]
    found += [torch.nn.Linear(3, 2).requires_grad_(False), layers, layers().state_dict()]
    return found + SCALARS


def every(names: str, **others: list[Any]) -> dict[str, list[Any]]:
    """Any scalar for each of these arguments, and what others may be beside."""
    return {name: SCALARS for name in names.split()} | {name: SCALARS + more for name, more in others.items()}


def calls() -> dict[str, tuple[Any, dict, dict]]:
    """{name: (function, a good call, values that each argument may be spoilt with)}."""
    given = dict(model=models(), train=data(), val=data())
    training = every("reg lr dynamics convention", time=[10])
    engine = every("outputs params batch_size dtype")
    run = given | training | engine | dict(candidates=data(), progress=[False])
    run |= every("sigma batch_size seed device resume output_mode output_rank sgd_batch_size sgd_lr sgd_jitter")
    run |= every("", measures=[("si", "si"), "si_sgd", ("leverage", "loo_margin")], loss=["cross_entropy"])
    run |= every("", method=["sketch", "nystrom"], rank=[10**9], params=[["0.weight"], ["wieght"]], part=[(3, 2)])
    run |= every("", dtype=[torch.int8], groups=[["a"] * N, [0] * (N + 1)], compat=["iclr2021"])
    run |= dict(outputs=[*SCALARS, lambda m, x: m(x).sum(), lambda m, x: x])
    run |= dict(store=[x for x in SCALARS if not isinstance(x, str) or not x])
    app = given | every("reg sigma by truth convention time seed")
    good = dict(model=layers(), train=(X, Y), val=(V, VY), reg=0.01)
    quiet = good | dict(progress=False)
    two = dict(sources={"a": (X[:6], Y[:6]), "b": (X[6:], Y[6:])}, val={"a": (V, VY)})
    path = dict(path=[x for x in SCALARS if not isinstance(x, str)] + ["", "/nothing/here", os.curdir, __file__])
    scores = sui_fast.score(**quiet)
    arrays = {name: spoilt(x) + SCALARS for name, x in dict(ntk=THETA, residual=R0, cross_ntk=THETA[:4]).items()}
    real = quiet | dict(reg=0.0, samples=3, time=5, lr=0.1, influence=None)
    s = sui_fast
    return {
        "score": (s.score, quiet, run),
        "score, finite time": (s.score, quiet | dict(time=10, lr=0.1), run),
        "score, low rank": (s.score, quiet | dict(method="sketch", rank=8), run),
        "plan": (s.plan, good, run),
        "leave_one_out": (
            s.leave_one_out,
            dict(ntk=THETA, residual=R0, outputs=K, reg=0.01),
            training | arrays | every("outputs groups method"),
        ),
        "jacobian": (s.jacobian, dict(model=layers(), data=X), dict(model=models(), data=data()) | engine),
        "ntk": (s.ntk, dict(model=layers(), x1=X), dict(model=models(), x1=data(), x2=data()) | engine),
        "find_mislabeled": (s.find_mislabeled, quiet, run | every("truth error_rate")),
        "summarize": (
            s.summarize,
            quiet | dict(m=0.5),
            app | every("m step method", quota=[{0: 100}]) | dict(review=[None, 3, "none.csv"]),
        ),
        "find_undersampled": (s.find_undersampled, quiet | dict(clusters=2), app | every("clusters neighbours")),
        "compare_sources": (
            s.compare_sources,
            dict(model=layers(), progress=False, **two),
            dict(model=models()) | every("val reg sigma", sources=[{"a": (X, Y)}]),
        ),
        "detect_adversarial": (s.detect_adversarial, quiet, app),
        "overlap": (s.overlap, quiet | dict(pairs=[(0, 1)]), app | every("groups", pairs=[[(0, 99)], [(0, 1, 2)]])),
        "redundancy": (s.redundancy, quiet, app | every("samples partners candidates")),
        "information_curves": (
            s.information_curves,
            quiet | dict(points=3),
            given | every("points lr dynamics reg sigma", times=[[1, 10]]),
        ),
        "influence_functions": (
            s.influence_functions,
            quiet,
            given | engine | every("samples reg damping iterations seed tolerance start", method=["cg", "lissa"]),
        ),
        "validate_linearization": (
            s.validate_linearization,
            real,
            given | engine | every("samples reg time lr influence convention seed"),
        ),
        "compare": (s.compare, dict(a=scores, b=scores), dict(a=path["path"], b=path["path"]) | every("measure names")),
        "read_review": (s.read_review, dict(path=""), path),
        "Scores.load": (Scores.load, dict(path=""), path),
        "Scores.top": (scores.top, dict(m=3), every("m by")),
    }


def finite(found: Any) -> bool:
    """Whether every number of a result is."""
    if torch.is_tensor(found):
        return bool(torch.isfinite(found).all())
    if isinstance(found, Scores):
        columns = found.values.values()
    elif hasattr(found, "table"):
        columns = [x.to_numpy() for x in found.table.columns]
    else:
        columns = [getattr(found, name, 0.0) for name in ("weight_sqnorm", "prediction_sqnorm")]
        columns = [x for x in columns if x is not None]
    return all(np.isfinite(x).all() for x in map(np.asarray, columns) if x.dtype.kind == "f")


class Late(BaseException):
    """A call that did not end within its time."""


def _late(*_: Any) -> None:
    raise Late


def outcome(function: Any, arguments: dict) -> str:
    """ "named error", "finite numbers", "unknown argument", "no such file", or what is wrong."""
    signal.alarm(120)
    try:
        return "finite numbers" if finite(function(**arguments)) else "numbers that are not finite"
    except SuiError as error:
        whole = ": expected" in str(error) and ", got " in str(error)
        return "named error" if whole else f"an error of other form: {error}"
    except FileNotFoundError:
        return "no such file"
    except Late:
        return "no end"
    except Exception as error:
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            return "unknown argument"
        last = [frame for frame in traceback.extract_tb(error.__traceback__) if "sui_fast" in frame.filename][-1:]
        where = f" at {os.path.basename(last[0].filename)}:{last[0].lineno}" if last else ""
        return f"{type(error).__name__}{where}: {str(error)[:150]}"
    finally:
        signal.alarm(0)


RIGHT = ("named error", "finite numbers", "unknown argument", "no such file")


def fuzz(count: int, seed: int = 0) -> tuple[collections.Counter, list[str]]:
    """Counts of outcomes, and the defects: what was called, with what, and how it ended."""
    rng, known = random.Random(seed), calls()
    ended, defects = collections.Counter(), []
    before = signal.signal(signal.SIGALRM, _late)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(count):
                name = rng.choice(list(known))
                function, good, values = known[name]
                names = rng.sample(list(values), min(len(values), rng.choice((1, 1, 1, 2))))
                changed = {x: rng.choice(values[x]) for x in names}
                how = outcome(function, good | changed)
                ended[how if how in RIGHT else "defect"] += 1
                if how not in RIGHT:
                    defects.append(f"{name} with { {x: repr(value)[:80] for x, value in changed.items()} }: {how}")
    finally:
        signal.signal(signal.SIGALRM, before)
    return ended, defects


def main() -> None:
    """Print the counts and every defect."""
    count, seed = (int(x) for x in (*sys.argv[1:3], *("5000", "0")[len(sys.argv[1:3]) :]))
    torch.set_num_threads(1)
    ended, defects = fuzz(count, seed)
    print(f"{count} calls:", ", ".join(f"{number} {how}" for how, number in ended.most_common()))
    print("\n".join(sorted(set(defects))))
    sys.exit(bool(defects))


if __name__ == "__main__":
    main()
