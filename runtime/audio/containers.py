"""What a file's own bytes say that it holds, where libsndfile stops short of that without a word."""

import struct
from dataclasses import dataclass

from aesanet.runtime.audio.sources import Source

# An Ogg page: RFC 3533, section 6.
OGG_FLAGS, OGG_GRANULE, OGG_SERIAL, OGG_SEGMENTS = 5, slice(6, 14), slice(14, 18), 26
OGG_FIRST = 2  # the flag of a stream's first page
OGG_HEAD_BYTES = 27 + 255 + 16  # with the start of what is in it
OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # the longest
OGG_PAGE_SECONDS = 30  # longer than any; a stream whose first page ends later was cut out of a longer one
OPUS_RATE = 48_000  # Hz, of every position in an opus stream; RFC 7845, section 4

RIFF_CHUNKS = 64  # before the audio; more is nonsense
RIFF_UNKNOWN = 2**31 - 2**16  # bytes; what is written into a pipe claims the most that there can be, signed or not

XING_WITHIN = 4 + 32 + 4  # bytes of an MP3 frame: header, side information of stereo MPEG 1, the tag's name
XING_FRAMES, XING_BYTES = 1, 2  # flags: which numbers follow, in this order


def chained_ogg_seconds(source: Source) -> float | None:
    """How long the audio of several Ogg streams is that follow one another; None if there is only one.

    The end of the file tells whether the pages are worth a walk.
    """
    tail = source.read(max(0, source.size - OGG_PAGE_BYTES), OGG_PAGE_BYTES)
    last = tail[max(0, tail.rfind(b"OggS")) :]
    streams: dict[bytes, _OggStream] = {}
    position, at_start = 0, True
    while (head := source.read(position, OGG_HEAD_BYTES)).startswith(b"OggS") and len(head) > OGG_SEGMENTS:
        serial, body = head[OGG_SERIAL], OGG_SEGMENTS + 1 + head[OGG_SEGMENTS]
        if head[OGG_FLAGS] & OGG_FIRST:
            streams[serial] = _OggStream(_ogg_rate(head[body:]))
        elif at_start:
            at_start = False
            if last[OGG_SERIAL] in streams:
                return None
        granule = int.from_bytes(head[OGG_GRANULE], "little", signed=True)
        if granule > 0 and serial in streams:
            streams[serial].add(granule)
        position += body + sum(head[OGG_SEGMENTS + 1 : body])
    return sum(stream.seconds for stream in streams.values()) if len(streams) > 1 else None


def mp3_ratio(source: Source) -> float | None:
    """How many times as long as its first part an MP3 file is, to which others may be joined; 1 if none is.

    None where the first frame is no Xing or Info tag that says how long that part is, as libsndfile then only guesses;
    http://gabriel.mp3-tech.org/mp3infotag.html
    """
    start = 0
    if (head := source.read(0, 10)).startswith(b"ID3") and len(head) == 10:
        start = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    head = source.read(start, XING_WITHIN + 12)
    at = max(head.find(b"Xing", 0, XING_WITHIN), head.find(b"Info", 0, XING_WITHIN))
    if not _is_mp3_frame(head) or at < 0 or len(head) < at + 16:
        return None
    flags, _, num_bytes = struct.unpack(">3I", head[at + 4 : at + 16])
    if not flags & XING_FRAMES:
        return None
    after = source.read(start + num_bytes, 4)
    joined = after.startswith(b"ID3") or (_is_mp3_frame(after) and after[1] == head[1])
    return (source.size - start) / num_bytes if flags & XING_BYTES and num_bytes and joined else 1.0


def riff_ratio(source: Source) -> float | None:
    """How many times the audio that can be read of a RIFF file its header, or past 4 GB its size, says there is."""
    if source.read(0, 4) != b"RIFF" or source.read(8, 4) != b"WAVE":
        return None
    start = 12
    for _ in range(RIFF_CHUNKS):
        if len(head := source.read(start, 8)) < 8:
            return None
        name, stated = struct.unpack("<4sI", head)
        start += 8
        if name == b"data":
            there = source.size - start
            said = there if source.size >= 2**32 else stated
            read = min(stated, there)
            return None if not read or (stated >= RIFF_UNKNOWN and source.size < 2**32) else said / read
        start += stated + stated % 2
    return None


@dataclass
class _OggStream:
    """Where a stream of an Ogg file starts and ends, in positions of its own."""

    rate: int  # Hz, of its positions; 0 where it is no audio that is known here
    start: int | None = None
    end: int = 0

    def add(self, granule: int) -> None:
        """Where a page of it ends."""
        if self.start is None:
            self.start = granule if granule > OGG_PAGE_SECONDS * self.rate else 0
        self.end = granule

    @property
    def seconds(self) -> float:
        """How long it is."""
        return max(0, self.end - (self.start or 0)) / self.rate if self.rate else 0.0


def _ogg_rate(packet: bytes) -> int:
    """Positions a second of a stream with this first packet, or 0."""
    if packet.startswith(b"\x01vorbis"):
        return int.from_bytes(packet[12:16], "little")
    return OPUS_RATE if packet.startswith(b"OpusHead") else 0


def _is_mp3_frame(head: bytes) -> bool:
    """Does it start as an MPEG audio frame of layer 3 does, with a version, bit rate and sample rate that there are?"""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return False
    return head[1] >> 3 & 3 != 1 and head[2] >> 4 not in (0, 15) and head[2] >> 2 & 3 != 3
