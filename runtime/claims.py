"""What a file's own bytes say that it holds, where libsndfile stops short of that without a word."""

import struct

from aesanet.runtime.sources import Source

OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # the longest
OGG_FIRST, OGG_GRANULE, OGG_SERIAL = 2, slice(6, 14), slice(14, 18)  # RFC 3533, section 6
OPUS_RATE = 48_000  # Hz, of every position in an opus stream; RFC 7845, section 4

RIFF_CHUNKS = 64  # before the audio; more is nonsense
RIFF_UNKNOWN = 2**31 - 2**16  # bytes; what is written into a pipe claims the most that there can be, signed or not

MP3_RATES = ((11_025, 12_000, 8_000), (), (22_050, 24_000, 16_000), (44_100, 48_000, 32_000))  # Hz, by version bits
XING_WITHIN = 4 + 32 + 4  # bytes of an MP3 frame: header, side information of stereo MPEG 1, the tag's name


def chained_ogg_frames(source: Source, rate: int) -> int | None:
    """Frames of the last of several Ogg streams that follow one another, at `rate` Hz; None if there is only one."""
    head = source.read(0, OGG_PAGE_BYTES)
    first_serials = set()
    start = 0
    while head.startswith(b"OggS", start) and len(head) > start + 27 and head[start + 5] & OGG_FIRST:
        first_serials.add(head[start:][OGG_SERIAL])
        num_segments = head[start + 26]
        start += 27 + num_segments + sum(head[start + 27 : start + 27 + num_segments])
    tail = source.read(max(0, source.size - OGG_PAGE_BYTES), OGG_PAGE_BYTES)
    last = tail[max(0, tail.rfind(b"OggS")) :]
    if not first_serials or not last.startswith(b"OggS\0") or len(last) < 27 or last[OGG_SERIAL] in first_serials:
        return None
    frames = int.from_bytes(last[OGG_GRANULE], "little", signed=True)
    return max(0, frames) * rate // (OPUS_RATE if b"OpusHead" in head else rate)


def joined_mp3(source: Source) -> float | None:
    """How many times as long as its first part an MP3 file is that several were joined to; None if it is only one.

    The first frame's Xing or Info tag says how many bytes the first part has; http://gabriel.mp3-tech.org/mp3infotag.html
    """
    start = 0
    if (tag := source.read(0, 10)).startswith(b"ID3") and len(tag) == 10:
        start = 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    head = source.read(start, 4 + XING_WITHIN + 12)
    at = max(head.find(b"Xing", 0, XING_WITHIN), head.find(b"Info", 0, XING_WITHIN))
    if not _is_mp3_frame(head) or at < 0 or len(head) < at + 16:
        return None
    flags, *counts = struct.unpack(">3I", head[at + 4 : at + 16])
    if not flags & 2:
        return None
    num_bytes: int = counts[flags & 1]  # after the number of frames, where that is there
    after = source.read(start + num_bytes, 4)
    if not num_bytes or not (after.startswith(b"ID3") or (_is_mp3_frame(after) and after[1] == head[1])):
        return None
    return (source.size - start) / num_bytes


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


def _is_mp3_frame(head: bytes) -> bool:
    """Does it start as an MPEG audio frame of layer 3 does?"""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return False
    return bool(MP3_RATES[head[1] >> 3 & 3]) and head[2] >> 4 not in (0, 15) and head[2] >> 2 & 3 != 3
