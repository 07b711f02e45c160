# %% [markdown]
# # Digits: which samples teach the model, and which carry a wrong label?
#
# 400 of scikit-learn's handwritten digits, a tenth of them with a wrong label on purpose. One call scores them all.

# %%
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
train, val, test = slice(0, 400), slice(400, 700), slice(700, 1700)

given = true[train].clone()
wrong = rng.permutation(400)[:40]
given[wrong] = (given[wrong] + torch.tensor(rng.integers(1, 10, 40))) % 10


# %% [markdown]
# Any `nn.Module` will do, trained or not. The scores say what each sample adds to this model when it is trained.


# %%
def network():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )


model = network()
scores = sui_fast.score(
    model, (images[train], given), (images[val], true[val]), measures=("si", "fsi", "loo_margin"), reg="auto"
)
print(scores)
print("regularisation with the smallest leave-one-out error:", scores.settings["reg"])
print("most informative (F-SI): ", scores.top(10).ids)
print("least informative (F-SI):", scores.bottom(10).ids)

# %% [markdown]
# A negative leave-one-out margin: the model trained on all others contradicts the label.

# %%
suspects = scores.bottom(40, by="loo_margin").ids
found = np.isin(suspects, wrong).mean()
print(f"of the 40 most suspicious samples {found:.0%} carry a wrong label")
repaired = scores.suggested[wrong] == true[wrong].numpy()
print(f"the suggested label is the true one for {repaired.mean():.0%} of the wrong labels")
assert found > 0.8 and repaired.mean() > 0.75


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


everything, cleaned = accuracy(np.arange(400)), accuracy(np.flatnonzero(scores["loo_margin"] >= 0))
print(f"test accuracy: {everything:.3f} with all labels as given, {cleaned:.3f} without the suspects")
assert cleaned > everything

# %% [markdown]
# The report lets you look at them: sort, filter, review with the keys K, R, D, export the decisions as CSV.

# %%
out = Path("examples_out")
out.mkdir(exist_ok=True)
scores.save(out / "digits.parquet")
print("open", scores.report(out / "digits.html", title="Digits, a tenth with wrong labels"))
