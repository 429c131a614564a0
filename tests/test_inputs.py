import contextlib
import io
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aesanet.errors import ClipError, InputError
from aesanet.runtime.rows.inputs import count_rows, read_rows
from aesanet.runtime.rows.row import OUTPUT_KEYS, Clip, Row, failed_row, scored_row, write_row


def given_rows(*inputs):
    rows = list(read_rows([os.fspath(i) for i in inputs]))
    assert count_rows([os.fspath(i) for i in inputs]) == len(rows)
    return [row.given for row in rows]


def test_a_folder_is_searched_recursively_in_the_order_of_names(tmp_path):
    for name in ("b.wav", "a/2.FLAC", "a/10.mp3", "a/notes.txt", "c.jsonl", "z/z.ogg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(row["path"], tmp_path) for row in given_rows(tmp_path)]
    assert found == ["b.wav", "a/10.mp3", "a/2.FLAC", "z/z.ogg"]


def test_folders_that_are_linked_are_searched_too_but_not_for_ever(tmp_path, monkeypatch):
    for name in ("in/a.wav", "in/sub/b.wav", "out/c.wav", "in2/d.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "link").symlink_to("../out")
    (tmp_path / "in" / "sub" / "back").symlink_to("../../in")
    (tmp_path / "out" / "also").symlink_to("../in2")
    (tmp_path / "in2" / "round").symlink_to("../in")
    monkeypatch.chdir(tmp_path / "in")
    for top in (str(tmp_path / "in"), f"{tmp_path}/in//", ".", "../in/"):
        found = [os.path.relpath(row.given["path"], top) for row in read_rows([top])]
        assert found == ["a.wav", "link/c.wav", "link/also/d.wav", "sub/b.wav"]


def test_globs_literal_names_and_missing_files(tmp_path):
    for name in ("a1.wav", "a2.wav", "b[1].wav"):
        (tmp_path / name).touch()
    assert given_rows(tmp_path / "a*.wav") == [{"path": f"{tmp_path}/a{i}.wav"} for i in (1, 2)]
    assert given_rows(tmp_path / "b[1].wav") == [{"path": f"{tmp_path}/b[1].wav"}]
    assert given_rows(tmp_path / "c*.wav") == [{"path": f"{tmp_path}/c*.wav"}]
    assert given_rows(tmp_path / "none.wav") == [{"path": f"{tmp_path}/none.wav"}]


def test_json_lines_keep_their_keys_and_bad_ones_stay_rows(tmp_path):
    lines = [
        '{"path": "a.wav", "start_time": 0.0, "end_time": 5, "id": 12345678901234567890, "x": {"y": [1, null]}}',
        "",
        '{"path": "b.wav",',
        "[1, 2]",
        '{"path": "c.wav", "x": NaN}',
        '{"path": "d.wav", "x": 1e999}',
        "[" * 100_000,
        "plain/path with spaces.wav",
        "[live] song.mp3",
        "[",
        '[{"path": "a.wav"},',
        '{"path": "a.wav"},',
        "[12] [1994].wav",
    ]
    (tmp_path / "m.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    rows = list(read_rows([str(tmp_path / "m.jsonl")]))
    assert len(rows) == 12
    assert rows[0].given == json.loads(lines[0])
    assert rows[0].clip() == Clip("a.wav", 0.0, 5.0)
    assert [row.given for row in (*rows[6:8], rows[11])] == [{"path": line} for line in (*lines[7:9], lines[12])]
    for row in rows[1:6] + rows[8:11]:
        with pytest.raises(ClipError) as caught:
            row.clip()
        assert caught.value.code == "bad_row"


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, suffix, delimiter):
    lines = [
        ["id", "path", "start_time"],
        ["1", "a.wav", "0.5"],
        ["2", "b.wav", ""],
        ["3"],
        ["4", '"q""uote.wav"', "x"],
    ]
    (tmp_path / f"m.{suffix}").write_text("\ufeff" + "\n".join(delimiter.join(line) for line in lines))
    rows = list(read_rows([str(tmp_path / f"m.{suffix}")]))
    assert rows[0].given == {"id": "1", "path": "a.wav", "start_time": "0.5"}
    assert rows[0].clip() == Clip("a.wav", 0.5)
    assert rows[1].clip() == Clip("b.wav")
    assert rows[2].error.code == "bad_row"
    with pytest.raises(ClipError, match="start_time is 'x'"):
        rows[3].clip()
    assert rows[3].given["path"] == 'q"uote.wav'


def test_columns_are_known_with_spaces_around_their_names_and_fields_may_be_long(tmp_path):
    text = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"path, start_time ,end_time,text\na.wav, 1, 2,{text}\n")
    (row,) = read_rows([str(tmp_path / "a.csv")])
    assert row.clip() == Clip("a.wav", 1.0, 2.0)
    assert row.given["text"] == text


@pytest.mark.parametrize(
    "text", ['"Hello', 'world"', '"Hi" she said', 'she said "hi"', "it's", '"', '""', '"a\\"b', "", '"all of it"']
)
def test_quotes_in_a_tsv_are_of_their_line(tmp_path, text):
    (tmp_path / "a.tsv").write_text(f"path\ttext\na.wav\t{text}\r\nb.wav\t{text}\n")
    plain = {'""': "", '"all of it"': "all of it"}.get(text, text)  # as a spreadsheet quotes
    assert given_rows(tmp_path / "a.tsv") == [{"path": name, "text": plain} for name in ("a.wav", "b.wav")]


def test_what_cannot_be_read_at_all(tmp_path):
    (tmp_path / "m.csv").write_text("id,file\n1,a.wav\n")
    for name, told in (("m.csv", r"\['id', 'file'\]"), ("none.jsonl", "No such file")):
        with pytest.raises(InputError, match=told):
            list(read_rows([str(tmp_path / name)]))


def test_names_that_are_not_utf8_survive_a_round_trip(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \xe4\xbd\xa0.wav"
    with open(name, "w"):
        pass
    (row,) = read_rows([str(tmp_path)])
    path = tmp_path / "out.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        write_row(file, row.given)
    (again,) = read_rows([str(path)])
    assert os.fsencode(again.clip().path) == name


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)))
def test_own_keys_come_first_and_unchanged(row):
    scores = {"CE": 1.0, "CU": 2.0, "PC": 3.0, "PQ": 4.0, "seconds": 5.0}
    file = io.StringIO()
    write_row(file, scored_row(Row(row), scores))
    line = file.getvalue()
    assert line.count("\n") == 1
    back = json.loads(line)
    assert back == {key: value for key, value in row.items() if key not in OUTPUT_KEYS} | scores
    assert list(back)[-5:] == list(scores)


