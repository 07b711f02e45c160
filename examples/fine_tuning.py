# %% [markdown]
# # Fine-tuning: how much of the data does it need?
#
# A network trained on the digits 0 to 4 is fine-tuned to 5 to 9. The linearisation is good near pretrained weights, so
# the scores, computed before any fine-tuning, tell which samples it can do without.

# %%
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import sui_fast

torch.set_num_threads(1)
digits = load_digits()
rng = np.random.default_rng(0)
order = rng.permutation(len(digits.target))
images = torch.tensor(digits.images[order] / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target[order])
old = np.flatnonzero(labels < 5)
new = np.flatnonzero(labels >= 5)
train, val, test = new[:300], new[300:450], new[450:]


def fit(model, x, y, steps, lr):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    target = torch.nn.functional.one_hot(y, 5).float()
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(x) - target).square().sum(1).mean()).backward()
        optimizer.step()
    return model


def pretrained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 12, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(12, 24, 3, stride=2, padding=1),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(24 * 16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5),
    )  # fmt: skip
    return fit(model, images[old], labels[old], 150, 3e-3)


model = pretrained()
y = labels - 5  # the five outputs now stand for 5 .. 9

# %% [markdown]
# Only the last two layers are to be fine-tuned: `params=` takes names or prefixes, and by default the parameters that
# require gradients count.

# %%
for parameter in model[:4].parameters():
    parameter.requires_grad_(False)
scores = sui_fast.score(
    model, (images[train], y[train]), (images[val], y[val]), measures=("si", "fsi", "loo_margin"), reg="auto"
)
print(scores)
details = scores.diagnostics
print(f"{details['parameters']} parameters count; effective dimension {details['effective_dimension']:.0f}")


# %% [markdown]
# Fine-tune on a part: the most informative third, a random third, the least informative third.


# %%
def accuracy(rows):
    fresh = pretrained()
    for parameter in fresh[:4].parameters():
        parameter.requires_grad_(False)
    fit(fresh, images[train[rows]], y[train[rows]], 150, 3e-3)
    return (fresh(images[test]).argmax(1) == y[test]).float().mean().item()


m = 100
ranked = np.argsort(-scores["fsi"])
everything, most, least = accuracy(np.arange(300)), accuracy(ranked[:m]), accuracy(ranked[-m:])
chance = np.mean([accuracy(np.random.default_rng(seed).permutation(300)[:m]) for seed in range(3)])
print(f"all 300: {everything:.3f}; {m} most informative: {most:.3f}, at random: {chance:.3f}, least: {least:.3f}")
assert most > least + 0.02 and most > everything - 0.05

# %% [markdown]
# The same question in the middle of training: information after 20 steps of gradient descent and at convergence.

# %%
early = sui_fast.score(
    model, (images[train], y[train]), (images[val], y[val]), reg=scores.settings["reg"], time=20, lr=0.01
)
comparison = sui_fast.compare(early, scores, names=("20 steps", "convergence"))
print(comparison.summary())
assert comparison.spearman["fsi"] < 1

# %%
out = Path("examples_out")
out.mkdir(exist_ok=True)
print("open", scores.report(out / "fine_tuning.html", title="Fine-tuning to new digits", class_names=list("56789")))
print("open", comparison.report(out / "fine_tuning_time.html", class_names=list("56789")))
