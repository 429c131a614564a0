"""What anyone would try first: scores as a linear function of bandwidth, noise floor and crest factor."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from aesanet.axes import AXES
from aesanet.machine import usable_cores
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip
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
    """Least squares an axis, for each kind of clip (speech, mixes, all else) on the training clips of that kind.

    Which kind a clip is of is more than the model is told.
    """

    def __init__(self, audio: Path, clips: Sequence[DemoClip], labels: Sequence[Label]) -> None:
        chosen = [(clip, one.scores) for clip, one in zip(clips, labels, strict=True) if clip.split == "train"]
        inputs = _features_of(audio, [clip for clip, _ in chosen])
        targets = np.array([scores for _, scores in chosen])
        kinds = np.array([_kind(clip) for clip, _ in chosen])
        self.weights: dict[str, np.ndarray] = {}
        for kind in np.unique(kinds):
            self.weights[kind] = least_squares(inputs[kinds == kind], targets[kinds == kind])

    def scores(self, audio: Path, clips: Sequence[DemoClip]) -> Mapping[str, np.ndarray]:
        """float64 [4] by clip id, order CE, CU, PC, PQ; 0 on an axis without labels for the kind."""
        inputs = _features_of(audio, clips)
        return {clip.id: row @ self.weights[_kind(clip)] for clip, row in zip(clips, inputs, strict=True)}


def least_squares(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """inputs [clips, features], labels [clips, 4] with nan for none -> weights [features, 4]."""
    weights = np.zeros((inputs.shape[1], len(AXES)))
    for axis in range(len(AXES)):
        known = ~np.isnan(labels[:, axis])
        if known.any():
            weights[:, axis] = np.linalg.lstsq(inputs[known], labels[known, axis], rcond=None)[0]
    return weights


def _kind(clip: DemoClip) -> str:
    return clip.kind if clip.kind in ("speech", "mix") else "other"


def _features_of(audio: Path, clips: Sequence[DemoClip]) -> np.ndarray:
    with ProcessPoolExecutor(usable_cores()) as pool:
        return np.array(list(pool.map(_read_features, [audio / f"{clip.id}.flac" for clip in clips], chunksize=64)))


def _read_features(file: Path) -> np.ndarray:
    return features(np.concatenate(list(clip_blocks(Clip(str(file))))).astype(np.float64))
