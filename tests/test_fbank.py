"""The folded float32 filterbank against a float64 reference and against Kaldi's own C++."""

from pathlib import Path

import kaldi_native_fbank
import numpy as np
import pytest
import reference
import soundfile
import soxr
import torch
from helpers import synthetic_audio

from aesanet.models.fbank import FrontEnd, KaldiFbank

SAMPLES = Path(__file__).parent.parent / "models" / "demo" / "samples"
REAL = sorted(path for path in SAMPLES.glob("*") if path.suffix in {".flac", ".wav", ".ogg", ".mp3"})
SYNTHETIC = sorted(synthetic_audio(np.random.default_rng(0), 0.1))
SILENCE = -15.942385

# A float32 DFT, ours or Kaldi's FFT, errs in every bin by some 1e-7 of the strongest amplitude among the frame's bins
# before pre-emphasis, which takes up to 30 dB off that bin but nothing off the rounding errors. So ln-energies can
# agree to a fixed 2e-3 only down to some level below that bin; beneath it, the amplitude's error is what is bounded.
# Largest in 31 minutes of speech, music, effects and synthetic signals: against float64 6e-4 and 6e-8 of the strongest
# amplitude, against Kaldi, which errs as well, 1.4e-3 and 1.7e-7.
NEAR_DB = 75
LN_ERROR = 2e-3


def ours(waveform, num_mel_bins=128):
    return KaldiFbank(num_mel_bins)(torch.from_numpy(waveform)[None])[0].double().numpy()


def kaldi(waveform, num_mel_bins):
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = num_mel_bins
    options.mel_opts.high_freq = 8000
    options.energy_floor = 0
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(16000, waveform.tolist())
    computer.input_finished()
    return np.array([computer.get_frame(i) for i in range(computer.num_frames_ready)], np.float64)


def strongest_amplitude(waveform):
    """The greatest DFT magnitude of each windowed frame, before pre-emphasis: [frames, 1]."""
    frames = np.lib.stride_tricks.sliding_window_view(waveform.astype(np.float64), 400)[::160]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    spectrum = np.fft.rfft((frames - frames.mean(axis=1, keepdims=True)) * window, 512)
    return np.maximum(np.abs(spectrum).max(axis=1, keepdims=True), reference.FLOOR**0.5)


def assert_close(actual, expected, waveform, far_error):
    assert actual.shape == expected.shape
    strongest = strongest_amplitude(waveform)
    near = np.exp(expected / 2) > 10 ** (-NEAR_DB / 20) * strongest
    assert near.mean() > 0.05
    assert np.abs(actual - expected)[near].max() < LN_ERROR
    amplitude_error = np.abs(np.exp(actual / 2) - np.exp(expected / 2)) / strongest
    assert amplitude_error[~near].max(initial=0) < far_error


def assert_agrees_with_both(waveform):
    assert_close(ours(waveform), reference.fbank(waveform), waveform, far_error=1.5e-7)
    assert_close(ours(waveform, 80), kaldi(waveform, 80), waveform, far_error=3e-7)


def read(path):
    """The first ten seconds as float32 mono at 16 kHz, 16-bit scale."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = soxr.resample(audio[: 10 * rate].mean(axis=1), rate, 16000)
    return mono.astype(np.float32) * np.float32(2**15)


def test_samples_are_there():
    assert REAL


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_audio(path):
    assert_agrees_with_both(read(path))


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synthetic_audio(name, seed):
    assert_agrees_with_both(synthetic_audio(np.random.default_rng(seed), 2.013)[name] * np.float32(2**15))


@pytest.mark.parametrize(
    "offset", [0.5, 0.1234567, -0.9999, 1 / 3], ids=["half", "fraction", "almost_full_scale", "third"]
)
@pytest.mark.parametrize("kind", ["constant", "last_bit", "faint_noise", "noise"])
def test_offset_is_removed(offset, kind):
    """Kaldi itself errs here, by up to 11 in ln-energy, so float64 alone is the judge; measured 1.7e-4."""
    rng = np.random.default_rng(0)
    noise = {
        "constant": np.zeros(16000),
        "last_bit": rng.integers(-1, 2, 16000) / 2**15,
        "faint_noise": 1e-6 * rng.standard_normal(16000),
        "noise": 1e-3 * rng.standard_normal(16000),
    }[kind]
    waveform = (offset + noise).astype(np.float32) * np.float32(2**15)
    expected = reference.fbank(waveform)
    assert (expected.max() < SILENCE + 1e-5) == (kind == "constant")
    assert np.abs(ours(waveform) - expected).max() < 5e-4


def test_silence_is_the_floor():
    assert np.abs(ours(np.zeros(1000, np.float32)) - SILENCE).max() < 1e-6
    assert np.abs(reference.fbank(np.zeros(1000)) - SILENCE).max() < 1e-6


def test_filter_three_is_empty():
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 5000
    features = ours(noise)
    assert np.abs(features[:, 3] - SILENCE).max() < 1e-6
    assert np.delete(features, 3, axis=1).min() > SILENCE + 1


@pytest.mark.parametrize(
    ("samples", "frames"), [(400, 1), (559, 1), (560, 2), (719, 2), (720, 3), (2799, 15), (2800, 16), (160_000, 998)]
)
def test_frame_count(samples, frames):
    assert ours(np.ones(samples, np.float32)).shape == (frames, 128)


def test_front_end_normalises_and_scales():
    """Batch rows are computed apart, from samples in [-1, 1)."""
    rng = np.random.default_rng(0)
    batch = (0.1 * rng.standard_normal((3, 3000))).astype(np.float32)
    features = FrontEnd()(torch.from_numpy(batch)).numpy()
    expected = np.array([reference.front_end(row) for row in batch])
    assert features.dtype == np.float32
    assert np.abs(features - expected).max() < 1e-5


def test_autocast_leaves_the_front_end_alone():
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (1, 16_000)).astype(np.float32))
    expected = FrontEnd()(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        found = FrontEnd()(waveform)
    assert torch.equal(found, expected)
