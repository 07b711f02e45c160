# %% [markdown]
# # Your own model: any module, any batch, any output
#
# A regression with a module of one's own (two inputs, a parameter outside any layer, a tuple as output), a Dataset of
# dictionaries with ids, and a check of the scores by really refitting.

# %%
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes

import sui_fast

torch.manual_seed(0)
torch.set_num_threads(1)
data = load_diabetes()
x = torch.tensor(data.data / data.data.std(0), dtype=torch.float64)
y = torch.tensor((data.target - data.target.mean()) / data.target.std(), dtype=torch.float64)


class Patients(torch.utils.data.Dataset):
    """Rows as dictionaries: blood values and the rest apart, an id, and the progression of the disease."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return {"body": x[row, :4], "blood": x[row, 4:], "id": 1000 + row, "target": y[row : row + 1]}


class Two(torch.nn.Module):
    """Two branches with a learned balance; returns what it thinks and what it looked at."""

    def __init__(self):
        super().__init__()
        self.body, self.blood = torch.nn.Linear(4, 8), torch.nn.Linear(6, 8)
        self.balance = torch.nn.Parameter(torch.tensor(0.5))
        self.last = torch.nn.Linear(8, 1)

    def forward(self, body, blood):
        hidden = torch.tanh(self.balance * self.body(body) + (1 - self.balance) * self.blood(blood))
        return self.last(hidden), hidden


model = Two().double()
train, val = Patients(range(300)), Patients(range(300, 442))


# %% [markdown]
# `outputs=` says how to call the model on a batch; ids and targets are found by their names. `plan` tells what will be
# done before it is done.


# %%
def outputs(model, batch):
    return model(batch["body"], batch["blood"])[0]


print(sui_fast.plan(model, train, val, outputs=outputs))
reg = 0.01
scores = sui_fast.score(
    model, train, val, outputs=outputs, measures=("si", "fsi", "leverage", "loo_residual"), reg=reg, convention="mean"
)
print(scores)
print("parameters covered:", scores.diagnostics["coverage"], "most informative patients:", scores.top(5).ids)

# %% [markdown]
# The claim: SI is what the weights of the linearised model change when one sample is left out. Here is the refit, with
# nothing but gradients and a linear solver.

# %%
names = [name for name, _ in model.named_parameters()]


def rows_of(samples):
    jac, out = [], []
    for i in range(len(samples)):
        sample = samples[i]
        value = outputs(model, {key: sample[key][None] for key in ("body", "blood")})[0, 0]
        jac.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))]))
        out.append(value.detach())
    return torch.stack(jac), torch.stack(out)


jac, f0 = rows_of(train)
r0 = y[:300] - f0


def fit(rows):
    """Change of the weights at the minimum of the mean squared loss with reg/2 ||w - w0||^2."""
    some = jac[rows]
    return torch.linalg.solve(some.T @ some / len(rows) + reg * torch.eye(some.shape[1]), some.T @ r0[rows] / len(rows))


full = fit(np.arange(300))
chosen = np.concatenate([np.argsort(scores["si"])[-3:], np.argsort(scores["si"])[:3], [7, 77]])
for i in chosen:
    change = fit(np.delete(np.arange(300), i)) - full
    print(f"patient {scores.ids[i]}: SI {scores['si'][i]:.6e}, refitted {change.square().sum() / 2:.6e}")
    assert abs(scores["si"][i] / (change.square().sum().item() / 2) - 1) < 1e-5

# %% [markdown]
# Applications take the same arguments. Which 100 of the 300 patients say almost all? The predictions of the linearised
# model trained on them stay closer to those of the full set than with 100 drawn ones.

# %%
summary = sui_fast.summarize(model, train, val, 100, outputs=outputs, reg=reg, convention="mean")
print(summary)
jac_val, _ = rows_of(val)


def distance(rows):
    return (jac_val @ (fit(rows) - full)).square().mean().sqrt().item()


rng = np.random.default_rng(0)
chosen, drawn = distance(summary.kept), np.mean([distance(rng.permutation(300)[:100]) for _ in range(10)])
print(f"distance of the predictions from the full fit: {chosen:.3f} with 100 chosen, {drawn:.3f} with 100 drawn")
assert chosen < drawn

# %%
out = Path("examples_out")
out.mkdir(exist_ok=True)
print("open", scores.report(out / "your_own_model.html", title="Patients", sections=[summary]))
