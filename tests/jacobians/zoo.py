"""Small configurations of real architectures, random weights, float64: shared by the tests and by docs/models.md.

``MODELS[name]()`` gives (model, batch, outputs): the batch as ``jacobian`` takes it, outputs None or f(model, batch).
Entries that need an optional package raise ImportError where it is missing.
"""

import importlib
import os
import time
from collections import Counter

import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import nn
from torch.utils.checkpoint import checkpoint

from sui_fast import jacobian

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMAGE, VOCABULARY, LENGTH, SAMPLES = 32, 40, 7, 4


def images(channels=3, size=IMAGE, samples=SAMPLES):
    return torch.randn(samples, channels, size, size)


def tokens(samples=SAMPLES, length=LENGTH, vocabulary=VOCABULARY):
    return torch.randint(2, vocabulary, (samples, length))


def padded(samples=SAMPLES, length=LENGTH):
    """Token batch with rows of different lengths, padded on the right."""
    mask = torch.ones(samples, length, dtype=torch.long)
    for i in range(samples):
        mask[i, length - i % 3 :] = 0
    return {"input_ids": tokens(samples, length) * mask, "attention_mask": mask}


# -- plain PyTorch ---------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """MLP-Mixer: patches, then layers that mix positions and layers that mix channels."""

    def __init__(self, dim=8, patches=16, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 8, stride=8)
        mlp = lambda size: nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))  # noqa: E731
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.tokens = nn.ModuleList(mlp(patches) for _ in range(depth))
        self.channels = nn.ModuleList(mlp(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for i, (token, channel) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + token(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channel(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class UNet(nn.Module):
    """Two levels down, transposed convolutions up, skips, group norms; logits are means over the image."""

    def __init__(self, c=4):
        super().__init__()
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(2, o), nn.SiLU(inplace=True))  # noqa: E731
        self.enter, self.down, self.deep = block(3, c), nn.Conv2d(c, 2 * c, 3, 2, 1), block(2 * c, 2 * c)
        self.up = nn.ConvTranspose2d(2 * c, c, 3, stride=2, padding=1, output_padding=1)
        self.leave, self.out = block(2 * c, c), nn.Conv2d(c, 2, 1)

    def forward(self, x):
        skip = self.enter(x)
        x = self.up(self.deep(self.down(skip)))
        return self.out(self.leave(torch.cat([x, skip], 1))).mean((2, 3))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, LayerNorm over channels, layer scale."""

    def __init__(self, dim=6):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, dim, 4, 4), nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.wide, self.back = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma, self.head = nn.Parameter(torch.rand(dim)), nn.Linear(dim, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.back(F.gelu(self.wide(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        x = x + (self.gamma * y).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, layer, batch_first=True):
        super().__init__()
        self.layer, self.batch_first = layer, batch_first
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.layer(x)[0]
        return self.head(out[:, -1] if self.batch_first else out[-1])


class Cells(nn.Module):
    """Recurrent cells called in a loop."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(4, 5), nn.GRUCell(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        h, c, g = x.new_zeros(len(x), 5), x.new_zeros(len(x), 5), x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(h, g)
        return self.head(g)


class Packed(nn.Module):
    """An LSTM on packed sequences."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.layer(packed)[1][0][-1])


class Attention(nn.Module):
    """nn.MultiheadAttention: self-attention, then cross-attention with keys of other sizes."""

    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=batch_first)
        self.key, self.value, self.head = nn.Linear(8, 6), nn.Linear(8, 5), nn.Linear(8, 2)
        self.batch_first = batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = x + self.own(x, x, x, need_weights=False)[0]
        y = y + self.cross(y, self.key(x), self.value(x))[0]
        return self.head(y.mean(1 if self.batch_first else 0))


class TransformerModel(nn.Module):
    """nn.TransformerEncoder with an embedding, learned positions and a class token."""

    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=not batch_first)
        self.embed = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, LENGTH + 4, 8))
        self.head, self.batch_first = nn.Linear(8, 2), batch_first

    def forward(self, x):
        x = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x)], 1)
        x = x + self.position[:, : x.shape[1]]
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x[:, 0])


class Seq2Seq(nn.Module):
    """nn.Transformer with a causal decoder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.embed.weight.dtype)
        e = self.embed(x)
        return self.head(self.body(e, e, tgt_mask=mask, tgt_is_causal=True).mean(1))


class NanoGPT(nn.Module):
    """Fused attention (scaled_dot_product_attention, causal), bare position table, tied output layer."""

    def __init__(self, dim=8):
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, dim), nn.Embedding(LENGTH, dim)
        self.qkv, self.out, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x):
        b, s = x.shape
        x = self.embed(x) + self.position(torch.arange(s, device=x.device))
        q, k, v = (part.view(b, s, 2, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1)
        return F.linear((x + self.out(y))[:, -1], self.embed.weight)[:, :3]


class Experts(nn.Module):
    """Mixture of experts by hand: top-2 routing, tokens gathered and scattered per expert."""

    def __init__(self, dim=6, experts=3):
        super().__init__()
        self.enter, self.gate, self.head = nn.Linear(4, dim), nn.Linear(dim, experts), nn.Linear(dim, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 8), nn.SiLU(), nn.Linear(8, dim)) for _ in range(experts)
        )

    def forward(self, x):
        b, s, _ = x.shape
        x = self.enter(x).flatten(0, 1)
        weight, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            y = y.index_add(0, row, expert(x[row]) * weight[row, slot, None])
        return self.head((x + y).view(b, s, -1).mean(1))


