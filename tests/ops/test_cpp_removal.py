"""The C++ kernel of block leave-one-out, against a resolvent with its rows deleted and against a plain evaluation."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

_cpu = pytest.importorskip("sui_fast._cpu", reason="the C++ module is not built")
kernel = pytest.importorskip("sui_fast.ops.removal._cpu")

SHAPES = [  # blocks, m, r, poles
    pytest.param(1, 1, 1, 1, id="all-one"),
    pytest.param(33, 1, 100, 5, id="rows"),
    pytest.param(3, 2, 600, 4, id="pairs-two-chunks"),
    pytest.param(7, 3, 513, 7, id="odd"),
    pytest.param(35, 10, 129, 6, id="ten"),
    pytest.param(2, 64, 200, 2, id="largest"),
    pytest.param(0, 1, 4, 2, id="no-blocks"),
    pytest.param(3, 2, 0, 2, id="rank-zero"),
    pytest.param(3, 2, 5, 0, id="no-poles"),
]


def problem(blocks, m, r, poles, dtype=torch.float64):
    random = np.random.default_rng(blocks + 10 * m + 100 * r)
    normal = lambda *shape: torch.from_numpy(random.standard_normal(shape))  # noqa: E731
    u = (normal(blocks, m, r) / max(r, 1) ** 0.5).to(dtype)
    root = normal(blocks, m, m)
    p = torch.complex(normal(poles), normal(poles))
    p[::2] = -p[::2].abs() - 0.1 + 0j
    null = root @ root.transpose(1, 2)
    return dict(
        u=u, s=3 * normal(r).abs(), g=normal(r), rest=normal(blocks, m), null=null, r0=normal(blocks, m),
        poles=p, residues=torch.complex(normal(poles), normal(poles)), constant=0.7,
    )  # fmt: skip


def plain_rational(u, s, g, rest, null, r0, poles, residues, constant):
    u = u.to(torch.complex128)
    coef = -constant * (u.transpose(1, 2).real @ r0[:, :, None])[..., 0]
    for p, c in zip(poles, residues, strict=True):
        f = 1 / (s - p)
        y = torch.linalg.solve((u * f) @ u.transpose(1, 2) - null / p, u @ (f * g) - rest / p)
        coef -= (c * f * (u.transpose(1, 2) @ y[:, :, None])[..., 0]).real
    return coef


def plain_converged(u, s, g, rest, null, shift):
    u, w = u.double(), 1 / (s + shift)
    v = torch.linalg.solve((u * w) @ u.transpose(1, 2) + null / shift, u @ (w * g) + rest / shift)
    return v, -w * (u.transpose(1, 2) @ v[:, :, None])[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks, m, r, poles", SHAPES)
def test_agrees_with_plain_evaluation(blocks, m, r, poles, dtype):
    case = problem(blocks, m, r, poles, dtype)
    torch.testing.assert_close(kernel.rational_removal(**case), plain_rational(**case), rtol=1e-11, atol=1e-12)
    case = {name: case[name] for name in ("u", "s", "g", "rest", "null")}
    pairs = zip(kernel.converged_removal(**case, shift=0.3), plain_converged(**case, shift=0.3), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rank", [12, 7], ids=["full-rank", "low-rank"])
@pytest.mark.parametrize("m", [1, 3])
def test_equals_deleting_rows(m, rank):
    """(K_-b - p)^-1 r_-b, padded with zeros, minus (K - p)^-1 r0, in the eigenvectors and on their complement."""
    random = np.random.default_rng(m)
    basis = torch.linalg.qr(torch.from_numpy(random.standard_normal((12, 12))))[0][:, :rank].contiguous()
    s = torch.from_numpy(random.uniform(0.1, 3, rank))
    k, r0 = (basis * s) @ basis.T, torch.from_numpy(random.standard_normal(12))
    g = basis.T @ r0
    poles, residues = torch.tensor([[-0.2, 1 + 0.7j], [0.8, -0.3 + 1.1j]], dtype=torch.complex128)
    u = basis.reshape(12 // m, m, rank)
    outside = torch.eye(12, dtype=torch.float64) - basis @ basis.T
    index = torch.arange(12).reshape(-1, m)
    null = torch.stack([outside[i][:, i] for i in index])
    rest = r0[index] - u @ g
    coef = kernel.rational_removal(u, s, g, rest, null, r0[index], poles, residues, 0.25)
    for block, rows in enumerate(index):
        kept = torch.tensor([i for i in range(12) if i not in rows])

        after = torch.zeros(12, dtype=torch.float64)
        after[kept] = filtered(k[kept][:, kept], r0[kept], poles, residues)
        before = filtered(k, r0, poles, residues)
        torch.testing.assert_close(coef[block], basis.T @ (after - before), rtol=1e-10, atol=1e-11)


def filtered(k, r0, poles, residues):
    result = 0.25 * r0
    for p, c in zip(poles, residues, strict=True):
        result = result + (c * torch.linalg.solve(k - p * torch.eye(len(k), dtype=p.dtype), r0.to(p.dtype))).real
    return result


def test_converged_equals_deleting_rows():
    random = np.random.default_rng(5)
    basis = torch.linalg.qr(torch.from_numpy(random.standard_normal((12, 7))))[0].contiguous()
    s, r0 = torch.from_numpy(random.uniform(0.1, 3, 7)), torch.from_numpy(random.standard_normal(12))
    index = torch.arange(12).reshape(-1, 2)
    u, k = basis[index], (basis * s) @ basis.T + 0.4 * torch.eye(12, dtype=torch.float64)
    outside = torch.eye(12, dtype=torch.float64) - basis @ basis.T
    null = torch.stack([outside[i][:, i] for i in index])
    g = basis.T @ r0
    v, coef = kernel.converged_removal(u, s, g, r0[index] - u @ g, null, 0.4)
    for block, rows in enumerate(index):
        kept = torch.tensor([i for i in range(12) if i not in rows])
        after = torch.zeros(12, dtype=torch.float64)
        after[kept] = torch.linalg.solve(k[kept][:, kept], r0[kept])
        change = basis.T @ (after - torch.linalg.solve(k, r0))
        torch.testing.assert_close(coef[block], change, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(v[block], r0[rows] - k[rows] @ after, rtol=1e-10, atol=1e-11)


def test_takes_views_and_fills_all_of_its_result():
    case = problem(5, 3, 24, 4)
    expected = kernel.rational_removal(**case)
    case["u"] = case["u"].transpose(0, 2).contiguous().transpose(0, 2)
    case["poles"], case["residues"] = case["poles"].conj(), case["residues"].conj()  # lazily conjugated: same real part
    torch.testing.assert_close(kernel.rational_removal(**case), expected)
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
    try:
        torch.testing.assert_close(kernel.rational_removal(**case), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_change_nothing():
    case = problem(301, 3, 257, 8)
    expected = kernel.rational_removal(**case)
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernel.rational_removal(**case), expected)
    finally:
        torch.set_num_threads(1)


def test_singular_block_is_an_error():
    case = problem(4, 2, 6, 2)
    case["u"][1] = 0
    case["null"][1] = 0
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 4"):
        kernel.rational_removal(**case)


def test_nan_stays_in_its_block():
    case = problem(4, 1, 6, 2)
    case["rest"][2] = float("nan")
    coef = kernel.rational_removal(**case)
    assert coef[2].isnan().all() and coef[[0, 1, 3]].isfinite().all()


def test_refusals_name_the_reason():
    case = problem(2, 1, 4, 1)
    assert kernel.refuse_rational_removal(**case) is None
    assert "float16" in kernel.refuse_rational_removal(**{**case, "u": case["u"].half()})
    assert "complex64" in kernel.refuse_rational_removal(**{**case, "poles": case["poles"].to(torch.complex64)})
    assert "float32" in kernel.refuse_rational_removal(**{**case, "rest": case["rest"].float()})
    wide = problem(1, _cpu.MOST_ROWS + 1, 4, 1)
    assert str(_cpu.MOST_ROWS) in kernel.refuse_rational_removal(**wide)
    assert kernel.refuse_converged_removal(*(wide[name] for name in ("u", "s", "g", "rest", "null")), 0.1) is not None


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_other_instruction_sets(instructions):
    """The machine's best is what the other tests run; the rest of the same source, in a process of its own."""
    selected = ["-k", "plain_evaluation and (odd or ten or rows)"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, *selected]
    environment = {**os.environ, "SUI_FAST_CPU": instructions, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr


def test_memory_of_a_large_result_is_used_again_and_never_shared():
    first, second = kernel._result(1 << 11, 1 << 10), kernel._result(1 << 11, 1 << 9)
    first.fill_(1.0)
    second.fill_(2.0)
    assert (first == 1).all() and first.shape == (1 << 11, 1 << 10) and first.is_contiguous()
    view, address = first[5:, :7], first.data_ptr()
    del first
    assert kernel._result(1 << 11, 1 << 10).data_ptr() != address  # a view still holds it
    assert (view == 1).all()
    del view
    assert kernel._result(1 << 10, (1 << 10) + 1).data_ptr() == address  # about the same size
    far = kernel._result(1 << 11, 1 << 12)  # larger: fresh memory
    far.fill_(3.0)
    assert (second == 2).all()


@pytest.mark.parametrize("op", ["converged", "rational"])
def test_a_used_result_is_overwritten_entirely(op):
    case = problem(1030, 1, 1024, 3)
    rational = lambda: kernel.rational_removal(**case)  # noqa: E731
    arguments = [case[name] for name in ("u", "s", "g", "rest", "null")]
    run = rational if op == "rational" else lambda: kernel.converged_removal(*arguments, 0.1)[1]
    want = run().clone()
    stale = kernel._result(1030, 1024)
    stale.fill_(float("nan"))
    address = stale.data_ptr()
    del stale
    got = run()
    assert got.data_ptr() == address
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_threads_take_results_at_once():
    def work(value):
        good = True
        for _ in range(20):
            mine = kernel._result(1 << 10, 1 << 10)
            mine.fill_(value)
            good &= bool((mine == value).all())
            del mine
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
