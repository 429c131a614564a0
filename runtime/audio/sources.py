"""Where a clip's bytes lie: a whole file, or the part of an uncompressed tar that a member takes."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aesanet.runtime.rows.files import open_regular
from aesanet.runtime.rows.tar import find_member


@dataclass(frozen=True)
class Source:
    """`size` bytes from `offset` on of an open regular file; `name` is the file's or the member's own."""

    descriptor: int
    offset: int
    size: int
    name: str

    def read(self, position: int, count: int) -> bytes:
        """Up to `count` bytes from a position in it, none where the disk fails; the descriptor's own stays as it is."""
        try:
            return os.pread(self.descriptor, max(0, min(count, self.size - position)), self.offset + position)
        except OSError:
            return b""

    @property
    def whole(self) -> bool:
        """Is it all of the file?"""
        return self.offset == 0 and self.size == os.fstat(self.descriptor).st_size


class SourceFile(io.RawIOBase):
    """A source as a file object, for readers that take one."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position = 0

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]  # any writable buffer
        """Fill the buffer as far as there are bytes."""
        data = self.source.read(self.position, len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; the position reached."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.source.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        """The position."""
        return self.position


class EndlessFile(SourceFile):
    """A source that seems many times as long, for an mp3 that does not say its length.

    libsndfile takes the bit rate of the first frame for that of the file, and reads no more than the length which
    that gives: 3 of 20 seconds where a loud start is followed by silence.
    """

    TIMES = 256  # from 320 kbit/s down to 8 kbit/s, and what a wrong guess may add

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]  # any writable buffer
        """Fill the buffer as far as there are bytes, or with zeros at the seeming end, where a tag is looked for."""
        if self.position < self.source.size * (self.TIMES - 1):
            return super().readinto(buffer)
        buffer[:] = bytes(len(buffer))
        self.position += len(buffer)
        return len(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; the position reached."""
        if whence == io.SEEK_END:
            return super().seek(self.source.size * self.TIMES + offset)
        return super().seek(offset, whence)


@contextmanager
def open_source(path: str, member: str | None = None) -> Iterator[Source]:
    """The bytes of a file, or of a tar's member; raises ClipError."""
    with open_regular(path) as descriptor:
        if member is None:
            yield Source(descriptor, 0, os.fstat(descriptor).st_size, path)
        else:
            offset, size = find_member(path, descriptor, member)
            yield Source(descriptor, offset, size, member)
