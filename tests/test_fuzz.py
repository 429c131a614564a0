"""Damaged files by the thousand, in a process of their own, as a library's crash would end this one."""

import subprocess
import sys
from pathlib import Path

import pytest

FILES = 2_500


@pytest.mark.slow
def test_no_damage_crashes_hangs_or_makes_a_number_that_is_none(tmp_path):
    program = Path(__file__).parent / "fuzz_audio.py"
    command = [sys.executable, program, tmp_path, "0", str(FILES)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    last = ended.stdout.splitlines()[-1:]
    assert ended.returncode == 0, f"status {ended.returncode} at seed {last}: {ended.stderr[-3_000:]}"
    assert last[0].startswith("done")
