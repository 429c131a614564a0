"""Tar shards in the layout of webdataset: members of one key, one after another, are one sample.

https://github.com/webdataset/webdataset: the key is a member's name up to the first dot after its last slash.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from threading import Lock

from aesanet.errors import ClipError
from aesanet.runtime.files import is_audio, open_regular
from aesanet.runtime.rows import Row, parse_json

COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
NAME = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<suffixes>[^/]*)", re.DOTALL)
MAX_JSON_BYTES = 2**24  # what is said of one sample, never a shard's worth
NUM_INDEXES = 8  # tars whose members stay known, at 0.2 kB a member


def tar_rows(path: str) -> Iterator[Row]:
    """A row for each audio member, in order: `path`, `member` and, where its sample has a member .json, `json`.

    A tar that cannot be opened, or that is damaged, is a row with the error, after the rows of what comes before.
    """
    try:
        with open_regular(path) as descriptor:
            members = _Members(descriptor)
            named = ((name, member) for member in members if (name := NAME.fullmatch(member.name)))
            for _, sample in groupby(named, lambda pair: pair[0]["key"]):
                yield from _sample_rows(path, descriptor, {name["suffixes"]: member for name, member in sample})
            if members.damage is not None:
                raise members.damage
    except ClipError as error:
        yield Row({"path": path}, error)


def find_member(path: str, descriptor: int, member: str) -> tuple[int, int]:
    """Where in an open tar a member's bytes are, as offset and size; raises ClipError."""
    stat = os.fstat(descriptor)
    with _INDEXING:
        places, damage = _index(path, stat.st_size, stat.st_mtime_ns)
    if member not in places:
        raise damage or ClipError("not_found", "no such member in the tar")
    return places[member]


_INDEXING = Lock()  # one thread reads a tar's headers, and those that want the same wait for it


@lru_cache(NUM_INDEXES)
def _index(path: str, size: int, modified: int) -> tuple[dict[str, tuple[int, int]], ClipError | None]:
    with open_regular(path) as descriptor:
        members = _Members(descriptor)
        return {member.name: (member.offset_data, member.size) for member in members}, members.damage


class _Members:
    """The regular files of an open tar, in order; `damage` says after the iteration why it ended early, if it did."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.damage: ClipError | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        size, end = os.fstat(self.descriptor).st_size, 0
        try:
            with open(self.descriptor, "rb", closefd=False) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                # tarfile takes sizes below zero, too, and comes back to where it was.
                while (member := tar.next()) is not None and member.size >= 0 and end < tar.offset <= size:
                    tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the tar
                    end = tar.offset
                    if member.isreg() and not member.issparse():
                        yield member
                # tarfile takes a damaged header for the end, whose mark is a block of zeros (or nothing at all).
                if member is None and not any(os.pread(self.descriptor, tarfile.BLOCKSIZE, end)):
                    return
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError):
            pass  # as tarfile fails on nonsense of many kinds
        self.damage = ClipError(
            "damaged_tar", f"not a tar, or damaged after byte {end}; members from there on are lost"
        )


def _sample_rows(path: str, descriptor: int, members: dict[str, tarfile.TarInfo]) -> Iterator[Row]:
    about = {}
    if (member := members.get("json")) is not None and member.size <= MAX_JSON_BYTES:
        with suppress(OSError, ValueError, RecursionError):  # the audio is scored all the same
            about = {"json": parse_json(os.pread(descriptor, member.size, member.offset_data))}
    for member in members.values():
        if is_audio(member.name):
            yield Row({"path": path, "member": member.name, **about})
