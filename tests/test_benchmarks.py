"""What runs only where a GPU is lent must be known to run before: the whole script, with tiny shapes on the CPU."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_table_runs_dry():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu_table.py", "--dry"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "nothing failed" in done.stdout and "converged removal" in done.stdout


def test_the_gpu_script_is_valid_shell():
    subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"], check=True)
