"""Which windows are trained on together, decided by seed and epoch alone, and how they become padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from aesanet.lengths import num_tokens
from aesanet.training.dataset import Data, Trunk

CHUNK_BATCHES = 32
"""Batches that are sorted by length together: enough for little padding, few enough that batches stay mixed."""

Part: TypeAlias = tuple[int, int]
"""A clip's index in Data, and the index of one of its windows."""


@dataclass(frozen=True)
class Batch:
    """Padded inputs of some windows.

    inputs      : float16 [layers, batch, tokens, width] (frozen trunk) or float32 [batch, frames, 128] (trained)
    num_tokens  : int64 [batch], each window's own
    labels      : float32 [batch, 4], nan where an axis has none
    """

    inputs: Tensor
    num_tokens: Tensor
    labels: Tensor


def training_batches(data: Data, batch_size: int, seed: int, epoch: int) -> list[list[Part]]:
    """Batches of one epoch: one window of every clip, so that long clips do not weigh more than others.

    A window is drawn with its share of the clip's samples, as it weighs in the clip's score: a short last one is rare.
    """
    draw = np.random.default_rng([seed, epoch])
    parts = [(int(clip), _drawn_window(data, int(clip), draw)) for clip in draw.permutation(len(data.clips))]
    chunk = CHUNK_BATCHES * batch_size
    batches: list[list[Part]] = []
    for start in range(0, len(parts), chunk):
        by_length = sorted(parts[start : start + chunk], key=lambda part: _num_samples(data, part))
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in draw.permutation(len(batches))]


def validation_batches(data: Data, batch_size: int) -> list[list[Part]]:
    """All windows of all clips, sorted by length."""
    parts = [(clip, window) for clip, windows in enumerate(data.windows) for window in range(len(windows))]
    parts.sort(key=lambda part: _num_samples(data, part))
    return [parts[i : i + batch_size] for i in range(0, len(parts), batch_size)]


def load_batch(data: Data, parts: Sequence[Part], trunk: Trunk) -> Batch:
    """Read the windows from the cache, padded at the end with zeros."""
    windows = [data.windows[clip][window] for clip, window in parts]
    arrays = [np.load(window.file, mmap_mode="r") for window in windows]
    axis = 0 if trunk == "trained" else 1  # of time
    longest = max(array.shape[axis] for array in arrays)
    if trunk == "trained":
        inputs = np.zeros((len(arrays), longest, arrays[0].shape[1]), np.float32)
        for row, array in zip(inputs, arrays, strict=True):
            row[: len(array)] = array
    else:
        layers, _, width = arrays[0].shape
        inputs = np.zeros((layers, len(arrays), longest, width), np.float16)
        for index, array in enumerate(arrays):
            inputs[:, index, : array.shape[1]] = array
    return Batch(
        torch.from_numpy(inputs),
        torch.tensor([num_tokens(window.num_samples) for window in windows]),
        torch.from_numpy(data.labels[[clip for clip, _ in parts]]),
    )


def _drawn_window(data: Data, clip: int, draw: np.random.Generator) -> int:
    ends = np.cumsum([window.num_samples for window in data.windows[clip]])
    return int(np.searchsorted(ends, draw.integers(ends[-1]), side="right"))


def _num_samples(data: Data, part: Part) -> int:
    return data.windows[part[0]][part[1]].num_samples
