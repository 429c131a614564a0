"""Degradations of known severity: each type has five levels, and a higher level is worse by construction."""

import io
from collections.abc import Callable
from typing import Final

import numpy as np
import soundfile
from scipy import signal

from aesanet.lengths import SAMPLE_RATE

LEVELS: Final = (1, 2, 3, 4, 5)

NOISE_SNR_DB: Final = (40.0, 30.0, 20.0, 10.0, 0.0)
BACKGROUND_SNR_DB: Final = (30.0, 22.0, 14.0, 6.0, -2.0)
CLIP_GAIN_DB: Final = (4.0, 9.0, 15.0, 23.0, 33.0)
LOWPASS_SHARE: Final = (0.75, 0.55, 0.40, 0.27, 0.17)  # of the recording's own bandwidth
MP3_KBIT: Final = (48, 32, 24, 16, 8)
OPUS_KBIT: Final = (32, 20, 14, 9, 6)
LOSS_SHARE: Final = (0.02, 0.05, 0.10, 0.20, 0.40)  # of 20 ms frames
REVERB_SECONDS: Final = (0.2, 0.4, 0.8, 1.6, 3.0)  # time to fall by 60 dB
BITS: Final = (9, 7, 6, 5, 4)

Degradation = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def noise(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """White noise at a signal-to-noise ratio."""
    return _add(x, rng.standard_normal(len(x)), NOISE_SNR_DB[level - 1])


def background(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Hum and coloured noise that swells, as of machines, wind and rooms."""
    spectrum = np.fft.rfft(rng.standard_normal(len(x)))
    hertz = np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE)
    coloured = np.fft.irfft(spectrum / np.maximum(hertz, 30.0) ** rng.uniform(0.4, 1.2), len(x))
    t = np.arange(len(x)) / SAMPLE_RATE
    swell = 1 + 0.6 * np.sin(2 * np.pi * (rng.uniform(0.3, 2.0) * t + rng.uniform()))
    hum = sum(np.sin(2 * np.pi * (50 * k * t + rng.uniform())) / k for k in range(1, 8))
    return _add(x, coloured / coloured.std() * swell + rng.uniform(0, 0.7) * hum, BACKGROUND_SNR_DB[level - 1])


def clip(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Amplified past full scale and cut off there."""
    peak = np.abs(x).max()
    limit = peak * 10 ** (-CLIP_GAIN_DB[level - 1] / 20)
    return np.asarray(np.clip(x, -limit, limit))


def lowpass(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Butterworth of order 8, forwards and backwards, at a share of the recording's bandwidth."""
    cutoff = min(0.97 * SAMPLE_RATE / 2, LOWPASS_SHARE[level - 1] * bandwidth_hertz(x))
    return np.asarray(signal.sosfiltfilt(signal.butter(8, cutoff, fs=SAMPLE_RATE, output="sos"), x))


def mp3(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """LAME at a constant bit rate."""
    # libsndfile maps its compression level on 160 down to 8 kbit/s.
    out = _codec(
        x, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=_mp3(MP3_KBIT[level - 1])
    )
    return out[-len(x) :] if len(out) < len(x) + 1105 else out[1105 : 1105 + len(x)]  # the delay, where it is kept


def opus(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Opus at a bit rate."""
    return _codec(x, format="OGG", subtype="OPUS", compression_level=1 - (OPUS_KBIT[level - 1] - 6) / 250)[: len(x)]


def loss(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of 20 ms lost and not concealed; a frame lost at one level is lost at all higher ones."""
    frame = SAMPLE_RATE // 50
    lost = rng.permutation(-(-len(x) // frame)) < LOSS_SHARE[level - 1] * len(x) / frame
    return np.asarray(np.where(np.repeat(lost, frame)[: len(x)], 0.0, x))


def reverb(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A room of exponentially falling noise; the longer it rings, the louder it is against the direct sound."""
    seconds = REVERB_SECONDS[level - 1]
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    room = rng.standard_normal(round(max(REVERB_SECONDS) * SAMPLE_RATE))[: len(t)] * np.exp(-6.9 * t / seconds)
    room *= np.sqrt(0.25 * level / np.square(room).sum())
    return np.asarray(x + signal.fftconvolve(x, room)[: len(x)])


def bits(x: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Fewer bits a sample, without dither."""
    step = np.abs(x).max() / 2 ** (BITS[level - 1] - 1)
    return np.asarray(np.round(x / step) * step)


TRAINED: Final[dict[str, Degradation]] = {d.__name__: d for d in (noise, background, clip, lowpass, mp3, opus, reverb)}
HELD_OUT: Final[dict[str, Degradation]] = {d.__name__: d for d in (loss, bits)}
"""Types that no training clip has: what the checkpoint makes of damage that it was never shown."""

DEGRADATIONS: Final = TRAINED | HELD_OUT


def bandwidth_hertz(x: np.ndarray) -> float:
    """The highest frequency within 60 dB of the strongest, in the mean power spectrum of x [samples]."""
    hertz, power = signal.welch(x, SAMPLE_RATE, nperseg=min(512, len(x)))
    return float(hertz[np.flatnonzero(power > power.max() * 1e-6).max()])


def _add(x: np.ndarray, other: np.ndarray, snr_db: float) -> np.ndarray:
    gain = np.sqrt(np.square(x).mean() / np.square(other).mean()) * 10 ** (-snr_db / 20)
    return np.asarray(x + gain * other)


def _codec(x: np.ndarray, **options: object) -> np.ndarray:
    file = io.BytesIO()
    peak = max(1.0, float(np.abs(x).max()))  # what an encoder must not clip by itself
    soundfile.write(file, x / peak, SAMPLE_RATE, **options)
    file.seek(0)
    return np.asarray(soundfile.read(file, dtype="float64")[0] * peak)


def _mp3(kbit: int) -> float:
    return 1 - (kbit - 4) / 160  # measured: the rate nearest to 160 * (1 - level) is taken
