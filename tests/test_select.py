import json
import math
import os
import subprocess
import sys

import pytest
from helpers import failed, scored, write_lines
from hypothesis import given
from hypothesis import strategies as st

from aesanet.axes import AXES
from aesanet.cli.main import main
from aesanet.runtime.rows.inputs import read_rows
from aesanet.runtime.rows.parquet import read_parquet, write_parquet
from aesanet.runtime.rows.results import Result
from aesanet.runtime.rows.selection import Conditions, Top


def select(*arguments):
    with pytest.raises(SystemExit) as done:
        main(["select", *map(str, arguments)])
    return done.value.code


def kept(capsys, *arguments):
    assert select(*arguments) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


@pytest.fixture
def rows():
    """Forty rows with many equal scores; every seventh failed."""
    made = [
        scored(f"{i}.wav", (i % 5, 1, 9 - i % 4, i % 10), seconds=float(i), label={"n": [i]}, start_time=0)
        for i in range(40)
    ]
    made[11] |= {"truncated": True, "header_seconds": 99.5}
    made[12] |= {"silence": "near"}
    return [failed(f"{i}.wav") if i % 7 == 0 else row for i, row in enumerate(made)]


@pytest.fixture
def shards(rows, tmp_path):
    """The rows in three files, the last of them Parquet; with the long lists that a run may write."""
    long = {"windows": [{"start_seconds": 0.0, "end_seconds": 1.0, **dict.fromkeys(AXES, 1.0)}], "embedding": [0.5]}
    given_rows = [row if "error" in row else row | long for row in rows]
    write_lines(tmp_path / "a-0.jsonl", given_rows[:10])
    write_lines(tmp_path / "a-1.jsonl", given_rows[10:20])
    write_parquet(write_lines(tmp_path / "rest", given_rows[20:]), tmp_path / "b.parquet")
    return [tmp_path / "a-*.jsonl", tmp_path / "b.parquet"]


def test_limits_are_allowed_themselves_and_all_must_hold(rows, shards, capsys):
    found, err = kept(capsys, *shards, "--min", "PQ=4", "--max", "PQ=8", "--min", "seconds=10.5", "--max", "CE=3")
    good = [row for row in rows if "error" not in row]
    expected = [row for row in good if 4 <= row["PQ"] <= 8 and row["seconds"] >= 10.5 and row["CE"] <= 3]
    assert found == expected
    assert 0 < len(found) < len(good)
    hours = [sum(row["seconds"] for row in some) / 3600 for some in (expected, good)]
    assert f"{len(found)} of 40 rows kept, {hours[0]:.2f} of {hours[1]:.2f} h of audio; 6 have an error" in err


def test_truncated_and_silent_clips_can_be_left_out(rows, shards, capsys):
    good = [row["path"] for row in rows if "error" not in row]
    for option, path in (("--no-truncated", "11.wav"), ("--no-silent", "12.wav")):
        found, _ = kept(capsys, *shards, option)
        assert [row["path"] for row in found] == [name for name in good if name != path]


@pytest.mark.parametrize(("top", "count"), [("10%", 4), ("100%", 34), ("0.1%", 1), ("5", 5), ("1000", 34)])
def test_the_top_is_of_what_passes_and_the_earlier_of_equal_ones(rows, shards, capsys, top, count):
    found, _ = kept(capsys, *shards, "--top", top, "--by", "PQ")
    good = [row for row in rows if "error" not in row]
    best = sorted(good, key=lambda row: -row["PQ"])[:count]
    assert found == [row for row in good if row in best]

    found, _ = kept(capsys, *shards, "--max", "PQ=5", "--top", top, "--by", "CE")
    good = [row for row in good if row["PQ"] <= 5]
    best = sorted(good, key=lambda row: -row["CE"])
    best = best[: math.ceil(len(good) * float(top[:-1]) / 100) if top.endswith("%") else int(top)]
    assert found == [row for row in good if row in best]


values = st.lists(st.integers(0, 4).map(float), max_size=40)


@given(values, st.integers(1, 50))
def test_the_top_is_what_a_stable_sort_takes(scores, rows):
    taken = Top("PQ", lambda count: min(count, rows)).of(scores)
    expected = sorted(range(len(scores)), key=lambda i: -scores[i])[:rows]
    assert [i for i, is_taken in enumerate(taken) if is_taken] == sorted(expected)


