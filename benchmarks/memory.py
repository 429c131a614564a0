"""How much memory scoring takes, whatever comes.

Each case is a run of `aesanet score` in a process of its own, which tells its peak at the end. Files are noise, written
as they would be found; rows are of many short files, each asked for many times, and of many segments of one.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile

from aesanet.benchmarks.records import WHERE
from aesanet.errors import BackendError
from aesanet.runtime.rows.row import row_line

MEMORY_COLUMNS: Final = (*WHERE, *"case rows audio_seconds seconds peak_memory_mib above_one_clip_mib".split())

_RATE: Final = 16_000
_SHORT_FILES: Final = 500
# Of its own memory, by Linux's own count: what `getrusage` tells of a child is never less than its parent's.
_SCORE: Final = """
import atexit, re
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
from aesanet.cli.main import main
main()
"""
_COMMAND: Final = (sys.executable, "-c", _SCORE, "score")


def _long(folder: Path, container: str, hours: float) -> tuple[Path, int, float]:
    path = folder / f"long.{container}"
    blocks = np.random.default_rng(0).normal(0, 0.1, (60, _RATE)).astype(np.float32)
    with soundfile.SoundFile(path, "w", _RATE, 1) as file:
        for second in range(round(3600 * hours)):
            file.write(blocks[second % len(blocks)])
    return path, 1, 3600 * hours


def _many(folder: Path, rows: int) -> tuple[Path, int, float]:
    rng = np.random.default_rng(1)
    for number in range(_SHORT_FILES):
        soundfile.write(folder / f"{number}.flac", rng.normal(0, 0.1, _RATE // 2), _RATE)
    manifest = folder / "rows.jsonl"
    with open(manifest, "w") as file:
        for number in range(rows):
            file.write(row_line({"path": str(folder / f"{rng.integers(_SHORT_FILES)}.flac"), "number": number}))
    return manifest, rows, rows / 2


def _segments(folder: Path, rows: int) -> tuple[Path, int, float]:
    path, _, _ = _long(folder, "flac", 60 / 3600)
    manifest = folder / "segments.jsonl"
    with open(manifest, "w") as file:
        for number in range(rows):
            start = number % 590 / 10
            file.write(row_line({"path": str(path), "start_time": start, "end_time": start + 0.9, "number": number}))
    return manifest, rows, rows * 0.9


def _run(bundle: Path, source: Path, engine: Sequence[str]) -> tuple[float, int]:
    """Seconds and MiB at the peak of one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = ("--out", str(Path(folder) / "rows.jsonl"))
        began = time.perf_counter()
        command = [*_COMMAND, str(bundle), str(source), *out, *engine]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            told = done.stderr.strip().splitlines()[-1:]
            ended = f"ended with status {done.returncode}"
            raise BackendError(f"`aesanet score {bundle} {source.name}` {': '.join([ended, *told])}")
        return time.perf_counter() - began, round(int(done.stdout) / 1024)


def measure_memory(
    bundle: Path, rows: int, hours: float, engine: Sequence[str], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each case; `engine` are options of `aesanet score`, `note` hears of each case as it is done."""
    cases: dict[str, Callable[[Path], tuple[Path, int, float]]] = {
        "one clip of 10 s": lambda folder: _long(folder, "flac", 10 / 3600),
        **{
            f"{hours:g} hours of {container}": partial(_long, container=container, hours=hours)
            for container in ("flac", "mp3", "ogg")
        },
        f"{rows:,} clips of .5 s": lambda folder: _many(folder, rows),
        f"{rows // 20:,} segments of one file": lambda folder: _segments(folder, rows // 20),
    }
    measured: list[dict[str, Any]] = []
    for name, make in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            source, count, audio_seconds = make(Path(folder))
            seconds, peak = _run(bundle, source, engine)
        least = measured[0]["peak_memory_mib"] if measured else peak
        measured.append(
            {
                "case": name,
                "rows": count,
                "audio_seconds": round(audio_seconds),
                "seconds": round(seconds, 1),
                "peak_memory_mib": peak,
                "above_one_clip_mib": peak - least,
            }
        )
        note(f"{name}: {peak} MiB in {seconds:.0f} s")
    return measured
