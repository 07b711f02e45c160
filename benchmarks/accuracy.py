"""Error of ``leave_one_out`` against refits in extended precision, over the whole grid; writes docs/accuracy.md.

    python -m benchmarks.accuracy [--quick] [--output docs/accuracy.md]

The judge is tests/oracle.py: every reduced problem decomposed in np.longdouble (64 bits of mantissa), on features of a
binary grid for which J J^T is exact in float64. The figure of a cell is the largest relative error over all its
samples and over weight_sqnorm and prediction_sqnorm.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from sui_fast import leave_one_out

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from oracle import Problem, make_problem, relative_error  # noqa: E402

SHAPES = {
    (1, "N < d"): (24, 48),
    (1, "N > d"): (40, 8),
    (3, "N < d"): (14, 60),
    (3, "N > d"): (20, 12),
    (10, "N < d"): (6, 72),
    (10, "N > d"): (12, 24),
}
DUPLICATES = ("no", "exact", "near")
TIMES = (1, 50, 2000, 200_000, None)
REGS = (0.0, 1e-6, 1e-3, 0.1)
EDGES = (1.0, 1.9)  # lr lambda_max
TARGET = 1e-8

HEADER = """# Accuracy of the exact leave-one-out

Largest relative error of `weight_sqnorm` and `prediction_sqnorm` over all samples, float64, against refits in
extended precision (64-bit mantissa) of every reduced problem. Written by `python -m benchmarks.accuracy`; convention
"sum" unless said otherwise. Finite times are gradient descent with lr lambda_max = 1.0 and 1.9, the worse of the two.
Near duplicates differ by relative noise of 1e-3, exact ones not at all; a third of the samples are copies, with labels
of their own. Above 1e-8: **bold**.

"""

FORMS = """
## The two converged forms

weight_sqnorm at convergence with regularisation, worst over problems as above, by the condition number of
Theta + lambda I (1-norm). The dual form takes ||dw||^2 as a difference of two numbers s_max / lambda times as large;
`method="auto"` therefore changes to the spectrum where the error may be large, by the condition number or by rows.

"""

REASON = """eps s_max / s_min is the relative change of the smallest positive eigenvalue when the entries of the kernel
are rounded to float64: an eigendecomposition in float64 errs by as much, and the more so the scores of near duplicates
late in training without regularisation, which go with powers of 1/s_min. The last column is the error of brute force in
the same precision, an eigendecomposition in float64 of each reduced kernel. The remedy is a regularisation, an earlier
time, or one copy of each near duplicate.

