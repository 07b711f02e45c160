"""Exact NTK against neural-tangents' structured derivatives: same weights, same core, one thread each, turn by turn.

    python benchmarks/peers_neural_tangents.py          # makes .venv-peers (jax 0.4.25) on its first run

neural-tangents 0.6.5 needs jax 0.4.25, hence an environment and a process of its own. Compilation is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".venv-peers"
NEEDS = ["jax==0.4.25", "jaxlib==0.4.25", "neural-tangents==0.6.5", "numpy<2", "scipy<1.13"]

WORKER = """
import sys, time
import numpy as np, jax, jax.numpy as jnp, neural_tangents as nt
data = np.load(sys.argv[1])
kind, axes = sys.argv[2], tuple(map(int, filter(None, sys.argv[3].split(","))))
params = [jnp.array(data[f"p{i}"]) for i in range(len(data.files) - 1)]
x = jnp.array(data["x"])
def mlp(p, x):
    for i in range(0, 4, 2):
        x = jax.nn.relu(x @ p[i] + p[i + 1])
    return x @ p[4] + p[5]
def cnn(p, x):
    for i, stride in ((0, 1), (2, 2), (4, 1)):
        x = jax.lax.conv_general_dilated(x, p[i], (stride, stride), ((1, 1), (1, 1)),
                                         dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jax.nn.relu(x + p[i + 1][:, None, None])
    return x.reshape(len(x), -1) @ p[6] + p[7]
kernel = jax.jit(nt.empirical_ntk_fn({"mlp": mlp, "cnn": cnn}[kind], trace_axes=axes, vmap_axes=0,
                                     implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES))
for line in sys.stdin:
    start = time.process_time()
    out = kernel(x, None, params).block_until_ready()
    print(time.process_time() - start, flush=True)
    if line.startswith("save"):
        np.save(sys.argv[4], np.asarray(out[:20, :20]))
        print("saved", flush=True)
"""


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if not ENVIRONMENT.exists():
        print("making .venv-peers")
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "-q", *NEEDS], check=True)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import torch
    from conftest import cnn, mlp  # torch is loaded after the thread count is set
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    digits = torch.tensor(load_digits().data / 16).float()
    rows = []
    for kind, model, x, axes, rounds in (
        ("mlp", mlp(), digits[:1000], "", 3),
        ("cnn", cnn(), digits[:300].view(-1, 1, 8, 8), "", 1),
    ):
        rows.append(against(kind, model, x, axes, rounds))
        print(json.dumps(rows[-1]), flush=True)
    result = {"machine": machine_note(), "needs": NEEDS, "rows": rows}
    (HERE / "results" / "neural_tangents.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def machine_note() -> str:
    """Processor and torch version."""
    import torch

    info = Path("/proc/cpuinfo")
    named = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{named[0] if named else ''}, one thread, torch {torch.__version__}"


def against(kind, model, x, axes, rounds) -> dict:
    """Seconds of both, in turns; ours is always the kernel of all pairs of outputs."""
    import numpy as np
    import torch

    import sui_fast

    with tempfile.TemporaryDirectory() as folder:
        data, kept = Path(folder) / "data.npz", Path(folder) / "kernel.npy"
        # its rules look for a plain x @ W: matrices go over transposed
        arrays = [p.detach().numpy() for p in model.parameters()]
        weights = {f"p{i}": p.T.copy() if p.ndim == 2 else p for i, p in enumerate(arrays)}
        np.savez(data, x=x.numpy(), **weights)
        worker = subprocess.Popen(
            [ENVIRONMENT / "bin" / "python", "-c", WORKER, data, kind, axes, kept],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

        def ask(what: str) -> float:
            worker.stdin.write(what + "\n")
            worker.stdin.flush()
            return float(worker.stdout.readline())

        ask("save")  # compiles
        worker.stdout.readline()
        few = sui_fast.ntk(model, x[:20]).reshape(20, model[-1].out_features, 20, -1).permute(0, 2, 1, 3)
        few = few if axes == "" else few.diagonal(dim1=2, dim2=3).mean(-1)
        torch.testing.assert_close(torch.from_numpy(np.load(kept)).reshape(few.shape), few, rtol=1e-3, atol=1e-3)
        theirs, ours = [], []
        for _ in range(rounds):
            theirs.append(ask("run"))
            start = time.process_time()
            sui_fast.ntk(model, x)
            ours.append(time.process_time() - start)
        worker.stdin.close()
        worker.wait()
    return dict(
        model=kind,
        n=len(x),
        theirs=min(theirs),
        ours=min(ours),
        ratio=min(ours) / min(theirs),
        what="all pairs of outputs" if axes == "" else "theirs: trace over outputs; ours: all pairs of outputs",
    )


if __name__ == "__main__":
    sys.exit(main())