class DenseExperts(nn.Module):
    """Mixture of experts as one einsum over stacked weights."""

    def __init__(self, dim=6, experts=3):
        super().__init__()
        self.gate, self.head = nn.Linear(4, experts), nn.Linear(dim, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(experts, 4, dim)), nn.Parameter(torch.randn(experts, dim))

    def forward(self, x):
        y = torch.tanh(torch.einsum("bsi,eio->bseo", x, self.weight) + self.bias)
        return self.head(torch.einsum("bse,bseo->bso", self.gate(x).softmax(-1), y).mean(1))


class Bare(nn.Module):
    """Parameters without modules: addmm, matmul, einsum, scale, mask token, PReLU, bilinear, weights of weights."""

    def __init__(self, d=6):
        super().__init__()
        new = lambda *shape: nn.Parameter(torch.randn(*shape) / d**0.5)  # noqa: E731
        self.a, self.b, self.c, self.bias, self.scale = new(d, d), new(d, d), new(d, 2, 3), new(d), new(d)
        self.token, self.temperature, self.slope = new(1, 1, d), new(1), nn.PReLU(5)
        self.pair, self.normed = nn.Bilinear(d, d, 3), nn.utils.parametrizations.weight_norm(nn.Linear(d, d))
        self.left, self.mask = new(5, 5), nn.Parameter(torch.rand(d) > 0.5, requires_grad=False)
        self.low, self.high, self.head = new(2, d), new(d, 2), new(2, d)

    def forward(self, x):
        b, s, d = x.shape
        x = torch.where(x[..., :1] > 1, self.token, x) * self.scale * self.temperature.exp()
        y = torch.addmm(self.bias, x.reshape(-1, d), self.a).view(b, s, d)
        y = self.slope(y @ self.b.T + self.left @ x)
        y = y + torch.einsum("bsd,dhk->bshk", y, self.c).flatten(2)
        y = y + F.linear(y, self.high @ self.low) + self.normed(y)
        y *= self.scale
        y -= self.bias[None]
        z = y.mean(1)
        return self.pair(z, x[:, 0])[:, :2] + z @ self.head.t()


