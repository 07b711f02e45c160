"""The table: round trip, ranking, damage."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sui_fast import ArgumentError, DataError, Scores


def scores(n=5, **more):
    rng = np.random.default_rng(0)
    return Scores(
        np.arange(n),
        {"si": rng.random(n), "fsi": rng.random(n)},
        {"reg": 0.1, "time": None},
        {"rank": 3},
        units={"si": "nats", "fsi": "nats"},
        **more,
    )


@settings(max_examples=25)
@given(values=hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(allow_nan=False)), text=st.booleans())
def test_round_trip_is_exact(tmp_path_factory, values, text):
    ids = np.array([f"s{i}" for i in range(len(values))]) if text else np.arange(len(values)) * 7
    path = tmp_path_factory.mktemp("scores") / "s.parquet"
    before = Scores(ids, {"si": values}, {"lr": 0.1}, {"seconds": {"solve": 1.5}}, labels=np.arange(len(values)))
    after = Scores.load(before.save(path))
    assert (after.ids == ids).all() and (after.labels == before.labels).all()
    assert after["si"].tobytes() == values.tobytes()
    assert after.settings == before.settings and after.diagnostics == before.diagnostics
    assert [p.name for p in path.parent.iterdir()] == ["s.parquet"]


def test_units_and_settings_are_in_the_file(tmp_path):
    table = pq.read_table(scores().save(tmp_path / "s.parquet"))
    assert table.schema.field("si").metadata[b"unit"] == b"nats"
    assert json.loads(table.schema.metadata[b"sui_fast.scores"])["settings"]["reg"] == 0.1
    assert scores().to_pandas().columns.tolist() == ["id", "si", "fsi"]


def test_ranking():
    s = scores()
    assert s.top(2).ids.tolist() == np.argsort(-s["fsi"])[:2].tolist()
    assert s.bottom(2, by="si").ids.tolist() == np.argsort(s["si"])[:2].tolist()
    assert len(s.top(99)) == 5 and len(s.top(0)) == 0
    with pytest.raises(ArgumentError, match="si, fsi"):
        s.top(1, by="nothing")
    with pytest.raises(ArgumentError, match="m:"):
        s.top(-1)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "flipped", "text"])
def test_damage_is_named(tmp_path, damage):
    path = scores(400).save(tmp_path / "s.parquet")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-6] ^= 0xFF  # in the length of the footer
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("si,fsi\n1,2\n")
    else:
        pq.write_table(scores().table.replace_schema_metadata({}), path)
    with pytest.raises(DataError, match="Scores.save"):
        Scores.load(path)


def test_every_flipped_byte_in_the_columns_is_detected_or_harmless(tmp_path):
    before = scores(50)
    data = before.save(tmp_path / "s.parquet").read_bytes()
    for place in range(4, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path = tmp_path / "t.parquet"
        path.write_bytes(changed)
        try:
            after = Scores.load(path)
        except DataError:
            continue
        assert all(after[name].tobytes() == before[name].tobytes() for name in before.values), place
