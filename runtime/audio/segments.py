"""Segments of one source, read in one pass over it, at the source's own rate and with all its channels."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aesanet.errors import ClipError
from aesanet.runtime.audio.decoders import CHUNK_FRAMES, Decoder, open_decoder
from aesanet.runtime.audio.sources import Source
from aesanet.runtime.rows.row import Clip

BLOCK_SAMPLES = 2**16  # over all channels: 256 kB of float32 at a time, which a core's cache holds
LARGEST_SAMPLE = 2.0**31  # 32-bit integers written as floats; past it, energies overflow float32
MIN_RATE, MAX_RATE = 1_000, 16_000_000  # Hz; below, a damaged header would make hours out of nothing
ENDLESS = 2**62  # frames


class Frames(NamedTuple):
    """The next frames of a segment: finite float32 [frames, channels] at `rate` Hz."""

    samples: np.ndarray
    rate: int


class Extent(NamedTuple):
    """A segment that has ended: what was decoded of it, and what the source's header says that it has, if it does."""

    frames: int
    header_frames: int | None
    rate: int
    channels: int


def read_segments(
    source: Source, clips: Sequence[Clip]
) -> Generator[tuple[int, Frames | Extent | ClipError], None, None]:
    """Parts of clips of one source: (index into clips, Frames) as they come, then one Extent or ClipError a clip.

    What seeks to the very frame is opened anew for each clip: its decoding costs little, and may lose frames at
    damage, after which a reader that came from before it is not where one is that has gone there. The rest is read
    once, from the start, for all clips. Either way, a clip's frames do not depend on which others are read with it.
    Raises ClipError where the source fails all clips that are left.
    """
    waiting = deque(enumerate(clips))
    while waiting:
        with open_decoder(source) as decoder:
            rate = checked_rate(decoder.rate)
            taken = [waiting.popleft() for _ in range(1 if decoder.seeks else len(waiting))]
            yield from _read(decoder, [_Segment.of(index, clip, rate) for index, clip in taken])


def checked_rate(rate: int) -> int:
    """The rate in Hz; raises ClipError unless it can be brought to 16 kHz."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ClipError("bad_sample_rate", f"a sample rate of {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz can be resampled")
    return rate


def check_samples(block: np.ndarray) -> None:
    """Raises ClipError on samples that no waveform has."""
    if block.size and not max(block.max(), -block.min()) <= LARGEST_SAMPLE:  # false for NaN too
        raise ClipError("non_finite", "samples that are NaN, infinite or beyond 2^31; a waveform lies in [-1, 1)")


@dataclass(eq=False)
class _Segment:
    """Frames `first` to `last` of the source, as far as they were decoded."""

    index: int
    clip: Clip
    first: int
    last: int
    decoded: int = 0
    error: ClipError | None = None

    @classmethod
    def of(cls, index: int, clip: Clip, rate: int) -> "_Segment":
        first = round((clip.start_seconds or 0.0) * rate)
        return cls(index, clip, first, ENDLESS if clip.end_seconds is None else round(clip.end_seconds * rate))

    def take(self, block: np.ndarray, position: int) -> np.ndarray:
        """What of a block that starts at `position` is the segment's; nothing of one that has bad samples there."""
        part = block[max(0, self.first - position) : max(0, self.last - position)]
        try:
            check_samples(part)
        except ClipError as error:
            self.error = error
            return part[:0]
        self.decoded += len(part)
        return part

    def end(self, decoder: Decoder, position: int) -> tuple[int, Extent | ClipError]:
        """What became of it, when `position` was the last that was read."""
        if self.error is None and not self.decoded:
            where = f" from {self.clip.start_seconds:g} s on" if self.first else ""
            self.error = (
                ClipError("undecodable", "damaged at its start")
                if decoder.damaged and not position
                else ClipError("no_audio", f"no samples{where}; the file holds {position / decoder.rate:g} s")
            )
        if self.error is not None:
            return self.index, self.error
        header_frames = None if decoder.frames is None else max(0, min(self.last, decoder.frames) - self.first)
        return self.index, Extent(self.decoded, header_frames, decoder.rate, decoder.channels)


def _read(decoder: Decoder, segments: list[_Segment]) -> Iterator[tuple[int, Frames | Extent | ClipError]]:
    """Serve segments from a fresh decoder: one, to whose start it seeks if it can, or all that there are."""
    block_chunks = max(1, BLOCK_SAMPLES // (CHUNK_FRAMES * decoder.channels))
    position = segments[0].first if decoder.seeks and decoder.seek(segments[0].first) else 0
    while segments:
        left = max(segment.last for segment in segments) - position
        wanted = CHUNK_FRAMES * min(block_chunks, -(-left // CHUNK_FRAMES))
        block = decoder.read(wanted)
        for segment in segments:
            if len(part := segment.take(block, position)):
                yield segment.index, Frames(part, decoder.rate)
        position += len(block)
        ended = len(block) < wanted
        over = [segment for segment in segments if ended or segment.error is not None or segment.last <= position]
        for segment in over:
            yield segment.end(decoder, position)
        segments = [segment for segment in segments if segment not in over]
