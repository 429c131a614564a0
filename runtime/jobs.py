"""Rows that follow each other and are of one file are decoded together: once, however many segments they are."""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeAlias, TypeVar

import numpy as np

from aesanet.errors import ClipError
from aesanet.runtime.audio.decode import ChannelPolicy, Heard, decode
from aesanet.runtime.rows.row import Clip, Row

Given = TypeVar("Given")

Blocks: TypeAlias = Iterator[tuple[int, np.ndarray | Heard | ClipError]]
"""As `decode` gives them: blocks of clips by index, and for each in the end what was heard, or why it cannot be."""

_MOST_TOGETHER: Final = 1000
_NO_MEMORY: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class Job(Generic[Given]):
    """Rows whose clips are decoded together."""

    rows: Sequence[Given]
    decode: Callable[[], Blocks]


def file_jobs(
    rows: Iterable[Row | Mapping[str, Any]], channels: ChannelPolicy, window_seconds: float, most_seconds: float
) -> Iterator[Job[Row]]:
    """The rows' jobs, in order; a row that asks for no clip is one that fails.

    most_seconds : of last windows, by what the rows ask for, in one job: all of them are held until their group ends
    """
    together: list[tuple[Row, Clip]] = []
    seconds = 0.0

    def job() -> Job[Row]:
        of_file, clips = zip(*together, strict=True)
        together.clear()
        return Job(of_file, partial(_decoded, clips, channels))

    for given in rows:
        row = given if isinstance(given, Row) else _row(given)
        try:
            clip = row.clip()
        except ClipError as error:
            if together:
                yield job()
            yield failed_job(row, error)
            continue
        if together:
            other = together[0][1]
            full = len(together) == _MOST_TOGETHER or seconds >= most_seconds
            if (clip.path, clip.member) != (other.path, other.member) or full:
                yield job()
        if not together:
            seconds = 0.0
        together.append((row, clip))
        seconds += min(window_seconds, clip.asked_seconds)
    if together:
        yield job()


def _row(given: Mapping[str, Any]) -> Row:
    """A caller's mapping as it is now: he may use it again before its scores are there."""
    if not isinstance(given, Mapping):
        raise TypeError(f"a row is a {type(given).__name__}; give mappings with a `path`, or paths to `score`")
    return Row(dict(given))


def _decoded(clips: Sequence[Clip], channels: ChannelPolicy) -> Blocks:
    """As `decode`; whatever a decoder may do on a file, the run goes on, unless it is the machine that has no more."""
    waiting = set(range(len(clips)))
    try:
        for index, found in decode(clips, channels):
            if not isinstance(found, np.ndarray):
                waiting.discard(index)
            yield index, found
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_MEMORY:
            raise
        for index in sorted(waiting):
            yield index, ClipError("undecodable", f"its decoder failed: {type(error).__name__}: {error}")


def failed_job(row: Given, error: ClipError) -> Job[Given]:
    """A row that cannot be decoded."""
    return Job([row], lambda: iter([(0, error)]))
