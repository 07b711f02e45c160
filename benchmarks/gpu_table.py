"""Parity and timings of every kernel on this GPU: python benchmarks/gpu_table.py [--small | --dry] [--seconds 200]

--small: parity of the CUDA kernels on small shapes only, for compute-sanitizer. --dry: the whole script on the CPU with
tiny shapes, so that it is known to run before a GPU is at hand; writes nothing. --seconds: when to stop measuring and
write what there is.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

import sui_fast
from sui_fast import ops
from sui_fast.ops.sketching.sums import TensorSums

DRY, SMALL = "--dry" in sys.argv, "--small" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
SKETCHES = ((64, 64, 4096, 2560, 4096), (64, 512, 1024, 1024, 4096), (4096, 1, 512, 512, 4096))  # n, s, i, o, r
REMOVALS = ((1_000_000, 4096, 1), (20_000, 1024, 3), (20_000, 1024, 10))  # n, r, k
SECONDS, START = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 1e9, time.monotonic()
ROWS: list[dict] = []
FAILED: list[str] = []


def seconds(call, rounds: int = 5) -> float:
    """Median over rounds, by CUDA events."""
    times = []
    for _ in range(rounds + 2):
        if DRY:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[2:])[rounds // 2]


def peak(call) -> int:
    if DRY:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def size(n: int) -> int:
    return max(2, n // 256) if DRY else n


def check(name, got, want, exact) -> None:
    """At most twice the error of the body, both against float64."""
    scale = float(exact.abs().max())
    mine, theirs = (float((x.double() - exact).abs().max()) / scale for x in (got, want))
    if not mine <= 2 * theirs + 16 * torch.finfo(got.dtype).eps:
        FAILED.append(f"{name}: error {mine:.1e}, the body's {theirs:.1e}")


def row(name, shape, kernel, floor, floor_name, body=None, target=None) -> None:
    """One line of the table; a kernel that fails is named, and the others go on."""
    try:
        took, least = seconds(kernel), seconds(floor)
        slow = None if body is None else seconds(body, 3)
        found = dict(
            name=name, shape=shape, seconds=took, floor=least, floor_name=floor_name, multiple=took / least,
            body=slow, gain=None if slow is None else slow / took, peak_mb=peak(kernel) / 1e6, target=target,
        )  # fmt: skip
        ROWS.append(found)
        gain = "" if slow is None else f", body {slow:.2e} s (gain {slow / took:.1f})"
        print(f"{name}, {shape}: {took:.2e} s = {took / least:.2f} x {floor_name}{gain}", flush=True)
    except Exception as error:  # out of memory, a compiler: the table must go on
        FAILED.append(f"{name}, {shape}: {type(error).__name__}: {str(error)[:300]}")
        print("FAILED", FAILED[-1], flush=True)
        if not DRY:
            torch.cuda.empty_cache()


def run(op, *args, backend="auto"):
    with sui_fast.use_backend(backend):
        return op(*args)


def gram_and_products(dtype) -> None:
    n, width, kind = size(16384), size(2048), str(dtype).removeprefix("torch.")
    a, g = draw(n, 1, width, dtype=dtype), draw(n, 1, 1, width, dtype=dtype)
    x, y = a[:, 0], g[:, 0, 0]
    row(
        "ntk_gram", f"{kind}, n = {n}, i = o = {width}", lambda: run(ops.ntk_gram, a, g, a, g),
        lambda: (x @ x.T, y @ y.T), "its two products in the dtype",
        lambda: (x @ x.T).float() * (y @ y.T).float(), target=1 / 0.6,
    )  # fmt: skip
    few = [t[:64] for t in (a, g, a, g)]
    check("ntk_gram", run(ops.ntk_gram, *few), ops.ntk_gram.op.body(*few), ops.ntk_gram.op.body(*map(_double, few)))
    widths, m = [size(w) for w in (1024, 2048, 1024, 784)], size(8192)
    layers = [(draw(m, 1, w, dtype=dtype), draw(m, 1, 1, w, dtype=dtype)) for w in widths]
    left, right = ([layer[j] for layer in layers] for j in (0, 1))
    args = left, right, left, right, [True] * len(widths)
    row(
        "ntk_gram_sum", f"{kind}, n = {m}, i = o = {widths}", lambda: run(ops.ntk_gram_sum, *args),
        lambda: [(a[:, 0] @ a[:, 0].T, g[:, 0, 0] @ g[:, 0, 0].T) for a, g in layers], "its products in the dtype",
        lambda: sum(run(ops.ntk_gram, a, g, a, g) for a, g in layers), target=1 / 0.6,
    )  # fmt: skip
    few = ([x[:64] for x in left], [x[:64] for x in right]) * 2
    exact = ops.ntk_gram_sum.op.body(*([x.double() for x in part] for part in few), args[4])
    check("ntk_gram_sum", run(ops.ntk_gram_sum, *few, args[4]), ops.ntk_gram_sum.op.body(*few, args[4]), exact)
    r = 16
    tangents, cotangents = draw(r, width, width, dtype=dtype), draw(n, 1, r, dtype=dtype)
    flat = tangents.reshape(r * width, width).T.contiguous()
    row(
        "jvp", f"{kind}, n = {n}, i = o = {width}, r = {r}", lambda: run(ops.jvp, a, g, tangents),
        lambda: [x @ flat[:, b * width : (b + 1) * width] for b in range(r)], "its products in the dtype",
        None if dtype == torch.float32 else lambda: ops.jvp.op.body(a, g, tangents), target=1 / 0.6,
    )  # fmt: skip
    row(
        "vjp", f"{kind}, n = {n}, i = o = {width}, r = {r}", lambda: run(ops.vjp, a, g, cotangents),
        lambda: [y.T @ x for _ in range(r)], "its products in the dtype", target=1 / 0.6,
    )  # fmt: skip
    for op, last in ((ops.jvp, tangents[:2]), (ops.vjp, cotangents[:64, :, :2])):
        args = (a[:64], g[:64], last)
        check(op.op.name, run(op, *args), op.op.body(*args), op.op.body(*map(_double, args)))


def _double(x):
    return x.double() if torch.is_tensor(x) else x


class Block(nn.Module):
    """One layer of a transformer from linear maps, so that every parameter has a rule."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        h = self.first(x)
        split = lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        mixed = nn.functional.scaled_dot_product_attention(*(split(f(h)) for f in (self.query, self.key, self.value)))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int):
        super().__init__()
        self.layers = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


