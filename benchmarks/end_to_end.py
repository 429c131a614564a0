"""Files on disk to rows on disk, beside its two halves alone: decoding with the same threads, and the engine on arrays.

The three take turns in each round, so that a machine that slows down slows all of them. What is reached is told as a
share of the slower half, which nothing that runs both could beat; on a CPU they also compete for the same cores.
"""

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from aesanet.benchmarks.records import TIMED
from aesanet.errors import InputError
from aesanet.machine import peak_memory_mib
from aesanet.runtime.audio.decode import Heard
from aesanet.runtime.backends.base import Backend, Pending
from aesanet.runtime.pipeline import BATCHES_AHEAD, GroupEnd, Settings
from aesanet.runtime.rows.output import RowFile
from aesanet.runtime.rows.row import Row
from aesanet.runtime.scorer import Scorer, output_row

END_TO_END_COLUMNS: Final = (
    *TIMED,
    *"files clips failed audio_seconds workers batch_seconds batches padding rounds".split(),
    *"decoding_seconds engine_seconds end_to_end_seconds share_of_slower x_real_time".split(),
    *"engine_share waiting_share decoders_share peak_memory_mib".split(),
)


@dataclass
class _Recorder(Backend):
    """Keeps an engine's batches while it scores them."""

    engine: Backend

    def __post_init__(self) -> None:
        self.name, self.kind, self.form = self.engine.name, self.engine.kind, self.engine.form
        self.device, self.precision = self.engine.device, self.engine.precision
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []

    def scores(self, waveform: np.ndarray, num_samples: np.ndarray) -> np.ndarray:
        self.batches.append((waveform, num_samples))
        return self.engine.scores(waveform, num_samples)


def measure_end_to_end(scorer: Scorer, rows: Sequence[Row], settings: Settings, rounds: int) -> dict[str, Any]:
    """Medians over rounds, of one engine on one set of rows; a first round, which also warms up, is not counted.

    All audio of the rows is held in memory, 64 kB a second. Raises InputError where no row can be scored.
    """
    recorder = _Recorder(scorer.backend)
    first = Scorer(scorer.manifest, recorder).pipeline(rows, settings)
    found = [one for one in first.run() if not isinstance(one, GroupEnd)]
    outcomes = [outcome for _, outcome in found]
    scored = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    if not scored:
        why = f"the first, {found[0][0].given.get('path')}: {outcomes[0]}" if found else "there are none"
        raise InputError(f"no row can be scored; {why}")

    spent: list[Mapping[str, float]] = []
    halves: dict[str, list[float]] = {"decoding": [], "engine": [], "end_to_end": []}
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], None]] = {
            "decoding": lambda: _decode(scorer, rows, settings),
            "engine": lambda: keep_under_way(scorer.backend, recorder.batches),
            "end_to_end": lambda: spent.append(score_to_file(scorer, rows, settings, Path(folder) / "rows.jsonl")),
        }
        for number in range(rounds):
            order = deque(parts)
            order.rotate(number)
            for name in order:
                began = time.perf_counter()
                parts[name]()
                halves[name].append(time.perf_counter() - began)

    decoding, engine, whole = (statistics.median(halves[name]) for name in ("decoding", "engine", "end_to_end"))
    audio = sum(outcome.heard.seconds for outcome in scored)
    shares = {name: statistics.median(one[name] for one in spent) for name in spent[0]}
    return {
        "files": len({str(row.given.get("path")) for row in rows}),
        "clips": len(outcomes),
        "failed": len(outcomes) - len(scored),
        "audio_seconds": round(audio, 1),
        "workers": settings.workers,
        "batch_seconds": settings.batch_seconds,
        "batches": first.spent.batches,
        "padding": round(first.spent.padding, 4),
        "rounds": rounds,
        "decoding_seconds": round(decoding, 3),
        "engine_seconds": round(engine, 3),
        "end_to_end_seconds": round(whole, 3),
        "share_of_slower": round(max(decoding, engine) / whole, 4),
        "x_real_time": round(audio / whole, 1),
        **{name: round(share, 4) for name, share in shares.items()},
        "peak_memory_mib": peak_memory_mib(),
    }


def _decode(scorer: Scorer, rows: Sequence[Row], settings: Settings) -> None:
    """All windows of all rows, by the same threads, for nobody."""
    ahead = scorer.pipeline(rows, settings).windows
    try:
        for _, (_, found) in ahead:
            assert isinstance(found, np.ndarray | Heard | Exception)
    finally:
        ahead.close()


def keep_under_way(backend: Backend, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Score batches that are ready in memory, as far ahead as a pipeline does, until the last scores are there."""
    under_way: deque[Pending] = deque()
    for batch in batches:
        under_way.append(backend.submit(*batch))
        if len(under_way) > BATCHES_AHEAD:
            under_way.popleft()()
    for pending in under_way:
        pending()


def score_to_file(scorer: Scorer, rows: Sequence[Row], settings: Settings, path: Path) -> Mapping[str, float]:
    """What `aesanet score` does, and where its time went."""
    began = time.perf_counter()
    file = RowFile(path, {})
    try:
        file.begin()
        pipeline = scorer.pipeline(rows, settings)
        for found in pipeline.run():
            if isinstance(found, GroupEnd):
                file.mark()
            else:
                file.write(output_row(*found))
        file.finish()
    finally:
        file.close()
    seconds, spent = time.perf_counter() - began, pipeline.spent
    return {
        "engine_share": spent.engine / seconds,
        "waiting_share": spent.waiting / seconds,
        "decoders_share": spent.decoding / seconds / max(1, settings.workers),
    }
