"""Real architectures in small configurations: every parameter accounted for, rows as autograd gives them.

SUI_FAST_WRITE_MODELS=1 writes docs/models.md from what the tests find, as ``python -m benchmarks.models`` does.
"""

import os
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

from sui_fast import ArgumentError, CoverageError, jacobian, score

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
SLOW_PATHS = {  # what has no rule, and why
    "LSTM on packed sequences": ["lstm"],
    "Mixtral (mixture of experts)": ["linear"],
    "Mixture of experts by hand": ["linear"],
    "Qwen 3, mixture of experts": ["linear"],
    "DeepSeek-V3": ["linear"],
    "GPT-OSS": ["add", "matmul"],
    "DeBERTa": ["div_", "linear"],
    "CLIP": ["mul"],
    "TimeSformer": ["a use that the rules do not see"],
    "Longformer": ["a use that the rules do not see"],
    "ViLT": ["cat", "embedding", "expand", "layer_norm", "linear"],
}
# parts in float32 whatever the model is; with these in float64 they agree to 1e-15
SINGLE = {"Gemma 2", "DeepSeek-V3", "Cohere", "RecurrentGemma"}
found = {}


@pytest.fixture(scope="module", autouse=True)
def document():
    yield
    if os.environ.get("SUI_FAST_WRITE_MODELS"):
        zoo.write(DOCUMENT, [found[name] for name in zoo.MODELS if name in found])


def build(name):
    try:
        return zoo.build(name)
    except ImportError as error:
        pytest.skip(f"needs {error.name}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_parameter_agrees_with_autograd(name):
    build(name)
    facts = found[name] = zoo.facts(name)
    limit = 1e-7 if name in SINGLE else 1e-10
    assert facts["coverage"] == 1 and facts["rows"] < limit and facts["kernel"] < limit
    assert facts["why"] == SLOW_PATHS.get(name, [])


def test_the_document_lists_every_model():
    text = DOCUMENT.read_text()
    optional = ("(torchvision)", "(timm)")
    assert [name for name in zoo.MODELS if f"| {name} |" not in text and not name.endswith(optional)] == []


BATCHED = ["BERT", "GPT-2", "ResNet-18 (transformers)", "nn.TransformerEncoder, time first"]
BATCHED += ["Video, frames in the batch", "T5", "LSTM", "Mixture of experts by hand", "Bare parameters"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BATCHED)
def test_rows_do_not_depend_on_the_batch(name):
    model, batch, outputs = build(name)
    whole = jacobian(model, batch, outputs=outputs).rows()
    for size in (1, 3):
        part = jacobian(model, batch, outputs=outputs, batch_size=size).rows()
        assert float((part - whole).abs().max()) <= 1e-10 * float(whole.abs().max())


@pytest.mark.parametrize("name", ["BERT", "BERT, eager attention", "DistilBERT", "Llama", "T5"])
def test_padding_changes_nothing(name):
    """More padding, and each sample alone without any."""
    model, batch, outputs = build(name)
    rows = jacobian(model, batch, outputs=outputs).rows()
    # Llama and T5 compute their norms in float32 whatever the model is
    limit = (1e-6 if name in ("Llama", "T5") else 1e-10) * float(rows.abs().max())
    longer = {key: torch.nn.functional.pad(x, (0, 3)) for key, x in batch.items()}
    wide = jacobian(model, longer, outputs=outputs).rows()
    assert float((wide - rows).abs().max()) <= limit
    k = len(rows) // len(batch["input_ids"])
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = jacobian(model, {key: x[i : i + 1, :length] for key, x in batch.items()}, outputs=outputs).rows()
        assert float((alone - rows[k * i : k * i + k]).abs().max()) <= limit


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "Llama"])
def test_padding_and_batches_in_lower_precision(name, dtype, limit):
    model, batch, outputs = build(name)
    model = model.to(dtype)
    theta = jacobian(model, batch, outputs=outputs).gram()
    longer = {key: torch.nn.functional.pad(x, (0, 3)) for key, x in batch.items()}
    for other in (jacobian(model, longer, outputs=outputs), jacobian(model, batch, outputs=outputs, batch_size=3)):
        assert float((other.gram() - theta).abs().max()) <= limit * float(theta.abs().max())


