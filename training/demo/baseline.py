"""What anyone would try first: scores as a linear function of bandwidth, noise floor and crest factor."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from aesanet.machine import usable_cores
from aesanet.runtime.decode import ClipReader
from aesanet.runtime.rows import Clip
from aesanet.training.demo.degrade import bandwidth_hertz
from aesanet.training.demo.label import Label
from aesanet.training.demo.plan import DemoClip

FRAME_SAMPLES = 320


def features(x: np.ndarray) -> np.ndarray:
    """float64 [4] of x [samples], 16 kHz: bandwidth in kHz, noise floor in dB, crest factor in dB, 1.

    The noise floor is the level below which 5 % of 20 ms frames lie, relative to the RMS of all.
    """
    rms = np.sqrt(np.square(x).mean())
    frames = x[: len(x) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    floor = np.quantile(np.sqrt(np.square(frames).mean(axis=1)), 0.05)
    floor_db = 20 * np.log10(max(floor / rms, 1e-5))
    return np.array([bandwidth_hertz(x) / 1000, floor_db, 20 * np.log10(np.abs(x).max() / rms), 1.0])


class Baseline:
    """Least squares an axis, on the training clips that have a label there."""

    def __init__(self, inputs: np.ndarray, labels: np.ndarray) -> None:
        known = ~np.isnan(labels)
        columns = [
            np.linalg.lstsq(inputs[known[:, axis]], labels[known[:, axis], axis], rcond=None)[0]
            for axis in range(labels.shape[1])
        ]
        self.weights = np.stack(columns, axis=1)

    def scores(self, inputs: np.ndarray) -> np.ndarray:
        """`features` of clips [clips, 4] -> float64 [clips, 4], order CE, CU, PC, PQ."""
        return np.asarray(inputs @ self.weights)


def baseline_scores(audio: Path, clips: Sequence[DemoClip], labels: Sequence[Label]) -> dict[str, np.ndarray]:
    """float64 [4] by clip id, fitted on the training clips; validation clips are left out."""
    chosen = [(clip, one) for clip, one in zip(clips, labels, strict=True) if clip.split != "validation"]
    with ProcessPoolExecutor(usable_cores()) as pool:
        inputs = np.array(list(pool.map(_features_of, [audio / f"{clip.id}.flac" for clip, _ in chosen], chunksize=64)))
    trained = np.array([clip.split == "train" for clip, _ in chosen])
    targets = np.array([one.scores for _, one in chosen])
    scores = Baseline(inputs[trained], targets[trained]).scores(inputs)
    return {clip.id: row for (clip, _), row in zip(chosen, scores, strict=True)}


def _features_of(file: Path) -> np.ndarray:
    return features(np.concatenate(list(ClipReader(Clip(str(file))))).astype(np.float64))
