"""The way of rows through the engine: decoded ahead in threads, batched over files, scored, put in order again.

Everything that decides which windows share a batch is a matter of the input alone (see batching.py), and so is the
order in which rows come out: the same rows give the same output, byte for byte, on the same engine.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar

import numpy as np

from aesanet.errors import ClipError
from aesanet.lengths import MIN_SAMPLES, SAMPLE_RATE, WindowPolicy
from aesanet.padding import pad_batch
from aesanet.runtime.audio.decode import Heard
from aesanet.runtime.backends.base import Backend, Pending, PendingEmbedded
from aesanet.runtime.batching import GROUP_BATCHES, Planner, Window
from aesanet.runtime.jobs import Blocks, Job
from aesanet.runtime.lookahead import LookAhead
from aesanet.runtime.windows import WindowCutter

Row = TypeVar("Row")

BATCHES_AHEAD: Final = 2


@dataclass(frozen=True)
class WindowScores:
    """One window of a clip: where it begins, how long it is, and float64 [4] scores."""

    start_seconds: float
    seconds: float
    scores: np.ndarray


@dataclass(frozen=True)
class Scored:
    """A clip's scores, float64 [4]: the mean of its windows', weighted by their lengths; the embedding likewise."""

    scores: np.ndarray
    heard: Heard
    windows: tuple[WindowScores, ...]
    embedding: np.ndarray | None


@dataclass(frozen=True)
class GroupEnd:
    """All of the first `rows` rows have come out, and nothing that comes depends on them."""

    rows: int


@dataclass(frozen=True)
class Settings:
    """How a pipeline runs.

    workers       : threads that decode; 0 decodes where the scores are taken
    batch_seconds : of a batch, padding included; a single window may be longer
    ordered       : rows come out in the order of the input, or else each as soon as it can (the same way every time)
    embeddings    : keep each clip's pooled features
    """

    workers: int
    batch_seconds: float
    ordered: bool = True
    embeddings: bool = False


@dataclass(eq=False)
class _Clip(Generic[Row]):
    """A row under way."""

    number: int
    row: Row
    given: int = 0  # windows, to the planner
    found: Heard | ClipError | None = None  # once the clip is decoded
    ended: bool = False  # and that has its turn among the batches
    windows: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # number, samples, scores
    embedding: np.ndarray | float = 0.0  # weighted by samples


@dataclass(frozen=True)
class Spent:
    """Where the time of a run went, in seconds, and what the engine was given."""

    decoding: float
    """Of all decoding threads together."""
    waiting: float
    """Of the thread that drives the engine, for decoded audio."""
    engine: float
    """Of that thread, in the engine or waiting for it."""
    batches: int
    padding: float
    """Share of the batches' samples."""


