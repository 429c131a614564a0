"""Scores from a bundle and audio: the one object that users hold."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args, overload

import numpy as np

from aesanet.axes import AXES
from aesanet.bundle import Manifest
from aesanet.choices import one_of
from aesanet.errors import ClipError, InputError
from aesanet.machine import usable_cores
from aesanet.runtime.audio.decode import ChannelPolicy, Heard, checked_mono, checked_rate, decode, resample
from aesanet.runtime.backends import BackendName, open_backend
from aesanet.runtime.backends.base import Backend, BundleFiles, CudaGraphs, Device, Precision
from aesanet.runtime.batching import GROUP_BATCHES
from aesanet.runtime.cuda.kernels import Specialize
from aesanet.runtime.jobs import Blocks, Job, failed_job, file_jobs
from aesanet.runtime.pipeline import GroupEnd, Pipeline, Scored, Settings
from aesanet.runtime.rows.row import Clip, Row, failed_row, file_name, scored_row

Audio: TypeAlias = str | os.PathLike[str] | tuple[np.ndarray, int]
"""A file, or samples with their rate in Hz."""
OneAudio = TypeVar("OneAudio", bound=Audio)

_MOST_WORKERS: Final = 32  # threads that decode: Python itself is the limit long before


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
        cuda_graphs: CudaGraphs = None,
        specialize: Specialize = "lazy",
    ) -> "Scorer":
        """Open a bundle folder on the fastest engine that fits; the hash of each file that it takes is checked first.

        cuda_graphs : on a GPU, launch what comes again as a whole. By default TensorRT does, and ONNX Runtime does not,
                      as nobody else in the process may take memory of the GPU while it captures. True is an error
                      where that fails; with "try", which is for a process of its own, it does without then
        specialize  : when TensorRT-RTX makes kernels for a batch's shape: while others serve it ("lazy"), before it is
                      served ("eager") or never ("none"); with "lazy" a clip's scores may change in their last digits

        Raises BundleError (a damaged bundle), BackendError (no such engine here) or InputError (no such choice).
        """
        files = BundleFiles.open(bundle)
        engine, reason = open_backend(files, backend, device, precision, threads, cuda_graphs, specialize)
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
        if isinstance(audio, list):
            return list(self._scored(audio, min(len(audio), self.settings().workers)))
        (outcome,) = self._scored([audio], workers=0 if isinstance(audio, tuple) else 1)
        if isinstance(outcome, ClipError):
            raise outcome
        return outcome

    def stream(
        self,
        rows: Iterable[Row | Mapping[str, Any]],
        *,
        workers: int | None = None,
        max_batch_seconds: float | None = None,
        channels: ChannelPolicy = "mean",
        per_window: bool = False,
        embeddings: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Score any number of rows; each gives exactly one output row, in order, and memory does not grow.

        rows              : mappings with `path` and perhaps `start_time` and `end_time` in seconds
        workers           : threads that decode; by default as many as there are cores
        max_batch_seconds : of audio in a batch, padding included; by default what suits the engine
        channels          : their mean, the left one, or the loudest one
        per_window        : keep each window's scores, as `windows`
        embeddings        : keep the mean of the encoder's features, as `embedding`

        Rows are taken ahead, and come out in groups: see `OUTPUT_KEYS` for what an output row has beside its own keys.
        What taking them raises is raised here, after the rows of before.
        """
        pipeline = self.pipeline(
            rows, self.settings(workers, max_batch_seconds, embeddings=embeddings), channels=channels
        )
        for found in pipeline.run():
            if not isinstance(found, GroupEnd):
                yield output_row(*found, per_window)

    def settings(
        self,
        workers: int | None = None,
        max_batch_seconds: float | None = None,
        *,
        ordered: bool = True,
        embeddings: bool = False,
    ) -> Settings:
        """How a pipeline runs on this engine where nothing else is said; raises InputError."""
        window_seconds = self.manifest.window.window_seconds
        if workers is not None and workers < 0:
            raise InputError(f"workers is {workers}; it must be the number of threads that decode, or 0 for none")
        if max_batch_seconds is not None and not 0 < max_batch_seconds < math.inf:
            raise InputError(f"max_batch_seconds is {max_batch_seconds}; it must be a positive number of seconds")
        return Settings(
            workers=min(usable_cores(), _MOST_WORKERS) if workers is None else workers,
            batch_seconds=max_batch_seconds or self.backend.batch_seconds(window_seconds),
            ordered=ordered,
            embeddings=embeddings,
        )

    def pipeline(
        self, rows: Iterable[Row | Mapping[str, Any]], settings: Settings, *, channels: ChannelPolicy = "mean"
    ) -> Pipeline[Row]:
        """A run over rows, for those who want to know where groups end and where the time goes."""
        one_of("channels", channels, *get_args(ChannelPolicy))
        window = self.manifest.window
        jobs = file_jobs(rows, channels, window.window_seconds, GROUP_BATCHES * settings.batch_seconds)
        return Pipeline(jobs, self.backend, window, settings)

    def _scored(self, audio: Iterable[Audio], workers: int) -> Iterator[ClipScores | ClipError]:
        settings = self.settings(workers)
        for found in Pipeline(map(_job, audio), self.backend, self.manifest.window, settings).run():
            if not isinstance(found, GroupEnd):
                outcome = found[1]
                yield outcome if isinstance(outcome, ClipError) else _clip_scores(outcome)


