"""Waveform to log-mel: the Kaldi filterbank that BEATs listens through, as one matrix product."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from aesanet.lengths import FFT_SIZE, FRAME_SAMPLES, HOP_SAMPLES, MEL_BINS, SAMPLE_RATE, num_frames

ENERGY_FLOOR = 1.1920929e-7
PREEMPHASIS = 0.97
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2

# Mean and deviation of log-mel features over AudioSet, from the public BEATs code (arXiv 2212.09058).
FBANK_MEAN, FBANK_STD = 15.41663, 6.55582


class KaldiFbank(nn.Module):
    """Kaldi's log-mel filterbank without dither (`compute-fbank-feats`, Povey window, snip_edges), in FP32.

    All that Kaldi does to a frame before the power spectrum is linear, so DC removal, pre-emphasis, window and
    DFT are folded, in float64, into one matrix. The frame's mean is also subtracted before the product: a matrix
    alone must cancel an offset by summing large terms, which in FP32 is wrong by up to 9 in log-mel.
    """

    basis: Tensor
    mel: Tensor

    def __init__(self, num_mel_bins: int = MEL_BINS) -> None:
        super().__init__()
        self.register_buffer("basis", torch.from_numpy(_folded_basis()).float(), persistent=False)
        self.register_buffer("mel", torch.from_numpy(_mel_filters(num_mel_bins)).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Log-mel energies.

        waveform : float32 [batch, samples], 16 kHz, at the scale of 16-bit integers, samples >= 400
        returns  : float32 [batch, 1 + (samples - 400) // 160, num_mel_bins]
        """
        starts = HOP_SAMPLES * torch.arange(num_frames(waveform.shape[1]), device=waveform.device)
        samples = starts[:, None] + torch.arange(FRAME_SAMPLES, device=waveform.device)
        frames = waveform.index_select(1, samples.flatten()).unflatten(1, (-1, FRAME_SAMPLES))
        spectrum = (frames - frames.mean(dim=2, keepdim=True)) @ self.basis
        real, imaginary = spectrum.chunk(2, dim=2)
        energies = (real.square() + imaginary.square()) @ self.mel
        log_mel: Tensor = energies.clamp_min(ENERGY_FLOOR).log()
        return log_mel


class FrontEnd(nn.Module):
    """Waveform in [-1, 1) to the normalised fbank that BEATs was trained on. Always FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.fbank = KaldiFbank()

    def forward(self, waveform: Tensor) -> Tensor:
        """waveform float32 [batch, samples] -> fbank float32 [batch, frames, 128]."""
        # Under autocast its sums would round to 8 or 11 bits, or overflow.
        with torch.autocast(waveform.device.type, enabled=False):
            log_mel: Tensor = self.fbank(waveform * 2.0**15)
        return (log_mel - FBANK_MEAN) / (2 * FBANK_STD)


def _folded_basis() -> np.ndarray:
    """Float64 [400, 514]: a frame of samples to the real, then the imaginary parts of its 257 DFT bins."""
    n = np.arange(FRAME_SAMPLES)
    remove_mean = np.eye(FRAME_SAMPLES) - 1 / FRAME_SAMPLES
    emphasise = np.eye(FRAME_SAMPLES) - PREEMPHASIS * np.eye(FRAME_SAMPLES, k=1)
    emphasise[0, 0] = 1 - PREEMPHASIS  # Kaldi takes the sample before the first to equal it
    povey_window = (0.5 - 0.5 * np.cos(2 * np.pi * n / (FRAME_SAMPLES - 1))) ** 0.85
    angle = 2 * np.pi * np.outer(n, np.arange(FFT_SIZE // 2 + 1)) / FFT_SIZE
    dft = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    return np.asarray(remove_mean @ emphasise @ (povey_window[:, None] * dft))


def _mel_filters(num_mel_bins: int) -> np.ndarray:
    """Float64 [257, num_mel_bins]: Kaldi's triangles, linear in mel = 1127 ln(1 + f / 700), without area norm."""
    bins = 1127 * np.log1p(np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE / 700)
    low, high = (1127 * math.log1p(hz / 700) for hz in (LOW_HZ, HIGH_HZ))
    edges = np.linspace(low, high, num_mel_bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    filters = np.maximum(0, np.minimum(rising, falling))
    filters[-1] = 0  # Kaldi leaves the Nyquist bin out
    return np.asarray(filters)
