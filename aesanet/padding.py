"""Clips of any lengths become one array."""

from collections.abc import Sequence

import numpy as np


def pad_batch(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Windows of any lengths -> waveform float32 [batch, longest] padded with zeros, num_samples int64 [batch]."""
    num_samples = np.array([len(window) for window in windows], np.int64)
    waveform = np.empty((len(windows), num_samples.max()), np.float32)
    for row, window in zip(waveform, windows, strict=True):
        row[: len(window)], row[len(window) :] = window, 0
    return waveform, num_samples
