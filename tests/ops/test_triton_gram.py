"""The Triton kernel of ntk_gram: interpreted on the CPU, compiled ahead of time, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = """
import torch
import sui_fast
from sui_fast import ops
fresh = torch.Tensor.new_empty
def poisoned(self, *a, **k):
    out = fresh(self, *a, **k)
    return out.fill_(float("nan")) if out.is_floating_point() else out
SHAPES = [(1, 1, 1, 1, 1, 1, 1, 1), (3, 2, 1, 5, 1, 1, 17, 9), (7, 3, 1, 6, 2, 1, 33, 31), (5, 1, 3, 4, 2, 2, 7, 13),
          (2, 5, 4, 3, 3, 5, 16, 64), (13, 5, 1, 17, 4, 1, 65, 63), (0, 2, 1, 3, 2, 1, 4, 4), (3, 2, 1, 0, 2, 1, 4, 4)]
body = ops.ntk_gram.op.body
torch.manual_seed(0)
for n1, k1, s1, n2, k2, s2, i, o in SHAPES:
    for dtype in (torch.float64, torch.float32, torch.float16):
        make = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
        a1, a2 = make(n1, i, s1).transpose(1, 2), make(n2 + 1, s2, 2 * i)[1:, :, ::2]  # strided and offset
        g1, g2 = make(n1, s1, k1, o).transpose(1, 2), make(n2, k2, s2, o)
        with sui_fast.use_backend("triton"):
            torch.Tensor.new_empty = poisoned
            got = ops.ntk_gram(a1, g1, a2, g2)
            torch.Tensor.new_empty = fresh
        exact, plain = body(*(x.double() for x in (a1, g1, a2, g2))), body(a1, g1, a2, g2)
        assert got.shape == exact.shape and got.dtype == plain.dtype
        if got.numel():
            size = float(exact.abs().max())
            mine, theirs = float((got - exact).abs().max()) / size, float((plain - exact).abs().max()) / size
            assert mine <= 2 * theirs + 4 * torch.finfo(got.dtype).eps, (n1, i, o, dtype, mine, theirs)
print("compared")
"""

COMPILED = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from sui_fast.ops.gram import _triton
names = list(inspect.signature(_triton.gram_kernel.fn).parameters)
KINDS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
for dtype, kind in KINDS.items():
    m, n, c, warps = _triton.BLOCKS[dtype]
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "DOUBLE": kind == "fp64"}
    out = "fp64" if kind == "fp64" else "fp32"
    signature = {name: "constexpr" if name in constants else "*" + (out if name == "p_out" else kind)
                 if name.startswith("p_") else "i32" for name in names}
    for arch in (80, 90):
        source = ASTSource(fn=_triton.gram_kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        assert len(built.asm["ptx"]) > 1000
        shared = built.metadata.shared
        assert shared <= 160 * 1024, shared
        print(kind, arch, shared)
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreted_kernel_agrees_with_the_body():
    assert "compared" in run(INTERPRETED, TRITON_INTERPRET="1")


def test_compiles_ahead_of_time_for_two_targets(tmp_path):
    lines = run(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    run(INTERPRETED.replace("dtype=torch.float64).to(dtype)", "dtype=torch.float64).to(dtype).cuda()"))
