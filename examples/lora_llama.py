"""LoRA fine-tuning of a small Llama, then: which sequences taught it most? Needs transformers and peft.


The model has random weights, so nothing is downloaded. The "language" counts up modulo 32 from a random start; a tenth
of the training sequences are noise. What each sequence adds to the adapters is scored with the adapters alone.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sui_fast import outputs, score

TRAIN, VAL, LENGTH, VOCABULARY = 240, 40, 12, 32


def sequences(n: int, noise: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    start = torch.randint(VOCABULARY, (n, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH)) % VOCABULARY
    noisy = torch.rand(n, generator=generator) < noise
    tokens[noisy] = torch.randint(VOCABULARY, (int(noisy.sum()), LENGTH), generator=generator)
    return tokens, noisy


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.print_trainable_parameters()

    train, noisy = sequences(TRAIN, 0.1, generator)
    val, _ = sequences(VAL, 0.0, generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for epoch in range(10):
        losses = []
        for batch in train[torch.randperm(TRAIN, generator=generator)].split(24):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")

    scores = score(
        model, {"input_ids": train}, {"input_ids": val}, outputs=outputs.causal_lm_loss, reg=1e-2,
        measures=("si", "fsi", "leverage", "loo_residual"),
    )  # fmt: skip
    print(scores)
    print(f"settings: {scores.settings['dtypes']}, {scores.diagnostics['parameters']} parameters of the adapters")
    found = set(scores.top(int(noisy.sum()), by="loo_residual").ids.tolist())
    print(f"of {int(noisy.sum())} noisy sequences, {int(noisy[sorted(found)].sum())} are in the top")


if __name__ == "__main__":
    main()
