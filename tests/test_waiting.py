"""Work of one long step shows that it goes on."""

import time
import warnings

import pytest
import torch
from torch import nn
from tqdm.auto import tqdm

import sui_fast

APPLICATIONS = {
    "find_mislabeled": sui_fast.find_mislabeled,
    "find_undersampled": sui_fast.find_undersampled,
    "detect_adversarial": sui_fast.detect_adversarial,
    "overlap": lambda *a, **k: sui_fast.overlap(*a, [(0, 1)], **k),
    "redundancy": sui_fast.redundancy,
    "information_curves": sui_fast.information_curves,
    "influence_functions": sui_fast.influence_functions,
    "score": sui_fast.score,
}


@pytest.mark.parametrize("name", APPLICATIONS)
@pytest.mark.parametrize("progress", [True, False])
def test_a_long_step_is_seen(name, progress, capsys, monkeypatch):
    slow = torch.nn.Linear.forward

    def forward(self, x):  # one step of more than three seconds
        if not waited:
            waited.append(time.sleep(3.2))
        return slow(self, x)

    waited: list = []
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    model = nn.Linear(3, 2)
    train, val = (torch.randn(12, 3), torch.arange(12) % 2), torch.randn(4, 3)
    APPLICATIONS[name](model, train, val, reg=0.1, progress=progress)
    seen = capsys.readouterr().err
    assert (name in seen) == progress


@pytest.mark.parametrize("asked", [dict(method="dense"), dict(method="sketch", rank=16), dict(candidates=True)])
@pytest.mark.parametrize("fsi", [True, False])
def test_the_bar_of_a_run_ends_full(asked, fsi, monkeypatch):
    bars = []

    class Bar(tqdm):
        def close(self):
            if self.desc and self.desc.startswith("score") and self not in bars:
                bars.append(self)
            super().close()

    monkeypatch.setattr(sui_fast.runs, "tqdm", Bar)
    train = torch.randn(12, 3), torch.arange(12) % 2
    asked = asked | ({"candidates": train} if "candidates" in asked else {})
    with warnings.catch_warnings(action="ignore"):
        measures = ("si", "fsi") if fsi else ("si",)
        found = sui_fast.score(nn.Linear(3, 2), train, train[0] if fsi else None, reg=0.1, measures=measures, **asked)
    assert len(bars) == 1 and bars[0].n == bars[0].total == len(found.diagnostics["seconds"])
