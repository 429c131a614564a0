"""Which windows share a batch: planned from the input alone, so that the same rows always form the same batches.

Full windows fill batches as they come. Shorter ones, the last of each clip, are kept until their group of rows ends,
and are then batched by length, so that little is padded. A group begins with nothing kept: what is scored from its
first row on does not depend on the rows before, which is what lets a run that was killed be resumed exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np

Owner = TypeVar("Owner")

GROUP_BATCHES: Final = 16  # of audio: with fewer, more is padded; with more, a killed run has more to do again
_GROUP_ROWS: Final = 4096
_EVEN: Final = 0.94  # of the longest; shorter ones begin the next batch where this one is half full


@dataclass(frozen=True)
class Window(Generic[Owner]):
    """Samples to be scored, float32 [samples] at 16 kHz, the number of the window in its clip, and whose it is."""

    samples: np.ndarray
    number: int
    owner: Owner


class Planner(Generic[Owner]):
    """Sorts windows into batches of at most `batch_samples`, padding included (one window always fits)."""

    def __init__(self, window_samples: int, batch_samples: int) -> None:
        self._window_samples, self._batch_samples = window_samples, batch_samples
        self._full: list[Window[Owner]] = []
        self._short: list[Window[Owner]] = []
        self._group_samples = self._group_rows = 0
        self.useful_samples = self.padded_samples = self.batches = 0
        """Of all batches so far; `padded_samples` includes the useful ones."""

    def add(self, window: Window[Owner]) -> Iterator[list[Window[Owner]]]:
        """Take a window; the batch that it completes, if it does."""
        self._group_samples += len(window.samples)
        if len(window.samples) < self._window_samples:
            self._short.append(window)
            return
        self._full.append(window)
        if (len(self._full) + 1) * self._window_samples > self._batch_samples:
            yield self._batch(self._full)
            self._full = []

    def end_rows(self, count: int) -> bool:
        """Rows came to their ends; should the group end, too?"""
        self._group_rows += count
        return self._group_samples >= GROUP_BATCHES * self._batch_samples or self._group_rows >= _GROUP_ROWS

    def end_group(self) -> Iterator[list[Window[Owner]]]:
        """The batches of all that is kept, longest first."""
        kept = sorted(self._full + self._short, key=lambda window: -len(window.samples))  # stable: ties as they came
        self._full, self._short = [], []
        self._group_samples = self._group_rows = 0
        batch: list[Window[Owner]] = []
        for window in kept:
            if batch:
                longest = len(batch[0].samples)
                padded = (len(batch) + 1) * longest
                uneven = len(window.samples) < _EVEN * longest and 2 * padded > self._batch_samples
                if padded > self._batch_samples or uneven:
                    yield self._batch(batch)
                    batch = []
            batch.append(window)
        if batch:
            yield self._batch(batch)

    def _batch(self, windows: list[Window[Owner]]) -> list[Window[Owner]]:
        self.batches += 1
        self.useful_samples += sum(len(window.samples) for window in windows)
        self.padded_samples += len(windows) * max(len(window.samples) for window in windows)
        return windows
