"""Dict, dataclass and named-tuple batches, Hugging Face data sets, padding, language models, half precision."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sui_fast import SuiError, outputs, score

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

N, K = 10, 3
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 9, N)
TOKENS = [RNG.integers(5, 40, size).tolist() for size in LENGTHS]
LABELS = (np.arange(N) % K).tolist()
MEASURES = ("si", "fsi", "loo_margin")


def bert(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_labels=K,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).to(dtype)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=20, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def padded(rows, length=None):
    length = length or max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def batches(size, length=None):
    return [
        {**padded(TOKENS[i : i + size], length), "labels": torch.tensor(LABELS[i : i + size])}
        for i in range(0, N, size)
    ]


def run(train, val=None, model=None, **more):
    more = {"reg": 0.05, "loss": "cross_entropy", "measures": MEASURES, "params": ["classifier", "bert.pooler"], **more}
    return score(model or bert(), train, val or batches(N), progress=False, **more)


@pytest.fixture(scope="module")
def plain():
    return run(batches(N))


def same(got, want, rtol=1e-8):
    for name in want.values:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, err_msg=name)


@dataclass
class Batch:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    token_type_ids: torch.Tensor | None = None


Named = namedtuple("Named", ["input_ids", "attention_mask", "labels"])


def hub(ragged=True, **more):
    rows = {"input_ids": TOKENS, "label": LABELS, "text": ["word"] * N, "idx": list(range(50, 50 + N)), **more}
    if not ragged:
        rows["input_ids"] = padded(TOKENS)["input_ids"].tolist()
    return datasets.Dataset.from_dict(rows)


def collate(rows):
    found = padded([row["input_ids"] for row in rows])
    return {**found, "labels": torch.tensor([row["label"] for row in rows])}


KINDS = {
    "padded beyond": lambda: batches(N, 14),
    "batches of several lengths": lambda: batches(3),
    "one by one": lambda: batches(1),
    "encoding": lambda: [transformers.BatchEncoding(b) for b in batches(4)],
    "dataclass": lambda: [Batch(**b) for b in batches(4)],
    "named tuples": lambda: [Named(**b) for b in batches(4)],
    "hub": hub,
    "hub of tensors": lambda: hub().with_format("torch"),
    "hub with masks": lambda: hub(attention_mask=[[1] * len(t) for t in TOKENS]),
    "collate_fn": lambda: torch.utils.data.DataLoader(hub(), batch_size=4, collate_fn=collate),
    "rows": lambda: [dict(input_ids=t, label=c) for t, c in zip(TOKENS, LABELS, strict=True)],
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind, plain):
    data = KINDS[kind]()
    got = run(Rows(data) if kind == "rows" else data)
    same(got, plain)
    if kind.startswith("hub"):
        np.testing.assert_array_equal(got.ids, np.arange(50, 50 + N))


def test_all_parameters_and_several_lengths():
    same(run(batches(3), params="trainable"), run(batches(N, 13), params="trainable"))


@pytest.mark.parametrize("method", ["sketch", "nystrom", "subspace"])
def test_padding_changes_no_score_of_low_rank(method):
    arguments = dict(method=method, rank=64 if method == "sketch" else 24, dtype=torch.float64)
    want = run(batches(N), **arguments)
    same(run(batches(3), **arguments), want, 1e-5)
    same(run(batches(N, 14), batch_size=4, **arguments), want, 1e-5)


def test_attributes_of_a_batch(plain):
    got = run([Batch(**b) for b in batches(4)], outputs=lambda model, b: model(b.input_ids, b.attention_mask).logits)
    same(got, plain)
    same(run(batches(N), outputs=outputs.classification), plain)


def test_one_field_goes_by_position():
    Plain = namedtuple("Plain", ["features", "y"])
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, 2), torch.randn(6, 4), torch.arange(6) % 2
    want = score(model, (x, y), x, reg=0.1, progress=False)
    same(score(model, [Plain(x[:4], y[:4]), Plain(x[4:], y[4:])], x, reg=0.1, progress=False), want)


@pytest.mark.parametrize(
    "data, word",
    [
        (lambda: datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}), "train"),
        (lambda: datasets.Dataset.from_dict({"input_ids": [[1], None], "label": [0, 1]}), "row 1"),
        (lambda: datasets.Dataset.from_dict({"x": [[1.0], [1.0, 2.0]], "label": [0, 1]}), "collate_fn"),
        (lambda: Rows([(torch.ones(2), 0), (torch.ones(3), 1)]), "collate_fn"),
        (lambda: datasets.Dataset.from_dict({"input_ids": TOKENS}), "targets"),
    ],
)
def test_data_that_cannot_be_read(data, word):
    with pytest.raises(SuiError, match=word):
        run(data())


@pytest.mark.parametrize("kind", ["causal_lm_loss", "causal_lm_tokens", "causal_lm_margin"])
def test_language_models(kind):
    function = getattr(outputs, kind)
    loss = "binary_cross_entropy" if kind == "causal_lm_margin" else "mse"
    text = [{key: value for key, value in b.items() if key != "labels"} for b in batches(5, 9)]
    arguments = dict(outputs=function, loss=loss, reg=0.1, progress=False, params=["model.layers"])
    got = score(llama(), text, text, **arguments)
    labels = [{**b, "labels": torch.where(b["attention_mask"] == 0, -100, b["input_ids"])} for b in text]
    same(score(llama(), labels, text, **arguments), got)
    assert (got["si"] > 0).all()
    if kind != "causal_lm_tokens":
        longer = [{key: torch.nn.functional.pad(value, (0, 3)) for key, value in b.items()} for b in text]
        same(score(llama(), longer, longer, **arguments), got)
        model = llama()
        out = model(**text[0], labels=labels[0]["labels"])
        mean = function(model, text[0])[:, 0]
        if kind == "causal_lm_loss":
            counts = text[0]["attention_mask"][:, 1:].sum(1)
            assert float((mean * counts).sum() / counts.sum()) == pytest.approx(float(out.loss), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_half_precision(dtype, loss):
    arguments = dict(method="sketch", rank=96, loss=loss, measures=("si", "fsi"))
    want = run(batches(N), **arguments)
    got = run(batches(N), model=bert(dtype), **arguments)
    for name in want.values:
        assert np.linalg.norm(got[name] - want[name]) < 0.05 * np.linalg.norm(want[name]), name
    name = str(dtype).removeprefix("torch.")
    assert got.settings["dtypes"] == dict(model=name, features="float32", accumulation="float64", solve="float64")
    same(run(batches(3), model=bert(dtype), **arguments), got, 0.05)


def test_columns_for_a_data_set(plain):
    found = plain.to_datasets(hub())
    assert found.column_names[-3:] == ["si", "fsi", "loo_margin"]
    np.testing.assert_array_equal(found["si"], plain["si"])
    with pytest.raises(SuiError, match="rows"):
        plain.to_datasets(hub().select(range(3)))
    with pytest.raises(SuiError, match="prefix"):
        plain.to_datasets(found)
    assert "sui_si" in plain.to_datasets(found, prefix="sui_").column_names


def test_lists_of_rows_and_tables():
    """Samples one by one, of several lengths, as a Trainer takes them; a table of pandas; not a DatasetDict."""
    rows = [dict(input_ids=TOKENS[i], labels=LABELS[i], id=f"r{i}") for i in range(N)]
    tensors = [row | dict(input_ids=torch.tensor(row["input_ids"]), labels=torch.tensor(row["labels"])) for row in rows]
    model, options = bert(torch.float64), dict(loss="cross_entropy", reg=0.1, measures=("si",), dtype=torch.float64)
    table = pytest.importorskip("pandas").DataFrame(rows)
    found = [score(model, data, **options) for data in (datasets.Dataset.from_list(rows), rows, tensors, table)]
    for other in found[1:]:
        assert list(other.ids) == list(found[0].ids)
        np.testing.assert_allclose(other["si"], found[0]["si"], rtol=1e-9)
    linear, x = torch.nn.Linear(4, K), torch.randn(N, 4)
    pairs = score(linear, [(x[i], LABELS[i]) for i in range(N)], reg=0.1, measures=("si",))
    np.testing.assert_allclose(pairs["si"], score(linear, (x, LABELS), reg=0.1, measures=("si",))["si"], rtol=1e-6)
    with pytest.raises(SuiError, match="one data set"):
        score(model, datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), **options)