@pytest.mark.filterwarnings("ignore")
def test_what_an_earlier_pass_left_in_a_cache_has_no_part():
    """LeViT keeps its attention biases in eval mode: a tensor of older weights, and without gradients."""
    model, batch, _ = build("LeViT")
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    jac = jacobian(model, batch)
    sizes = [dict(model.named_parameters())[name].numel() for name in jac.parameter_names]
    parts = zip(jac.parameter_names, jac.rows().split(sizes, 1), strict=True)
    assert any(rows.any() for name, rows in parts if name.endswith("attention_biases"))
    after = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert all(x is y for x, y in zip(caches, after, strict=True))


def test_settings_named_after_a_cache_stay():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.cache_settings, self.cache = torch.nn.Linear(3, 1), {"size": 2.0}, {}

        def forward(self, x):
            self.cache["scale"] = self.inner.weight * self.cache_settings["size"]
            return self.inner(x) + self.cache["scale"].sum()

    model, x = Scaled().double(), torch.randn(4, 3, dtype=torch.float64)
    kept = model.cache
    rows = jacobian(model, x).rows()
    assert torch.allclose(rows[:, :3], x + 2) and model.cache is kept and not kept


@pytest.mark.filterwarnings("ignore")
def test_nystromformer_mixes_the_samples_of_a_batch():
    """Its pseudo-inverse begins with a maximum over the whole batch."""
    from families import classes, tokens

    sizes = dict(num_landmarks=4, segment_means_seq_len=8, conv_kernel_size=3)
    torch.manual_seed(0)
    model, batch, _ = classes("Nystromformer", lambda: {"input_ids": tokens(8)}, **sizes)()
    one = lambda i: {key: x[i : i + 1] for key, x in batch.items()}  # noqa: E731
    alone = torch.cat([jacobian(model.double(), one(i)).rows() for i in range(len(batch["input_ids"]))])
    rows = jacobian(model, batch).rows()  # at the weights it begins with, the pseudo-inverse converges all the same
    assert float((rows - alone).abs().max()) <= 1e-10 * float(alone.abs().max())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(CoverageError, match="other company"):
        jacobian(model, batch)


def test_frozen_models_and_unused_parameters():
    model, batch, _ = build("BERT")
    true = jacobian(model, batch).rows()
    jac = jacobian(model.requires_grad_(False), batch, params="all")
    assert float((jac.rows() - true).abs().max()) <= 1e-12 * float(true.abs().max())
    model.unused = nn.Linear(2, 2).double()
    assert not jacobian(model, batch, params=["unused"]).rows().any()


def test_batches_padded_each_to_its_own_length():
    model, batch, outputs = build("BERT")
    rows = jacobian(model, batch).rows()
    cut = [{key: x[:2] for key, x in batch.items()}, {key: x[2:, :5] for key, x in batch.items()}]
    batch["attention_mask"][2:, 5:] = 0
    for batches in (cut, cut[::-1]):
        whole = jacobian(model, batches)
        one = torch.cat([jacobian(model, part).rows() for part in batches])
        assert float((whole.rows() - one).abs().max()) <= 1e-10 * float(rows.abs().max())
        assert float((whole.gram() - one @ one.T).abs().max()) <= 1e-10 * float((one @ one.T).abs().max())
        cotangent = torch.randn(len(one)).double()
        assert float((whole.vjp(cotangent) - one.T @ cotangent).abs().max()) <= 1e-10 * float(one.abs().max())


