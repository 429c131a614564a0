"""What decodes a source: libsndfile where it can, else the program `ffmpeg` where it is installed."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Protocol

import numpy as np
import soundfile

from aesanet.errors import ClipError
from aesanet.runtime.claims import chained_ogg_frames, joined_mp3, riff_ratio
from aesanet.runtime.ffmpeg import FfmpegDecoder, find_ffmpeg
from aesanet.runtime.sources import Source, SourceFile

UNKNOWN_FRAMES = 2**62  # libsndfile's answer for streams of unknown length is 2^63 - 1
# libsndfile 1.2.2 seeks in Vorbis, Opus and MP3 too, but what it then reads is not always what stands there.
EXACT_SEEK = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
WITHOUT_FFMPEG = (
    "not a format that libsndfile decodes (wav, flac, mp3, ogg, opus, aiff, caf, w64, au and more), or damaged at its "
    "start; installing the program ffmpeg would decode m4a, mp4, aac, alac, webm, wma, ac3, amr, wv and more"
)


class Decoder(Protocol):
    """Frames of a source, in order, from its start on."""

    rate: int  # Hz
    channels: int

    @property
    def frames(self) -> int | None:
        """How many frames the source says it holds, as far as is known by now, or None."""

    @property
    def damaged(self) -> bool:
        """Did the last read end at damage?"""

    def seek(self, frame: int) -> bool:
        """Go to a frame, if that can be done exactly; was it? Raises ClipError where the way there is damaged."""

    def read(self, frames: int) -> np.ndarray:
        """The next frames, float32 [frames, channels]; fewer only at the end or at damage."""

    def close(self) -> None:
        """Give everything back."""


class SoundfileDecoder:
    """A source as libsndfile decodes it; raises soundfile.LibsndfileError where it does not."""

    def __init__(self, source: Source) -> None:
        if source.whole:
            os.lseek(source.descriptor, 0, os.SEEK_SET)  # where libsndfile takes the file to start
            self._file = _Stream(source.descriptor, closefd=False)
        else:
            self._file = _Stream(SourceFile(source))
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.damaged = False
        self._source = source

    @cached_property
    def chained_frames(self) -> int | None:
        """Frames of the last stream after the first, which is all that libsndfile reads; None where there is one."""
        return chained_ogg_frames(self._source, self.rate) if self._file.format == "OGG" else None

    @cached_property
    def ratio(self) -> float | None:
        """How many times what libsndfile reads of it the file says it holds, or None."""
        return joined_mp3(self._source) if self._file.format == "MP3" else riff_ratio(self._source)

    @property
    def several(self) -> bool:
        """Is it several files one after another, of which libsndfile reads the first?"""
        return self.chained_frames is not None or (self._file.format == "MP3" and self.ratio is not None)

    @property
    def frames(self) -> int | None:
        """How many frames the source says it holds, as far as is known by now, or None."""
        if self.chained_frames is not None:
            return int(self._file.tell()) + self.chained_frames
        return round(self._file.frames * (self.ratio or 1.0)) if self._file.frames < UNKNOWN_FRAMES else None

    def read(self, frames: int) -> np.ndarray:
        """The next frames, float32 [frames, channels]; fewer only at the end or at damage."""
        block = np.empty((frames, self.channels), np.float32)
        before = self._file.tell()
        try:
            return block[: len(self._file.read(out=block))]
        except soundfile.LibsndfileError:
            self.damaged = True  # what was decoded before it is in the block
            return block[: max(0, self._file.tell() - before)]

    def seek(self, frame: int) -> bool:
        """Go to a frame, if that can be done exactly; was it? Raises ClipError where the way there is damaged."""
        if not self._file.subtype.startswith(EXACT_SEEK) or not self._file.frames > frame:
            return False
        try:
            self._file.seek(frame)
        except soundfile.LibsndfileError:
            raise ClipError("undecodable", f"damaged before second {frame / self.rate:g}") from None
        return True

    def close(self) -> None:
        """Give everything back."""
        self._file.close()


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Without python-soundfile's seek after each read, which fails in FLAC of unknown length and, in an mp3
    of variable bit rate, changes what is read next. `seek` itself works.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def open_decoder(source: Source) -> Iterator[Decoder]:
    """A decoder at the source's first frame; raises ClipError if none knows it."""
    with closing(_decoder(source)) as decoder:
        yield decoder


def _decoder(source: Source) -> Decoder:
    try:
        decoder = SoundfileDecoder(source)
    except soundfile.LibsndfileError:
        if find_ffmpeg() is None:
            raise ClipError("undecodable", WITHOUT_FFMPEG) from None
        return FfmpegDecoder(source)
    if decoder.several and find_ffmpeg() is not None:
        decoder.close()
        try:
            return FfmpegDecoder(source)
        except ClipError:
            return SoundfileDecoder(source)  # the first part is better than nothing
    return decoder
