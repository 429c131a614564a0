"""A run's file, cut anywhere and gone on with."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.errors import InputError
from aesanet.runtime.rows.output import RowFile, state_of
from aesanet.runtime.rows.row import Row

RUN = {"the engine": ["known", 1], "--channels": "mean"}
ROWS = [Row({"path": f"clip {number}.wav", "id": number, "é": [1, {"x": None}]}) for number in range(30)]
ROWS[7] = Row({"path": "caf\udce9.wav"})  # a name that is not UTF-8
ROWS[9] = Row({"line": "no JSON"})
ORDER = sorted(range(30), key=lambda number: (number // 5, -number))  # as a run without order could: in groups of five


def out_row(number):
    if number % 4 == 3:
        return {**ROWS[number].given, "error": {"code": "not_found", "message": "none"}}
    return {**ROWS[number].given, "CE": 1 + number / 7, "seconds": 1.5, "truncated": False}


def write(path, numbers, run=RUN, resume=False, given=ROWS, ordered=True):
    """A run that writes rows, marking every fifth; what it counted."""
    file = RowFile(path, run)
    try:
        rest = iter(given)
        if resume:
            file.resume(rest, ordered)
            assert file.tally.rows % 5 == 0 or file.tally.rows == len(ROWS)
            numbers = numbers[file.tally.rows :]
            if ordered:
                assert [row.given for row in rest] == [ROWS[number].given for number in numbers]
        else:
            file.begin()
        for number in numbers:
            file.write(out_row(number))
            if file.tally.rows % 5 == 0:
                file.mark()
        return file.tally
    finally:
        file.close()


def finish(path):
    """A run that comes to its end with nothing more to write."""
    file = RowFile(path, RUN)
    assert file.resume(iter(ROWS), ordered=True)
    file.finish()
    file.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    tally = write(path, range(30))
    assert (tally.rows, tally.failed, tally.seconds) == (30, 7, 23 * 1.5)
    return path.read_bytes()


@given(done=st.integers(0, 30), torn=st.integers(0, 200), ordered=st.booleans())
@settings(max_examples=60)
def test_a_file_cut_anywhere_after_its_last_mark_becomes_the_same(tmp_path_factory, whole, done, torn, ordered):
    numbers = list(range(30)) if ordered else ORDER
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    write(path, numbers, ordered=ordered)
    expected = path.read_bytes()
    assert (expected == whole) == ordered
    write(path, numbers[:done], ordered=ordered)
    marked = json.loads(state_of(path).read_bytes())["bytes"]
    with open(path, "r+b") as file:
        file.truncate(max(marked, len(path.read_bytes()) - torn))
    tally = write(path, numbers, resume=True, ordered=ordered)
    assert path.read_bytes() == expected
    assert (tally.rows, tally.failed, tally.seconds) == (30, 7, 23 * 1.5)


def test_rows_read_back_as_they_were(whole):
    for number, line in enumerate(whole.splitlines()):
        assert json.loads(line) == out_row(number)


def test_nothing_there_is_begun_and_a_finished_run_is_left_alone(tmp_path, whole):
    path = tmp_path / "rows.jsonl"
    write(path, list(range(30)), resume=True)
    assert path.read_bytes() == whole
    finish(path)
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "rows.jsonl.state"]
    tally = write(path, list(range(30)), resume=True)
    assert path.read_bytes() == whole
    assert tally.rows == 30


@pytest.mark.parametrize("finished", [False, True])
def test_another_input_is_refused_and_named(tmp_path, finished):
    path = tmp_path / "rows.jsonl"
    write(path, range(30))
    if finished:
        finish(path)
    before = path.read_bytes()
    changed = [*ROWS[:11], Row({"path": "other.wav"}), *ROWS[12:]]
    for given_rows, told in (
        (changed, r"row 12 is of .*clip 11\.wav.*and the input has .*other\.wav"),
        ([*ROWS[:3], *ROWS[4:]], r"row 4 is of .*clip 3\.wav.*and the input has .*clip 4\.wav"),
        (ROWS[:20], "has 30 rows, and the input only 20"),
    ):
        with pytest.raises(InputError, match=told):
            write(path, range(30), resume=True, given=given_rows)
    if finished:
        with pytest.raises(InputError, match="is finished with 30 rows, and the input has more"):
            write(path, range(30), resume=True, given=[*ROWS, Row({"path": "new.wav"})])
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="are not the first of the input"):
        write(path, range(30), resume=True, given=changed, ordered=False)


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_and_named(tmp_path, finished):
    path = tmp_path / "rows.jsonl"
    write(path, range(30 if finished else 12))
    if finished:
        finish(path)
    with pytest.raises(InputError, match='begun with --channels "mean", and this is "left"'):
        write(path, range(30), run={**RUN, "--channels": "left"}, resume=True)
    with pytest.raises(InputError, match='with the engine \\["known", 1\\], and this is \\["known", 2\\]'):
        write(path, range(30), run={**RUN, "the engine": ["known", 2]}, resume=True)
    with pytest.raises(InputError, match="with --more null, and this is true"):
        write(path, range(30), run={**RUN, "--more": True}, resume=True)


@pytest.mark.parametrize("damage", ["state", "text", "version", "shorter", "rows"])
def test_what_was_damaged_is_refused(tmp_path, damage):
    path = tmp_path / "rows.jsonl"
    write(path, range(12))
    if damage == "state":
        state_of(path).write_bytes(b"{")
    elif damage == "text":
        state_of(path).write_bytes(b"\xff")
    elif damage == "version":
        state_of(path).write_bytes(state_of(path).read_bytes().replace(b'"format":1', b'"format":9'))
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_bytes(path.read_bytes().replace(b'"id": 2', b'"id" 2}'))
    with pytest.raises(InputError, match="--overwrite to start anew"):
        write(path, range(30), resume=True)


def test_rows_whose_run_is_not_known_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, range(30))
    state_of(path).unlink()
    with pytest.raises(InputError, match=r"has no rows\.jsonl\.state beside it"):
        write(path, range(30), resume=True)


@pytest.mark.parametrize("state", [True, False])
def test_a_run_killed_as_soon_as_it_had_its_file_is_begun(tmp_path, whole, state):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path, RUN)
    if state:
        file.begin()
    file.close()
    write(path, list(range(30)), resume=True)
    assert path.read_bytes() == whole


def test_an_output_that_was_taken_away_is_made_again(tmp_path, whole):
    path = tmp_path / "rows.jsonl"
    write(path, list(range(30)))
    finish(path)
    path.unlink()
    write(path, list(range(30)), resume=True)
    assert path.read_bytes() == whole


def test_beginning_anew_can_be_killed_at_any_step(tmp_path, whole, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write(path, list(range(30)))
    file = RowFile(path, RUN)
    monkeypatch.setattr(file, "_cut", lambda num_bytes: 1 / 0)  # the kill
    with pytest.raises(ZeroDivisionError):
        file.begin()
    file.close()
    write(path, list(range(30)), resume=True)
    assert path.read_bytes() == whole


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = RowFile(path, RUN)
    with pytest.raises(InputError, match="another run is writing it"):
        RowFile(path, RUN)
    first.close()
    RowFile(path, RUN).close()


def test_a_device_keeps_no_state():
    path = Path("/dev/null")
    file = RowFile(path, RUN)
    file.begin()
    file.write(out_row(0))
    file.mark()
    file.finish()
    file.close()
    assert not state_of(path).exists()
