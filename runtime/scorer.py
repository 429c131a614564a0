"""Scores from a bundle and audio: the one object that users hold."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np

from aesanet.axes import AXES
from aesanet.bundle import Manifest, graph_file, read_manifest
from aesanet.errors import ClipError
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE
from aesanet.runtime.backends import BackendName, open_backend
from aesanet.runtime.backends.base import Backend, BundleFiles, Device, Pending, Precision
from aesanet.runtime.decode import ClipReader, checked_mono, checked_rate, resample
from aesanet.runtime.rows import Clip, Row, failed_row, file_name, scored_row
from aesanet.runtime.windows import pad_batch, split_windows

Audio: TypeAlias = str | os.PathLike[str] | tuple[np.ndarray, int]
"""A file, or samples with their rate in Hz."""
OneAudio = TypeVar("OneAudio", bound=Audio)

# A batch of windows from one clip: enough to fill the cores, and little memory.
BATCH_WINDOWS = 4
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ClipScores:
    """The four scores of a clip, each on the bundle's scale (0-10 by default), and the seconds that were scored."""

    CE: float
    CU: float
    PC: float
    PQ: float
    seconds: float


class Scorer:
    """A bundle, opened on an engine. Threads may share it.

    >>> scorer = Scorer.open("my.bundle")                       # doctest: +SKIP
    >>> scorer.score("clip.wav").PQ                             # doctest: +SKIP
    >>> scorer.score(["a.mp3", (samples, 44_100)])              # doctest: +SKIP
    """

    def __init__(self, manifest: Manifest, backend: Backend, reason: str = "as given") -> None:
        self.manifest = manifest
        self.backend = backend
        self.reason = reason
        """Why this engine was taken."""

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        device: Device | Literal["auto"] = "auto",
        *,
        backend: BackendName | Literal["auto"] = "auto",
        precision: Precision | Literal["auto"] = "auto",
        threads: int | None = None,
    ) -> "Scorer":
        """Open a bundle folder on the fastest engine that fits; every file's hash is checked first.

        Raises BundleError (a damaged bundle) or BackendError (no such engine here).
        """
        files = open_files(bundle)
        engine, reason = open_backend(files, backend, device, precision, threads)
        return cls(files.manifest, engine, reason)

    @overload
    def score(self, audio: list[OneAudio]) -> list[ClipScores | ClipError]: ...
    @overload
    def score(self, audio: Audio) -> ClipScores: ...
    def score(self, audio: Audio | list[OneAudio]) -> ClipScores | list[ClipScores | ClipError]:
        """Score one clip, or a list of clips in order.

        audio : a path; or (samples, rate) with samples floating [samples] or [samples, channels] in [-1, 1) and the
                rate in Hz; or a list of either

        One clip that cannot be scored raises ClipError; in a list, the error stands in the clip's place.
        """
        if not isinstance(audio, list):
            return self._score_one(audio)
        results: list[ClipScores | ClipError] = []
        for one in audio:
            try:
                results.append(self._score_one(one))
            except ClipError as error:
                results.append(error)
        return results

    def stream(self, rows: Iterable[Row | Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Score rows as they come; each gives exactly one output row, in order.

        An input row is a mapping with `path` and perhaps `start_time` and `end_time` in seconds. An output row has the
        input row's own keys, then `CE`, `CU`, `PC`, `PQ`, `seconds` and, where the file ended before its header said,
        `truncated`; or `error` with `code` and `message`.
        """
        for given in rows:
            row = given if isinstance(given, Row) else Row(given)
            try:
                reader = ClipReader(row.clip())
                scores = asdict(self._score_clip(reader))
            except ClipError as error:
                yield failed_row(row, error)
                continue
            if reader.truncated:
                scores["truncated"] = {"decoded_seconds": reader.seconds, "header_seconds": reader.claimed_seconds}
            yield scored_row(row, scores)

    def _score_one(self, audio: Audio) -> ClipScores:
        if isinstance(audio, str | os.PathLike):
            return self._score_clip(ClipReader(Clip(file_name(audio))))
        if not isinstance(audio, tuple) or len(audio) != 2:
            raise TypeError(f"audio is a {type(audio).__name__}; give a path, (samples, rate), or a list of these")
        samples, rate = _mono(audio[0]), checked_rate(int(audio[1]))
        return _rounded(self._mean_scores(resample(iter([samples]), rate)), len(samples) / rate)

    def _score_clip(self, reader: ClipReader) -> ClipScores:
        return _rounded(self._mean_scores(iter(reader)), reader.seconds)

    def _mean_scores(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        """Blocks of 16 kHz mono to float64 [4]: the mean over windows, weighted by their lengths."""
        # A last window without one patch of its own (0.175 s) cannot be seen by the network, and is left out.
        windows = (window for window in split_windows(blocks, self.manifest.window) if len(window) >= MIN_SAMPLES)
        weighted_sum, weight = np.zeros(len(AXES)), 0
        for num_samples, scores in self._batch_scores(windows):
            weighted_sum += num_samples @ scores.astype(np.float64)
            weight += int(num_samples.sum())
        if not weight:
            raise ClipError("too_short", f"shorter than {MIN_SAMPLES / SAMPLE_RATE} s, the least that can be scored")
        if not np.isfinite(weighted_sum).all():
            raise ClipError("bad_score", f"{self.backend.name} gave {weighted_sum / weight}")
        return weighted_sum / weight

    def _batch_scores(self, windows: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """num_samples and scores of each batch in order; the next ones are under way while one is waited for."""
        under_way: deque[tuple[np.ndarray, Pending]] = deque()
        while batch := list(islice(windows, BATCH_WINDOWS)):
            waveform, num_samples = pad_batch(batch)
            under_way.append((num_samples, self.backend.submit(waveform, num_samples)))
            if len(under_way) > _BATCHES_AHEAD:
                num_samples, scores = under_way.popleft()
                yield num_samples, scores()
        for num_samples, scores in under_way:
            yield num_samples, scores()


def open_files(bundle: str | Path) -> BundleFiles:
    """A bundle's manifest and graphs, each file's hash checked; raises BundleError."""
    manifest = read_manifest(bundle)
    return BundleFiles(
        Path(bundle),
        manifest,
        {name: graph_file(bundle, spec) for name, spec in manifest.graphs.items()},
        {name: graph_file(bundle, spec) for name, spec in manifest.half.graphs.items()} if manifest.half else {},
    )


def _rounded(scores: np.ndarray, seconds: float) -> ClipScores:
    """To six decimals, which is finer than FP32 tells scores of 0-10 apart."""
    ce, cu, pc, pq = (round(float(score), 6) for score in scores)
    return ClipScores(ce, cu, pc, pq, round(seconds, 6))


def _mono(samples: np.ndarray) -> np.ndarray:
    """An array of a caller as float32 [samples]; raises ValueError (not audio) or ClipError (audio with no use)."""
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"samples are {samples.dtype} {list(samples.shape)}; they must be floating, [samples] or "
            "[samples, channels], in [-1, 1): divide 16-bit integers by 32768"
        )
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0]:
        raise ValueError(
            f"samples are {list(samples.shape)}, with more channels than samples; give [samples, channels]"
        )
    if not len(samples):
        raise ClipError("no_audio", "an array of no samples")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused next
        return checked_mono(samples.reshape(len(samples), -1).astype(np.float32))
