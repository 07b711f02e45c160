"""Parity of every kernel on this GPU, and ntk_gram against two matrix products and a multiplication."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import torch

import sui_fast
from sui_fast import ops


def seconds(call, rounds: int = 7) -> float:
    """Median over rounds, by CUDA events."""
    times = []
    for _ in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[2:])[rounds // 2]


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    found = ops.self_test()
    print(json.dumps(found, indent=1))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for n, width in ((4096, 512), (8192, 1024)):
            a, g = (torch.randn(n, 1, width, device="cuda", dtype=dtype) for _ in range(2))
            g = g[:, None]

            def run(backend, a=a, g=g):
                with sui_fast.use_backend(backend):
                    return ops.ntk_gram(a, g, a, g)

            error = float((run("triton") - run("reference")).norm() / run("reference").norm())
            kernel, body = seconds(lambda: run("triton")), seconds(lambda: run("reference"))
            rate = 4 * n * n * width / kernel / 1e12
            rows.append(dict(dtype=str(dtype), n=n, width=width, error=error, kernel=kernel, body=body, tflops=rate))
            print(
                f"ntk_gram {dtype} n={n} i=o={width}: {kernel:.2e} s, body {body:.2e} s, "
                f"{rate:.0f} TFLOP/s, error {error:.1e}"
            )
    name = torch.cuda.get_device_name()
    result = {
        "gpu": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "self_test": found,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.name}")
    return 0 if all(reason is None for tests in found.values() for reason in tests.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