class Checkpointed(nn.Module):
    def __init__(self, reentrant, dim=6):
        super().__init__()
        self.enter, self.scale, self.head = nn.Linear(4, dim), nn.Parameter(torch.randn(dim)), nn.Linear(dim, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Tanh()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + checkpoint(lambda v, block=block: block(v * self.scale), x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


class Video(nn.Module):
    """Frames folded into the batch for the convolutions, unfolded after."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        y = self.norm(self.conv(x.flatten(0, 1))) * self.scale
        return self.head(F.relu(y).mean((2, 3)).view(len(x), -1, 4).mean(1))


class Bag(nn.Module):
    """Bags of embeddings: mean without padding, sum, and the largest (which goes through vmap)."""

    def __init__(self):
        super().__init__()
        self.mean = nn.EmbeddingBag(VOCABULARY, 6, mode="mean", padding_idx=3)
        self.sum, self.max = nn.EmbeddingBag(VOCABULARY, 6, mode="sum"), nn.EmbeddingBag(VOCABULARY, 6, mode="max")
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.mean(x) + self.sum(x) * self.max(x)))


def data_parallel():
    """DistributedDataParallel needs a process group; one process on the gloo backend will do."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(Mixer().double())


def compiled():
    return torch.compile(Attention(), backend="eager")


def compiled_inside():
    model = TransformerModel()
    model.encoder.compile(backend="eager")
    return model


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def hf(config, model, **options):
    """A class of transformers with a tiny configuration."""
    transformers = importlib.import_module("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def last_logits(model, batch):
    """Three logits at the last position that is not padding."""
    logits, mask = model(**batch).logits, batch["attention_mask"]
    return logits[torch.arange(len(mask)), mask.sum(1) - 1, :3]


SMALL = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3)
TEXT = dict(vocab_size=VOCABULARY, max_position_embeddings=16)
LLAMA = dict(SMALL, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **TEXT)


def bert(**options):
    return hf("BertConfig", "BertForSequenceClassification", **SMALL, **TEXT, **options)


def llama():
    return hf("LlamaConfig", "LlamaForCausalLM", **LLAMA)


def resnet(layer, depths):
    sizes = [8, 16, 16, 16] if layer == "basic" else [16, 32, 32, 32]
    return hf(
        "ResNetConfig", "ResNetForImageClassification", embedding_size=8, hidden_sizes=sizes, depths=depths,
        layer_type=layer, num_labels=3,
    )  # fmt: skip


def lora():
    """Llama with LoRA on the attention projections: only the adapters are trainable."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


def lora_bert():
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "dense"], init_lora_weights=False, use_dora=True
    )
    return peft.get_peft_model(bert(), config)


def t5():
    return hf(
        "T5Config", "T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=16, num_layers=2,
        num_heads=2, relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip


def t5_outputs(model, batch):
    start = batch["input_ids"][:, :2] * 0 + 1
    return model(**batch, decoder_input_ids=start).logits[:, -1, :3]


def mixtral(implementation="eager"):
    return hf(
        "MixtralConfig", "MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2,
        experts_implementation=implementation, **LLAMA,
    )  # fmt: skip


def whisper():
    return hf(
        "WhisperConfig", "WhisperModel", d_model=8, encoder_layers=2, encoder_attention_heads=2, decoder_layers=1,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=6, max_source_positions=10,
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ).encoder  # fmt: skip


def mean_state(model, batch):
    """Three features of the mean of the last hidden states."""
    return model(**batch).last_hidden_state.mean(1)[:, :3]


def other(module, name, *args, **options):
    """A model of torchvision or timm, where they are installed."""
    return getattr(importlib.import_module(module), name)(*args, **options)


def sequences(samples=SAMPLES, length=5, size=4):
    return torch.randn(samples, length, size)


MODELS = {
    "ResNet-18 (transformers)": lambda: (resnet("basic", [2, 2, 2, 2]), images(), None),
    "ResNet-50 (transformers)": lambda: (resnet("bottleneck", [3, 4, 6, 3]), images(), None),
    "ViT (transformers)": lambda: (
        hf("ViTConfig", "ViTForImageClassification", image_size=IMAGE, patch_size=8, **SMALL),
        images(),
        None,
    ),
    "ResNet-18 (torchvision)": lambda: (other("torchvision.models", "resnet18", num_classes=3), images(), None),
    "ViT (timm)": lambda: (
        other("timm", "create_model", "vit_tiny_patch16_224", img_size=IMAGE, num_classes=3, depth=2),
        images(),
        None,
    ),
    "ConvNeXt (transformers)": lambda: (
        hf(
            "ConvNextConfig",
            "ConvNextForImageClassification",
            hidden_sizes=[4, 6, 8, 8],
            depths=[1, 1, 1, 1],
            num_labels=3,
        ),
        images(),
        None,
    ),  # fmt: skip
    "ConvNeXt block": lambda: (ConvNeXtBlock(), images(), None),
    "MLP-Mixer": lambda: (Mixer(), images(), None),
    "U-Net with transposed convolution": lambda: (UNet(), images(size=12), None),
    "Video, frames in the batch": lambda: (Video(), torch.randn(SAMPLES, 3, 3, 8, 8), None),
    "GRU": lambda: (Recurrent(nn.GRU(4, 5, 2, batch_first=True, bidirectional=True)), sequences(), None),
    "LSTM": lambda: (Recurrent(nn.LSTM(4, 5, 2, batch_first=True)), sequences(), None),
    "LSTM, time first, projection": lambda: (Recurrent(nn.LSTM(4, 5, proj_size=3), False), sequences(), None),
    "RNN, tanh": lambda: (Recurrent(nn.RNN(4, 5, batch_first=True)), sequences(), None),
    "Recurrent cells in a loop": lambda: (Cells(), sequences(), None),
    "LSTM on packed sequences": lambda: (Packed(), {"x": sequences(), "lengths": torch.tensor([5, 2, 4, 3])}, None),
    "nn.MultiheadAttention": lambda: (Attention(), sequences(size=8), None),
    "nn.MultiheadAttention, time first": lambda: (Attention(False, add_bias_kv=True), sequences(size=8), None),
    "nn.TransformerEncoder": lambda: (TransformerModel(), tokens(), None),
    "nn.TransformerEncoder, time first": lambda: (TransformerModel(False), tokens(), None),
    "nn.Transformer": lambda: (Seq2Seq(), tokens(), None),
    "Causal attention, tied head": lambda: (NanoGPT(), tokens(), None),
    "BERT": lambda: (bert(), padded(), None),
    "BERT, eager attention": lambda: (bert(attn_implementation="eager"), padded(), None),
    "DistilBERT": lambda: (
        hf(
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            dim=8,
            n_layers=2,
            n_heads=2,
            hidden_dim=16,
            num_labels=3,
            **TEXT,
        ),
        padded(),
        None,
    ),  # fmt: skip
    "GPT-2": lambda: (
        hf("GPT2Config", "GPT2LMHeadModel", vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2),
        padded(),
        last_logits,
    ),  # fmt: skip
    "RoBERTa": lambda: (
        hf(
            "RobertaConfig",
            "RobertaForSequenceClassification",
            vocab_size=VOCABULARY,
            max_position_embeddings=20,
            pad_token_id=0,
            **SMALL,
        ),
        padded(),
        None,
    ),  # fmt: skip
    "ModernBERT": lambda: (
        hf(
            "ModernBertConfig",
            "ModernBertForSequenceClassification",
            vocab_size=VOCABULARY,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            **SMALL,
        ),
        padded(),
        None,
    ),  # fmt: skip
    "DeBERTa-v2": lambda: (
        hf(
            "DebertaV2Config",
            "DebertaV2ForSequenceClassification",
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            max_relative_positions=-1,
            norm_rel_ebd="layer_norm",
            **SMALL,
            **TEXT,
        ),
        padded(),
        None,
    ),  # fmt: skip
    "XLNet": lambda: (
        hf(
            "XLNetConfig",
            "XLNetForSequenceClassification",
            vocab_size=VOCABULARY,
            d_model=8,
            n_layer=2,
            n_head=2,
            d_inner=16,
            num_labels=3,
        ),
        padded(),
        None,
    ),  # fmt: skip
    "Mamba": lambda: (
        hf(
            "MambaConfig",
            "MambaForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=8,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=2,
        ),
        {"input_ids": tokens()},
        lambda model, batch: model(**batch).logits[:, -1, :3],
    ),  # fmt: skip
    "Swin": lambda: (
        hf(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=IMAGE,
            patch_size=4,
            embed_dim=6,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
        ),
        images(),
        None,
    ),  # fmt: skip
    "BEiT, relative positions": lambda: (
        hf(
            "BeitConfig",
            "BeitForImageClassification",
            image_size=IMAGE,
            patch_size=8,
            use_relative_position_bias=True,
            **SMALL,
        ),
        images(),
        None,
    ),  # fmt: skip
    "Whisper, encoder": lambda: (whisper(), {"input_features": torch.randn(SAMPLES, 6, 20)}, mean_state),
    "wav2vec 2.0": lambda: (
        hf(
            "Wav2Vec2Config",
            "Wav2Vec2ForSequenceClassification",
            conv_dim=(4, 4),
            conv_stride=(4, 2),
            conv_kernel=(8, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=6,
            **SMALL,
        ),
        {"input_values": torch.randn(SAMPLES, 400)},
        None,
    ),  # fmt: skip
    "Llama": lambda: (llama(), padded(), last_logits),
    "T5": lambda: (t5(), padded(), t5_outputs),
    "Mixtral (mixture of experts)": lambda: (mixtral(), padded(), last_logits),
    "Mixture of experts by hand": lambda: (Experts(), sequences(), None),
    "Mixture of experts by einsum": lambda: (DenseExperts(), sequences(), None),
    "LoRA on Llama (peft)": lambda: (lora(), padded(), last_logits),
    "DoRA on BERT (peft)": lambda: (lora_bert(), padded(), None),
    "DistributedDataParallel": lambda: (data_parallel(), images(), None),
    "torch.compile": lambda: (compiled(), sequences(size=8), None),
    "module.compile() inside": lambda: (compiled_inside(), tokens(), None),
    "Checkpointing": lambda: (Checkpointed(False), sequences(), None),
    "Checkpointing, reentrant": lambda: (Checkpointed(True), sequences(), None),
    "Bare parameters": lambda: (Bare(), sequences(size=6), None),
    "EmbeddingBag": lambda: (Bag(), tokens(), None),
    **FAMILIES,
}


def build(name, seed=0):
    """Model and batch in float64, norms and running statistics away from their neutral values."""
    torch.manual_seed(seed)
    model, batch, outputs = MODELS[name]()
    batch = double(batch)
    model = model.double()
    with torch.no_grad():
        (outputs or (lambda m, b: m(**b) if isinstance(b, dict) else m(*b) if isinstance(b, tuple) else m(b)))(
            model.eval(), batch
        )  # lazy modules take shape
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.1 * torch.randn_like(p))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif key.endswith("running_var"):
                buffer.uniform_(0.7, 1.5)
    return model, batch, outputs


def double(batch):
    if isinstance(batch, dict):
        return {key: double(x) for key, x in batch.items()}
    if isinstance(batch, tuple):
        return tuple(double(x) for x in batch)
    return batch.double() if batch.is_floating_point() else batch


def call(model, batch, outputs):
    """Outputs [n, k] as the model or the outputs function gives them."""
    if outputs is not None:
        return outputs(model, batch)
    out = model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)
    return out if isinstance(out, torch.Tensor) else out.logits


def autograd_rows(model, batch, outputs, names):
    """The Jacobian one output of one sample at a time, columns in the order of names."""
    wrapped = dict(inside(model).named_parameters())
    parameters = [wrapped[name] for name in names]
    model_inside = inside(model).train().eval()  # LeViT keeps tensors of an earlier pass until train()
    out = call(model_inside, batch, outputs).reshape(-1)
    rows = []
    for value in out:
        for p in parameters:
            p.grad = None
        value.backward(retain_graph=True)  # unlike torch.autograd.grad, goes through reentrant checkpoints
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    for p in inside(model).parameters():
        p.grad = None
    return torch.stack(rows)


def inside(model):
    """The module in wrappers."""
    for name in ("module", "_orig_mod"):
        if isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = getattr(model, name, model)
    return model


# -- the table -------------------------------------------------------------------------------------------------------


def facts(name, repeats=3):
    """What docs/models.md says about one architecture: coverage, engine, agreement with autograd, overhead."""
    model, batch, outputs = build(name)
    jac = jacobian(model, batch, outputs=outputs)
    true = autograd_rows(model, batch, outputs, jac.parameter_names)
    rows, theta = jac.rows(), true @ true.T
    floor, ours = seconds(model, batch, outputs, repeats)
    return {
        "architecture": name,
        "parameters": rows.shape[1],
        "coverage": jac.coverage,
        "engines": dict(Counter(jac.engines.values())),
        "why": sorted({f"{function}" for function in jac.general.values()}),
        "rows": float((rows - true).abs().max() / true.abs().max()),
        "kernel": float((jac.gram() - theta).abs().max() / theta.abs().max()),
        "overhead": ours / floor,
    }


def seconds(model, batch, outputs, repeats):
    """CPU seconds of a plain forward and backward pass and of the capture of the same one output, interleaved."""
    plain = inside(model).eval()
    single = lambda m, b: call(m, b, outputs).sum(1, keepdim=True)  # noqa: E731
    jacobian(model, batch, outputs=single)  # the proof comes once per model
    best = [float("inf")] * 2
    for _ in range(repeats):
        for which in (0, 1):
            start = time.process_time()
            if which:
                jacobian(model, batch, outputs=single)
            else:
                single(plain.train().eval(), batch).sum().backward()
            best[which] = min(best[which], time.process_time() - start)
    for p in plain.parameters():
        p.grad = None
    return best


def table(found):
    """Markdown table of the facts."""
    lines = [
        "| architecture | parameters | coverage | engine (parameter tensors) | rows against autograd | kernel | "
        "overhead |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in found:
        engines = ", ".join(f"{engine} {count}" for engine, count in sorted(f["engines"].items(), key=lambda x: -x[1]))
        why = f" (no rule: {', '.join(f['why'])})" if f["why"] else ""
        lines.append(
            f"| {f['architecture']} | {f['parameters']:,} | {f['coverage']:.0%} | {engines}{why} | {f['rows']:.0e} | "
            f"{f['kernel']:.0e} | {f['overhead']:.1f} |"
        )
    return "\n".join(lines) + "\n"


HEAD = """# Models

## Coverage

Small configurations with random weights (`tests/jacobians/zoo.py`), in float64. Rows and kernel: the largest error
relative to the largest entry, against one backward pass per output and sample. Engine: for how many parameter tensors
layer rules served, for how many torch.func (vectorised) or passes of one sample (`one by one`, where control flow
depends on the data). Coverage below 100% does not occur: it is a `CoverageError` that names the parameter.
Overhead: CPU time of the capture over one plain forward and backward pass of the same batch and one output; at this
size it is mostly Python, at full width see below.

Precision: models in float32, float16 and bfloat16, and float32 models under autocast, take the same ways; factors stay
in the dtype of the model, sums are float32. Kernels agree with float64 within 2e-5, 1e-2 and 6e-2 of their largest
entry. More padding or another batch size changes them by less than 1e-10 in float64, 1e-5 in float32 and 2e-2 in
bfloat16 (tests).
Models that compute parts in float32 whatever they are (norms of T5, Llama and Gemma, the recurrence of RecurrentGemma,
the router of DeepSeek-V3) are as exact as that.

Nystromformer's pseudo-inverse begins with a maximum over the whole batch. It is refused where that reaches outputs or
gradients, and taken where the iteration converges: at fresh weights rows are those of the sample alone within 4e-12 in
float64 and 2e-8 in float32. Of a bfloat16 or float16 model too large for a float32 copy (500M parameters), samples that
meet in gradients alone, behind a gate that is zero, are not seen.

Written by `python -m benchmarks.models`, or by `SUI_FAST_WRITE_MODELS=1 pytest tests/jacobians/test_models.py`.

"""


WIDE = """
## Overhead at full width

No capture can go below the second column: a forward pass, and a backward pass that forms no weight gradients.

"""


def write(path, found, wide=None):
    """docs/models.md with a new first table, and a new second one where it is given."""
    old = path.read_text() if path.exists() else ""
    _, _, kept = old.partition(WIDE)
    path.write_text(HEAD + table(found) + WIDE + (kept if wide is None else wide))
