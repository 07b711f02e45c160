"""python -m benchmarks: measure, write results/<machine>.json, refresh the tables in the READMEs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
NAMES = {
    "test_capture": "capture of all factors",
    "test_rows": "explicit rows, one reused buffer",
    "test_ntk_mlp": "exact NTK",
    "test_ntk_cnn": "exact NTK",
    "test_gradient_descent": "all leave-one-out removals, gradient descent",
    "test_converged": "all leave-one-out removals, converged",
    "test_scaling": "growth with n",
    "test_converged_kernel": "converged removal, C++",
    "test_rational_kernel": "rational removal, C++",
    "test_rational_sums": "rational removal, its sums alone, C++",
    "test_triangular": "lengths under a triangular factor, C++",
    "test_products": "lengths of rows of products, C++",
    "test_sjlt": "SJLT of formed gradients, C++",
    "test_tensor_sketch": "tensor sketch, C++",
    "test_routes": "tensor sketch, slowest choice of route on a grid",
    "test_two_sided": "two-sided sketch, C++",
    "test_rademacher": "dense Rademacher sketch, C++",
    "test_dispatch": "dispatch of a call",
    "test_one_output": "pass 1 of a run of low rank, tensor sketch of all parameters",
    "test_end_to_end": "whole run of a sketch, from model to scores",
    "test_minilm": "pass 1, loss gradients of an encoder",
    "test_training_step": "scores from training's own backward passes",
}
FLOORS = {
    "test_capture": "forward + k backward passes",
    "test_rows": "forward + k backward passes",
    "test_ntk_mlp": "bare matrix products",
    "test_ntk_cnn": "bare matrix products",
    "test_scaling": "the smaller size",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-k", default="", help="only the benchmarks that match, tables left alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *sorted(map(str, HERE.glob("bench_*.py"))),
            f"--benchmark-json={raw}",
            "-k",
            arguments.k,
        ]
        status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        if not raw.exists():
            return status or 1
        runs = json.loads(raw.read_text())["benchmarks"]
    rows = [{"name": run["name"], **run["extra_info"]} for run in runs]
    table = markdown(rows)
    print("\n" + table)
    if not arguments.k:
        result = {"machine": machine(), "rows": rows}
        (HERE / "results").mkdir(exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", machine()["cpu"].lower()).strip("-")
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        note = f"{machine()['cpu']}, one thread, torch {torch.__version__}, Python {platform.python_version()}"
        for path, mark in ((HERE / "README.md", "table"), (HERE.parent / "README.md", "speed")):
            refresh(path, mark, f"{table}\n\n{note}")
    return status


def machine() -> dict[str, str]:
    """Processor and versions; nothing that names the host."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    return {
        "cpu": model or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": "1",
    }


def markdown(rows: list[dict]) -> str:
    head = "what | shapes | seconds | floor | multiple of it | at most | gain over body or rival | at least | peak MB"
    lines = [f"| {head} |", "|---" * 9 + "|"]
    for row in rows:
        test = row["name"].split("[")[0]
        shape, _, floor = row["shape"].partition("; floor: ")
        floor = row.get("floor_name") or floor or FLOORS.get(test, "")
        number = lambda name, style="g", row=row: "" if row.get(name) is None else format(row[name], style)  # noqa: E731
        gain = f"**{row['gain']:.1f}**" if "gain" in row else ""
        lines.append(
            f"| {NAMES.get(test, test)} | {shape} | {row['seconds']:.3g} | {floor}, {row['floor_seconds']:.3g} s | "
            f"**{row['ratio']:.2f}** | {number('target')} | {gain} | {number('gain_target')} | "
            f"{number('peak_mb', '.0f')} |"
        )
    return "\n".join(lines)


def refresh(path: Path, mark: str, text: str) -> None:
    """Replace what stands between <!-- mark --> and <!-- /mark -->."""
    before, _, rest = path.read_text().partition(f"<!-- {mark} -->")
    _, _, after = rest.partition(f"<!-- /{mark} -->")
    path.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{after}")


if __name__ == "__main__":
    sys.exit(main())
