"""A clip's samples become windows."""

from collections.abc import Iterable, Iterator

import numpy as np

from aesanet.lengths import WindowPolicy


class WindowCutter:
    """Cuts one clip into windows as its samples come; holds one window, and copies each sample once.

    Nothing is left out, and no window ends inside the one before it; the last one has its own length.
    """

    def __init__(self, policy: WindowPolicy) -> None:
        self._hop = policy.hop_samples
        self._window = np.empty(policy.window_samples, np.float32)
        self._filled = 0  # samples at its start
        self._covered = 0  # of these, that an earlier window has had

    def push(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """The windows that float32 [samples] more complete, each an array of its own."""
        while len(block):
            taken = block[: len(self._window) - self._filled]
            self._window[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            block = block[len(taken) :]
            if self._filled == len(self._window):
                full, self._window = self._window, np.empty_like(self._window)
                self._filled = self._covered = len(full) - self._hop
                self._window[: self._filled] = full[self._hop :]
                yield full

    def rest(self) -> Iterator[np.ndarray]:
        """What is left at the end of the clip: one window or none."""
        if self._filled > self._covered:
            yield self._window[: self._filled].copy()


def split_windows(blocks: Iterable[np.ndarray], policy: WindowPolicy) -> Iterator[np.ndarray]:
    """The windows of a clip that comes as float32 [samples] blocks."""
    cutter = WindowCutter(policy)
    for block in blocks:
        yield from cutter.push(block)
    yield from cutter.rest()
