"""Rows that follow each other and are of one file are decoded together: once, however many segments they are."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeAlias, TypeVar

import numpy as np

from aesanet.errors import ClipError
from aesanet.runtime.decode import ChannelPolicy, Heard, decode
from aesanet.runtime.rows import Clip, Row

Given = TypeVar("Given")

Blocks: TypeAlias = Iterator[tuple[int, np.ndarray | Heard | ClipError]]
"""As `decode` gives them: blocks of clips by index, and for each in the end what was heard, or why it cannot be."""

_MOST_TOGETHER: Final = 1000


@dataclass(frozen=True)
class Job(Generic[Given]):
    """Rows whose clips are decoded together."""

    rows: Sequence[Given]
    decode: Callable[[], Blocks]


def file_jobs(rows: Iterable[Row | Mapping[str, Any]], channels: ChannelPolicy) -> Iterator[Job[Row]]:
    """The rows' jobs, in order; a row that asks for no clip is one that fails."""
    together: list[tuple[Row, Clip]] = []

    def job() -> Job[Row]:
        of_file, clips = zip(*together, strict=True)
        together.clear()
        return Job(of_file, partial(_decoded, clips, channels))

    for given in rows:
        row = given if isinstance(given, Row) else Row(given)
        try:
            clip = row.clip()
        except ClipError as error:
            if together:
                yield job()
            yield failed_job(row, error)
            continue
        if together:
            other = together[0][1]
            if (clip.path, clip.member) != (other.path, other.member) or len(together) == _MOST_TOGETHER:
                yield job()
        together.append((row, clip))
    if together:
        yield job()


def _decoded(clips: Sequence[Clip], channels: ChannelPolicy) -> Blocks:
    """As `decode`; whatever a decoder may do on a file, the run goes on."""
    waiting = set(range(len(clips)))
    try:
        for index, found in decode(clips, channels):
            if not isinstance(found, np.ndarray):
                waiting.discard(index)
            yield index, found
    except Exception as error:
        for index in sorted(waiting):
            yield index, ClipError("undecodable", f"its decoder failed: {type(error).__name__}: {error}")


def failed_job(row: Given, error: ClipError) -> Job[Given]:
    """A row that cannot be decoded."""
    return Job([row], lambda: iter([(0, error)]))