PRECISION = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}  # of the largest entry of the kernel


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("name", ["BERT", "ResNet-18 (transformers)", "GPT-2", "Llama", "LSTM", "MLP-Mixer"])
def test_models_in_lower_precision(name, dtype):
    model, batch, outputs = build(name)
    true = jacobian(model, batch, outputs=outputs).gram()
    model = model.to(dtype)
    jac = jacobian(model, batch, outputs=outputs)
    assert jac.dtype == torch.float32 and set(jac.engines.values()) == {"rules"}
    if dtype != torch.float32:
        assert jac._uses[0][1].dtype == dtype  # kept as the model computes it
    theta = jac.gram().double()
    assert float((theta - true).abs().max()) <= PRECISION[dtype] * float(true.abs().max())
    rows = jac.rows().double()
    assert float((theta - rows @ rows.T).abs().max()) <= 1e-5 * float(true.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BERT", "ConvNeXt block", "nn.MultiheadAttention", "GRU"])
def test_autocast(name, dtype):
    model, batch, outputs = build(name)
    true = jacobian(model, batch, outputs=outputs).gram()
    model = model.float()
    batch = zoo.double(batch)
    batch = batch.float() if isinstance(batch, torch.Tensor) else batch
    with torch.autocast("cpu", dtype):
        jac = jacobian(model, batch, outputs=outputs)
        theta = jac.gram().double()
    assert jac.dtype == torch.float32 and set(jac.engines.values()) == {"rules"}
    assert float((theta - true).abs().max()) <= PRECISION[dtype] * float(true.abs().max())
    rows = jac.rows().double()
    assert float((theta - rows @ rows.T).abs().max()) <= 1e-5 * float(true.abs().max())


def test_scores_through_the_public_call():
    model, batch, _ = build("BERT")
    data = {**batch, "labels": torch.tensor([0, 1, 2, 1])}
    scores = score(model, data, reg=0.1, measures=("si",), progress=False)
    wide = {key: torch.nn.functional.pad(x, (0, 4)) for key, x in batch.items()} | {"labels": data["labels"]}
    again = score(model, wide, reg=0.1, measures=("si",), batch_size=3, progress=False)
    assert abs(scores["si"] - again["si"]).max() <= 1e-9 * abs(scores["si"]).max()


@pytest.mark.filterwarnings("ignore")
def test_names_may_carry_the_wrapper():
    for name, wrapper in (("DistributedDataParallel", "module."), ("torch.compile", "_orig_mod.")):
        model, batch, _ = build(name)
        jac = jacobian(model, batch, params=[wrapper + "head"])
        assert jac.parameter_names == ["head.weight", "head.bias"]


class Casts(nn.Module):
    """Moves a module in its forward pass and routes samples: under torch.func that ended the process."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(3, 2), nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

    def forward(self, x):
        self.router = self.router.to(x.dtype)
        weight, chosen = self.router(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return out


def test_modules_moved_in_the_forward_pass():
    torch.manual_seed(0)
    model, x = Casts().double(), torch.randn(6, 3).double()
    jac = jacobian(model, x)
    true = zoo.autograd_rows(model, x, None, jac.parameter_names)
    assert "one by one" in jac.engines.values() and float((jac.rows() - true).abs().max()) < 1e-12


def test_a_table_that_is_also_the_output_layer_needs_little_memory():
    """What adds up needs no dense rows [V, d]; others are formed a few samples at a time."""
    model, batch, outputs = build("GPT-2")
    jac = jacobian(model, batch, outputs=outputs)
    theta, rows = jac.gram(), jac.rows()
    t = torch.randn(3, jac.shape[1]).double()
    assert jac._portion(4, memory=1) == 1
    jac._portion = lambda most, memory=0: 1
    torch.testing.assert_close(jac.jvp(t), rows @ t.T)
    torch.testing.assert_close(jac.vjp(t[:, : len(rows)].T), t[:, : len(rows)] @ rows)
    torch.testing.assert_close(torch.block_diag(*jac.own_blocks()), theta * torch.block_diag(*torch.ones(4, 3, 3)))
    along, own = jac.jvp_and_own_blocks(t)
    torch.testing.assert_close(along, rows @ t.T)
    torch.testing.assert_close(own, jac.own_blocks())
    torch.testing.assert_close(torch.cat([part.clone() for part in jac.iter_rows()]), rows)


class Outside(nn.Module):
    """Uses a tensor made of its parameter when it was built."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.__dict__["turned"] = self.layer.weight.T

    def forward(self, x):
        return x @ self.turned + self.layer.bias


def test_tensors_made_before_the_pass_are_named():
    with pytest.raises(CoverageError, match=r"layer\.weight.*before the forward pass"):
        jacobian(Outside(), torch.randn(4, 3))


def test_sharded_models_are_named():
    class FullyShardedDataParallel(nn.Linear):
        pass

    with pytest.raises(ArgumentError, match="FullyShardedDataParallel"):
        jacobian(FullyShardedDataParallel(3, 2), torch.randn(4, 3))


@pytest.mark.filterwarnings("ignore")
def test_grouped_experts_in_float32():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = zoo.mixtral(implementation="grouped_mm").eval()
    batch = zoo.padded()
    jac = jacobian(model, batch, outputs=zoo.last_logits)
    true = zoo.autograd_rows(model, batch, zoo.last_logits, jac.parameter_names)
    assert float((jac.rows() - true).abs().max()) <= 1e-5 * float(true.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Checkpointing, reentrant", "torch.compile", "BERT"])
def test_the_model_is_left_as_found(name):
    model, batch, outputs = build(name)
    model.train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    apply, rng = torch.utils.checkpoint.CheckpointFunction.apply, torch.get_rng_state()
    jacobian(model, batch, outputs=outputs)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert torch.utils.checkpoint.CheckpointFunction.apply == apply and torch.equal(rng, torch.get_rng_state())