@given(st.tuples(*[st.integers(0, 4)] * 5), st.lists(st.tuples(st.sampled_from((*AXES, "seconds")), st.integers(0, 4))))
def test_more_conditions_never_keep_more(numbers, limits):
    result = Result(scored("a", numbers[:4], numbers[4]), numbers[:4], numbers[4])
    for kind in ("least", "most"):
        is_kept = [Conditions(**{kind: limits[:count]}).met_by(result) for count in range(len(limits) + 1)]
        assert is_kept == sorted(is_kept, reverse=True)
    both = Conditions(least=limits, most=limits).met_by(result)
    assert both == all(dict(zip((*AXES, "seconds"), numbers, strict=True))[name] == limit for name, limit in limits)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_kept_is_a_manifest_with_the_rows_own_keys(tmp_path, capsys, suffix):
    own = {"id": 2**60, "label": {"a": [1, None, "\u4f60"]}, "start_time": 0.5, "end_time": "1.5", "none": None}
    paths = ("a\n\"b'<.wav", "caf\udce9 \u4f60.wav", "a.wav")
    rows = [{**scored(path, (1, 2, 3, i)), **own} for i, path in enumerate(paths)]
    out = tmp_path / f"kept.{suffix}"
    assert select(write_lines(tmp_path / "s.jsonl", rows), "--min", "PQ=0", "--out", out) == 0
    assert capsys.readouterr().out == ""
    if suffix == "jsonl":
        assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    for row, asked in zip(rows, read_rows([str(out)]), strict=True):
        assert {key: asked.given[key] for key in own} == own
        clip = asked.clip()
        assert (clip.path, clip.start_seconds, clip.end_seconds) == (row["path"], 0.5, 1.5)
    again, _ = kept(capsys, out)
    assert [row["path"] for row in again] == [row["path"] for row in rows]
    assert sorted(os.listdir(tmp_path)) == sorted(["s.jsonl", out.name])


def test_nothing_passes_and_everything_failed(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    write_lines(tmp_path / "failed.jsonl", [failed("a"), failed("b")])
    for more in ((), ("--top", "10%", "--by", "CE")):
        found, err = kept(capsys, tmp_path / "empty.jsonl", tmp_path / "failed.jsonl", *more)
        assert found == []
        assert "0 of 2 rows kept, 0.00 of 0.00 h of audio; 2 have an error" in err
    assert select(tmp_path / "failed.jsonl", "--out", tmp_path / "kept.parquet") == 0
    assert list(read_parquet(str(tmp_path / "kept.parquet"))) == []


def test_a_torn_last_line_is_noted_once(tmp_path, capsys):
    path = write_lines(tmp_path / "s.jsonl", [scored(i, (1, 2, 3, i)) for i in range(3)])
    path.write_text(path.read_text()[:-9])
    found, err = kept(capsys, path, "--top", "1", "--by", "PQ")
    assert [row["path"] for row in found] == ["1"]
    assert err.count("is torn") == 1


def test_rows_that_come_between_the_two_readings_are_not_kept(tmp_path, capsys, monkeypatch):
    path = write_lines(tmp_path / "s.jsonl", [scored(i, (1, 2, 3, i)) for i in range(3)])
    of = Top.of

    def of_and_more(self, scores):
        write_lines(path, [scored(i, (1, 2, 3, i)) for i in range(length)])
        return of(self, scores)

    monkeypatch.setattr(Top, "of", of_and_more)
    length = 9
    found, _ = kept(capsys, path, "--top", "2", "--by", "PQ")
    assert [row["path"] for row in found] == ["1", "2"]
    length = 1
    assert select(path, "--top", "2", "--by", "PQ") == 2
    assert "changed while they were read" in capsys.readouterr().err


def test_standard_input_and_a_reader_that_goes_away(rows, tmp_path):
    path = write_lines(tmp_path / "s.jsonl", rows * 500)
    command = [sys.executable, "-c", "from aesanet.cli.main import main; main()", "select", "-", "--min", "PQ=9"]
    with open(path) as file:
        piped = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert piped.returncode == 0
    assert {json.loads(line)["PQ"] for line in piped.stdout.splitlines()} == {9.0}
    told = subprocess.run([*command, "--top", "5", "--by", "PQ"], input="", capture_output=True, text=True)
    assert told.returncode == 2
    assert "standard input cannot be; give it as a file" in told.stderr
    script = f"{' '.join(map(repr, command[:-2]))} < {path} | head -n 1"
    headed = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert len(headed.stdout.splitlines()) == 1
    assert headed.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--min", "XX=1"], "'XX=1'; it must be one of CE, CU, PC, PQ, seconds"),
        (["--min", "PQ"], "'PQ'; it must be"),
        (["--max", "PQ=nan"], "'PQ=nan'; it must be"),
        (["--min", "PQ=inf"], "'PQ=inf'; it must be"),
        (["--top", "10%"], "--top and --by go together"),
        (["--by", "PQ"], "--top and --by go together"),
        (["--top", "0", "--by", "PQ"], "'0'; it must be a number of rows"),
        (["--top", "101%", "--by", "PQ"], "'101%'; it must be"),
        (["--top", "1/0", "--by", "PQ"], "'1/0'; it must be"),
        (["--top", "2.5", "--by", "PQ"], "'2.5'; it must be"),
        (["--out", "kept.txt"], "kept.txt: a manifest is one of .jsonl"),
        (["--out", "s.jsonl", "--overwrite"], "is one of the inputs"),
        (["--out", "there.jsonl"], "exists; give --overwrite"),
        (["--out", "no/kept.jsonl"], "kept.jsonl: there is no folder no"),
        (["--out", "no/kept.parquet"], "kept.parquet: there is no folder no"),
        (["none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    path = write_lines(tmp_path / "s.jsonl", [scored("a", (1, 2, 3, 4))])
    (tmp_path / "there.jsonl").write_text("mine")
    before = path.read_text()
    assert select("s.jsonl", *arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert path.read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["s.jsonl", "there.jsonl"]
