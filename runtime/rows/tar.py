"""Tar shards in the layout of webdataset: members of one key, one after another, are one sample.

https://github.com/webdataset/webdataset: the key is a member's name up to the first dot after its last slash.
"""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from threading import Lock
from typing import TypeAlias

from aesanet.errors import ClipError
from aesanet.runtime.rows.files import is_audio, open_regular
from aesanet.runtime.rows.row import Row, parse_json

COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
NAME = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<suffixes>[^/]*)", re.DOTALL)
MAX_JSON_BYTES = 2**24  # what is said of one sample, never a shard's worth
_MOST_LINKS = 40  # that lead to each other, as Linux has it
_READ_BYTES = 2**20
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
                yield from _sample_rows(path, descriptor, [(name["suffixes"], member) for name, member in sample])
            if members.damage is not None:
                raise members.damage
    except ClipError as error:
        yield Row({"path": path}, error)


def find_member(path: str, descriptor: int, member: str) -> tuple[int, int]:
    """Where in an open tar a member's bytes are, as offset and size; raises ClipError."""
    stat = os.fstat(descriptor)
    with _INDEXING:
        reading = _reading(path, stat.st_size, stat.st_mtime_ns)
    with reading:
        places, damage = _index(path, stat.st_size, stat.st_mtime_ns)
    place = places.get(member, damage or ClipError("not_found", "no such member in the tar"))
    if isinstance(place, ClipError):
        raise place
    return place


_Place: TypeAlias = tuple[int, int] | ClipError
"""Offset and size of a member's bytes, or why it cannot be told."""

_INDEXING = Lock()  # of `_reading`, which might make two locks for one tar


@lru_cache(8 * NUM_INDEXES)
def _reading(path: str, size: int, modified: int) -> Lock:
    """One thread reads a tar's headers, and those that want the same tar's wait for it."""
    return Lock()


@lru_cache(NUM_INDEXES)
def _index(path: str, size: int, modified: int) -> tuple[dict[str, _Place], ClipError | None]:
    places: dict[str, _Place] = {}
    links: dict[str, str] = {}
    with open_regular(path) as descriptor:
        members = _Members(descriptor)
        for member in members:
            if member.name in places:
                places[member.name] = ClipError("bad_row", "the tar has several members of this name")
                links.pop(member.name, None)
            elif member.isreg():
                places[member.name] = member.offset_data, member.size
            else:
                places[member.name] = ClipError("not_found", f"a link to {member.linkname}, which is not in the tar")
                links[member.name] = member.linkname if member.islnk() else _beside(member.name, member.linkname)
    _follow(links, places)
    return places, members.damage


def _beside(name: str, link: str) -> str:
    """What a symbolic link of this name leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _follow(links: dict[str, str], places: dict[str, _Place]) -> None:
    """Give links the places of what they lead to, where the tar has it."""
    if not links:
        return
    named = {posixpath.normpath(name): name for name in places}
    for name in links:
        end = name
        for _ in range(_MOST_LINKS):
            if end not in links:
                places[name] = places[end]
                break
            end = named.get(posixpath.normpath(links[end]), end)


class _Members:
    """An open tar's regular files and links, in order; `damage` says after the iteration why it ended early, if so."""

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
                    if (member.isreg() and not member.issparse()) or member.islnk() or member.issym():
                        yield member
                # tarfile takes a damaged header for the end, whose mark are blocks of zeros (or nothing at all).
                if member is None and self._is_empty_from(end):
                    return
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError):
            pass  # as tarfile fails on nonsense of many kinds
        self.damage = ClipError(
            "damaged_tar", f"not a tar, damaged after byte {end}, or several in one; members from there on are lost"
        )

    def _is_empty_from(self, position: int) -> bool:
        """Are there only zeros from here to the end?"""
        while block := os.pread(self.descriptor, _READ_BYTES, position):
            if block.count(0) < len(block):
                return False
            position += len(block)
        return True


def _sample_rows(path: str, descriptor: int, members: list[tuple[str, tarfile.TarInfo]]) -> Iterator[Row]:
    about = {}
    for suffixes, member in members:
        if suffixes == "json" and member.isreg() and member.size <= MAX_JSON_BYTES:
            with suppress(OSError, ValueError, RecursionError):  # the audio is scored all the same
                about = {"json": parse_json(os.pread(descriptor, member.size, member.offset_data))}
    for _, member in members:
        if is_audio(member.name):
            yield Row({"path": path, "member": member.name, **about})