def transformer() -> None:
    width, layers, positions, batch = (32, 2, 8, 2) if DRY else (1024, 12, 512, 16)
    model = Transformer(layers, width, 4 if DRY else 16).to(DEVICE, torch.bfloat16)
    x = draw(batch, positions, width, dtype=torch.bfloat16)

    def plain():
        model.zero_grad()
        model(x).sum().backward()

    def captured():
        return sui_fast.jacobian(model, x, batch_size=batch, dtype=torch.bfloat16).sketch(64 if DRY else 4096)

    row(
        "capture and tensor sketch", f"bf16 transformer, {layers} layers of {width}, {positions} positions, r = 4096",
        captured, plain, "forward + backward", target=1.0,
    )  # fmt: skip


def formed_gradients(dtype) -> None:
    n, d, rank = size(64), size(10_000_000), size(4096)
    a, g = torch.ones(n, 1, 1, device=DEVICE, dtype=dtype), draw(n, 1, 1, d, dtype=dtype)
    place = torch.randint(0, rank, (d,), device=DEVICE)
    rows = g.view(n, d)
    few = a[:2], g[:2, ..., : d // 100], rank, 0, 0, "sjlt"
    got, want = run(ops.sketch, *few), ops.sketch.op.body(*few)
    check("SJLT of formed gradients", got, want, ops.sketch.op.body(*map(_double, few)))
    row(
        "SJLT of formed gradients", f"{dtype}, {n} x {d} to {rank}", lambda: run(ops.sketch, a, g, rank, 0, 0, "sjlt"),
        lambda: rows.clone(), "a copy (read and write)",
        lambda: torch.zeros(n, rank, device=DEVICE, dtype=dtype).index_add_(1, place, rows), target=0.5 / 0.6,
    )  # fmt: skip


def sketches(n: int, s: int, i: int, o: int, rank: int) -> None:
    n, s, i, o, rank = (size(x) if x > 512 else x for x in (n, s, i, o, rank))
    a, g = draw(n, s, i, dtype=torch.bfloat16), draw(n, 1, s, o, dtype=torch.bfloat16)
    for kind, routes in (("tensor", ("fft", "scatter")), ("two_sided", ("auto",)), ("rademacher", ("auto",))):
        for route in routes:
            args = (a, g, rank, 0, 0, kind, route)
            row(
                f"sketch {kind} {route}", f"bf16, n = {n}, s = {s}, {i} -> {o}, r = {rank}",
                lambda args=args: run(ops.sketch, *args), lambda: g[:, 0].transpose(1, 2) @ a, "forming the rows",
            )  # fmt: skip
    few = (a[:2].float(), g[:2].float(), rank, 0, 0)
    layers_add_up()
    got, want = run(ops.sketch, *few), run(ops.sketch, *few, backend="reference")
    check("sketch", got, want, run(ops.sketch, *map(_double, few), backend="reference"))


def removal(n: int, rank: int, k: int) -> None:
    n, rank = size(n), size(rank)
    u = draw(n, k, rank) / (n * k) ** 0.5
    wide = dict(device=DEVICE, dtype=torch.float64)
    s, g = torch.rand(rank, **wide), torch.randn(rank, **wide)
    rest, null = torch.randn(n, k, **wide), torch.eye(k, **wide).expand(n, k, k).contiguous()
    shape = f"u float32, n = {n}, r = {rank}, k = {k}"
    table = torch.randn(rank, 2, dtype=torch.float64, device=DEVICE)
    few = u[:50], s, g, rest[:50], null[:50]
    for got, want in zip(run(ops.converged_removal, *few, 0.1), ops.converged_removal.op.body(*few, 0.1), strict=True):
        if not float((got - want).abs().max()) <= 1e-9 * float(want.abs().max()):
            FAILED.append(f"converged removal, {shape}")
    row(
        "converged removal", shape, lambda: run(ops.converged_removal, u, s, g, rest, null, 0.1),
        lambda: [part.double() @ table for part in u.reshape(-1, rank).split(65536)],
        "reading the features and the products",
        None if n > 100_000 else lambda: ops.converged_removal.op.body(u, s, g, rest, null, 0.1), target=2.0,
    )  # fmt: skip
    if n <= 100_000:
        poles = torch.complex(-torch.rand(13, **wide) - 0.1, torch.randn(13, **wide))
        args = (u, s, g, rest, null, rest, poles, poles.conj().resolve_conj(), 0.3)
        few = (u[:50], s, g, rest[:50], null[:50], rest[:50], *args[6:])
        for backend in ("auto",) if DRY else ("auto", "cuda"):
            got, want = run(ops.rational_removal, *few, backend=backend), ops.rational_removal.op.body(*few)
            if not float((got - want).abs().max()) <= 1e-9 * float(want.abs().max()):
                FAILED.append(f"rational removal ({backend}), {shape}")
            row(
                f"rational removal ({backend})", shape + ", 13 poles",
                lambda args=args, backend=backend: run(ops.rational_removal, *args, backend=backend),
                lambda: u.double() @ table, "one product", lambda args=args: ops.rational_removal.op.body(*args),
            )  # fmt: skip


def layers_add_up() -> None:
    """Two layers in the Fourier domain, brought back once."""
    sums, want, n, k, rank = None, 0, 3, 2, 64
    for stream, (s, i, o) in enumerate(((5, 300, 400), (1, 400, 300))):
        a, g = draw(n, s, i), draw(n, k, s, o)
        with sui_fast.use_backend("sketch=auto" if DRY else "sketch=cuda"):
            sums = sums or TensorSums(n, k, rank, 0, a)
        sums.outer(a, g, stream)
        want = want + ops.sketch.op.body(a.double(), g.double(), rank, 0, stream)
    check("sums of tensor sketches", sums.total(), want.float(), want)


def small() -> int:
    """Every CUDA kernel once, against its body."""
    for shape in ((3, 2, 5, 17, 9, 64), (5, 1, 1, 1, 4099, 128)):
        n, k, s, i, o, rank = shape
        for dtype in (torch.float32, torch.float64):
            a, g = draw(n, s, i, dtype=dtype), draw(n, k, s, o, dtype=dtype)
            for kind, route in (("tensor", "fft"), ("tensor", "scatter"), ("sjlt", "auto")):
                args = (a, g, rank, 0, 0, kind, route)
                got, want = run(ops.sketch, *args, backend="cuda"), ops.sketch.op.body(*args)
                check(f"sketch {kind} {route}", got, want, ops.sketch.op.body(*map(_double, args)))
    layers_add_up()
    for op in (ops.converged_removal, ops.rational_removal):
        for args in op.op.examples(torch.device("cuda")):
            if op.op.refusal("cuda", args):
                continue
            got, want = run(op, *args, backend="cuda"), op.op.body(*args)
            for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, want)), strict=True):
                if float((x - y).abs().max()) > 1e-9:
                    FAILED.append(op.op.name)
    print("small shapes:", FAILED or "all agree")
    return bool(FAILED)


