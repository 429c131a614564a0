"""How much audio a second an engine scores when it never waits for any, and what share of its device's peak that is.

Batches are kept under way as far ahead as a pipeline keeps them. A round is as many of them as take some seconds, timed
from the first that is given to the last scores, so that filling and emptying the engine is counted. Cells take turns
and are repeated until they have settled, as in latency.py.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Final

import msgspec
import numpy as np

from aesanet.benchmarks.end_to_end import keep_under_way
from aesanet.benchmarks.latency import WARM_UPS, Cell, median_interval, settled
from aesanet.benchmarks.peak import Peak, device_peak
from aesanet.benchmarks.records import TIMED
from aesanet.errors import BundleError
from aesanet.gpu import gpu_memory_mib
from aesanet.lengths import SAMPLE_RATE
from aesanet.machine import peak_memory_mib
from aesanet.models.config import AESANetConfig
from aesanet.models.flops import clip_flops
from aesanet.runtime.backends.base import Backend
from aesanet.runtime.pipeline import BATCHES_AHEAD
from aesanet.runtime.scorer import Scorer

THROUGHPUT_COLUMNS: Final = (
    *TIMED,
    *"batch clip_seconds rounds batches_a_round".split(),
    *"clips_per_second clips_per_second_low clips_per_second_high hours_of_audio_per_second x_real_time".split(),
    *"useful_tflops peak_tflops peak_source mfu memory_mib gpu_memory_before_mib gpu_memory_after_mib".split(),
)
"""`mfu` is the useful share of the peak. `memory_mib` is this process's at its peak, with four batches of audio a cell
(64 kB a second); a GPU's is what all processes hold, before the engine is opened and after the last round.
"""

_LEAST_ROUNDS: Final = 6  # of fewer, order statistics give no interval of 95 %
_ROUND_SECONDS: Final = 2.0
_LEAST_BATCHES: Final = BATCHES_AHEAD + 2  # of a round; as many arrays take turns, more than are under way
_SIZING_BATCHES: Final = 3  # the last of the warm-up, that tell how many make a round


@dataclass
class Rounds:
    """Seconds of each round of a cell, and of how many batches one is."""

    batches: int
    seconds: list[float] = field(default_factory=list)


def measure_throughput(
    backend: Backend, cells: Sequence[Cell], seconds_a_cell: float, clock: Callable[[], float] = time.perf_counter
) -> dict[Cell, Rounds]:
    """Rounds of each cell, at least 6, of noise in distinct arrays.

    seconds_a_cell : after which a cell is repeated no more, stable or not (but at least 6 times); it also shortens
                     rounds, down to 4 batches
    """
    rng = np.random.default_rng(0)
    ready = {cell: [_noise(cell, rng) for _ in range(_LEAST_BATCHES)] for cell in cells}

    def run(cell: Cell, batches: int) -> float:
        began = clock()
        keep_under_way(backend, islice(cycle(ready[cell]), batches))
        return clock() - began

    rounds = {}
    for cell in cells:
        run(cell, WARM_UPS - _SIZING_BATCHES)
        batch_seconds = run(cell, _SIZING_BATCHES) / _SIZING_BATCHES
        round_seconds = min(_ROUND_SECONDS, seconds_a_cell / _LEAST_ROUNDS)
        rounds[cell] = Rounds(max(_LEAST_BATCHES, math.ceil(round_seconds / batch_seconds)))
    while unfinished := [c for c in cells if not settled(rounds[c].seconds, _LEAST_ROUNDS, seconds_a_cell)]:
        for cell in unfinished:
            rounds[cell].seconds.append(run(cell, rounds[cell].batches))
    return rounds


def throughput_rows(
    scorer: Scorer, cells: Sequence[Cell], seconds_a_cell: float, threads: int, gpu_memory_before_mib: int | None
) -> list[dict[str, Any]]:
    """A row for each cell, beside the peak of the device: of a processor's before and after, the higher.

    threads               : that the engine was opened with, which a processor's peak is measured with
    gpu_memory_before_mib : before it was opened

    Raises BundleError where the checkpoint's config in the manifest is not one.
    """
    try:
        config = msgspec.convert(scorer.manifest.source.config, AESANetConfig)
    except msgspec.ValidationError as error:
        raise BundleError(f"source.config: {error}; export the checkpoint again") from None
    backend = scorer.backend
    peak_before = device_peak(backend, threads)
    found = measure_throughput(backend, cells, seconds_a_cell)
    memory = {
        "memory_mib": peak_memory_mib(),
        "gpu_memory_before_mib": gpu_memory_before_mib,
        "gpu_memory_after_mib": gpu_memory_mib(),
    }
    peak = max(peak_before, device_peak(backend, threads), key=lambda peak: peak.tflops or 0.0)
    return [
        throughput_row(cell, rounds, clip_flops(config, _samples(cell)).total, peak) | memory
        for cell, rounds in found.items()
    ]


def throughput_row(cell: Cell, rounds: Rounds, flops_a_clip: int, peak: Peak) -> dict[str, Any]:
    """A cell's median rate with an interval of 95 %, in clips, in audio and in useful operations, each a second."""
    clips = cell.batch * rounds.batches
    shortest, longest = median_interval(rounds.seconds)
    rate = clips / statistics.median(rounds.seconds)
    useful_tflops = rate * flops_a_clip / 1e12
    return {
        "batch": cell.batch,
        "clip_seconds": cell.seconds,
        "rounds": len(rounds.seconds),
        "batches_a_round": rounds.batches,
        "clips_per_second": round(rate, 3),
        "clips_per_second_low": round(clips / longest, 3),
        "clips_per_second_high": round(clips / shortest, 3),
        "hours_of_audio_per_second": _four_digits(rate * cell.seconds / 3600),
        "x_real_time": round(rate * cell.seconds, 2),
        "useful_tflops": _four_digits(useful_tflops),
        "peak_tflops": _four_digits(peak.tflops) if peak.tflops else None,
        "peak_source": peak.source,
        "mfu": _four_digits(useful_tflops / peak.tflops) if peak.tflops else None,
    }


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _samples(cell: Cell) -> int:
    return round(cell.seconds * SAMPLE_RATE)


def _noise(cell: Cell, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    waveform = rng.standard_normal((cell.batch, _samples(cell)), np.float32)
    waveform *= 0.1
    return waveform, np.full(cell.batch, _samples(cell))
