"""A clip's description becomes its samples: the same ones each time, on every machine with the same codecs."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import soundfile
import soxr

from aesanet.lengths import SAMPLE_RATE
from aesanet.training.demo.degrade import DEGRADATIONS, bandwidth_hertz
from aesanet.training.demo.sources import Kind, read_mono

GAP_SAMPLES: Final = round(0.12 * SAMPLE_RATE)
MIN_SECONDS: Final = 2.0
FULL_SCALE: Final = 0.999


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A part of a recording."""

    file: str
    start_seconds: float
    seconds: float


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """Undamaged sound of one speaker or thing, `level_db` its RMS below full scale, played at `speed`."""

    id: str
    kind: Kind
    group: str
    language: str = ""
    level_db: float
    speed: float = 1.0
    parts: tuple[Part, ...]


@lru_cache(maxsize=8)  # the clips of a ladder come one after another
def render_reference(folder: Path, reference: Reference) -> np.ndarray:
    """float64 [samples], 16 kHz: parts of recordings, with short silences between them; pitch follows speed."""
    pieces: list[np.ndarray] = []
    for part in reference.parts:
        pieces += [read_mono(folder / part.file, part.start_seconds, part.seconds), np.zeros(GAP_SAMPLES)]
    x = np.concatenate(pieces[:-1]).astype(np.float64)
    return x if reference.speed == 1.0 else soxr.resample(x, reference.speed, 1.0)


def is_fit(x: np.ndarray, kind: Kind, strict: bool) -> bool:
    """Is there sound, not cut off at full scale and not all spikes? If strict: full band, speech without noise too."""
    if len(x) < MIN_SECONDS * SAMPLE_RATE or _rms(x) < 10 ** (-50 / 20):
        return False
    spikes = np.abs(x).max() / _rms(x) > 10 ** (21 / 20)
    if spikes or np.mean(np.abs(x) >= FULL_SCALE) > 1e-4:
        return False
    if not strict:
        return True
    frames = x[: len(x) // 320 * 320].reshape(-1, 320)
    loudness = np.sqrt(np.square(frames).mean(axis=1))
    quiet = np.quantile(loudness[loudness > 1e-6], 0.05) < _rms(x) * 10 ** (-25 / 20)
    return bandwidth_hertz(x) >= 7000 and (kind != "speech" or bool(quiet))


def active_share(x: np.ndarray) -> float:
    """Share of 20 ms frames within 30 dB of the RMS of x [samples]."""
    frames = x[: len(x) // 320 * 320].reshape(-1, 320)
    return float(np.mean(np.square(frames).mean(axis=1) > np.square(x).mean() * 1e-3))


def render(
    folder: Path,
    references: Mapping[str, Reference],
    layers: Sequence[str],
    degradation: str = "",
    level: int = 0,
) -> np.ndarray:
    """float64 [samples] of a clip: layers of equal loudness, mixed, damaged, and brought to the first one's level."""
    sounds = [render_reference(folder, references[name]) for name in layers]
    clean = np.sum([np.resize(x, len(sounds[0])) / _rms(x) for x in sounds], axis=0)
    if degradation:
        # One seed a reference and type, so that levels differ in severity alone.
        seed = hashlib.sha256(f"{layers[0]} {degradation}".encode()).digest()
        clean = DEGRADATIONS[degradation](clean, level, np.random.default_rng(list(seed)))
    out = clean / _rms(clean) * 10 ** (references[layers[0]].level_db / 20)
    return np.asarray(out / max(1.0, np.abs(out).max() / FULL_SCALE))


def write_clip(path: Path, x: np.ndarray) -> None:
    """16-bit flac, 16 kHz."""
    soundfile.write(path, x, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))
