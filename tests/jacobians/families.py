"""More families of transformers in small configurations: (model, batch, outputs) as in ``zoo.MODELS``."""

import importlib

import torch

IMAGE, VOCABULARY = 32, 40
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=IMAGE, patch_size=8
)
SPEECH = dict(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8],
    conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, classifier_proj_size=8,
)  # fmt: skip
ONE = dict(num_key_value_heads=1)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=8)


def make(name, model, experts=None, **options):
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    kind = getattr(transformers, name + model)
    return kind(config) if experts is None else kind._from_config(config, experts_implementation=experts)


def tokens(length=7):
    return torch.randint(3, VOCABULARY, (4, length))


def padded(length=7):
    mask = torch.ones(4, length, dtype=torch.long)
    for i in range(4):
        mask[i, length - i % 3 :] = 0
    return {"input_ids": tokens(length) * mask + 1 - mask, "attention_mask": mask}


def last(model, batch):
    return model(**batch).logits[:, -1, :3]


def causal(name, experts=None, **options):
    return lambda: (make(name, "ForCausalLM", experts, **{**TEXT, "use_cache": False, **options}), padded(), last)


def classes(name, batch=padded, **options):
    return lambda: (make(name, "ForSequenceClassification", num_labels=3, **{**TEXT, **options}), batch(), None)


def pictures(name, model="ForImageClassification", shape=(3, IMAGE, IMAGE), **options):
    return lambda: (make(name, model, num_labels=3, **options), {"pixel_values": torch.randn(4, *shape)}, None)


def speech(name):
    head = "ForSequenceClassification"
    return lambda: (make(name, head, num_labels=3, **SPEECH), {"input_values": torch.randn(4, 200)}, None)


def translated(name, **options):
    size = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    size |= dict(vocab_size=VOCABULARY, d_model=8, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1)
    return lambda: (
        make(name, "ForConditionalGeneration", **size, **options),
        {**padded(), "decoder_input_ids": tokens(5)},
        last,
    )


def clip():
    text = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    text["max_position_embeddings"] = 16
    model = make("CLIP", "Model", text_config=text, vision_config=VISION, projection_dim=6)

    def matched(model, batch):
        out = model(**batch)
        return (out.image_embeds * out.text_embeds).unflatten(1, (2, 3)).sum(2)

    return model, {"input_ids": tokens(), "pixel_values": torch.randn(4, 3, IMAGE, IMAGE)}, matched


def ended():
    """Every sequence ends with the same token."""
    return {"input_ids": torch.cat([tokens(6), torch.full((4, 1), 2)], 1)}


def boxes():
    return {**padded(), "bbox": torch.randint(0, 60, (4, 7, 1)).expand(4, 7, 4).contiguous()}


def noise(batch):
    return {**batch, "noise": torch.rand(4, 16)}


