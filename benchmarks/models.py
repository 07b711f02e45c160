"""docs/models.md: coverage and agreement of the zoo of the tests, and the overhead of the capture at full width.

python -m benchmarks.models           both tables
python -m benchmarks.models --wide    print the second one only
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

from sui_fast import jacobian

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "jacobians"))
import zoo  # noqa: E402

WIDE = {
    "BERT, 6 layers of 384, 32 x 64 tokens": lambda: (
        zoo.hf("BertConfig", "BertForSequenceClassification", hidden_size=384, num_hidden_layers=6,
               num_attention_heads=12, intermediate_size=1536, vocab_size=30522, num_labels=2),
        {"input_ids": torch.randint(0, 30522, (32, 64)), "attention_mask": torch.ones(32, 64, dtype=torch.long)},
    ),
    "ResNet-18, 16 images of 64 x 64": lambda: (
        zoo.hf("ResNetConfig", "ResNetForImageClassification", embedding_size=64, hidden_sizes=[64, 128, 256, 512],
               depths=[2, 2, 2, 2], layer_type="basic", num_labels=2),
        torch.randn(16, 3, 64, 64),
    ),
    "ViT, 6 layers of 192, 16 images, 65 positions": lambda: (
        zoo.hf("ViTConfig", "ViTForImageClassification", image_size=64, patch_size=8, hidden_size=192,
               num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, num_labels=2),
        torch.randn(16, 3, 64, 64),
    ),
    "Llama, 4 layers of 256, 16 x 64 tokens": lambda: (
        zoo.hf("LlamaConfig", "LlamaForSequenceClassification", hidden_size=256, num_hidden_layers=4,
               num_attention_heads=8, num_key_value_heads=2, intermediate_size=688, vocab_size=8000, num_labels=2,
               pad_token_id=0),
        {"input_ids": torch.randint(1, 8000, (16, 64)), "attention_mask": torch.ones(16, 64, dtype=torch.long)},
    ),
}  # fmt: skip


def measure(make, repeats: int) -> tuple[float, float, float]:
    """CPU seconds, least of several, interleaved: forward and backward; the same without weight gradients; capture."""
    torch.manual_seed(0)
    model, batch = make()
    model.eval()

    def outputs(model: nn.Module, batch) -> torch.Tensor:
        return (model(**batch) if isinstance(batch, dict) else model(batch)).logits[:, :1]

    def plain() -> None:
        outputs(model, batch).sum().backward()
        model.zero_grad()

    def inputs_only() -> None:
        frozen = [p for p in model.parameters() if p.ndim > 1]
        for p in frozen:
            p.requires_grad_(False)
        outputs(model, batch).sum().backward()
        model.zero_grad()
        for p in frozen:
            p.requires_grad_(True)

    runs = (plain, inputs_only, lambda: jacobian(model, batch, outputs=outputs))
    runs[2]()  # the proof comes once per model
    best = [float("inf")] * 3
    for _ in range(repeats):
        for which, run in enumerate(runs):
            start = time.process_time()
            run()
            best[which] = min(best[which], time.process_time() - start)
    return tuple(best)


def wide_table(repeats: int = 4) -> str:
    """Markdown table of the overhead at full width."""
    lines = [
        "| model (float32, one output, one thread) | forward + backward, ms | without weight gradients | capture | "
        "capture over forward + backward |",
        "|---|---|---|---|---|",
    ]
    for name, make in WIDE.items():
        floor, least, ours = measure(make, repeats)
        lines.append(f"| {name} | {floor * 1e3:.0f} | {least * 1e3:.0f} | {ours * 1e3:.0f} | {ours / floor:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.models", description=__doc__)
    parser.add_argument("--wide", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wide = wide_table()
    print(wide)
    if arguments.wide:
        return
    found = []
    for name in zoo.MODELS:
        try:
            found.append(zoo.facts(name))
        except ImportError as error:
            print(f"{name}: needs {error.name}")
    zoo.write(ROOT / "docs" / "models.md", found, wide)


if __name__ == "__main__":
    main()
