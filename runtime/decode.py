"""A file becomes 16 kHz mono, block by block: memory does not grow with the file, and no header is believed."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr

from aesanet.errors import ClipError
from aesanet.lengths import SAMPLE_RATE
from aesanet.runtime.rows import Clip

BLOCK_SAMPLES = 2**18  # over all channels: 1 MB of float32 at a time, whatever a header claims
LARGEST_SAMPLE = 2.0**31  # 32-bit integers written as floats; past it, energies overflow float32
MIN_RATE, MAX_RATE = 1_000, 16_000_000  # Hz; below, a damaged header would make hours out of nothing
HEADER_SLACK_SECONDS = 0.1  # whole mp3 files say up to two frames of 36 ms more than they give
UNKNOWN_FRAMES = 2**62  # libsndfile's answer for streams of unknown length is 2^63 - 1
UNDECODABLE = (
    "not a format that libsndfile decodes (wav, flac, mp3, ogg, opus, aiff, caf, w64, au and more), "
    "or damaged at its start; convert it to one of these, with ffmpeg for instance"
)


class ClipReader:
    """Streams one clip; `seconds` and `claimed_seconds` are known when the iteration has ended.

    Iterating yields float32 [samples] blocks, mono (the mean of the channels), 16 kHz, and raises ClipError.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.seconds = 0.0  # of the clip, as decoded
        self.claimed_seconds: float | None = None  # of the clip, by the file's header; None where it says nothing

    @property
    def truncated(self) -> bool:
        """Did the file end before its header said?"""
        return self.claimed_seconds is not None and self.seconds < self.claimed_seconds - HEADER_SLACK_SECONDS

    def __iter__(self) -> Iterator[np.ndarray]:
        with _open(self.clip.path) as file:
            rate = checked_rate(file.samplerate)
            first = round((self.clip.start_seconds or 0.0) * rate)
            last = None if self.clip.end_seconds is None else round(self.clip.end_seconds * rate)
            if file.frames < UNKNOWN_FRAMES:
                claimed = file.frames if last is None else min(last, file.frames)
                self.claimed_seconds = max(0, claimed - first) / rate
            yield from resample(self._mono(file, first, last), rate)

    def _mono(self, file: soundfile.SoundFile, first: int, last: int | None) -> Iterator[np.ndarray]:
        """The clip's frames as float32 [frames], at the file's own rate, until the decoder gives no more."""
        block_frames = max(1, BLOCK_SAMPLES // file.channels)
        position = _seek(file, first)
        decoded, damaged = 0, False
        while not damaged and (last is None or position < last):
            frames = block_frames if last is None else min(block_frames, last - position)
            block = np.empty((frames, file.channels), np.float32)
            try:
                got = len(file.read(out=block))
            except soundfile.LibsndfileError as error:
                # What was decoded of this block before the damage is in it; the clip ends there.
                got, damaged = file.tell() - position, True
                if position + got <= 0:
                    raise ClipError("undecodable", f"damaged at its start: {error.error_string}") from None
            if got <= 0:
                break
            before = min(got, max(0, first - position))
            position += got
            decoded += got - before
            self.seconds = decoded / file.samplerate
            if got > before:
                yield checked_mono(block[before:got])
        if not decoded:
            where = f" from {self.clip.start_seconds} s on" if first else ""
            raise ClipError("no_audio", f"no samples{where}; the file holds {position / file.samplerate:g} s")


def checked_rate(rate: int) -> int:
    """The rate in Hz; raises ClipError unless it can be brought to 16 kHz."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ClipError("bad_sample_rate", f"a sample rate of {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz can be resampled")
    return rate


def checked_mono(block: np.ndarray) -> np.ndarray:
    """float32 [frames, channels] -> the channels' mean, float32 [frames]; raises ClipError on non-finite samples."""
    if not np.abs(block).max() <= LARGEST_SAMPLE:  # false for NaN too
        raise ClipError("non_finite", "samples that are NaN, infinite or beyond 2^31; a waveform lies in [-1, 1)")
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def resample(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Bring float32 blocks from `rate` Hz to 16 kHz, as one stream, at soxr's HQ quality."""
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        if len(out := stream.resample_chunk(block)):
            yield out
    if len(out := stream.resample_chunk(np.zeros(0, np.float32), last=True)):
        yield out


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Without python-soundfile's seek after each read, which fails in FLAC of unknown length and, in an mp3
    of variable bit rate, changes what is read next. `seek` itself works.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def _open(path: str) -> Iterator[soundfile.SoundFile]:
    try:
        # Without waiting for a pipe's other end, and by descriptor, as libsndfile takes no name that is not UTF-8.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise _open_error(path, error) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ClipError("not_a_file", "a folder, a pipe or a device; only regular files are opened")
        try:
            file = _Stream(descriptor, closefd=False)
        except soundfile.LibsndfileError:
            raise ClipError("undecodable", UNDECODABLE) from None
        with file:
            yield file
    finally:
        os.close(descriptor)


def _open_error(path: str, error: OSError) -> ClipError:
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return ClipError("not_a_file", "a link that leads nowhere")
        return ClipError("not_found", "no such file; relative paths start at the current folder")
    if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
        return ClipError("not_a_file", str(error.strerror))
    return ClipError("not_readable", str(error.strerror))


def _seek(file: soundfile.SoundFile, frame: int) -> int:
    """Go to a frame where that is possible; the position reached, from which the rest is read and dropped.

    In an mp3 of variable bit rate, libsndfile 1.2.2 goes on with other samples than those that stand there.
    """
    if not frame or not file.frames > frame or file.subtype.startswith("MPEG"):
        return 0
    try:
        return int(file.seek(frame))
    except soundfile.LibsndfileError:
        raise ClipError("undecodable", f"damaged before second {frame / file.samplerate:g}") from None