def test_an_old_error_does_not_outlive_a_new_score():
    row = Row({"path": "a.wav", "error": {"code": "not_found"}, "PQ": 1})
    assert scored_row(row, {"PQ": 2.0}) == {"path": "a.wav", "PQ": 2.0}
    assert failed_row(row, ClipError("too_short", "why")) == {
        "path": "a.wav",
        "error": {"code": "too_short", "message": "why"},
    }


@pytest.mark.parametrize("path", [None, 5, "", ["a"], "a\0b"])
def test_rows_without_a_usable_path(path):
    with pytest.raises(ClipError) as caught:
        Row({"path": path}).clip()
    assert caught.value.code == "bad_row"


@pytest.mark.parametrize(
    "segment",
    [
        {"start_time": -1},
        {"end_time": "soon"},
        {"start_time": True},
        {"start_time": 5, "end_time": 5},
        {"end_time": 0},
        {"start_time": float("nan")},
        {"end_time": float("inf")},
        {"start_time": [1]},
        {"start_time": 1e308},
    ],
)
def test_segments_that_are_none(segment):
    with pytest.raises(ClipError) as caught:
        Row({"path": "a.wav", **segment}).clip()
    assert caught.value.code == "bad_segment"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
)


@given(path=json_values, start=json_values, end=json_values)
def test_any_row_at_all_is_a_clip_or_a_clip_error(path, start, end):
    with contextlib.suppress(ClipError):
        clip = Row({"path": path, "start_time": start, "end_time": end}).clip()
        assert os.fsencode(clip.path)
        assert (clip.start_seconds or 0) < (math.inf if clip.end_seconds is None else clip.end_seconds)


@pytest.mark.parametrize("row", [{"path": "\ud83d.wav"}, {"path": "a.wav", "start_time": 10**400}])
def test_rows_that_no_system_can_take(row):
    with pytest.raises(ClipError):
        Row(row).clip()


def test_a_table_as_spreadsheets_write_it_and_one_with_an_open_quote(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"path","text"\r\n"a.wav","b, c"\r\n')
    assert given_rows(tmp_path / "a.csv") == [{"path": "a.wav", "text": "b, c"}]
    (tmp_path / "b.csv").write_text('path,text\na.wav,"open\nb.wav,c\n')
    with pytest.raises(InputError, match="line 3"):
        list(read_rows([str(tmp_path / "b.csv")]))
