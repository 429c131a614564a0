"""Which rows are decoded together, and that a decoder's failure is its file's alone."""

import numpy as np
import pytest

from aesanet.errors import ClipError
from aesanet.runtime import jobs
from aesanet.runtime.audio.decode import Heard
from aesanet.runtime.jobs import file_jobs
from aesanet.runtime.rows.row import Row


def paths(rows):
    return [[row.given.get("path") for row in job.rows] for job in file_jobs(rows, "mean", 10.0, 1e9)]


def test_rows_of_one_file_that_follow_each_other_are_one_job():
    rows = [
        {"path": "a"},
        {"path": "a", "start_time": 1},
        {"path": "b"},
        Row({"path": "a"}),
        {"path": "a", "start_time": -1},
        {"path": "a"},
        {"path": "s.tar", "member": "1.wav"},
        {"path": "s.tar", "member": "2.wav"},
        {"path": "s.tar", "member": "2.wav", "start_time": 1},
        {"id": "no path"},
    ]
    assert paths(rows) == [["a", "a"], ["b"], ["a"], ["a"], ["a"], ["s.tar"], ["s.tar", "s.tar"], [None]]
    assert paths([]) == []
    assert [len(job) for job in paths([{"path": "a"}] * 2_500)] == [1_000, 1_000, 500]


def test_a_job_is_no_longer_than_a_group():
    """Its last windows are all held: no more of them than a group may hold, by what the rows ask for."""
    rows = [{"path": "a", "start_time": start, "end_time": start + 0.5} for start in range(400)]
    assert [len(job.rows) for job in file_jobs(rows, "mean", 10.0, 50.0)] == [100] * 4
    rows = [{"path": "a", "start_time": start} for start in range(12)]  # to the end of the file: a window at most
    assert [len(job.rows) for job in file_jobs(rows, "mean", 10.0, 50.0)] == [5, 5, 2]
    assert [len(job.rows) for job in file_jobs(rows[3:], "mean", 10.0, 50.0)] == [5, 4]  # from its own start


def test_a_row_is_as_it_was_when_it_was_given():
    """Whoever gives them may have one mapping for all."""
    row = {}

    def rows():
        for row["path"] in "abc":
            yield row

    assert paths(rows()) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("row", ["a.wav", None, 5, ["path"]])
def test_what_is_no_row_is_told(row):
    with pytest.raises(TypeError, match="give mappings with a `path`, or paths to `score`"):
        paths([row])


def test_a_row_that_asks_for_no_clip_is_a_job_with_its_error():
    (job,) = file_jobs([{"path": "a", "end_time": 0}], "mean", 10.0, 1e9)
    ((index, error),) = job.decode()
    assert (index, error.code) == (0, "bad_segment")


@pytest.mark.parametrize("failure", [RuntimeError("of libsndfile"), OSError(5, "Input/output error")])
def test_a_decoder_that_fails_fails_its_own_clips_and_not_the_run(monkeypatch, failure):
    def failing(clips, channels):
        yield 0, np.zeros(10, np.float32)
        yield 1, Heard(1.0, None, 16_000, 1, None)
        raise failure

    monkeypatch.setattr(jobs, "decode", failing)
    (job,) = file_jobs([{"path": "a"}] * 3, "mean", 10.0, 1e9)
    block, heard, *errors = job.decode()
    assert block[0] == 0
    assert heard[0] == 1
    assert [(index, error.code) for index, error in errors] == [(0, "undecodable"), (2, "undecodable")]
    assert all(isinstance(error, ClipError) and type(failure).__name__ in error.message for _, error in errors)


@pytest.mark.parametrize("failure", [MemoryError(), OSError(24, "Too many open files")])
def test_a_machine_that_has_no_more_ends_the_run(monkeypatch, failure):
    """Rows of such errors would stay, and the same input would not give them again."""

    def failing(clips, channels):
        raise failure
        yield

    monkeypatch.setattr(jobs, "decode", failing)
    (job,) = file_jobs([{"path": "a"}], "mean", 10.0, 1e9)
    with pytest.raises(type(failure)):
        list(job.decode())
