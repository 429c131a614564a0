"""Rows: what a row asks for, and what becomes of it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from aesanet.axes import AXES
from aesanet.errors import ClipError

MAX_SECONDS = 1e9  # 31 years: past it, times of a sample are no longer exact

OUTPUT_KEYS = (
    *AXES,
    "start_seconds",
    "end_seconds",
    "seconds",
    "sample_rate",
    "channels",
    "truncated",
    "header_seconds",
    "silence",
    "windows",
    "embedding",
    "error",
)
"""Keys that scoring writes; an input row's own values under these names are replaced."""


@dataclass(frozen=True)
class Row:
    """One input row: the keys that it came with, or what was wrong with it."""

    given: Mapping[str, Any]
    error: ClipError | None = None

    def clip(self) -> "Clip":
        """The clip that the row asks for; raises ClipError."""
        if self.error is not None:
            raise self.error
        path = file_name(self.given.get("path"))
        start, end = (_seconds(name, self.given.get(name)) for name in ("start_time", "end_time"))
        if end is not None and end <= (start or 0.0):
            raise ClipError("bad_segment", f"end_time is {end} s; it must be after start_time, {start or 0.0} s")
        member = self.given.get("member") if is_tar(path) else None
        if is_tar(path) and not (isinstance(member, str) and member):
            raise ClipError("bad_row", f"member is {member!r}; beside the path of a tar, it must name a file in it")
        return Clip(path, start, end, member)


@dataclass(frozen=True)
class Clip:
    """A file, or the part of it from `start_seconds` to `end_seconds`; `member` names a file in a tar."""

    path: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    member: str | None = None

    @property
    def asked_seconds(self) -> float:
        """How long the clip is at most; infinite where the row does not say."""
        return math.inf if self.end_seconds is None else self.end_seconds - (self.start_seconds or 0.0)


def file_name(path: Any) -> str:
    """A path that the system can look up, as str; raises ClipError."""
    try:
        name = os.fsdecode(os.fspath(path))
        if name and "\0" not in name and os.fsencode(name):
            return name
    except (TypeError, UnicodeError):
        pass
    raise ClipError("bad_row", f"path is {path!r}; it must be the name of a file")


def is_tar(path: str) -> bool:
    """Is it a tar, by its name? Its members are what can be scored."""
    return path.lower().endswith(".tar")


def parse_json(text: str | bytes) -> Any:
    """JSON that can be written again: without NaN and infinity. Raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def failed_row(row: Row, error: ClipError) -> dict[str, Any]:
    """The output row of a clip that could not be scored."""
    return {**own_keys(row.given), "error": {"code": error.code, "message": error.message}}


def scored_row(row: Row, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The output row of a scored clip: the row's own keys, then what was measured."""
    return {**own_keys(row.given), **scores}


def row_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON that UTF-8 can hold."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path that is not UTF-8: as escapes, which read back the same
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


def write_row(file: TextIO, row: Mapping[str, Any]) -> None:
    """One JSON line, flushed."""
    try:
        file.write(row_line(row))
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def own_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """What an input row came with, of an input row or the output row that became of it."""
    return {key: value for key, value in row.items() if key not in OUTPUT_KEYS}


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a number that JSON can hold")
    return number


def _seconds(name: str, value: Any) -> float | None:
    """A time of a row: a number, or a string of one as CSV has them; missing, null and empty are None."""
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:
        raise ClipError("bad_segment", f"{name} is {value!r}; it must be a number of seconds from 0 to {MAX_SECONDS:g}")
    return seconds