def output_row(row: Row, outcome: Scored | ClipError, per_window: bool = False) -> dict[str, Any]:
    """What is written of a row: its own keys, then its scores and what they are of, or why there are none."""
    if isinstance(outcome, ClipError):
        return failed_row(row, outcome)
    heard = outcome.heard
    start = row.clip().start_seconds or 0.0
    found: dict[str, Any] = {
        **_by_axis(outcome.scores),
        "start_seconds": round(start, 6),
        "end_seconds": round(start + heard.seconds, 6),
        "seconds": round(heard.seconds, 6),
        "sample_rate": heard.sample_rate,
        "channels": heard.channels,
        "truncated": heard.truncated,
    }
    if heard.truncated and heard.header_seconds is not None:
        found["header_seconds"] = round(heard.header_seconds, 6)
    if heard.silence is not None:
        found["silence"] = heard.silence
    if per_window:
        found["windows"] = [
            {
                "start_seconds": round(start + window.start_seconds, 6),
                "end_seconds": round(start + window.start_seconds + window.seconds, 6),
                **_by_axis(window.scores),
            }
            for window in outcome.windows
        ]
    if outcome.embedding is not None:
        found["embedding"] = [float(f"{value:.6g}") for value in outcome.embedding]
    return scored_row(row, found)


def _by_axis(scores: np.ndarray) -> dict[str, float]:
    """To six decimals, which is finer than FP32 tells scores of 0-10 apart."""
    return {axis: round(float(score), 6) for axis, score in zip(AXES, scores, strict=True)}


def _clip_scores(scored: Scored) -> ClipScores:
    return ClipScores(**_by_axis(scored.scores), seconds=round(scored.heard.seconds, 6))


def _job(audio: Audio) -> Job[Audio]:
    """One clip of a caller."""
    if isinstance(audio, str | os.PathLike):
        try:
            return Job([audio], partial(decode, [Clip(file_name(audio))]))
        except ClipError as error:
            return failed_job(audio, error)
    if not isinstance(audio, tuple) or len(audio) != 2:
        raise TypeError(f"audio is a {type(audio).__name__}; give a path, (samples, rate), or a list of these")
    return Job([audio], partial(_decode_array, *audio))


def _decode_array(samples: np.ndarray, rate: int) -> Blocks:
    """Samples of a caller, as `decode` gives those of files."""
    try:
        mono, rate = _mono(samples), checked_rate(int(rate))
    except ClipError as error:
        yield 0, error
        return
    for block in resample(iter([mono]), rate):
        yield 0, block
    yield 0, Heard(len(mono) / rate, None, rate, np.asarray(samples).reshape(len(mono), -1).shape[1], None)


def _mono(samples: np.ndarray) -> np.ndarray:
    """An array of a caller as float32 [samples]; raises ValueError (not audio) or ClipError (audio with no use)."""
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"samples are {samples.dtype} {list(samples.shape)}; they must be floating, [samples] or "
            "[samples, channels], in [-1, 1): divide 16-bit integers by 32768"
        )
    if not samples.size:
        raise ClipError("no_audio", "an array of no samples")
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0]:
        raise ValueError(
            f"samples are {list(samples.shape)}, with more channels than samples; give [samples, channels]"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused next
        return checked_mono(samples.reshape(len(samples), -1).astype(np.float32))
