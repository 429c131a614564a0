"""What decodes a source: libsndfile where it can, else the program `ffmpeg` where it is installed."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Protocol

import numpy as np
import soundfile

from aesanet.errors import ClipError
from aesanet.runtime.audio.containers import chained_ogg_seconds, mp3_ratio, riff_ratio
from aesanet.runtime.audio.ffmpeg import FfmpegDecoder, find_ffmpeg
from aesanet.runtime.audio.sources import EndlessFile, Source, SourceFile

CHUNK_FRAMES = 4 * 1152  # four frames of an mp3
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
    def seeks(self) -> bool:
        """Does it seek, and to the very frame?"""

    @property
    def damaged(self) -> bool:
        """Did the last read end at damage?"""

    def seek(self, frame: int) -> bool:
        """Go to a frame of what seeks, from the start; is it there? If not, the decoder is at its start again."""

    def read(self, frames: int) -> np.ndarray:
        """The next frames, a multiple of CHUNK_FRAMES: float32 [frames, channels]; fewer only at the end or damage."""

    def close(self) -> None:
        """Give everything back."""


class SoundfileDecoder:
    """A source as libsndfile decodes it; raises soundfile.LibsndfileError where it does not."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = _open(source)
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.seeks = self._file.subtype.startswith(EXACT_SEEK)
        self.damaged = False
        self.container: str = self._file.format
        self.frames, self.several = _held(self._file, source)
        self._position = 0

    def read(self, frames: int) -> np.ndarray:
        """The next frames, float32 [frames, channels]; fewer only at the end or at damage."""
        block = np.empty((frames, self.channels), np.float32)
        # Of a read that meets damage in an mp3, libsndfile gives nothing: many small ones lose little.
        chunk_frames = CHUNK_FRAMES if self.container == "MP3" else frames
        got = 0
        while got < frames and (more := self._read_into(block[got : got + chunk_frames])):
            got += more
        return block[:got]

    def _read_into(self, block: np.ndarray) -> int:
        if self.damaged:
            return 0
        try:
            got: int = self._file.buffer_read_into(block, "float32")
        except soundfile.LibsndfileError:
            self.damaged = True
            try:
                got = max(0, int(self._file.tell()) - self._position)  # which are in the block
            except soundfile.LibsndfileError:  # in a format without seeking
                got = 0
        self._position += got
        return got

    def seek(self, frame: int) -> bool:
        """Go to a frame; is it there? If not, the decoder is at its start again."""
        try:
            self._position = int(self._file.seek(frame))
        except soundfile.LibsndfileError:
            self._file.close()
            self._file = _open(self._source)
            return False
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


def _open(source: Source) -> soundfile.SoundFile:
    if source.whole:
        os.lseek(source.descriptor, 0, os.SEEK_SET)  # where libsndfile takes the file to start
        file = _Stream(source.descriptor, closefd=False)
    else:
        file = _Stream(SourceFile(source))
    if file.format == "MP3" and mp3_ratio(source) is None:
        file.close()
        file = _Stream(EndlessFile(source))
    return file


def _held(file: soundfile.SoundFile, source: Source) -> tuple[int | None, bool]:
    """Frames that an open source says it holds, if it does, and is it several, of which libsndfile reads the first?"""
    if file.format == "OGG" and (seconds := chained_ogg_seconds(source)) is not None:
        return round(seconds * file.samplerate), True
    if file.frames >= UNKNOWN_FRAMES:
        return None, False
    if file.format == "MP3":
        ratio = mp3_ratio(source)
        return (None, False) if ratio is None else (round(file.frames * ratio), ratio > 1)
    return round(file.frames * (riff_ratio(source) or 1.0)), False


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
        # Where a later Ogg stream has other channels or another rate, ffmpeg ends too; of mp3 we know no exact length.
        chained = decoder.frames is not None and decoder.container == "OGG"
        try:
            return FfmpegDecoder(source, decoder.frames / decoder.rate if chained else None)
        except ClipError:
            return SoundfileDecoder(source)  # the first part is better than nothing
    return decoder
