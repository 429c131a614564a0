"""How long a batch takes, and how long until the first is scored: on any engine, with where and how in the CSV.

Cells of the grid (batch x seconds) take turns, so that a machine that slows down slows all of them; each is repeated
until the medians of the first and the second half of its times agree. Audio is noise: engines take no longer for music.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

from aesanet.benchmarks.records import TIMED, read_rows_of
from aesanet.errors import BackendError, InputError
from aesanet.lengths import SAMPLE_RATE
from aesanet.runtime.backends.base import Backend

LATENCY_COLUMNS: Final = (
    *TIMED,
    *"batch clip_seconds repeats milliseconds_p50 p50_low p50_high".split(),
    *"milliseconds_p90 milliseconds_p99 milliseconds_max x_real_time".split(),
)
COLD_COLUMNS: Final = (*TIMED, "repeats", "import_milliseconds", "open_milliseconds", "first_score_milliseconds")
KEY: Final = ("engine", "weights", "batch", "clip_seconds")
"""What makes two rows of two files comparable, beside the threads, which older files do not tell."""

WARM_UPS: Final = 9
"""Batches of a shape before it is timed: TensorRT captures a CUDA graph at its second run in each of three slots."""

_LEAST_REPEATS: Final = 20
_STABLE: Final = 0.02


@dataclass(frozen=True)
class Cell:
    """Batches of one shape."""

    batch: int
    seconds: float


def measure_latency(
    backend: Backend, cells: Sequence[Cell], seconds_a_cell: float, clock: Callable[[], float] = time.perf_counter
) -> dict[Cell, list[float]]:
    """Seconds of every call of each cell, from waveforms in memory to scores.

    seconds_a_cell : after which a cell is repeated no more, stable or not (but at least 20 times)
    """
    rng = np.random.default_rng(0)
    longest = max(round(cell.seconds * SAMPLE_RATE) for cell in cells)
    noise = rng.normal(0, 0.1, (max(cell.batch for cell in cells), longest)).astype(np.float32)
    times: dict[Cell, list[float]] = {cell: [] for cell in cells}
    inputs = {}
    for cell in cells:
        samples = round(cell.seconds * SAMPLE_RATE)
        waveform = np.ascontiguousarray(noise[: cell.batch, :samples])
        inputs[cell] = (waveform, np.full(cell.batch, samples))
        for _ in range(WARM_UPS):
            backend.scores(*inputs[cell])
    while unfinished := [cell for cell in cells if not settled(times[cell], _LEAST_REPEATS, seconds_a_cell)]:
        for cell in unfinished:
            started = clock()
            backend.scores(*inputs[cell])
            times[cell].append(clock() - started)
    return times


def latency_row(cell: Cell, times: Sequence[float]) -> dict[str, Any]:
    """Quantiles of a cell's times, with an interval of 95 % for the median."""
    milliseconds = 1000 * np.sort(times)
    low, high = median_interval(milliseconds)
    p50, p90, p99 = (float(np.percentile(milliseconds, q)) for q in (50, 90, 99))
    return {
        "batch": cell.batch,
        "clip_seconds": cell.seconds,
        "repeats": len(times),
        "milliseconds_p50": round(p50, 3),
        "p50_low": round(low, 3),
        "p50_high": round(high, 3),
        "milliseconds_p90": round(p90, 3),
        "milliseconds_p99": round(p99, 3),
        "milliseconds_max": round(float(milliseconds[-1]), 3),
        "x_real_time": round(1000 * cell.batch * cell.seconds / p50, 2),
    }


def median_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a median that order statistics give: how many of n lie below it is Binomial(n, 1/2)."""
    ordered = np.sort(values)
    outside = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    below = max(0, outside - 1)
    return float(ordered[below]), float(ordered[len(ordered) - 1 - below])


def settled(times: Sequence[float], least: int, seconds: float) -> bool:
    """Whether the medians of both halves of at least `least` times agree, or they sum up to `seconds`."""
    if len(times) < least:
        return False
    half = len(times) // 2
    one, two = statistics.median(times[:half]), statistics.median(times[half:])
    return abs(one - two) <= _STABLE * min(one, two) or sum(times) >= seconds


def measure_cold_start(bundle: Path, options: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Medians over fresh processes: importing aesanet, opening the bundle, scoring a first window."""
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from aesanet import Scorer; import numpy\n"
        "imported = time.perf_counter(); import json\n"
        "scorer = Scorer.open(sys.argv[1], **json.loads(sys.argv[2]))\n"
        "opened = time.perf_counter(); window = scorer.manifest.window.window_samples\n"
        "scorer.score((numpy.sin(numpy.arange(window, dtype=numpy.float32)) / 2, 16000))\n"
        "print(imported - start, opened - imported, time.perf_counter() - opened)"
    )
    command = [sys.executable, "-c", code, str(bundle), json.dumps(options)]
    runs = []
    for _ in range(repeats):
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode != 0:
            told = found.stderr.strip() or f"it ended with status {found.returncode} and said nothing"
            raise BackendError(f"a fresh process cannot score: {told.splitlines()[-1]}")
        runs.append([1000 * float(part) for part in found.stdout.split()])
    medians = [round(statistics.median(part), 1) for part in zip(*runs, strict=True)]
    names = ("import_milliseconds", "open_milliseconds", "first_score_milliseconds")
    return {"repeats": repeats, **dict(zip(names, medians, strict=True))}


def compare(before: Path, after: Path) -> list[dict[str, Any]]:
    """For each cell of both files, how many times as long the second takes, with the interval that both medians leave.

    The last row of a cell counts, as files are appended to. Raises InputError for other files than of latencies.
    """
    found: list[dict[tuple[str, ...], dict[str, str]]] = []
    for path in (before, after):
        rows = read_rows_of(path)
        if missing := {*KEY, "milliseconds_p50", "p50_low", "p50_high"} - rows[0].keys():
            raise InputError(f"{path}: has no column {', '.join(sorted(missing))}; `aesanet bench latency` writes them")
        found.append({(*(row[name] for name in KEY), row.get("threads", "")): row for row in rows})
    first, second = found
    if not (shared := [key for key in first if key in second]):
        raise InputError(f"{before} and {after} have no engine, weights, threads, batch and clip length in common")
    return [
        {
            **dict(zip((*KEY, "threads"), key, strict=True)),
            "ratio": _number(second[key], "milliseconds_p50") / _number(first[key], "milliseconds_p50"),
            "low": _number(second[key], "p50_low") / _number(first[key], "p50_high"),
            "high": _number(second[key], "p50_high") / _number(first[key], "p50_low"),
        }
        for key in shared
    ]


def _number(row: Mapping[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = 0.0
    if not value > 0:
        raise InputError(f"{name} is {row[name]!r}; it must be a time in milliseconds")
    return value
