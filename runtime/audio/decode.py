"""A file becomes 16 kHz mono, block by block: memory does not grow with the file, and no header is believed."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soxr

from aesanet.errors import ClipError
from aesanet.lengths import SAMPLE_RATE
from aesanet.runtime.audio.segments import Extent, Frames, check_samples, read_segments
from aesanet.runtime.audio.segments import checked_rate as checked_rate  # for samples that come without a file
from aesanet.runtime.audio.sources import Source, open_source
from aesanet.runtime.rows.row import Clip

ChannelPolicy = Literal["mean", "left", "loudest"]
"""What of several channels is heard: their mean, the first, or the one with the most energy over the clip."""

HEADER_SLACK_SECONDS = 0.1  # whole mp3 files say up to two frames of 36 ms more than they give
DIGITAL_SILENCE = 2.0**-15  # peak to peak; one step of 16 bits
NEAR_SILENCE = 1e-3  # RMS; -60 dBFS


@dataclass(frozen=True)
class Heard:
    """What was decoded of a clip.

    `silence` is "digital" where the mono signal moves by less than one 16-bit step, whatever its offset, and "near"
    where its RMS about its mean is below -60 dBFS.
    """

    seconds: float  # decoded
    header_seconds: float | None  # by the file's header; None where it says nothing
    sample_rate: int  # Hz, of the file
    channels: int  # of the file
    silence: Literal["digital", "near"] | None

    @property
    def truncated(self) -> bool:
        """Did the file end before its header said?"""
        return self.header_seconds is not None and self.seconds < self.header_seconds - HEADER_SLACK_SECONDS


def decode(
    clips: Sequence[Clip], channels: ChannelPolicy = "mean"
) -> Generator[tuple[int, np.ndarray | Heard | ClipError], None, None]:
    """Clips of one file (the same path and member), in one pass over it where that saves decoding.

    Yields (index into clips, float32 [samples] block at 16 kHz mono), any number of them, then exactly one
    (index, Heard) or (index, ClipError) for each clip; never raises ClipError itself. A clip's samples are
    bit-identical to those that it has alone, and from run to run.
    """
    waiting = set(range(len(clips)))
    listeners: dict[int, _Listener] = {}
    try:
        with open_source(clips[0].path, clips[0].member) as source:
            chosen = _chosen_channels(source, clips, channels)
            with closing(read_segments(source, clips)) as parts:
                for index, part in parts:
                    if isinstance(part, Frames):
                        if index not in listeners:
                            listeners[index] = _Listener(part.rate, chosen.get(index))
                        yield from ((index, block) for block in listeners[index].hear(part.samples))
                        continue
                    waiting.discard(index)
                    if isinstance(part, ClipError):
                        yield index, part
                    else:
                        listener = listeners.pop(index)
                        yield from ((index, block) for block in listener.rest())
                        yield index, listener.heard(part)
    except ClipError as error:
        for index in sorted(waiting):
            yield index, error


def clip_blocks(clip: Clip) -> Iterator[np.ndarray]:
    """One clip as float32 [samples] blocks, mono (the mean of the channels), 16 kHz; raises ClipError."""
    with closing(decode([clip])) as parts:
        for _, part in parts:
            if isinstance(part, ClipError):
                raise part
            if not isinstance(part, Heard):
                yield part


def checked_mono(block: np.ndarray) -> np.ndarray:
    """float32 [frames, channels] -> the channels' mean, float32 [frames]; raises ClipError on non-finite samples."""
    check_samples(block)
    return _mono(block, None)


def resample(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Bring float32 blocks from `rate` Hz to 16 kHz, as one stream, at soxr's HQ quality."""
    resampler = _Resampler(rate)
    for block in blocks:
        yield from resampler.push(block)
    yield from resampler.rest()


class _Resampler:
    """One stream on its way to 16 kHz; its samples do not depend on how it is cut into blocks."""

    def __init__(self, rate: int) -> None:
        same = rate == SAMPLE_RATE
        self._stream = None if same else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    def push(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """What a block, float32 [frames], gives for now."""
        out = block if self._stream is None else self._stream.resample_chunk(block)
        if len(out):
            yield out

    def rest(self) -> Iterator[np.ndarray]:
        """What comes after the last block."""
        if self._stream is not None and len(out := self._stream.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield out


class _Listener:
    """Hears one clip: one channel of several, at 16 kHz, and how loud it is."""

    def __init__(self, rate: int, channel: int | None) -> None:
        self._channel = channel
        self._resampler = _Resampler(rate)
        self._count, self._sum, self._squares = 0, 0.0, 0.0  # about the first sample, as an offset may be large
        self._first, self._lowest, self._highest = 0.0, np.inf, -np.inf

    def hear(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """The next frames, [frames, channels] at the clip's rate; what they give at 16 kHz."""
        mono = _mono(samples, self._channel)
        if not self._count:
            self._first = float(mono[0])
        self._count += len(mono)
        self._lowest, self._highest = min(self._lowest, mono.min()), max(self._highest, mono.max())
        about = np.subtract(mono, self._first, dtype=np.float64)
        self._sum += about.sum()
        self._squares += np.square(about, out=about).sum()
        yield from self._resampler.push(mono)

    def rest(self) -> Iterator[np.ndarray]:
        """What comes at 16 kHz after the last frames."""
        yield from self._resampler.rest()

    def heard(self, extent: Extent) -> Heard:
        """What was decoded, when it has ended."""
        header_seconds = None if extent.header_frames is None else extent.header_frames / extent.rate
        return Heard(extent.frames / extent.rate, header_seconds, extent.rate, extent.channels, self._silence())

    def _silence(self) -> Literal["digital", "near"] | None:
        if float(self._highest) - float(self._lowest) < DIGITAL_SILENCE:
            return "digital"
        variance = self._squares / self._count - (self._sum / self._count) ** 2
        return "near" if variance < NEAR_SILENCE**2 else None


def _mono(block: np.ndarray, channel: int | None) -> np.ndarray:
    """float32 [frames, channels] -> one of them, or their mean: float32 [frames]."""
    if block.shape[1] == 1 or channel is not None:
        return np.ascontiguousarray(block[:, channel or 0])
    total: np.ndarray = block[:, 0].copy()
    for other in block.T[1:]:  # 30 times as fast as a mean over so short an axis
        total += other
    total /= block.shape[1]
    return total


def _chosen_channels(source: Source, clips: Sequence[Clip], policy: ChannelPolicy) -> dict[int, int]:
    """Which channel each clip is heard by, where it is not their mean."""
    if policy == "mean":
        return {}
    if policy == "left":
        return dict.fromkeys(range(len(clips)), 0)
    energies: dict[int, np.ndarray] = {}
    with closing(read_segments(source, clips)) as parts:
        for index, part in parts:
            if isinstance(part, Frames):
                if part.samples.shape[1] == 1:
                    return {}
                energy = np.square(part.samples, dtype=np.float64).sum(axis=0)
                energies[index] = energies[index] + energy if index in energies else energy
    return {index: int(np.argmax(energy)) for index, energy in energies.items()}
