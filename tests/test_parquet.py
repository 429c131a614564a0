import datetime
import decimal
import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from conftest import RECORDINGS
from helpers import write_lines
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from aesanet.axes import AXES
from aesanet.cli.main import main
from aesanet.errors import InputError
from aesanet.runtime.rows.inputs import count_rows, read_rows
from aesanet.runtime.rows.parquet import read_parquet, write_parquet
from aesanet.runtime.rows.results import read_results
from aesanet.runtime.rows.row import OUTPUT_KEYS, Clip

MEASURED = {
    **dict(zip(AXES, (1.5, 2.25, 3.0, 9.999999), strict=True)),
    "start_seconds": 0.0,
    "end_seconds": 2.5,
    "seconds": 2.5,
    "sample_rate": 44_100,
    "channels": 2,
    "truncated": False,
}
FAILED = {"error": {"code": "not_found", "message": "no such file"}}


def round_trip(folder, rows):
    write_lines(folder / "s.jsonl", rows)
    write_parquet(folder / "s.jsonl", folder / "s.parquet")
    return pq.read_table(folder / "s.parquet")


def test_a_manifest_of_every_type(tmp_path):
    noon = datetime.datetime(2024, 2, 29, 12, 0, 0, 5, tzinfo=datetime.UTC)
    columns = {
        "path": pa.array(["a.wav", "b.wav"]),
        "start_time": pa.array([0.5, math.nan]),
        "end_time": pa.array([2, None], pa.int64()),
        "made": pa.array([noon, None], pa.timestamp("us", "UTC")),
        "nanoseconds": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
        "day": pa.array([datetime.date(2024, 2, 29), None]),
        "price": pa.array([decimal.Decimal("1.10"), None]),
        "tags": pa.array([["x", "y"], []]),
        "audio": pa.array([{"bytes": b"RIFF", "path": "x"}, None]),
        "bytes": pa.array([b"\xff", None]),
        "language": pa.array(["de", "de"]).dictionary_encode(),
        "a.b": pa.array([True, None]),
        "more": pa.array([{"x": math.inf, "at": noon}, None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    first, second = read_rows([str(tmp_path / "m.parquet")])
    assert first.given == {
        "path": "a.wav",
        "start_time": 0.5,
        "end_time": 2,
        "made": "2024-02-29T12:00:00.000005+00:00",
        "nanoseconds": "2023-11-14T22:13:20",
        "day": "2024-02-29",
        "price": "1.10",
        "tags": ["x", "y"],
        "audio": {"path": "x"},
        "language": "de",
        "a.b": True,
        "more": {"x": None, "at": "2024-02-29T12:00:00.000005+00:00"},
    }
    assert first.clip() == Clip("a.wav", 0.5, 2.0)
    assert second.clip() == Clip("b.wav")
    assert second.given == {
        **dict.fromkeys(first.given),
        "path": "b.wav",
        "language": "de",
        "tags": [],
    }
    json.dumps([first.given, second.given], allow_nan=False)


def test_rows_are_counted_without_being_read(tmp_path, monkeypatch):
    pq.write_table(pa.table({"path": [f"{i}.wav" for i in range(2_500)]}), tmp_path / "m.parquet", row_group_size=700)
    (tmp_path / "m.csv").write_text("path\na.wav\n")
    inputs = [str(tmp_path / "m.parquet"), str(tmp_path / "m.csv")]
    assert [row.given["path"] for row in read_rows(inputs)] == [*(f"{i}.wav" for i in range(2_500)), "a.wav"]
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    assert count_rows(inputs) == 2_501


def test_names_that_are_not_utf8_and_folders_that_look_like_files(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    pq.write_table(pa.table({"path": ["a.wav"]}), tmp_path / "m.parquet")
    os.rename(tmp_path / "m.parquet", name)
    assert [row.given for row in read_rows([name])] == [{"path": "a.wav"}]
    os.mkdir(tmp_path / "folder.parquet")
    assert list(read_rows([str(tmp_path / "folder.parquet")])) == []
    assert count_rows([str(tmp_path / "folder.parquet")]) == 0


def test_what_cannot_be_read(tmp_path):
    pq.write_table(pa.table({"file": ["a.wav"]}), tmp_path / "named.parquet")
    pq.write_table(pa.table({"path": [b"a.wav"]}), tmp_path / "binary.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["path", "path"]), tmp_path / "twice.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1 but not so")
    pq.write_table(pa.table({"path": [str(i) * 50 for i in range(5_000)]}), tmp_path / "damaged.parquet")
    whole = (tmp_path / "damaged.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(whole[:4] + b"\xa5" * 5_000 + whole[5_004:])
    for name, told in (
        ("named", r"columns are {'file': 'string'}; it must have a `path` of strings"),
        ("binary", r"columns are {'path': 'binary'}; it must have a `path` of strings"),
        ("twice", "no name may be there twice"),
        ("none", "not a Parquet file"),
        ("damaged", "a damaged Parquet file"),
        ("missing", "No such file"),
    ):
        with pytest.raises(InputError, match=rf"{name}\.parquet: .*{told}"):
            list(read_rows([str(tmp_path / f"{name}.parquet")]))


def test_without_pyarrow_it_says_what_to_install(tiny_bundle, tmp_path):
    code = """
import sys
sys.modules["pyarrow"] = None
from aesanet.cli.main import main
main(sys.argv[1:])
"""
    for arguments in (
        ["no.bundle", tmp_path / "m.parquet"],
        [tiny_bundle, RECORDINGS[0], "--out", tmp_path / "s.parquet"],
    ):
        command = [sys.executable, "-c", code, "score", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "pip install 'aesanet[parquet]'" in done.stderr
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_scores_have_the_same_types_whatever_the_rows(tmp_path):
    window = {"start_seconds": 0.0, "end_seconds": 2.5, **dict(zip(AXES, (1.0, 2.0, 3.0, 4.0), strict=True))}
    long = {"windows": [window], "embedding": [0.5, -1.0], "silence": "near", "header_seconds": 3.0}
    full = round_trip(tmp_path, [{"path": "a", **MEASURED, **long}, {"path": "b", **FAILED}])
    plain = round_trip(tmp_path, [{"path": "a", **MEASURED}])
    failed = round_trip(tmp_path, [{"path": "a", **FAILED}])
    none = round_trip(tmp_path, [])
    assert full.schema == plain.schema == failed.schema
    assert none.schema.names == list(OUTPUT_KEYS)
    assert [str(full.schema.field(key).type) for key in ("CE", "sample_rate", "truncated", "embedding")] == [
        "double",
        "int32",
        "bool",
        "list<element: float>",
    ]
    assert full.to_pylist()[0] == {"path": "a", **MEASURED, **long, "error": None}


def test_own_keys_have_the_type_of_all_their_values(tmp_path):
    own = {
        "bools": ([True, False, None], "bool"),
        "ints": ([1, 2**62, None], "int64"),
        "floats": ([0.5, 1.5, None], "double"),
        "both": ([1, 0.5, -(2**53)], "double"),
        "too_exact": ([2**53 + 1, 0.5, None], "extension<arrow.json>"),
        "huge": ([2**64, 1, None], "extension<arrow.json>"),
        "strings": (["a", "\u4f60", ""], "string"),
        "mixed": (["1", 1, True], "extension<arrow.json>"),
        "nested": ([{"x": [1]}, [], None], "extension<arrow.json>"),
        "bytes": (["caf\udce9", "plain", None], "extension<arrow.json>"),
        "nothing": ([None, None, None], "string"),
    }
    rows = [{**{key: values[i] for key, (values, _) in own.items()}, **MEASURED} for i in range(3)]
    table = round_trip(tmp_path, rows)
    assert {key: str(table.schema.field(key).type) for key in own} == {key: kind for key, (_, kind) in own.items()}
    assert list(read_parquet(str(tmp_path / "s.parquet"), leave_out=("windows", "embedding"))) == [
        {**row, "header_seconds": None, "silence": None, "error": None} for row in rows
    ]


texts = st.text(st.characters(codec=None, exclude_categories=())) | st.just("caf\udce9.wav")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.text(st.characters(codec="utf-8"), max_size=5).filter(lambda name: name not in OUTPUT_KEYS)


@given(st.lists(st.dictionaries(names, values, max_size=4), max_size=5), st.data())
def test_any_rows_come_back_the_same(tmp_path_factory, given_rows, data):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{**row, **(FAILED if data.draw(st.booleans()) else MEASURED)} for row in given_rows]
    round_trip(folder, rows)
    lines, columns = (list(read_results([str(folder / name)])) for name in ("s.jsonl", "s.parquet"))
    assert [result.scores for result in columns] == [result.scores for result in lines]
    expected = [{key: value for key, value in result.row.items() if value is not None} for result in lines]
    # As text, in which 1 is not true; a whole number among fractions comes back as a fraction.
    assert [_shown(result.row) for result in columns] == [_shown(row) for row in expected]


def _shown(value):
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return value if isinstance(value, bool | str | None) else ("number", value)


def test_strings_that_utf8_cannot_hold(tmp_path):
    rows = [
        {"path": "caf\udce9.wav", "k\udce9y": 1, **MEASURED},
        {"path": "b.wav", "error": {"code": "not_found", "message": "caf\udce9"}},
    ]
    table = round_trip(tmp_path, rows)
    assert table.schema.names[:2] == ["path", r"k\udce9y"]
    first, second = read_results([str(tmp_path / "s.parquet")])
    assert os.fsencode(first.row["path"]) == b"caf\xe9.wav"
    assert second.row["error"]["message"] == r"caf\udce9"
    # And as a manifest:
    assert next(read_rows([str(tmp_path / "s.parquet")])).clip().path == "caf\udce9.wav"


def test_order_is_kept_over_many_row_groups_and_embeddings_are_float32(tmp_path, monkeypatch):
    monkeypatch.setattr("aesanet.runtime.rows.parquet._GROUP_ROWS", 1_000)
    embedding = np.random.default_rng(0).normal(size=8)
    rows = [{"path": f"{i}.wav", **MEASURED, "embedding": (embedding + i).tolist()} for i in range(2_500)]
    table = round_trip(tmp_path, rows)
    assert pq.ParquetFile(tmp_path / "s.parquet").num_row_groups == 3
    assert table["path"].to_pylist() == [row["path"] for row in rows]
    np.testing.assert_array_equal(table["embedding"][2_000].as_py(), (embedding + 2_000).astype(np.float32))


def test_a_file_that_fails_leaves_the_old_one_and_no_other(tmp_path):
    (tmp_path / "s.parquet").write_text("old")
    for line, told in (
        ("{", "line 1: not a JSON object"),
        ("[1]", "line 1: a JSON list"),
        ('{"PQ": "high"}', "did not write"),
    ):
        (tmp_path / "s.jsonl").write_text(line)
        with pytest.raises(InputError, match=told):
            write_parquet(tmp_path / "s.jsonl", tmp_path / "s.parquet")
    assert (tmp_path / "s.parquet").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["s.jsonl", "s.parquet"]


def aesanet(*arguments):
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    return done.value.code


def test_from_a_manifest_to_scores_to_a_page_to_a_manifest_that_is_scored(tiny_bundle, tmp_path, capsys):
    manifest, scores, lines, kept = (tmp_path / name for name in ("m.parquet", "s.parquet", "s.jsonl", "k.parquet"))
    ends = pa.array([1.0, None, 0.5], pa.float64())
    paths = [str(RECORDINGS[0]), str(tmp_path / "none.wav"), str(RECORDINGS[1])]
    pq.write_table(pa.table({"path": paths, "end_time": ends, "tags": [["a"], [], None]}), manifest)
    assert aesanet("score", tiny_bundle, manifest, "--per-window", "--embeddings", "--out", scores) == 1
    assert aesanet("score", tiny_bundle, manifest, "--per-window", "--embeddings", "--out", lines) == 1
    assert sorted(os.listdir(tmp_path)) == ["m.parquet", "s.jsonl", "s.jsonl.state", "s.parquet", "s.parquet.state"]
    expected = [json.loads(line) for line in lines.read_text().splitlines()]
    found = [{key: value for key, value in row.items() if value is not None} for row in read_parquet(str(scores))]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row.pop("embedding", []), np.float32(other.pop("embedding", [])))
        assert row == {key: value for key, value in other.items() if value is not None}

    assert aesanet("report", scores, "--out", tmp_path / "r.html") == 0
    assert "2 clips scored, 0.00 h of audio, 1 rows failed" in capsys.readouterr().out
    assert aesanet("select", scores, "--max", "seconds=0.5", "--out", kept) == 0
    assert aesanet("score", tiny_bundle, kept) == 0
    again = json.loads(capsys.readouterr().out)
    # Alone, and not beside another clip, a processor may round a score otherwise.
    assert [again[axis] for axis in AXES] == pytest.approx([expected[2][axis] for axis in AXES], abs=1e-4)
    assert again["seconds"] == expected[2]["seconds"]