def main() -> int:
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    if SMALL:
        return small()
    found = ops.self_test()
    print(json.dumps(found, indent=1))
    FAILED.extend(f"{op} on {where}: {why}" for op, tests in found.items() for where, why in tests.items() if why)
    parts = [(gram_and_products, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    parts += [(formed_gradients, dtype) for dtype in (torch.float32, torch.bfloat16)]
    parts += [(sketches, *sizes) for sizes in SKETCHES] + [(transformer,)]
    parts += [(removal, *sizes) for sizes in REMOVALS]
    for part, *arguments in parts:
        if time.monotonic() - START > SECONDS:
            FAILED.append(f"{part.__name__} {arguments}: no time left")
            continue
        try:
            part(*arguments)
        except Exception as error:  # what is left can still be measured
            FAILED.append(f"{part.__name__}: {type(error).__name__}: {str(error)[:300]}")
    print("\n| kernel | shape | seconds | floor | multiple | at most | gain over body | peak MB |\n" + "|---" * 8 + "|")
    for r in ROWS:
        show = lambda x, style: "" if x is None else format(x, style)  # noqa: E731
        print(
            f"| {r['name']} | {r['shape']} | {r['seconds']:.2e} | {r['floor_name']}, {r['floor']:.2e} s | "
            f"{r['multiple']:.2f} | {show(r['target'], '.2f')} | {show(r['gain'], '.1f')} | {r['peak_mb']:.0f} |"
        )
    print("\n".join(["", "failed:", *FAILED]) if FAILED else "\nnothing failed")
    if not DRY:
        name = torch.cuda.get_device_name()
        result = dict(
            gpu=name, torch=torch.__version__, python=platform.python_version(),
            self_test=found, rows=ROWS, failed=FAILED,
        )  # fmt: skip
        path = Path(__file__).parent / "results" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path.name}")
    return bool(FAILED)


if __name__ == "__main__":
    sys.exit(main())
