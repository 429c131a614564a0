"""Files whole or not at all: what killed processes left, and folders that one process writes at a time."""

import copy
import os
import pickle
import subprocess
import sys
import time

import pytest

from aesanet.errors import CLIP_ERROR_CODES, ClipError, InputError
from aesanet.files import alone_in, replacing, sweep


def test_a_folder_is_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from aesanet.files import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another run is writing it"), alone_in(tmp_path):
            pass
        other.kill()
    for _ in range(2):
        with alone_in(tmp_path):
            pass


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    with replacing(tmp_path / "state.pt") as left:
        left.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    (tmp_path / "state.pt").unlink()
    others = [".state.pt", ".gitignore", ".state.pt.0123", "state.pt.0123456789abcdef", ".a.0123456789ABCDEF"]
    for name in (left.name, ".other.0123456789abcdef", *others):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path, 3600)
    os.utime(tmp_path / ".other.0123456789abcdef", (time.time() - 4000,) * 2)
    sweep(tmp_path, 3600, "state*")
    assert len(list(tmp_path.iterdir())) == 7
    sweep(tmp_path, 3600)
    assert {path.name for path in tmp_path.iterdir()} == {left.name, *others}
    (tmp_path / ".folder.0123456789abcdef").mkdir()  # which is nothing that was to be written
    others.append(".folder.0123456789abcdef")
    sweep(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_clips_error_is_the_same_in_another_process(again):
    """A pool of processes that cannot read one waits for ever, or breaks."""
    for code in CLIP_ERROR_CODES:
        found = again(ClipError(code, "a: b"))
        assert (type(found), found.code, found.message, str(found)) == (ClipError, code, "a: b", "a: b")