SIDES = dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
FAMILIES = {
    "Gemma 2": causal("Gemma2", head_dim=4, **ONE),
    "Qwen 2": causal("Qwen2", **ONE),
    "Qwen 3": causal("Qwen3", head_dim=4, **ONE),
    "Qwen 3, mixture of experts": causal("Qwen3Moe", "eager", num_experts=4, head_dim=4, **MOE, **ONE),
    "DeepSeek-V3": causal(
        "DeepseekV3", "eager", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=4,
        kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, num_key_value_heads=2, **MOE,
    ),
    "GPT-OSS": causal(
        "GptOss", "eager", num_local_experts=4, num_experts_per_tok=2, head_dim=4, sliding_window=4,
        layer_types=["full_attention"] * 2, num_key_value_heads=2,
    ),
    "Mistral": causal("Mistral", **ONE),
    "Phi-3": causal("Phi3", **ONE),
    "OPT": causal("OPT", ffn_dim=16, word_embed_proj_dim=8),
    "BLOOM": causal("Bloom", n_layer=2, n_head=2),
    "Falcon": causal("Falcon", new_decoder_architecture=False, multi_query=True),
    "GPT-NeoX": causal("GPTNeoX"),
    "GPT-J": causal("GPTJ", n_embd=8, n_layer=2, n_head=2, n_inner=16, rotary_dim=4, n_positions=32),
    "MPT": causal("Mpt", d_model=8, n_heads=2, n_layers=2, max_seq_len=32),
    "OLMo 2": causal("Olmo2"),
    "Cohere": causal("Cohere", **ONE),
    "RecurrentGemma": causal("RecurrentGemma", head_dim=4, lru_width=8, attention_window_size=8, **ONE),
    "ELECTRA": classes("Electra", embedding_size=6),
    "ALBERT": classes("Albert", embedding_size=6),
    "DeBERTa": classes("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "ConvBERT": classes("ConvBert", embedding_size=8, head_ratio=1, conv_kernel_size=3),
    "FNet": classes("FNet", lambda: {"input_ids": tokens()}, tpu_short_seq_length=7),
    "BART": classes("Bart", ended, encoder_ffn_dim=16, decoder_ffn_dim=16, **SIDES),
    "Pegasus": translated("Pegasus", max_position_embeddings=32),
    "LayoutLM": classes("LayoutLM", boxes, max_2d_position_embeddings=64),
    "CLIP": clip,
    "SegFormer": pictures(
        "Segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    ),
    "DINOv2": pictures("Dinov2", mlp_ratio=2, **{key: VISION[key] for key in VISION if key != "intermediate_size"}),
    "ViT-MAE, encoder": lambda: (
        make("ViTMAE", "Model", mask_ratio=0.0, **VISION),
        noise({"pixel_values": torch.randn(4, 3, IMAGE, IMAGE)}),
        lambda model, batch: model(**batch).last_hidden_state[:, 0, :3],
    ),
    "Swin v2": pictures(
        "Swinv2", image_size=IMAGE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "ConvNeXt v2": pictures("ConvNextV2", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2),
    "TimeSformer": pictures("Timesformer", "ForVideoClassification", (2, 3, IMAGE, IMAGE), num_frames=2, **VISION),
    "VideoMAE": pictures(
        "VideoMAE", "ForVideoClassification", (4, 3, IMAGE, IMAGE), num_frames=4, tubelet_size=2, **VISION
    ),
    "HuBERT": speech("Hubert"),
    "WavLM": speech("WavLM"),
    "Whisper, both sides": lambda: (
        make(
            "Whisper", "ForConditionalGeneration", vocab_size=VOCABULARY, num_mel_bins=8, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_source_positions=10, max_target_positions=16, pad_token_id=1, bos_token_id=0,
            eos_token_id=2, decoder_start_token_id=3, **SIDES,
        ),
        {"input_features": torch.randn(4, 8, 20), "decoder_input_ids": tokens(5)},
        last,
    ),
    "RWKV": lambda: (
        make(
            "Rwkv", "ForCausalLM", vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8,
            intermediate_size=16, context_length=16, use_cache=False,
        ),
        {"input_ids": tokens()},
        last,
    ),
    "xLSTM": lambda: (
        make(
            "xLSTM", "ForCausalLM", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_heads=2,
            chunk_size=8, use_cache=False,
        ),
        {"input_ids": tokens(8)},
        last,
    ),
    "Mamba 2": causal("Mamba2", num_heads=4, head_dim=4, state_size=4, n_groups=1, expand=2, chunk_size=4),
    "Longformer": classes("Longformer", attention_window=4),
    "EfficientNet": pictures(
        "EfficientNet", image_size=IMAGE, width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256, depth_divisor=4
    ),
    "CvT": pictures(
        "Cvt", embed_dim=[8, 8, 16], num_heads=[1, 2, 2], depth=[1, 2, 3], patch_sizes=[7, 3, 3],
        drop_path_rate=[0.0] * 3,
    ),
    "LeViT": pictures(
        "Levit", image_size=IMAGE, hidden_sizes=[8, 16, 16], num_attention_heads=[1, 2, 2], depths=[1, 1, 1],
        key_dim=[4, 4, 4], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], down_ops=[["Subsample", 4, 2, 2, 2, 2]] * 2,
    ),
    "ViLT": lambda: (
        make("Vilt", "ForQuestionAnswering", num_labels=3, **{**TEXT, **VISION}),
        {
            **padded(),
            "token_type_ids": torch.zeros(4, 7, dtype=torch.long),
            "pixel_values": torch.randn(4, 3, IMAGE, IMAGE),
            "pixel_mask": torch.ones(4, IMAGE, IMAGE, dtype=torch.long),
        },
        None,
    ),
}  # fmt: skip
