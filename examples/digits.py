# %% [markdown]
# # Digits: which samples teach the model, and which carry a wrong label?
#
# 300 of scikit-learn's handwritten digits, a tenth of them with a wrong label on purpose. One call scores them all.

# %%
import csv
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import sui_fast

torch.manual_seed(0)
torch.set_num_threads(1)
rng = np.random.default_rng(0)
digits = load_digits()
order = rng.permutation(len(digits.target))
images = torch.tensor(digits.images[order] / 16, dtype=torch.float32)[:, None]
true = torch.tensor(digits.target[order])
train, val, test = slice(0, 300), slice(300, 600), slice(600, 1700)

given = true[train].clone()
wrong = rng.permutation(300)[:30]
given[wrong] = (given[wrong] + torch.tensor(rng.integers(1, 10, 30))) % 10


# %% [markdown]
# Any `nn.Module` will do, trained or not. The scores say what each sample adds to this model when it is trained.


# %%
def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


model = network()
scores = sui_fast.score(
    model, (images[train], given), (images[val], true[val]), measures=("si", "fsi", "loo_margin"), reg="auto"
)
print(scores)
print("regularisation with the smallest leave-one-out error:", scores.settings["reg"])
print("most informative (F-SI): ", scores.top(10).ids)
print("least informative (F-SI):", scores.bottom(10).ids)

# %% [markdown]
# A negative leave-one-out margin: the model trained on all others contradicts the label. `find_mislabeled` ranks by it
# and estimates how many labels are wrong; `truth=` only says how well it did.

# %%
labels = sui_fast.find_mislabeled(scores, truth=np.isin(np.arange(300), wrong))
print(labels)
found = np.isin(labels.order[:30], wrong).mean()
print(f"of the 30 most suspicious samples {found:.0%} carry a wrong label")
repaired = labels.suggested[wrong] == true[wrong].numpy()
print(f"the suggested label is the true one for {repaired.mean():.0%} of the wrong labels")
assert found > 0.8 and repaired.mean() > 0.75 and labels.auroc > 0.95


# %% [markdown]
# Does it help? Train on the labels as given, and without the samples under suspicion.


# %%
def accuracy(rows):
    torch.manual_seed(0)
    fresh = network()
    optimizer = torch.optim.Adam(fresh.parameters(), 2e-3)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(fresh(images[train][rows]), given[rows]).backward()
        optimizer.step()
    return (fresh(images[test]).argmax(1) == true[test]).float().mean().item()


everything, cleaned = accuracy(np.arange(300)), accuracy(np.flatnonzero(~labels.flagged))
print(f"test accuracy: {everything:.3f} with all labels as given, {cleaned:.3f} without the suspects")
assert cleaned > everything

# %% [markdown]
# In the report a person looks at them (keys K, R, D for keep, relabel, drop) and exports the decisions as a CSV file.
# Here a file like it drops what was flagged. `summarize` reads it, and keeps a third of what is left.

# %%
out = Path("examples_out")
out.mkdir(exist_ok=True)
with open(out / "review.csv", "w", newline="") as file:
    rows = [(i, "drop", given[i].item(), given[i].item()) for i in np.flatnonzero(labels.flagged)]
    csv.writer(file).writerows([("id", "decision", "label", "new_label"), *rows])
data = (images[train], given), (images[val], true[val])
kept = sui_fast.summarize(model, *data, m=90, review=out / "review.csv")
good = np.flatnonzero(~labels.flagged)
small, chance = accuracy(kept.kept), np.mean([accuracy(rng.choice(good, 90, replace=False)) for _ in range(3)])
print(kept)
print(f"test accuracy: {small:.3f} with 90 samples chosen, {chance:.3f} with 90 of the same drawn")
assert small > chance and not labels.flagged[kept.kept].any()

# %%
scores.save(out / "digits.parquet")
title = "Digits, a tenth with wrong labels"
print("open", scores.report(out / "digits.html", title=title, sections=[labels, kept]))
