"""A clip's samples become windows, and windows a padded batch."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from aesanet.lengths import WindowPolicy


class WindowCutter:
    """Cuts one clip into windows as its samples come; holds one window and one block at a time.

    Nothing is left out, and no window ends inside the one before it; the last one has its own length.
    """

    def __init__(self, policy: WindowPolicy) -> None:
        self._window, self._hop = policy.window_samples, policy.hop_samples
        self._held = np.zeros(0, np.float32)
        self._covered = 0  # samples at the start of `_held` that an earlier window has had

    def push(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """The windows that float32 [samples] more complete, each an array of its own."""
        self._held = np.concatenate([self._held, block])
        while len(self._held) >= self._window:
            yield self._held[: self._window].copy()
            self._held, self._covered = self._held[self._hop :], self._window - self._hop

    def rest(self) -> Iterator[np.ndarray]:
        """What is left at the end of the clip: one window or none."""
        if len(self._held) > self._covered:
            yield self._held.copy()


def split_windows(blocks: Iterable[np.ndarray], policy: WindowPolicy) -> Iterator[np.ndarray]:
    """The windows of a clip that comes as float32 [samples] blocks."""
    cutter = WindowCutter(policy)
    for block in blocks:
        yield from cutter.push(block)
    yield from cutter.rest()


def pad_batch(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Windows of any lengths -> waveform float32 [batch, longest] padded with zeros, num_samples int64 [batch]."""
    num_samples = np.array([len(window) for window in windows], np.int64)
    waveform = np.zeros((len(windows), num_samples.max()), np.float32)
    for row, window in zip(waveform, windows, strict=True):
        row[: len(window)] = window
    return waveform, num_samples
