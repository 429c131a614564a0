"""A clip's samples become windows, and windows a padded batch."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from aesanet.lengths import WindowPolicy


def split_windows(blocks: Iterable[np.ndarray], policy: WindowPolicy) -> Iterator[np.ndarray]:
    """Cut a stream of float32 [samples] blocks into windows, the last one with its own length.

    Holds one window and one block at a time. Nothing is left out, and no window ends inside the one before it.
    """
    window, hop = policy.window_samples, policy.hop_samples
    held = np.zeros(0, np.float32)
    covered = 0  # samples at the start of `held` that an earlier window has had
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= window:
            yield held[:window].copy()
            held, covered = held[hop:], window - hop
    if len(held) > covered:
        yield held


def pad_batch(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Windows of any lengths -> waveform float32 [batch, longest] padded with zeros, num_samples int64 [batch]."""
    num_samples = np.array([len(window) for window in windows], np.int64)
    waveform = np.zeros((len(windows), num_samples.max()), np.float32)
    for row, window in zip(waveform, windows, strict=True):
        row[: len(window)] = window
    return waveform, num_samples
