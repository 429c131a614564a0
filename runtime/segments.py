"""Segments of one source, read in one pass over it, at the source's own rate and with all its channels."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aesanet.errors import ClipError
from aesanet.runtime.decoders import Decoder, open_decoder
from aesanet.runtime.rows import Clip
from aesanet.runtime.sources import Source

BLOCK_SAMPLES = 2**18  # over all channels: 1 MB of float32 at a time, whatever a header claims
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

    A clip's frames do not depend on which others are read with it: what seeks exactly seeks to each, and from damage
    on, the source is opened anew for those that come later. Raises ClipError where the source fails them all.
    """
    waiting: deque[_Segment] | None = None
    while waiting is None or waiting:
        with open_decoder(source) as decoder:
            rate = checked_rate(decoder.rate)
            if waiting is None:
                segments = (_Segment.of(index, clip, rate) for index, clip in enumerate(clips))
                waiting = deque(sorted(segments, key=lambda segment: segment.first))
            yield from _read(decoder, waiting)


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

    def take(self, block: np.ndarray, position: int, rate: int) -> Iterator[tuple[int, Frames]]:
        """What of a block that starts at `position` is the segment's."""
        part = block[: max(0, self.last - position)]
        try:
            check_samples(part)
        except ClipError as error:
            self.error = error
            return
        self.decoded += len(part)
        if len(part):
            yield self.index, Frames(part, rate)

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


def _read(decoder: Decoder, waiting: deque[_Segment]) -> Iterator[tuple[int, Frames | Extent | ClipError]]:
    """Serve segments in the order of their first frames; from damage on, those that still wait are left."""
    block_frames = max(1, BLOCK_SAMPLES // decoder.channels)
    active: list[_Segment] = []
    position, ended = 0, False
    while not ended and (active or waiting):
        if not active:
            try:
                if waiting[0].first > position and decoder.seek(waiting[0].first):
                    position = waiting[0].first
            except ClipError as error:
                yield waiting.popleft().index, error
                return
        while waiting and waiting[0].first <= position:
            active.append(waiting.popleft())
        # A segment starts with a block: what comes before it is another segment's, or dropped.
        until = waiting[0].first if waiting else ENDLESS
        if active:
            until = min(until, max(segment.last for segment in active))
        wanted = max(0, min(block_frames, until - position))
        block = decoder.read(wanted)
        for segment in active:
            yield from segment.take(block, position, decoder.rate)
        position += len(block)
        ended = len(block) < wanted
        if ended and not (decoder.damaged and active):
            active.extend(waiting)
            waiting.clear()
        over = [segment for segment in active if ended or segment.error is not None or segment.last <= position]
        for segment in over:
            yield segment.end(decoder, position)
        active = [segment for segment in active if segment not in over]
