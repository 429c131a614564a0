"""Samples, frames, tokens and windows: every length that models and runtime must agree on."""

from typing import Final, Protocol, Self, TypeVar

import msgspec

SAMPLE_RATE: Final = 16_000
"""Hz, of everything that enters the network."""

FRAME_SAMPLES: Final = 400
HOP_SAMPLES: Final = 160
FFT_SIZE: Final = 512
MEL_BINS: Final = 128
PATCH_SIZE: Final = 16
TOKENS_PER_PATCH: Final = MEL_BINS // PATCH_SIZE

MIN_SAMPLES: Final = FRAME_SAMPLES + (PATCH_SIZE - 1) * HOP_SAMPLES
"""Samples of the shortest clip that fills one time patch: 2,800, which is 0.175 s."""


class _Integer(Protocol):
    """An int, or an integer array or tensor: what the length formulas are written for."""

    def __add__(self, other: int, /) -> Self: ...
    def __sub__(self, other: int, /) -> Self: ...
    def __mul__(self, other: int, /) -> Self: ...
    def __floordiv__(self, other: int, /) -> Self: ...


Integer = TypeVar("Integer", bound=_Integer)


def num_frames(num_samples: Integer) -> Integer:
    """Fbank frames in `num_samples` >= 400 samples, Kaldi's `snip_edges` rule.

    >>> num_frames(160_000)
    998
    """
    return (num_samples - FRAME_SAMPLES) // HOP_SAMPLES + 1


def num_tokens(num_samples: Integer) -> Integer:
    """Encoder tokens that a clip of `num_samples` >= 400 samples owns: 8 for each full time patch of 16 frames.

    Works alike on an int, an integer NumPy array [batch] and an integer tensor [batch].

    >>> num_tokens(160_000), num_tokens(MIN_SAMPLES), num_tokens(MIN_SAMPLES - 1)
    (496, 8, 0)
    """
    return num_frames(num_samples) // PATCH_SIZE * TOKENS_PER_PATCH


class WindowPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a clip is cut for scoring; it travels in checkpoint and bundle.

    Windows start every `hop_seconds`, the last one keeps its own length, and a clip's score is the mean of
    its windows' scores weighted by their lengths.
    """

    window_seconds: float = 10.0
    hop_seconds: float = 10.0

    def __post_init__(self) -> None:
        shortest, longest = MIN_SAMPLES / SAMPLE_RATE, 600.0
        if not shortest <= self.window_seconds <= longest:
            raise ValueError(
                f"window_seconds is {self.window_seconds}; it must be from {shortest}, which is one patch, to {longest}"
            )
        finest = HOP_SAMPLES / SAMPLE_RATE
        if not finest <= self.hop_seconds <= self.window_seconds:
            raise ValueError(
                f"hop_seconds is {self.hop_seconds}; it must be from {finest} to window_seconds, "
                f"{self.window_seconds}, or audio would be left out"
            )

    @property
    def window_samples(self) -> int:
        """Samples at 16 kHz of a full window."""
        return round(self.window_seconds * SAMPLE_RATE)

    @property
    def hop_samples(self) -> int:
        """Samples at 16 kHz from one window's start to the next."""
        return round(self.hop_seconds * SAMPLE_RATE)
