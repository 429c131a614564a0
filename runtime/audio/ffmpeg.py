"""The program `ffmpeg`, where it is installed, decodes what libsndfile does not know: m4a, aac, wma, webm and more."""

import os
import re
import selectors
import shutil
import struct
import subprocess
import time

import numpy as np

from aesanet.errors import ClipError
from aesanet.runtime.audio.sources import Source

STALL_SECONDS = 60.0  # that it may give nothing; an hour of any of these formats takes seconds
LOG_BYTES = 2**16  # of what it says, which is kept for the length by the file's header
PIPE_BYTES = 2**18
AU = struct.Struct(">4s5I")  # .snd, header size, data size, encoding, rate, channels

# Containers of one file. Playlists (hls, dash, concat...) would make ffmpeg open what a file names.
DEMUXERS = "aac,ac3,aiff,amr,ape,asf,avi,caf,dts,eac3,flac,g722,gsm,matroska,mov,mp3,ogg,tta,w64,wav,wv"
UNMARKED = {".g722": "g722", ".gsm": "gsm"}  # formats that only their name tells


class FfmpegDecoder:
    """A source as ffmpeg decodes its first audio stream: [frames, channels] at the stream's rate, from the start on.

    `seconds` is what it is known to hold, where its header may say less.
    Raises ClipError if there is no ffmpeg, or it knows no audio in the source, or says nothing for STALL_SECONDS.
    """

    rate: int
    channels: int
    seeks = False  # in a pipe
    damaged = False  # ffmpeg steps over damage

    def __init__(self, source: Source, seconds: float | None = None) -> None:
        program = find_ffmpeg()
        if program is None:
            raise ClipError("undecodable", "ffmpeg is not installed")
        try:
            self._process = subprocess.Popen(
                _command(program, source),
                stdin=source.descriptor,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for us alone: the clip in hand is finished
            )
        except OSError as error:
            raise ClipError("undecodable", f"ffmpeg does not start: {error.strerror}") from None
        self._seconds = seconds
        self._log, self._data = b"", bytearray()
        self._pipes = selectors.DefaultSelector()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            self._pipes.register(pipe, selectors.EVENT_READ)
        try:
            if not (head := self._take(AU.size)).startswith(b".snd") or len(head) < AU.size:
                raise ClipError("undecodable", "ffmpeg finds no audio in it either; not audio, or damaged at its start")
            _, header_size, _, _, self.rate, self.channels = AU.unpack(head)
            self._take(header_size - AU.size)
        except BaseException:
            self.close()
            raise

    @property
    def frames(self) -> int | None:
        """How many frames the source's header says it holds, as far as is known by now, or None."""
        if self._seconds is not None:
            return round(self._seconds * self.rate)
        about, _, _ = self._log.partition(b"\nStream mapping:")
        # With video, the length may be that of the video; a cover is none.
        streams = [line for line in re.findall(rb"^  Stream #0:.*", about, re.M) if b"attached pic" not in line]
        length = re.search(rb"^  Duration: (\d+):(\d\d):(\d\d\.\d+)", about, re.M)
        if length is None or len(streams) != 1 or b"Estimating duration" in about:
            return None
        hours, minutes, seconds = map(float, length.groups())
        return round((3600 * hours + 60 * minutes + seconds) * self.rate)

    def read(self, frames: int) -> np.ndarray:
        """The next frames, float32 [frames, channels]; fewer only at the end."""
        data = self._take(frames * self.channels * 4)
        data = data[: len(data) // (self.channels * 4) * self.channels * 4]
        return np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, self.channels)

    def seek(self, frame: int) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """End the program, whatever it is at."""
        self._pipes.close()
        with self._process:  # closes its pipes and waits for its end
            self._process.kill()

    def _take(self, count: int) -> bytes:
        """The next `count` bytes of audio; fewer only at the end."""
        while len(self._data) < count and (more := self._more()):
            self._data += more
        taken = bytes(self._data[:count])
        del self._data[:count]
        return taken

    def _more(self) -> bytes:
        """What comes next of the audio, b"" at the end; what ffmpeg says meanwhile goes to the log."""
        until = time.monotonic() + STALL_SECONDS
        while ready := self._pipes.select(max(0.0, until - time.monotonic())):
            # The log first: what is said before the first sample must be known with it.
            for key, _ in sorted(ready, key=lambda pair: pair[0].fileobj is self._process.stdout):
                data = os.read(key.fd, PIPE_BYTES)
                if key.fileobj is self._process.stdout:
                    return data
                self._log += data[: LOG_BYTES - len(self._log)]
                if not data:
                    self._pipes.unregister(key.fileobj)
        raise ClipError("timeout", f"ffmpeg gave nothing for {STALL_SECONDS:g} s")


def find_ffmpeg() -> str | None:
    """The path of the program, or None."""
    return shutil.which("ffmpeg")


def _command(program: str, source: Source) -> list[str]:
    suffix = os.path.splitext(source.name)[1].lower()
    # Its own open descriptor, by which no name is misread and no other file opened; a tar's member as a part of it.
    url = "file:/dev/fd/0"
    if not source.whole:
        url = f"subfile,,start,{source.offset},end,{source.offset + source.size},,:{url}"
    return [
        *(program, "-hide_banner", "-nostdin", "-nostats", "-threads", "1"),
        *("-protocol_whitelist", "file,subfile", "-format_whitelist", DEMUXERS),
        *(("-f", UNMARKED[suffix]) if suffix in UNMARKED else ()),
        *("-i", url, "-map", "0:a:0", "-map_metadata", "-1", "-threads", "1"),
        *("-c:a", "pcm_f32be", "-f", "au", "pipe:1"),
    ]