"""


def learning_rate(case: Problem, reg: float, edge: float) -> float:
    return edge / (case.lambda_max / len(case.residual) + reg)


def error(case: Problem, **arguments) -> tuple[float, dict]:
    """(largest relative error over samples and both measures, diagnostics)."""
    want = case.refit(**arguments)
    got = leave_one_out(
        case.ntk,
        case.residual,
        outputs=case.residual.shape[1],
        cross_ntk=case.cross_ntk,
        groups=case.groups,
        **arguments,
    )
    zero = 1e-24 * float((want.w**2).sum())
    pairs = ((got.weight_sqnorm, want.weight_sqnorm), (got.prediction_sqnorm, want.prediction_sqnorm))
    return max(relative_error(a, b, zero) for a, b in pairs), got.diagnostics


def show(value: float) -> str:
    return f"**{value:.0e}**" if value >= TARGET else f"{value:.0e}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def grid(shapes: dict) -> tuple[str, list[tuple]]:
    """The grid as a table, and the cells above the target."""
    rows, failures = [], []
    for (k, shape), (n, d) in shapes.items():
        for duplicates in DUPLICATES:
            case = make_problem(n, k, d, duplicates, seed=10 + k)
            for reg in REGS:
                row = [str(k), f"{shape} ({n * k}, {d})", duplicates, f"{reg:g}"]
                for time in TIMES:
                    edges = (None,) if time is None else EDGES
                    runs = [dict(reg=reg, time=time, lr=edge and learning_rate(case, reg, edge)) for edge in edges]
                    found = [(*error(case, **run), run) for run in runs]
                    worst, diagnostics, run = max(found, key=lambda entry: entry[0])
                    row.append(show(worst))
                    if worst >= TARGET:
                        name = f"k={k}, {shape}, {duplicates} duplicates, reg={reg:g}, t={time or 'infinity'}"
                        failures.append((name, worst, diagnostics, case, run))
                rows.append(row)
                print(*row, flush=True)
    return table(["k", "(N, d)", "duplicates", "reg", *(f"t = {t or 'infinity'}" for t in TIMES)], rows), failures


def conventions() -> str:
    """Conventions, groups and gradient flow on one problem each."""
    rows = []
    for convention in ("sum", "mean", "iclr2021"):
        for grouped in (False, True):
            row = [convention, "groups of 3" if grouped else "single samples"]
            case = make_problem(15, 3, 60, "near", seed=3)
            case.groups = np.arange(15) // 3 if grouped else None
            for dynamics, time in (("gd", 50), ("gd", 2000), ("flow", 50), ("flow", 2000), ("gd", None)):
                arguments = dict(reg=1e-3, time=time, lr=time and learning_rate(case, 1e-3, 1.0), dynamics=dynamics)
                row.append(show(error(case, convention=convention, **arguments)[0]))
            rows.append(row)
    return table(["convention", "removed", "gd, t = 50", "gd, t = 2000", "flow, 50", "flow, 2000", "infinity"], rows)


def forms() -> str:
    """Largest error of either converged form, by the condition number of Theta + lambda I (1-norm)."""
    worst: dict[int, list[float]] = {}
    for seed in range(3):
        for (k, _), (n, d) in SHAPES.items():
            case = make_problem(n, k, d, DUPLICATES[seed], m=1, seed=100 + seed) if k < 10 else None
            for reg in np.logspace(-7, -1, 13) if case else ():
                found = []
                for method in ("dual", "spectral", "auto"):
                    got = leave_one_out(case.ntk, case.residual, outputs=k, reg=reg, method=method)
                    found.append(relative_error(got.weight_sqnorm, case.refit(reg=reg).weight_sqnorm))
                    if method == "dual":
                        decade = int(np.log10(got.diagnostics["condition"]))
                worst[decade] = [max(pair) for pair in zip(worst.get(decade, (0, 0, 0)), found, strict=True)]
    rows = [[f"1e{key} to 1e{key + 1}", *(f"{value:.0e}" for value in worst[key])] for key in sorted(worst)]
    return table(["condition", "dual", "spectral", "auto"], rows)


def brute_force(case: Problem, *, reg: float, time: float | None, lr: float | None) -> np.ndarray:
    """||dw||^2 from an eigendecomposition in float64 of every reduced kernel, convention "sum"."""
    n, r0, theta = len(case.residual), case.residual.ravel(), case.ntk

    def dual(keep: np.ndarray) -> np.ndarray:
        s, u = np.linalg.eigh(theta[np.ix_(keep, keep)])
        x = np.where(s > len(r0) * np.finfo(float).eps * s[-1], s, 0) + n * reg
        safe = np.where(x > 0, x, 1)
        phi = (x > 0) / safe
        if time is not None:
            z = lr / n * safe
            phi = phi * np.where(z < 0.5, -np.expm1(time * np.log1p(-np.minimum(z, 0.5))), 1 - (1 - z) ** time)
        alpha = np.zeros_like(r0)
        alpha[keep] = u @ (phi * (u.T @ r0[keep]))
        return alpha

    everything = np.arange(len(r0))
    change = np.array([dual(np.setdiff1d(everything, case.rows(b))) for b in case.blocks]) - dual(everything)
    return np.einsum("bi,ij,bj->b", change, theta, change)


def reasons(failures) -> str:
    """For each cell above the target: the condition of the kernel, and what brute force in float64 reaches."""
    rows = []
    for name, worst, diagnostics, case, arguments in failures:
        s = np.linalg.eigvalsh(case.ntk)
        condition = s[-1] / s[s > len(s) * np.finfo(float).eps * s[-1]][0]
        zero = 1e-24 * float((case.refit(**arguments).w ** 2).sum())
        brute = relative_error(brute_force(case, **arguments), case.refit(**arguments).weight_sqnorm, zero)
        row = [name, f"{worst:.1e}", diagnostics.get("form", ""), f"{condition:.0e}"]
        rows.append([*row, f"{condition * np.finfo(float).eps:.0e}", f"{brute:.1e}"])
    return table(["cell", "error", "form", "s_max / s_min", "eps s_max / s_min", "brute force, float64"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="k = 1 and 3 only")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {key: value for key, value in SHAPES.items() if not arguments.quick or key[0] < 10}
    cells, failures = grid(shapes)
    text = (
        HEADER
        + cells
        + "\n## Conventions, groups, gradient flow\n\nk = 3, near duplicates, reg = 1e-3.\n\n"
        + conventions()
    )
    text += FORMS + forms() + "\n## Cells above 1e-8\n\n"
    if failures:
        text += REASON + reasons(failures)
    else:
        text += "None.\n"
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(text)
    print(f"{len(failures)} cells above {TARGET:g}; wrote {arguments.output.name}")


if __name__ == "__main__":
    main()