class Pipeline(Generic[Row]):
    """Scores the rows of jobs; made for one run.

    Iterating `run` yields (row, Scored or ClipError), exactly one for each row, and a GroupEnd now and then.
    """

    def __init__(self, jobs: Iterable[Job[Row]], backend: Backend, policy: WindowPolicy, settings: Settings) -> None:
        self._backend, self._policy, self._settings = backend, policy, settings
        batch_samples = round(settings.batch_seconds * SAMPLE_RATE)
        self._planner: Planner[_Clip[Row]] = Planner(policy.window_samples, batch_samples)
        self.windows: LookAhead[Job[Row], tuple[int, np.ndarray | Heard | ClipError]] = LookAhead(
            jobs,
            partial(_windows_of, policy),  # not a method: in a cycle, this and its engine would go late
            _weight,
            max(batch_samples, 1) * GROUP_BATCHES,
            settings.workers,
            lambda job: len(job.rows),
        )
        self._under_way: deque[_Batch[Row] | _Clip[Row] | GroupEnd] = deque()
        self._batches = 0  # of those
        self._rows = self._grouped = 0  # so far, and in groups that have ended
        self._engine_seconds = 0.0

    def run(self) -> Iterator[tuple[Row, Scored | ClipError] | GroupEnd]:
        """Score everything, once."""
        waiting: dict[int, tuple[Row, Scored | ClipError]] = {}
        next_number = 0
        try:
            for done in self._done():
                if isinstance(done, GroupEnd):
                    yield done
                elif not self._settings.ordered:
                    yield done.row, self._outcome(done)
                else:
                    waiting[done.number] = done.row, self._outcome(done)
                    while next_number in waiting:
                        yield waiting.pop(next_number)
                        next_number += 1
        finally:
            self.windows.close()

    def stop(self) -> None:
        """Begin no more jobs; what is under way is finished. May be called by a signal's handler."""
        self.windows.stop()

    @property
    def spent(self) -> Spent:
        """Where the time went so far."""
        planner, ahead = self._planner, self.windows
        return Spent(
            decoding=ahead.working_seconds,
            waiting=ahead.waited_seconds,
            engine=self._engine_seconds,
            batches=planner.batches,
            padding=1 - planner.useful_samples / planner.padded_samples if planner.batches else 0.0,
        )

    def _done(self) -> Iterator["_Clip[Row] | GroupEnd"]:
        """Clips that are done, and ends of groups, in the order that the plan gives them."""
        clips: list[_Clip[Row]] = []
        not_ended = 0  # of these
        failure: Exception | None = None
        heard = iter(self.windows)
        while True:
            try:
                job, (index, found) = next(heard)
            except StopIteration:
                break
            except Exception as error:  # of whoever gives rows, or of a machine that has no more memory
                failure = error
                break
            if not not_ended:
                clips = [_Clip(self._rows + number, row) for number, row in enumerate(job.rows)]
                not_ended = len(clips)
                self._rows += len(clips)
            clip = clips[index]
            if isinstance(found, np.ndarray):
                window = Window(found, clip.given, clip)
                clip.given += 1
                yield from self._submit(self._planner.add(window))
                continue
            clip.found = found
            self._under_way.append(clip)
            not_ended -= 1
            if not not_ended and self._planner.end_rows(len(clips)):
                yield from self._end_group()
            yield from self._take()
        if failure is not None:  # what was before it is lost to nobody, but no group that could be gone on after
            try:
                yield from self._submit(self._planner.end_group())
                yield from self._take(0)
                raise failure
            finally:
                del failure  # as what it was raised through has this, and so the engine, in it
        if self._rows > self._grouped:
            yield from self._end_group()
        yield from self._take(0)

    def _end_group(self) -> Iterator["_Clip[Row] | GroupEnd"]:
        yield from self._submit(self._planner.end_group())
        self._under_way.append(GroupEnd(self._rows))
        self._grouped = self._rows

    def _submit(self, batches: Iterator[list[Window[_Clip[Row]]]]) -> Iterator["_Clip[Row] | GroupEnd"]:
        for windows in batches:
            waveform, num_samples = pad_batch([window.samples for window in windows])
            began = time.perf_counter()
            run = self._backend.submit_embedded if self._settings.embeddings else self._backend.submit
            pending = run(waveform, num_samples)
            self._engine_seconds += time.perf_counter() - began
            parts = [(window.owner, window.number, len(window.samples)) for window in windows]
            self._under_way.append(_Batch(parts, pending))
            self._batches += 1
            yield from self._take()

    def _take(self, batches_left: int = BATCHES_AHEAD) -> Iterator["_Clip[Row] | GroupEnd"]:
        """What is done, in the order in which it was given; batches beyond `batches_left` are waited for."""
        while self._under_way and (self._batches > batches_left or not isinstance(self._under_way[0], _Batch)):
            step = self._under_way.popleft()
            if isinstance(step, GroupEnd):
                yield step
            elif isinstance(step, _Clip):
                step.ended = True
                if len(step.windows) == step.given:
                    yield step
            else:
                self._batches -= 1
                yield from self._scored(step)

    def _scored(self, batch: "_Batch[Row]") -> Iterator["_Clip[Row]"]:
        """Hand a batch's scores to its clips; the clips that this was the last of."""
        began = time.perf_counter()
        found = batch.pending()
        self._engine_seconds += time.perf_counter() - began
        scores, embeddings = found if isinstance(found, tuple) else (found, None)
        for place, (clip, number, num_samples) in enumerate(batch.parts):
            clip.windows.append((number, num_samples, scores[place].astype(np.float64)))
            if embeddings is not None:
                clip.embedding = clip.embedding + num_samples * embeddings[place].astype(np.float64)
            if clip.ended and len(clip.windows) == clip.given:
                yield clip

    def _outcome(self, clip: _Clip[Row]) -> Scored | ClipError:
        """The mean over a clip's windows, weighted by their lengths."""
        if not isinstance(clip.found, Heard):
            assert clip.found is not None
            return clip.found
        clip.windows.sort(key=lambda window: window[0])  # batches need not be in the order of windows
        weights = np.array([num_samples for _, num_samples, _ in clip.windows], np.float64)
        scores = weights @ np.stack([scores for _, _, scores in clip.windows]) / weights.sum()
        embedding = clip.embedding / weights.sum() if self._settings.embeddings else None
        if not np.isfinite(scores).all():
            return ClipError("bad_score", f"{self._backend.name} gave {scores}")
        hop = self._policy.hop_seconds
        windows = tuple(WindowScores(n * hop, length / SAMPLE_RATE, values) for n, length, values in clip.windows)
        return Scored(scores, clip.found, windows, np.asarray(embedding) if embedding is not None else None)


@dataclass(frozen=True)
class _Batch(Generic[Row]):
    """A batch in the engine: whose windows it holds, with their numbers and samples."""

    parts: Sequence[tuple[_Clip[Row], int, int]]
    pending: Pending | PendingEmbedded


def _too_short(heard: Heard) -> ClipError:
    return ClipError(
        "too_short", f"{heard.seconds:g} s; at least {MIN_SAMPLES / SAMPLE_RATE} s are needed to be scored"
    )


def _weight(item: tuple[int, np.ndarray | Heard | ClipError]) -> int:
    """Of what a decoding thread made: samples."""
    return len(item[1]) if isinstance(item[1], np.ndarray) else 0


def _windows_of(policy: WindowPolicy, job: Job[Any]) -> Blocks:
    """A job's clips in windows instead of blocks; runs in the decoding threads."""
    cutters: dict[int, WindowCutter] = {}  # of the clips that are being heard
    seen: set[int] = set()
    for index, found in job.decode():
        if isinstance(found, np.ndarray):
            if index not in cutters:
                cutters[index] = WindowCutter(policy)
            windows = cutters[index].push(found)
        else:
            windows = cutters.pop(index).rest() if index in cutters else iter(())
        if isinstance(found, ClipError):
            yield index, found
            continue
        for window in windows:
            # A last window without one patch of its own (0.175 s) cannot be seen by the network, and is left out.
            if len(window) >= MIN_SAMPLES:
                seen.add(index)
                yield index, window
        if isinstance(found, Heard):
            yield index, found if index in seen else _too_short(found)
